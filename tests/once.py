"""Work that many tests need and few ask about: it is done once for all of pytest's processes."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A temporary folder that all of pytest's processes share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process is at work on this path."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remember_traces(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Trace a network once: its graph is written into a folder, and read there when the same network comes again.

    Networks are the same when all that they hold is: modules, settings and every weight.
    """
    from exporter.graph import trace

    real = trace.trace

    @functools.wraps(real)
    def traced_once(model, options):
        import onnx
        import onnx_ir as ir

        path = folder / f"{_digest((model, options))}.onnx"
        with locked(path):
            if not path.exists():
                graph = real(model, options)
                gc.collect()
                gc.freeze()  # PyTorch's exporter leaves so much that lasts that every later collection takes 0.3 s
                whole = path.with_suffix(f".{os.getpid()}")
                whole.write_bytes(ir.serde.serialize_model(graph).SerializeToString())
                whole.replace(path)
                return graph
        return ir.serde.deserialize_model(onnx.load(path))

    patch.setattr(trace, "trace", traced_once)


def keep_the_exporters_functions(patch: pytest.MonkeyPatch) -> None:
    """PyTorch's exporter collects its 500 ONNX functions anew for every graph, a third of the time of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    collected = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*opset, **opset_version):
        registry = copy.copy(collected(*opset, **opset_version))
        registry.functions = {target: list(functions) for target, functions in registry.functions.items()}
        return registry

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))


def _digest(content: object) -> str:
    """A digest of everything that an object holds, tensors included."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, torch.Tensor):
                return tuple, ((str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()),)
            return NotImplemented

    pickled = io.BytesIO()
    Pickler(pickled).dump(content)
    return hashlib.sha256(pickled.getvalue()).hexdigest()[:32]


def forking():
    """A multiprocessing context whose processes are forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def fork_processes_of(module: object, patch: pytest.MonkeyPatch) -> None:
    """Fork the processes that a module spawns."""
    patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: forking()))
