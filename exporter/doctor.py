"""What this machine can build, run and measure, and what to install for the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter import backends, machine
from exporter.artifact.sidecar import Record
from exporter.errors import ExporterError, Unavailable


class Fact(Record, frozen=True):
    """One line: ✓ it can, ✗ it cannot, · for your information."""

    mark: str
    what: str
    found: str
    mend: str = ""


def examine() -> list[Fact]:
    """Everything there is to say about this machine."""
    name, isa = machine.cpu()
    facts = [
        Fact(mark="·", what="processor", found=f"{name}, {machine.cores()} cores"),
        Fact(mark="·", what="instruction sets", found=", ".join(isa) or "none that matter here"),
        Fact(mark="·", what="memory", found=f"{machine.memory_gib():.1f} GiB"),
        Fact(mark="·", what="free disk", found=f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here"),
        *(_package(tool) for tool in ("torch", "onnx", "onnxscript", "onnxsim", "huggingface_hub")),
        *(_runtime(name) for name in backends.runtimes()),
        *_devices(),
    ]
    return [*facts, _hub_cache()]


def _package(tool: str) -> Fact:
    version = backends.installed(tool)
    if version is None:
        return Fact(mark="✗", what=tool, found="not installed", mend=f"pip install {tool}")
    return Fact(mark="✓", what=tool, found=version)


def _runtime(name: str) -> Fact:
    runtime = backends.runtime(name)
    try:
        version = runtime.probe()
    except Unavailable as error:
        found, _, mend = str(error).partition("; ")
        return Fact(mark="✗", what=f"runtime {name}", found=found, mend=mend)
    precisions = sorted(backends.target(name).precisions) if name in backends.targets() else ["fp32"]
    return Fact(mark="✓", what=f"runtime {name}", found=f"{version}, for {', '.join(precisions)}")


def _devices() -> list[Fact]:
    facts = []
    for what, look in [item for name in backends.runtimes() for item in backends.runtime(name).describe.items()]:
        try:
            facts.append(Fact(mark="✓", what=what, found=look()))
        except ExporterError as error:
            found, _, mend = str(error).partition("; ")
            facts.append(Fact(mark="·", what=what, found=found, mend=mend))
    return facts


def _hub_cache() -> Fact:
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = sorted(path.name for path in Path(HF_HUB_CACHE).glob("models--*convnext*"))
    return Fact(mark="·", what="Hub cache", found=f"{HF_HUB_CACHE}: {len(cached)} ConvNeXt repositories")
