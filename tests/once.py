"""Work that many tests need and few ask about: it is done once for all of pytest's processes."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GRAPHS = "TESTS_GRAPHS"  # the environment variable that names the folder of traced graphs and drawn images
LARGEST = 256  # pixels of a side of an image that is kept, so that all of them take little of a disk


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


def written(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, into which something is written by the first process that needs it."""
    with locked(folder):
        if not any(folder.iterdir()):
            write(folder)
    return folder


def lasting_folder(name: str) -> Path:
    """A folder below `build/` that lasts from run to run, as long as nothing changes that a traced graph depends on."""
    sources = [*(ROOT / "exporter/model").glob("*.py"), *(ROOT / "exporter/graph").glob("*.py"), Path(__file__)]
    tools = [metadata.version(tool) for tool in ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")]
    content = b"".join(path.read_bytes() for path in sorted(sources)) + repr((sys.version, tools)).encode()
    folder = ROOT / "build" / name / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def remember_traces(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Trace a network once: its graph is written into a folder, and read there when a network like it comes again.

    Networks are alike when modules, settings and the shapes of all weights are the same; the graph gets the weights of
    the network that comes. A graph with a constant computed from weights is read for equal weights only. Networks whose
    code is not this package's are traced anew in each run.
    """
    lasting = lasting_folder("test-graphs")
    from exporter.graph import trace

    real = trace.trace

    @functools.wraps(real)
    def traced_once(model, options):
        import onnx
        import onnx_ir as ir

        ours = all(type(module).__module__.startswith(("exporter.", "torch.")) for module in model.modules())
        path = (lasting if ours else folder) / f"{_digest((model, options), values=False)}.onnx"
        with locked(path):
            if path.exists():
                links = json.loads(path.with_suffix(".json").read_text())
            else:
                graph = real(model, options)
                gc.collect()
                gc.freeze()  # PyTorch's exporter leaves so much that lasts that every later collection takes 0.3 s
                links = _links(graph, model)
                weights = _digest(model, values=True)
                path.with_suffix(".json").write_text(json.dumps([weights, links]))
                whole = path.with_suffix(f".{os.getpid()}")
                whole.write_bytes(ir.serde.serialize_model(graph).SerializeToString())
                whole.replace(path)
                return graph
        weights, names = links
        if names is None and weights != _digest(model, values=True):
            return real(model, options)
        graph = ir.serde.deserialize_model(onnx.load(path))
        state = model.state_dict()
        for name, (weight, transposed) in (names or {}).items():
            array, value = state[weight].detach().numpy(), graph.graph.initializers[name]
            whole = np.ascontiguousarray(array.T if transposed else array).reshape(value.const_value.shape.numpy())
            value.const_value = ir.tensor(whole, name=name)
        return graph

    patch.setattr(trace, "trace", traced_once)


def _links(graph, model) -> dict[str, tuple[str, bool]] | None:
    """The weight of a model that each initializer is, in whatever shape, and whether it is transposed; None if an
    initializer is computed from weights."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    weights = {array.tobytes(): (name, False) for name, array in state.items()}
    weights |= {np.ascontiguousarray(array.T).tobytes(): (name, True) for name, array in state.items()} | weights
    links = {}
    for name, value in graph.graph.initializers.items():
        array = value.const_value.numpy()
        if (link := weights.get(array.tobytes())) is not None:
            links[name] = link
        elif array.dtype.kind == "f" and array.size and not (array == array.flat[0]).all():
            return None
    return links


def keep_the_exporters_functions(patch: pytest.MonkeyPatch) -> None:
    """PyTorch's exporter collects its 500 ONNX functions anew for every graph, a third of the time of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    collected = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*opset, **opset_version):
        registry = copy.copy(collected(*opset, **opset_version))
        registry.functions = {target: list(functions) for target, functions in registry.functions.items()}
        return registry

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))


def remember_drawings(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Draw a synthetic image once, which takes up to 60 ms: others read its pixels from a folder."""
    from exporter.data import synthetic

    draw = synthetic._square.__wrapped__

    @functools.lru_cache(synthetic.KEPT)
    def drawn_once(size, seed):
        path = folder / f"{size}-{seed}"
        if not path.exists():
            pixels = draw(size, seed)
            if size > LARGEST:
                return pixels
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(pixels.tobytes())
            part.replace(path)
        return np.frombuffer(path.read_bytes(), np.uint8).reshape(size, size, 3)

    patch.setattr(synthetic, "_square", drawn_once)


def time_in_two_processes(patch: pytest.MonkeyPatch) -> None:
    """Time models in two or three processes instead of six after a short warm-up, compare them with the first product
    that could be the peak, and measure nothing again that another test disturbed."""
    from exporter.backends import _peak
    from exporter.bench import supervisor, worker
    from exporter.optimize import search

    patch.setattr(worker, "WARM_UP_S", (0.02, 0.2))
    patch.setattr(_peak, "PRODUCTS", _peak.PRODUCTS[:1])
    patch.setattr(_peak, "LARGE_PRODUCTS", ())
    patch.setattr(supervisor, "PROCESSES", 2)
    for name in ("FORM_PROCESSES", "PROCESSES", "MOST_PROCESSES"):
        patch.setattr(search, name, 3)  # of which an interval is taken
    patch.setattr(supervisor, "is_disturbed", lambda launch: False)


def _digest(content: object, *, values: bool) -> str:
    """A digest of everything that an object holds. Without values, of tensors the shapes, and the value of one that has
    the same everywhere: the exporter removes products with one and sums with zero."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, torch.Tensor):
                array = value.detach().numpy()
                constant = array.size and (array == array.flat[0]).all()
                content = array.tobytes() if values else array.flat[0].item() if constant else None
                return tuple, ((str(value.dtype), tuple(value.shape), content),)
            return NotImplemented

    pickled = io.BytesIO()
    Pickler(pickled).dump(content)
    return hashlib.sha256(pickled.getvalue()).hexdigest()[:32]


def forking():
    """A multiprocessing context whose processes are forked from one that has imported the libraries.

    That process is started here: there is one for all contexts, and it imports what the first of them asked for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    forkserver._forkserver.ensure_running()
    return context


def fork_processes_of(module: object, patch: pytest.MonkeyPatch) -> None:
    """Fork the processes that a module spawns."""
    patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: forking()))
