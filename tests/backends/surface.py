"""The names that TensorRT's Python bindings have, with the arguments they take: what the fakes allow.

    python -m tests.backends.surface tensorrt_rtx > tests/backends/surfaces/tensorrt-rtx-1.7.json

The bindings of TensorRT proper (`tensorrt_cu13_bindings`) import without a GPU once the three libraries they are linked
to (`libnvinfer`, `libnvinfer_plugin`, `libnvonnxparser`) are there; empty ones with the same entry points will do.
"""

import importlib
import json
import re
import sys

CLASSES = (
    "Builder", "OnnxParser", "ParserError", "INetworkDefinition", "IBuilderConfig", "IOptimizationProfile", "ITensor",
    "IHostMemory", "Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "ILogger", "IProgressMonitor",
    "NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "ProfilingVerbosity", "TensorIOMode",
    "HardwareCompatibilityLevel", "ComputeCapability", "CudaGraphStrategy", "ITimingCache", "IRuntimeCache",
    "EngineInspector", "LayerInformationFormat",
)  # fmt: skip


def signatures(doc: str | None) -> list[list[str]]:
    """The arguments of every overload, without self; `=` behind those that may be left out."""
    found = []
    for arguments in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> .*$", doc or "", flags=re.M):
        parts = re.split(r", (?=\w+:|\*)", arguments)
        names = [re.sub(r":.*", "", part) + ("=" if " = " in part else "") for part in parts if part]
        found.append([name for name in names if name != "self"])
    return found


def surface(module) -> dict:
    """Class to member to overloads; None for what is no method."""
    found = {}
    for name in CLASSES:
        if (owner := getattr(module, name, None)) is not None:
            members = {m for m in dir(owner) if not m.startswith("_")} | {"__init__"}
            found[name] = {
                m: signatures(getattr(owner, m).__doc__) if callable(getattr(owner, m)) else None
                for m in sorted(members)
            }
    return found


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    print(json.dumps({"version": module.__version__, "classes": surface(module)}, sort_keys=True))
