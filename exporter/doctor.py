"""What this machine can build, run and measure; for what it cannot, the line that changes that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from exporter import backends, discover, machine
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
        *(_backend(backend) for backend in discover.names("exporter.backends")),
        *_devices(),
    ]
    return [*facts, _hub_cache()]


def _package(tool: str) -> Fact:
    version = backends.installed(tool)
    if version is None:
        return Fact(mark="✗", what=tool, found="not installed", mend=f"pip install {tool}")
    return Fact(mark="✓", what=tool, found=version)


def _backend(name: str) -> Fact:
    backend = backends.get(name)
    try:
        version = backend.probe()
    except Unavailable as error:
        found, _, mend = str(error).partition("; ")
        return Fact(mark="✗", what=f"backend {name}", found=found, mend=mend)
    return Fact(mark="✓", what=f"backend {name}", found=f"{version}, for {', '.join(sorted(backend.precisions))}")


def _devices() -> list[Fact]:
    looks: dict[str, Callable[[], str]] = {
        "CUDA through torch": _torch_cuda,
        "CUDA through ONNX Runtime": _ort_cuda,
        "OpenVINO devices": _openvino_devices,
    }
    facts = []
    for what, look in looks.items():
        try:
            facts.append(Fact(mark="✓", what=what, found=look()))
        except ExporterError as error:
            found, _, mend = str(error).partition("; ")
            facts.append(Fact(mark="·", what=what, found=found, mend=mend))
    return facts


def _torch_cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device, or a CPU build of torch; on a GPU machine: pip install torch")
    return str(torch.cuda.get_device_name())


def _ort_cuda() -> str:
    """Whether the provider really loads: ONNX Runtime lists it where it cannot run."""
    backends.get("onnxruntime").probe()
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Unavailable(
            "this build has none; on a GPU machine: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    _torch_cuda()
    return "listed; `verify --device cuda` proves it"


def _openvino_devices() -> str:
    backends.get("openvino").probe()
    import openvino as ov

    core = ov.Core()
    found = []
    for device in core.available_devices:
        abilities = [a for a in core.get_property(device, "OPTIMIZATION_CAPABILITIES") if a in ("BF16", "FP16", "INT8")]
        found.append(f"{device} ({', '.join(sorted(abilities)).lower()})")
    return ", ".join(found)


def _hub_cache() -> Fact:
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = sorted(path.name for path in Path(HF_HUB_CACHE).glob("models--*convnext*"))
    return Fact(mark="·", what="Hub cache", found=f"{HF_HUB_CACHE}: {len(cached)} ConvNeXt repositories")
