"""What every runtime and target must hold, whichever there are."""

import contextlib
import itertools
from importlib import metadata

import numpy as np
import pytest

from exporter import artifact, backends
from exporter.backends import Options, TargetOptions, _peak
from exporter.backends.openvino import OpenVinoOptions
from exporter.bench import Arm, worker
from exporter.bench.latency import BenchOptions, bench
from exporter.data.images import normalise
from exporter.errors import BadRequest, RunFailed, Unavailable
from exporter.model import FORMS
from exporter.precision import PRECISIONS
from tests.conftest import PX, build, needs_bf16

NAMES = backends.runtimes()
TARGETS = backends.targets()
BUILT = [(name, precision) for name in TARGETS for precision in sorted(backends.target(name).precisions)]
HERE = [name for name in NAMES if not backends.runtime(name).unable()]  # without a GPU no plan runs
RUN = [(name, precision) for name, precision in BUILT if name in HERE]
LAYERED = [(name, precision) for name, precision in BUILT if backends.runtime(name).layers]
PEAKS = [(name, precision) for name, precision in [("eager", "fp32"), *RUN] if backends.runtime(name).peak]


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(3, 3, PX, PX)).astype(np.float32)


def opened(artifacts, name, precision, options=None):
    needs_bf16(name, precision)
    made = artifacts[name, precision]
    runtime = backends.runtime(name)
    return runtime.open(made, options or runtime.options())


def parent_of(name, precision, form):
    """The file that an artifact is built from; an intermediate one has its form in its name."""
    if name == backends.ONNX:
        return "custom_fp32.onnx"
    is_lowered = backends.target(name).lower is not None or PRECISIONS[precision].needs_calibration
    return f"custom_{form}_{precision if is_lowered else 'fp32'}.onnx"


def eager(artifacts, images):
    made = artifacts["onnxruntime", "fp32"]
    with backends.runtime("eager").open(made, backends.runtime("eager").options()) as session:
        return session(images)


def test_torchs_threads_are_put_back_when_its_session_closes(artifacts):
    import torch

    runtime, before = backends.runtime("eager"), torch.get_num_threads()
    with runtime.open(artifacts["onnxruntime", "fp32"], runtime.options(threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_those_of_this_release_are_found():
    assert {"eager", "onnxruntime", "openvino", "tensorrt"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_is_a_record_named_like_its_file(name):
    runtime = backends.runtime(name)
    assert runtime.name == name
    assert isinstance(runtime.options(), Options)
    assert runtime.probe().split()[-1].split(".")[0].isdecimal()
    assert runtime.distributions
    assert runtime.devices


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_a_record_named_like_its_runtime(name):
    target = backends.target(name)
    assert target.name == name
    assert set(target.precisions) <= set(PRECISIONS)
    assert target.above_int8() in PRECISIONS
    assert isinstance(target.options(), TargetOptions)
    assert target.summary.endswith(".")
    assert all(f"{example} ".startswith(f"{target.command} ") for example in target.examples)


def test_no_two_targets_share_a_command_or_a_suffix():
    targets = [backends.target(name) for name in TARGETS]
    assert len({target.command for target in targets}) == len(targets)
    assert len({target.suffix for target in targets}) == len(targets)


def test_nothing_is_built_for_a_runtime_without_a_target():
    assert "eager" not in TARGETS
    with pytest.raises(BadRequest, match="nothing is built for backend 'eager'; known: "):
        backends.target("eager")


@pytest.mark.parametrize(("name", "precision"), RUN)
def test_it_gives_what_eager_gives(name, precision, artifacts, images):
    with opened(artifacts, name, precision) as session:
        (got,) = session(images)
    (expected,) = eager(artifacts, images)
    assert got.dtype == np.float32
    assert got.shape == (3, 10)
    assert np.abs(got - expected).max() <= PRECISIONS[precision].limits.share * expected.std()
    if precision != "fp32":
        assert np.abs(got - expected).max() > 1e-6 * expected.std(), "nothing was lowered"


@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in TARGETS if name in HERE])
def test_it_gives_the_same_in_every_form(name, form, source, request, images, tmp_path):
    made = build(request.getfixturevalue(source), tmp_path, name, form=form)
    assert made.sidecar.recipe["export"]["form"] == form
    eager = backends.runtime("eager")
    runtime = backends.runtime(name)
    with runtime.open(made, runtime.options()) as session, eager.open(made, eager.options()) as reference:
        (got,), (expected,) = session(images), reference(images)
    assert np.abs(got - expected).max() <= PRECISIONS["fp32"].limits.share * expected.std()


@pytest.mark.parametrize(("name", "precision"), [(n, p) for n, p in RUN if p != "bf16"])
@pytest.mark.parametrize("word", ["uint8", "float01"])
def test_it_takes_pixels_as_they_are(name, precision, word, tiny, tmp_path):
    """A session is given normalised images as ever; what runs inside is given bytes, or 0…1."""
    made = build(tiny, tmp_path, name, precision, input=word)
    assert made.sidecar.inputs[0].dtype == {"uint8": "uint8", "float01": "float32"}[word]
    recipe = made.sidecar.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (3, PX, PX, 3), dtype=np.uint8)
    images = normalise(pixels, recipe)
    taken = backends.as_taken(images, recipe)
    assert np.allclose(taken, np.moveaxis(pixels, -1, 1) / (1 if word == "uint8" else 255), atol=1e-6)
    eager = backends.runtime("eager")
    runtime = backends.runtime(name)
    with runtime.open(made, runtime.options()) as session, eager.open(made, eager.options()) as reference:
        (got,), (expected,) = session(images), reference(images)
        got = got.copy()
        bound = session.bind([images])
        bound.run()
        assert np.array_equal(bound.outputs()[0], got)
    assert np.abs(got - expected).max() <= PRECISIONS[precision].limits.share * expected.std()


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
@pytest.mark.parametrize("batch", [None, 1, 8])
@pytest.mark.parametrize("name", TARGETS)
def test_its_own_form_is_one_of_the_forms(name, batch, precision):
    assert backends.target(name).form(precision, batch) in FORMS


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_product_of_another_process_is_opened_without_a_search(name, artifacts, monkeypatch):
    monkeypatch.setattr(_peak, "_fastest", lambda *_: pytest.fail("it was searched again"))
    known = _peak.PRODUCTS[-1]
    path = str(artifacts[name, "fp32"].path)
    with worker.open_arm(Arm(name="peak", path=path, runtime="peak", product=str(known))) as product:
        assert product.facts["product"] == str(known)


@pytest.mark.parametrize("hint", ["latency", "throughput"])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("name", "precision"), PEAKS)
def test_its_peak_is_a_product_in_the_artifacts_precision(name, precision, convolution, hint, artifacts, monkeypatch):
    needs_bf16(name, precision)
    weights = _peak.PeakProduct(512, convolution)
    monkeypatch.setattr(_peak, "PRODUCTS", (weights,))
    monkeypatch.setattr(_peak, "LARGE_PRODUCTS", ())
    made = artifacts["onnxruntime" if name == "eager" else name, precision]
    runtime = backends.runtime(name)
    in_a_row = 1 if precision == "fp32" or (name, precision) == ("onnxruntime", "fp16") else _peak.IN_A_ROW
    with runtime.peak(made, runtime.options(hint=hint)) as product:
        bound = product.bind([])
        bound.run()
        (got,) = bound.outputs()
        assert product.facts["device"].lower() == "cpu"
        assert product.facts["macs"] == str(in_a_row * 1024 * 512 * 512)
        assert product.facts["product"] == str(weights) + (f", {in_a_row} in a row" if in_a_row > 1 else "")
    expected, matrix = weights.input(), weights.matrix()
    for _ in range(in_a_row):
        if convolution:
            pixels = expected.reshape(*expected.shape[:2], -1)
            expected = (matrix[:, :, 0, 0] @ pixels).reshape(expected.shape)
        else:
            expected = expected @ matrix
    error = np.abs(got - expected).max() / got.std()
    # Independent rounding errors grow with the square root of the number of products.
    assert error < {"bf16": 0.05, "int8": 0.1}.get(precision, 1e-5) * in_a_row**0.5
    assert precision not in ("bf16", "int8") or error > 1e-4, "it is computed in that precision"


def test_a_product_of_onnx_runtime_leaves_no_file_while_it_is_timed(artifacts, tmp_path, monkeypatch):
    """The process may be killed meanwhile."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime, known = backends.runtime("onnxruntime"), str(_peak.PRODUCTS[0])
    with runtime.peak(artifacts["onnxruntime", "fp32"], runtime.options(threads=1), known) as product:
        assert not list(tmp_path.iterdir())
        product.bind([product.product.input()]).run()


def test_the_peak_is_the_fastest_product_in_either_form(monkeypatch):
    """Seconds of each product by a clock of the test's; the best rate is not that of the shortest run."""
    now = 0.0
    seconds = {(512, False): 0.5, (512, True): 0.4, (1024, False): 1.1, (1024, True): 1.3}
    monkeypatch.setattr(_peak.time, "perf_counter", lambda: now)
    monkeypatch.setattr(_peak, "PRODUCTS", tuple(itertools.starmap(_peak.PeakProduct, seconds)))
    large = tuple(_peak.PeakProduct(4096, convolution) for convolution in (False, True))
    monkeypatch.setattr(_peak, "LARGE_PRODUCTS", large)

    class Timed:
        def __init__(self, product):
            self.facts, self.streams = {"device": "cpu"}, 1
            self.seconds = seconds[product.channels, product.convolution]

        def bind(self, batches):
            def run():
                nonlocal now
                now += self.seconds

            return backends.Bound(run, tuple)

    def fastest(known=""):
        with _peak.fastest_product(lambda product: contextlib.nullcontext(Timed(product)), "fp32", known) as fastest:
            return fastest.product

    assert fastest() == _peak.PeakProduct(1024, convolution=False)
    seconds[1024, True] = 1.0
    assert fastest() == _peak.PeakProduct(1024, convolution=True)
    # All small products take less than `SHORT_S`, so the large ones are timed too, on any device.
    seconds.update({key: value / 1000 for key, value in seconds.items()})
    seconds.update({(4096, False): 0.002, (4096, True): 0.003})
    assert fastest() == _peak.PeakProduct(4096, convolution=False)
    # The text of one, from another process, spares the timing.
    before, slow = now, _peak.PeakProduct(512, convolution=True)
    assert (fastest(str(slow)), now) == (slow, before)


@pytest.mark.parametrize(("name", "precision"), RUN)
def test_the_order_of_images_and_their_batch_do_not_matter(name, precision, artifacts, images):
    with opened(artifacts, name, precision) as session:
        (together,) = session(images)
        together = together.copy()
        alone = [session(images[i : i + 1])[0].copy() for i in (2, 0, 1)]
    spread = together.std() * (1e-5 if precision == "fp32" else PRECISIONS[precision].limits.share)
    assert np.abs(np.concatenate([alone[1], alone[2], alone[0]]) - together).max() <= spread


@pytest.mark.parametrize(("name", "precision"), RUN)
def test_outputs_are_the_callers_own(name, precision, artifacts, images):
    """A second run must not write into what the first one gave."""
    with opened(artifacts, name, precision) as session:
        (first,) = session(images)
        kept = first.copy()
        session(images * 2)
        assert np.array_equal(first, kept)


@pytest.mark.parametrize("hint", ["latency", "throughput"])
@pytest.mark.parametrize("name", HERE)
def test_bound_inputs_run_in_turn(name, hint, artifacts, images):
    made = artifacts["onnxruntime" if name == "eager" else name, "fp32"]
    runtime = backends.runtime(name)
    batches = [images, images[::-1] * 0.5, images * 2]
    with runtime.open(made, runtime.options(threads=2, hint=hint)) as session:
        expected = [session(batch)[0] for batch in batches]
        bound = session.bind(batches)
        given = []
        for _ in range(4):
            assert bound.run() is None
            (output,) = bound.outputs()
            given.append(int(np.argmin([np.abs(output - one).max() for one in expected])))
            assert np.allclose(output, expected[given[-1]], atol=1e-5)
        assert bound.streams >= 1
        if bound.streams == 1:
            assert given == [0, 1, 2, 0]


@pytest.mark.parametrize(("name", "precision"), LAYERED)
def test_layers_have_modules_and_precisions(name, precision, artifacts):
    needs_bf16(name, precision)
    runtime = backends.runtime(name)
    layers = runtime.layers(artifacts[name, precision], runtime.options())
    blocks = {".".join(layer.module.split(".")[:3]) for layer in layers if layer.module.startswith("stages")}
    assert blocks == {"stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"}
    found = {
        layer.precision for layer in layers if layer.operator in ("MatMul", "FullyConnected", "Conv", "Convolution")
    }
    if precision == "int8":
        told = artifacts[name, precision].sidecar.quantization.layers
        whole = {layer.module for layer in layers if layer.precision in ("int8", "uint8")}
        assert set(told) <= whole, "every rounded layer is computed in int8 on this machine"
        assert not any(module.endswith("dwconv") for module in whole)
        return
    computed = {"fp32", "fp16"} if (name, precision) == ("openvino", "fp16") else {precision}
    assert found <= computed


@pytest.mark.parametrize(("name", "precision"), BUILT)
def test_the_sidecar_tells_what_was_built(name, precision, artifacts):
    made = artifacts[name, precision]
    sidecar = made.sidecar
    assert (sidecar.backend, sidecar.precision, sidecar.variant) == (name, precision, "custom")
    assert made.path.name == f"custom_{precision}{backends.target(name).suffix}"
    assert sidecar.labels[0] == "class 0"
    if (name, precision) == ("onnxruntime", "int8"):
        assert sidecar.parents == (), "made from the weights: scales are folded before it is traced"
    elif (name, precision) != ("onnxruntime", "fp32"):
        parent = artifact.load(made.path.with_name(parent_of(name, precision, sidecar.recipe["export"]["form"])))
        assert sidecar.parents == (parent.sidecar.sha256,)
        assert parent.sidecar.recipe["export"]["form"] == sidecar.recipe["export"]["form"]


def test_an_unknown_precision_is_refused_with_the_nearest(tiny, tmp_path):
    with pytest.raises(BadRequest, match="onnxruntime cannot run fp61; did you mean 'fp16'"):
        build(tiny, tmp_path, "onnxruntime", "fp61")
    with pytest.raises(BadRequest, match="unknown backend 'openvini'; did you mean 'openvino'"):
        build(tiny, tmp_path, "openvini")


def test_a_provider_that_is_not_there_is_an_error_not_a_fallback(artifacts):
    with pytest.raises(Unavailable, match="CUDA"), opened(artifacts, "onnxruntime", "fp32", Options(device="cuda")):
        pass


def test_a_provider_that_falls_back_silently_is_found_out(artifacts, monkeypatch):
    """onnxruntime-gpu lists CUDA where there is no GPU, and then runs on the CPU (onnxruntime#23372)."""
    import onnxruntime

    honest = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, settings, providers: honest(path, providers=["CPUExecutionProvider"]),
    )
    with (
        pytest.raises(Unavailable, match="CUDAExecutionProvider is not in use"),
        opened(artifacts, "onnxruntime", "fp32", Options(device="cuda")),
    ):
        pass


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_that_fails_during_a_run_is_one_line(name, artifacts):
    images = np.zeros((1, 3, PX, 2 * PX), np.float32)  # which the graph does not take
    with (
        opened(artifacts, name, "fp32") as session,
        pytest.raises(RunFailed, match=r"failed during a run: .*smaller"),
    ):
        session(images)


def test_a_device_that_is_not_there_is_an_error(artifacts, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "GPU"])
    with (
        pytest.raises(Unavailable, match="and no NPU"),
        opened(artifacts, "openvino", "fp32", OpenVinoOptions(device="npu")),
    ):
        pass


def test_arithmetic_other_than_asked_for_is_found_out(artifacts):
    """Left alone the CPU plugin computes an fp32 IR in bf16 where it can; ours must not."""
    with opened(artifacts, "openvino", "fp32") as session:
        assert session.facts["arithmetic"] == "fp32"
    layers = backends.runtime("openvino").layers(artifacts["openvino", "fp32"], OpenVinoOptions())
    assert {layer.precision for layer in layers} == {"fp32"}


def test_bf16_is_computed_in_bf16(artifacts):
    with opened(artifacts, "openvino", "bf16") as session:
        assert session.facts["arithmetic"] == "bf16"
    layers = backends.runtime("openvino").layers(artifacts["openvino", "bf16"], OpenVinoOptions())
    assert sum(layer.precision == "bf16" for layer in layers) > len(layers) / 2


def test_a_runtime_that_is_not_installed_says_how_to_install_it(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    for name, extra in (("onnxruntime", "cpu"), ("openvino", "openvino")):
        with pytest.raises(Unavailable, match=rf"pip install 'convnext-export\[{extra}\]'"):
            backends.runtime(name).probe()


def test_both_builds_of_onnxruntime_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.31")
    with pytest.raises(Unavailable, match="both installed"):
        backends.runtime("onnxruntime").probe()


@pytest.fixture
def cuda():
    import onnxruntime
    import torch

    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU, and pytest -m gpu")
    return Options(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_cuda_computes_the_same_network(artifacts, images, cuda, precision, limit):
    """Products in TF32 are off by 1e-3 of the spread."""
    expected = eager(artifacts, images)[0]
    with opened(artifacts, "onnxruntime", precision, cuda) as session:
        assert session.facts["provider"] == "CUDAExecutionProvider"
        (got,) = session(images)
        bound = session.bind([images])
        bound.run()
        np.testing.assert_allclose(bound.outputs()[0], got, atol=1e-6)
    assert np.abs(got - expected).max() <= limit * expected.std()


@pytest.mark.gpu
@pytest.mark.parametrize(("arithmetic", "limit"), [("fp32", 1e-4), ("tf32", 1e-2), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_pytorch_on_the_gpu_is_the_same_network(artifacts, images, cuda, arithmetic, limit):
    expected = eager(artifacts, images)[0]
    runtime = backends.runtime("eager")
    options = runtime.options(device="cuda", arithmetic=arithmetic)
    with runtime.open(artifacts["onnxruntime", "fp32"], options) as session:
        bound = session.bind([images])
        bound.run()
        assert np.abs(bound.outputs()[0] - expected).max() <= limit * expected.std()
        assert min(bound.parts().values()) > 0


@pytest.mark.gpu
def test_cuda_is_timed_beside_pytorch_on_the_gpu(artifacts, cuda):
    options = BenchOptions(device="cuda", batch=(2,), duration=0.4, also=("tf32", "fp16"))
    (report,) = bench([artifacts["onnxruntime", "fp16"]], options)
    assert report.passed
    assert {"speedup", "tf32_p50_ms", "eager_fp16_p50_ms", "peak_pct"} <= {one.metric for one in report.findings}
    assert report.environment["gpu_before"]["name"]
