"""The machine a number was taken on."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

# In the order in which they matter to a ConvNeXt.
_ISA = (
    "amx_int8",
    "amx_bf16",
    "avx512_fp16",
    "avx512_bf16",
    "avx512_vnni",
    "avx512f",
    "avx_vnni",
    "avx2",
    "asimd",
)
_TOOLS = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


@lru_cache(maxsize=1)
def cpu() -> tuple[str, list[str]]:
    """The processor's name, and which of the instruction sets that matter it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [isa for isa in _ISA if isa in flags]


def has_bf16() -> bool:
    """Whether this processor computes in bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu()[1]))


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """Physical memory."""
    import psutil

    return float(psutil.virtual_memory().total) / 2**30


def versions() -> dict[str, str]:
    """Of the tools that had a hand in it."""
    found = {}
    for tool in ("convnext-export", *_TOOLS):
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, object]:
    """All of it, for a report."""
    name, isa = cpu()
    return {
        "cpu": name,
        "isa": isa,
        "cores": cores(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
