"""What this machine can build, run and measure; for what it cannot, the line that changes that."""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter import backends, machine
from exporter.artifact.sidecar import Record
from exporter.backends import Options, Runtime
from exporter.errors import ExporterError, Unavailable


class Fact(Record, frozen=True):
    """One line: ✓ it can, ✗ it cannot, · for your information."""

    mark: str
    what: str
    found: str
    remedy: str = ""


def examine() -> list[Fact]:
    """Examine this machine."""
    name, isa = machine.cpu()
    facts = [
        Fact(mark="·", what="processor", found=f"{name}, {machine.cores()} cores"),
        Fact(mark="·", what="instruction sets", found=", ".join(isa) or "none that matter here"),
        Fact(mark="·", what="memory", found=f"{machine.memory_gib():.1f} GiB"),
        Fact(mark="·", what="free disk", found=f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here"),
        *(_package(tool) for tool in ("torch", "onnx", "onnxscript", "onnxsim", "huggingface_hub")),
        *(_reference(library) for library in ("timm", "transformers", "torchvision")),
    ]
    runtimes = [backends.runtime(name) for name in backends.runtimes()]
    return [*facts, *map(_runtime, runtimes), *(fact for one in runtimes for fact in _devices(one)), _hub_cache()]


def _package(tool: str) -> Fact:
    version = machine.installed(tool)
    if version is None:
        return Fact(mark="✗", what=tool, found="not installed", remedy=f"pip install {tool}")
    return Fact(mark="✓", what=tool, found=version)


def _reference(library: str) -> Fact:
    """A library for `--reference`, which nothing else needs."""
    version = machine.installed(library)
    return Fact(
        mark="·",
        what=f"reference {library}",
        found=version or "not installed",
        remedy="" if version else f"pip install {library}",
    )


def _runtime(runtime: Runtime[Options]) -> Fact:
    what = f"backend {runtime.name}"
    try:
        version = runtime.probe()
    except Unavailable as error:
        return _missing("✗", what, error)
    precisions = backends.target(runtime.name).precisions if runtime.name in backends.targets() else ()
    return Fact(mark="✓", what=what, found=version + (f", for {', '.join(sorted(precisions))}" if precisions else ""))


def _devices(runtime: Runtime[Options]) -> list[Fact]:
    if runtime.devices_here is None:
        return []
    what = f"devices of {runtime.name}"
    try:
        return [Fact(mark="✓", what=what, found=runtime.devices_here())]
    except ExporterError as error:
        return [_missing("·", what, error)]


def _missing(mark: str, what: str, error: ExporterError) -> Fact:
    reason, _, remedy = str(error).partition("; ")
    return Fact(mark=mark, what=what, found=reason, remedy=remedy)


def _hub_cache() -> Fact:
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = sorted(path.name for path in Path(HF_HUB_CACHE).glob("models--*convnext*"))
    return Fact(mark="·", what="Hub cache", found=f"{HF_HUB_CACHE}: {len(cached)} ConvNeXt repositories")
