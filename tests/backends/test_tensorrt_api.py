"""Every name of TensorRT 10, 11 and RTX that the backend uses is there, and takes what it is given."""

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from exporter import artifact
from exporter.backends.tensorrt import builder, library, runtime
from exporter.backends.tensorrt.library import Library, Profile, TensorRtOptions
from exporter.errors import BadRequest, ExporterError, Unavailable
from tests.artifact.test_sealed import notes
from tests.backends.fake_tensorrt import SURFACES, FakeModule, Meanings
from tests.backends.surface import surface

IDS = [path.stem for path in SURFACES]


@pytest.fixture(params=SURFACES, ids=IDS)
def trt(request):
    flavor = "tensorrt-rtx" if "rtx" in request.param.stem else "tensorrt"
    return Library(flavor, FakeModule(request.param))


def all_that_can_be_asked(trt, cache):
    common = {"profiles": (Profile(1, 2, 4), Profile(8, 8, 8)), "workspace": 0.5, "opt_level": 4, "tf32": True}
    if trt.rtx:
        return TensorRtOptions(**common, compute_capability=("8.9", "12.0"))
    return TensorRtOptions(**common, version_compatible=True, hardware_compat="ampere+", timing_cache=str(cache))


def test_there_are_surfaces_of_all_three():
    assert IDS == ["tensorrt-10.0", "tensorrt-10.16", "tensorrt-11.4", "tensorrt-rtx-1.7"]


@pytest.mark.skipif("tensorrt-rtx" not in library.here(), reason="needs tensorrt-rtx")
def test_the_surface_is_that_of_the_library_that_is_installed():
    module = library.find("tensorrt-rtx").module
    known = FakeModule(SURFACES[-1])
    if module.__version__ != known.__version__:
        pytest.skip(f"{module.__version__} is installed, {known.__version__} is known")
    found = surface(module)
    assert set(found) == {name for name in vars(known) if name[0].isupper()}
    assert found["IBuilderConfig"] == known.IBuilderConfig.members


def test_a_build_with_every_option_asks_for_what_is_there(trt, artifacts, tmp_path):
    made = artifacts["onnxruntime", "fp32"]
    target = all_that_can_be_asked(trt, tmp_path / "kernels.cache")
    library.check(trt, "fp16", None, target)
    plan, listing = builder.build(trt, made.path, made.sidecar, target)
    module = trt.module
    assert (plan, listing) == (b"plan", "")
    assert module.asked("Builder.create_network") == [(1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)]
    assert module.asked("IBuilderConfig.set_flag")[0] == (module.BuilderFlag.TF32,)
    assert module.asked("IBuilderConfig.set_memory_pool_limit") == [(module.MemoryPoolType.WORKSPACE, 2**29)]
    assert module.asked("IOptimizationProfile.set_shape") == [
        ("images", (1, 3, 64, 64), (2, 3, 64, 64), (4, 3, 64, 64)),
        ("images", (8, 3, 64, 64), (8, 3, 64, 64), (8, 3, 64, 64)),
    ]
    kept = tmp_path / "kernels.cache"
    assert kept.exists() == (not trt.rtx)
    if not trt.rtx:
        assert kept.read_bytes() == b"timings"
        builder.build(trt, made.path, made.sidecar, target)
        assert module.asked("IBuilderConfig.create_timing_cache")[-1] == (b"timings",)
    capabilities = module.asked("IBuilderConfig.set_compute_capability")
    assert [c.name for c, _ in capabilities] == (["SM89", "SM120"] if trt.rtx else [])


def test_a_timing_cache_that_cannot_be_written_is_refused_or_left_out(trt, artifacts, tmp_path, monkeypatch):
    if trt.rtx:
        pytest.skip("refused for TensorRT-RTX")
    graph = artifacts["onnxruntime", "fp32"]
    with pytest.raises(BadRequest, match="not a regular file"):
        builder.build(trt, graph.path, graph.sidecar, TensorRtOptions(timing_cache=str(tmp_path)))

    def fail(path, content):
        raise Unavailable(f"{path}: no space left")

    monkeypatch.setattr(builder, "write_file", fail)
    with notes() as noted:
        plan, _ = builder.build(trt, graph.path, graph.sidecar, TensorRtOptions(timing_cache=str(tmp_path / "t.cache")))
    assert plan == b"plan"
    assert any("the timing cache is not kept" in line for line in noted)


@pytest.mark.parametrize(("precision", "least"), [("fp8", (8, 9)), ("bf16", (8, 0)), ("fp32", (8, 0))])
def test_an_engine_names_only_gpus_that_have_its_arithmetic(precision, least):
    trt = Library("tensorrt-rtx", FakeModule(SURFACES[-1]))
    numbers = [tuple(map(int, one.split("."))) for one in library.default_capabilities(trt, precision)]
    assert min(numbers) == least


def test_an_engine_without_weights_takes_the_same_ones_back(trt, artifacts):
    if trt.rtx:
        pytest.skip("refused for TensorRT-RTX")
    made, target = artifacts["onnxruntime", "fp32"], TensorRtOptions(strip_weights=True)
    library.check(trt, "fp16", None, target)
    builder.build(trt, made.path, made.sidecar, target)
    flags = [flag.name for (flag,) in trt.module.asked("IBuilderConfig.set_flag")]
    assert flags == ["STRIP_PLAN", "REFIT_IDENTICAL"]
    with pytest.raises(BadRequest, match="--version-compatible"):
        library.check(trt, "fp16", None, replace(target, version_compatible=True))


def test_fp32_is_fp32_unless_tf32_is_asked_for(trt, artifacts):
    made = artifacts["onnxruntime", "fp32"]
    builder.build(trt, made.path, made.sidecar, TensorRtOptions())
    assert trt.module.asked("IBuilderConfig.clear_flag") == [(trt.module.BuilderFlag.TF32,)]
    assert trt.module.asked("IBuilderConfig.set_flag") == []


def test_what_a_version_has_not_is_refused(trt):
    if trt.rtx or trt.version.startswith("10.0"):
        with pytest.raises(BadRequest, match="--hardware-compat"):
            library.check(trt, "fp16", None, TensorRtOptions(hardware_compat="same"))
    else:
        library.check(trt, "fp16", None, TensorRtOptions(hardware_compat="same"))
    if not trt.rtx:
        with pytest.raises(BadRequest, match="builds for the GPU that it runs on"):
            library.check(trt, "fp16", None, TensorRtOptions(compute_capability=("8.9",)))


def test_a_builder_that_gives_nothing_is_an_error_with_what_it_said(trt, artifacts):
    made = artifacts["onnxruntime", "fp32"]

    def fail(network, config):
        builder.listener(trt).log(trt.module.ILogger.Severity.ERROR, "no tactic for this\nand more")

    trt.module.answers["Builder.build_serialized_network"] = fail
    with pytest.raises(ExporterError, match="cannot build it: no tactic for this"):
        builder.build(trt, made.path, made.sidecar, TensorRtOptions())


@pytest.fixture
def gpu(monkeypatch, artifacts):
    """A GPU that is the CPU, once there is an artifact to run on it."""
    artifacts["onnxruntime", "fp32"]

    @contextmanager
    def within(*args, **told):
        yield

    empty = torch.empty
    stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: torch.zeros(tensor.shape, dtype=tensor.dtype))


class Event:
    """A CUDA event whose clock goes on by a millisecond at each record."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def opened(trt, gpu, artifacts):
    module = trt.module
    Meanings(module)
    made = artifacts["onnxruntime", "fp32"]
    return runtime.PlanSession(artifact.Artifact(made.path, replace(made.sidecar, backend="tensorrt")), trt)


def test_a_run_asks_for_what_is_there(opened, trt):
    images = np.zeros((2, 3, 64, 64), np.float32)
    (output,) = opened(images)
    assert output.shape == (2, 10)
    assert trt.module.asked("IExecutionContext.execute_async_v3") == [(7,)], "not the default stream"
    assert trt.module.asked("IExecutionContext.set_input_shape") == [("images", (2, 3, 64, 64))]
    addresses = trt.module.asked("IExecutionContext.set_tensor_address")
    assert [name for name, _ in addresses] == ["images", "logits"]


def test_what_is_bound_runs_as_a_cuda_graph(opened, trt):
    bound = opened.bind([np.zeros((2, 3, 64, 64), np.float32)])
    enqueued = len(trt.module.asked("IExecutionContext.execute_async_v3"))
    bound.run()
    assert bound.outputs()[0].shape == (2, 10)
    again = len(trt.module.asked("IExecutionContext.execute_async_v3")) - enqueued
    assert again == (1 if trt.rtx else 0), "RTX keeps the graph itself"
    assert trt.module.asked("IRuntimeConfig.cuda_graph_strategy =") == (
        [(trt.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,)] if trt.rtx else []
    )


def test_upload_computing_and_download_are_timed_apart(opened, trt):
    bound = opened.bind([np.zeros((2, 3, 64, 64), np.float32)])
    assert bound.parts() == {"h2d_ms": 1.0, "compute_ms": 1.0, "d2h_ms": 1.0}


def test_rtx_keeps_what_it_compiled_for_the_next_time(opened, trt, gpu, artifacts):
    if not trt.rtx:
        pytest.skip("only TensorRT-RTX compiles where a plan runs")
    opened.bind([np.zeros((2, 3, 64, 64), np.float32)])
    assert opened.kept.read_bytes() == hashlib.sha256(b"kernels").digest() + b"kernels"
    runtime.PlanSession(artifacts["onnxruntime", "fp32"], trt)
    assert trt.module.asked("IRuntimeCache.deserialize")[-1] == (b"kernels",)


@pytest.mark.parametrize("spoilt", [b"", b"kernels", b"x" * 40, None])
def test_kernels_without_their_digest_are_compiled_again(spoilt, opened, trt, artifacts):
    if not trt.rtx:
        pytest.skip("only TensorRT-RTX compiles where a plan runs")
    opened.bind([np.zeros((2, 3, 64, 64), np.float32)])
    whole = opened.kept.read_bytes()
    opened.kept.write_bytes(whole[:-1] + b"S" if spoilt is None else spoilt)
    trt.module.calls.clear()
    again = runtime.PlanSession(artifacts["onnxruntime", "fp32"], trt)
    assert trt.module.asked("IRuntimeCache.deserialize") == [], "nothing of it is read"
    again.bind([np.zeros((2, 3, 64, 64), np.float32)])
    assert opened.kept.read_bytes() == whole


def test_a_batch_outside_the_profile_is_not_timed(opened):
    with pytest.raises(BadRequest, match=r"takes \(1, 3, 64, 64\) to \(4, 3, 64, 64\); build it with --min-batch and"):
        opened.bind([np.zeros((5, 3, 64, 64), np.float32)])


def test_a_plan_that_does_not_open_is_an_error(trt, gpu, artifacts):
    with pytest.raises(ExporterError, match="cannot load it"):
        runtime.PlanSession(artifacts["onnxruntime", "fp32"], trt)


def test_an_image_outside_the_profile_is_not_timed(opened):
    with pytest.raises(
        BadRequest, match=r"takes \(1, 3, 64, 64\) to \(4, 3, 64, 64\); build it with --imgsz dynamic, --min-size and"
    ):
        opened.bind([np.zeros((2, 3, 96, 64), np.float32)])


SIZED = TensorRtOptions(min_size=32, opt_size=512, max_size=800)


@pytest.mark.parametrize(
    ("imgsz", "options", "expected"),
    [
        ((64, 96), TensorRtOptions(), [(1, 3, 64, 96), (1, 3, 64, 96), (16, 3, 64, 96)]),
        ("dynamic", TensorRtOptions(), [(1, 3, 64, 64), (1, 3, 64, 64), (16, 3, 512, 512)]),
        ("dynamic", TensorRtOptions(opt_size=384), [(1, 3, 64, 64), (1, 3, 384, 384), (16, 3, 768, 768)]),
        ("dynamic", SIZED, [(1, 3, 32, 32), (1, 3, 512, 512), (16, 3, 800, 800)]),
    ],
)
def test_a_profile_has_both_sides(imgsz, options, expected, trt, tiny, tmp_path):
    from tests.conftest import build

    made = build(tiny, tmp_path, imgsz=imgsz)
    builder.build(trt, made.path, made.sidecar, options)
    assert trt.module.asked("IOptimizationProfile.set_shape") == [("images", *expected)]


@pytest.mark.parametrize(
    ("imgsz", "options", "message"),
    [
        (224, TensorRtOptions(max_size=800), "--max-size: the size of images is fixed; add --imgsz dynamic, or leave"),
        (None, TensorRtOptions(min_size=32), "--min-size: the size of images is fixed"),
        ("dynamic", TensorRtOptions(min_size=512, max_size=256), "images of 512, 256 pixels: expected --min-size ≤"),
    ],
)
def test_sizes_that_make_no_range_are_refused(imgsz, options, message):
    with pytest.raises(BadRequest, match=message):
        library.check_sizes(imgsz, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TensorRtOptions(min_size=300), "images of 300, 224, 512 pixels: expected --min-size ≤"),
        (TensorRtOptions(opt_size=96, max_size=128), "images of 64 to 128 pixels leave out 224, the size of the"),
    ],
)
def test_a_range_that_leaves_the_size_of_the_preprocessing_out_is_refused(options, message):
    with pytest.raises(BadRequest, match=message):
        library.sizes(224, options)
