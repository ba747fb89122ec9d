"""A tiny seeded ConvNeXt, exported once, and a way to type commands."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.verify.budgets import CI_SERVICES
from tests import once, program
from tests.reference import library

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PX = 64


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU of this machine from tests that are not for it: `-m gpu` runs those that are."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, in both halves of the list: each of two processes begins with a half, and none ends alone with
    a slow test."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    half = len(items) // 2 - len(slow[0::2])
    items[:] = [*slow[0::2], *quick[:half], *slow[1::2], *quick[half:]]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """One of pytest's processes rewrites the assertions of a file, and the others read its bytecode."""
    if not isinstance(collector, pytest.Module) or sys.dont_write_bytecode:
        return (yield)
    with collector.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


def pytest_collection_finish() -> None:
    """All that was imported and collected lasts: no later collection of garbage need look at it, which takes 0.3 s. And
    what a trace leaves is collected where the tool asks for it; the default looks at its graphs again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@dataclass
class Result:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def type_command(*words: object) -> Result:
    """Run `convnext-export WORDS…` in this process."""
    from exporter.cli import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["convnext-export", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_the_tests_own(tmp_path_factory: pytest.TempPathFactory):
    """What is remembered for a user is not remembered by tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def the_same_verdicts_in_ci():
    """Budgets fail in CI and warn elsewhere where images are too few: tests say which of the two they mean."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CI", *CI_SERVICES):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def int8_of_tiny_networks_may_be_slower():
    """Skip the speed test before int8 calibration; yields the real function for the tests of `probe`."""
    from exporter.build.int8 import probe

    with pytest.MonkeyPatch.context() as patch:
        real = probe.refuse_slower
        patch.setattr(probe, "refuse_slower", lambda *_: None)
        yield real


@pytest.fixture(autouse=True, scope="session")
def two_processes_are_enough():
    """Whether a difference is significant is asked where it is measured."""
    with pytest.MonkeyPatch.context() as patch:
        once.time_in_two_processes(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory):
    """Each network is traced once, and each synthetic image drawn once; this is the folder of both."""
    folder = once.shared_folder(tmp_path_factory, "graphs")
    with pytest.MonkeyPatch.context() as patch:
        once.keep_the_exporters_functions(patch)
        once.remember_traces(folder, patch)
        once.remember_drawings(folder, patch)
        patch.setenv(once.GRAPHS, str(folder))
        yield folder


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch):
    """For tests of tracing itself: every network is traced, each time."""
    from exporter.graph import trace

    monkeypatch.setattr(trace, "trace", trace.trace.__wrapped__)


@pytest.fixture(autouse=True, scope="session")
def processes_are_forked():
    """What times, and what runs several recipes at once, need not import the libraries first."""
    from exporter.bench import supervisor
    from exporter.run import pool

    with pytest.MonkeyPatch.context() as patch:
        for module in (supervisor, pool):
            once.fork_processes_of(module, patch)
        yield


@pytest.fixture(scope="session")
def installed(graphs: Path, tmp_path_factory: pytest.TempPathFactory):
    """The path of a `convnext-export` for shells, which starts at once."""
    with program.installed(tmp_path_factory.mktemp("bin")) as path:
        yield path


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """A shell starts what it puts in the background deaf to Ctrl-C, and so would be all that tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run():
    return type_command


@pytest.fixture
def refused():
    """Type a command that must fail with one clear line and leave the folder as it was."""

    def check(code: int, *words: object, folder: Path | None = None) -> str:
        before = snapshot(folder) if folder else None
        result = type_command(*words)
        assert result.code == code, result.err
        errors = [line for line in result.err.splitlines() if line.lower().startswith("error")]
        assert len(errors) == 1, result.err
        assert "Traceback" not in result.err
        assert result.out == ""
        if folder:
            assert snapshot(folder) == before
        return errors[0]

    return check


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shared(*parts: str) -> Path:
    """A path in the shared folder that development and CI have; elsewhere the test is skipped."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(SHARED.parent)}, which only development and CI have")
    return path


def tiny_architecture(**differences: object):
    from exporter.model.variants import Architecture

    fields = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), **differences}
    return Architecture(**fields)


def tiny_state(seed: int = 0, classes: int = 10, **differences: object):
    """Weights of a tiny ConvNeXt in our layout: every tensor matters to the output."""
    from exporter.model import weights

    state = weights._random_state(tiny_architecture(**differences), seed)
    for key in state.keys() & {"head.weight", "head.bias"}:
        state[key] = state[key][:classes].clone()
    return state


def tiny_config(classes: int = 10) -> dict[str, Any]:
    """A `config.json` with labels and preprocessing of our own."""
    return {
        "id2label": {str(i): f"class {i}" for i in range(classes)},
        "pretrained_cfg": {
            "input_size": [3, PX, PX],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "label_names": [f"class {i}" for i in range(classes)],
        },
    }


def write_tiny(folder: Path, classes: int = 10, **differences: object) -> Path:
    """A folder with a tiny ConvNeXt as `model.safetensors` and `config.json`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_state(classes=classes, **differences), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_config(classes)))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once.written(once.shared_folder(tmp_path_factory, "tiny"), write_tiny)


@pytest.fixture(scope="session")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = once.shared_folder(tmp_path_factory, "tiny_v2")
    return once.written(folder, lambda path: write_tiny(path, grn=True, layer_scale=False))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small UPerNet in `model`, trained on drawn scenes, and held-out ones with masks in `val`: see
    `benchmarks.scenes`."""
    library("transformers")
    pytest.importorskip("sklearn")
    from benchmarks import scenes

    return once.written(once.shared_folder(tmp_path_factory, "scenes"), scenes.prepare)


@pytest.fixture(scope="session")
def tiny_upernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small UPerNet of transformers with random weights, of 96 pixels."""
    library("transformers")
    from tests.model import segmenters

    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    processor = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 96, "width": 96}}
    processor |= {"image_mean": mean, "image_std": std, "do_normalize": True, "do_resize": True}
    folder = once.shared_folder(tmp_path_factory, "tiny_upernet")
    return once.written(folder, lambda path: segmenters.save(path, segmenters.transformers_model(), processor))


@pytest.fixture(scope="session")
def half_scenes(scenes: Path, tmp_path_factory: pytest.TempPathFactory):
    """The artifact in fp16 of the network in `scenes`."""
    return build(scenes / "model", tmp_path_factory.mktemp("half_scenes"), precision="fp16")


def recipe_of(backend: str = "onnxruntime", precision: str = "fp32", **fields: Any):
    """A recipe from fields of its sections by name; int8 and fp8 are calibrated on 16 images where nothing is said."""
    from exporter.precision import PRECISIONS
    from exporter.recipe import Export, Model, Quantization, Recipe

    def section(kind):
        return kind(**{name: fields.pop(name) for name in kind.__struct_fields__ if name in fields})

    model, export = section(Model), section(Export)
    quantization = None
    if precision in PRECISIONS and PRECISIONS[precision].needs_calibration:
        fields.setdefault("calib_size", 16)
        quantization = section(Quantization)
    return Recipe(backend=backend, precision=precision, model=model, export=export, quantization=quantization, **fields)


def trace_options(**fields: Any):
    """Options of a trace, those of a recipe's defaults where nothing is said."""
    from exporter.artifact.sidecar import OutputSpec
    from exporter.graph.trace import TraceOptions

    spec = OutputSpec(tasks=tuple(fields.pop("task", "classify").split(",")))
    defaults = {"spec": spec, "strides": (4, 8, 16, 32), "imgsz": None, "batch": None}
    return TraceOptions(**{**defaults, **fields})


def build(source: Path | str, out: Path, backend: str = "onnxruntime", precision: str = "fp32", **fields: Any):
    """An artifact; int8 and fp8 neither judged nor timed."""
    from exporter.build import build

    recipe = recipe_of(backend, precision, weights=str(source), **fields)
    return build(recipe, out).artifact if recipe.quantization is None else build_int8(recipe, out)


def prepared(recipe, folder: Path):
    """A calibrated network, from which artifacts are made."""
    from exporter.build import resolve
    from exporter.build.int8.work import prepare

    return prepare(resolve(recipe, folder), folder)


def build_int8(recipe, out: Path, kept: tuple[str, ...] = ()):
    """An int8 artifact, neither judged nor timed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return prepared(recipe, Path(folder)).make(kept, out)


@pytest.fixture(scope="session")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tiny model at every precision of every target, each built for the first test of any process that needs it."""
    return Artifacts(tiny, once.shared_folder(tmp_path_factory, "artifacts"))


class Artifacts(dict):
    """{(backend, precision): artifact}."""

    def __init__(self, source: Path, out: Path):
        super().__init__()
        self.source, self.out = source, out

    def __missing__(self, key: tuple[str, str]):
        from exporter.artifact import load

        path_file = self.out / f".{'-'.join(key)}"
        with once.locked(path_file):
            if not path_file.exists():
                path_file.write_text(str(build(self.source, self.out, *key).path))
            self[key] = load(Path(path_file.read_text()))
        return self[key]


def needs_bf16(name: str, precision: str) -> None:
    """Skip a test that runs OpenVINO in bf16 if this CPU has no bf16. Building works on every CPU."""
    from exporter import machine

    if (name, precision) == ("openvino", "bf16") and not machine.has_bf16():
        pytest.skip("this CPU has no bf16")


@pytest.fixture
def onnx_copy(artifacts, tmp_path: Path):
    """A copy of the fp32 ONNX artifact that a test may spoil."""
    return copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)


def copy_artifact(artifact, folder: Path):
    import shutil

    from exporter.artifact import load, sidecar_path

    for path in [*artifact.files, sidecar_path(artifact.path)]:
        shutil.copy(path, folder / path.name)
    return load(folder / artifact.path.name)
