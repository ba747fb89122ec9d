"""Artifacts of UPerNet: one graph that is right at every size, with logits or labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exporter.build.export import TRACE_SHARE, _shares
from exporter.model import weights
from exporter.verify import VerifyOptions, verify
from tests.build.maps import outputs, pictures
from tests.conftest import build
from tests.model import segmenters
from tests.reference import library

library("transformers")
SIZES = ((512, 512), (640, 640), (512, 768), (96, 160), (224, 224), (352, 480), (300, 451), (33, 47), (32, 32))
NOISE = 1e-5  # of the spread of the logits
# PyTorch's resize by a ratio that is no power of two differs from that in double precision by as much.
ODD_NOISE = 2e-5
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def model():
    return segmenters.transformers_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("upernet"), model)


@pytest.fixture(scope="module")
def small_model():
    """Two levels: traced for any size in a third of the time, for what does not depend on the levels."""
    return segmenters.transformers_model(dims=(8, 12), scales=(1, 2))


@pytest.fixture(scope="module")
def small(small_model, tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("small"), small_model)


def first_output(artifact, batch):
    return outputs(artifact, batch)[0]


def expected(model, batch):
    return segmenters.logits(model, torch.from_numpy(batch)).numpy()


def limit_of(size):
    """The largest error at a size, in spreads of the logits."""
    return ODD_NOISE if any(side % 32 for side in size) else NOISE


@pytest.fixture(scope="module", params=BACKENDS)
def dynamic(request, folder, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("dynamic"), request.param, imgsz="dynamic")


def test_one_dynamic_graph_gives_the_logits_of_transformers_at_every_size(dynamic, model):
    (tensor,) = dynamic.sidecar.outputs
    assert (tensor.name, tensor.holds) == ("logits", "pixel_logits")
    assert tensor.shape == ("batch", 7, "height", "width")
    assert dynamic.sidecar.task == "segment"
    assert dynamic.sidecar.labels == segmenters.LABELS
    for size in SIZES:
        batch = pictures(size, 2 if size[0] < 100 else 1)
        theirs, ours = expected(model, batch), first_output(dynamic, batch)
        assert ours.shape == theirs.shape == (len(batch), 7, *size)
        limit = limit_of(size)
        assert np.abs(ours - theirs).max() / theirs.std() < limit, size


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), ("openvino", "int8")])
def test_a_stage_that_the_head_does_not_take_is_not_in_the_graph(backend, precision, tmp_path):
    model = segmenters.transformers_model(levels=(0, 1, 2))
    artifact = build(segmenters.save(tmp_path / "weights", model), tmp_path, backend, precision, imgsz=64)
    batch = pictures((64, 64))
    theirs, ours = expected(model, batch), first_output(artifact, batch)
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.99
    names = artifact.path.read_bytes()
    assert b"stages.2." in names
    assert b"stages.3." not in names


@pytest.mark.parametrize(("pixels", "passes"), [(2, True), (3, False)])
def test_two_pixels_of_a_small_image_may_have_another_label(pixels, passes):
    options = SimpleNamespace(outputs={"labels": "labels"}, picture=False)
    expected = np.zeros((1, 64, 64), np.uint8)
    labels = expected.copy()
    labels.flat[:pixels] = 1
    (share,) = _shares(options, (expected,), (labels,), [1.0])
    assert (share <= TRACE_SHARE) == passes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("imgsz", ["dynamic", (96, 128)])
def test_labels_are_the_classes_of_the_pixels_in_bytes(backend, imgsz, small_model, small, tmp_path):
    artifact = build(small, tmp_path, backend, output="labels", imgsz=imgsz)
    (tensor,) = artifact.sidecar.outputs
    axes = ("height", "width") if imgsz == "dynamic" else imgsz
    assert (tensor.name, tensor.dtype, tensor.shape) == ("labels", "uint8", ("batch", *axes))
    batch = pictures((96, 128), 3)
    np.testing.assert_array_equal(first_output(artifact, batch), expected(small_model, batch).argmax(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_the_probabilities_of_the_labels(backend, small_model, small, tmp_path):
    artifact = build(small, tmp_path, backend, output="scores", imgsz="dynamic")
    assert [(tensor.name, tensor.shape) for tensor in artifact.sidecar.outputs] == [
        ("labels", ("batch", "height", "width")),
        ("scores", ("batch", "height", "width")),
    ]
    batch = pictures((75, 107), 2)
    labels, scores = outputs(artifact, batch)
    theirs = torch.from_numpy(expected(small_model, batch)).softmax(1).numpy()
    np.testing.assert_array_equal(labels, theirs.argmax(1))
    np.testing.assert_allclose(scores, theirs.max(1), rtol=1e-4)
    assert verify(artifact, VerifyOptions(samples=2)).passed


def test_logits4_are_those_of_the_first_map(small_model, small, tmp_path):
    artifact = build(small, tmp_path, output="logits4", imgsz="dynamic")
    assert artifact.sidecar.outputs[0].shape == ("batch", 7, "height/4", "width/4")
    batch = pictures((97, 131))
    small = torch.from_numpy(first_output(artifact, batch))
    assert small.shape == (1, 7, 24, 32)
    whole = torch.nn.functional.interpolate(small, (97, 131), mode="bilinear").numpy()
    theirs = expected(small_model, batch)
    assert np.abs(whole - theirs).max() / theirs.std() < NOISE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fixed_size_that_32_does_not_divide_is_right_too(backend, model, folder, tmp_path):
    artifact = build(folder, tmp_path, backend, imgsz=(75, 107), batch=1)
    batch = pictures((75, 107))
    theirs = expected(model, batch)
    assert np.abs(first_output(artifact, batch) - theirs).max() / theirs.std() < ODD_NOISE


@pytest.mark.parametrize("form", ["plain", "linear", "nchw"])
def test_a_form_takes_bytes_of_any_size_with_channels_last(form, small_model, small, tmp_path):
    artifact = build(small, tmp_path, form=form, imgsz="dynamic", input="uint8", layout="nhwc", color="bgr")
    batch = pictures((75, 107), 2)
    theirs = expected(small_model, batch)
    assert np.abs(first_output(artifact, batch) - theirs).max() / theirs.std() < 3 * NOISE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("imgsz", ["dynamic", (224, 300)])
def test_fp16_gives_nearly_the_same_labels(backend, imgsz, model, folder, tmp_path):
    artifact = build(folder, tmp_path, backend, precision="fp16", imgsz=imgsz)
    batch = pictures((224, 300))
    theirs, ours = expected(model, batch), first_output(artifact, batch)
    assert np.abs(ours - theirs).max() / theirs.std() < 0.02
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.995


def test_an_engine_is_built_for_a_range_of_sizes_and_gives_nearly_the_same_labels_in_fp16(small, tmp_path, run):
    sizes = ("--imgsz", "dynamic", "--min-size", 32, "--opt-size", 96, "--max-size", 512)
    result = run("trt", "--fp16", "--weights", small, *sizes, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    engine = result.json["artifact"]
    assert (engine["task"], engine["target"]["sizes"]) == ("segment", [32, 96, 512])
    report = run("verify", engine["path"], "--samples", 1, "--json").json
    values = {finding["metric"]: finding["value"] for finding in report["findings"]}
    assert values["simulated"] == 1, "every result of the graph that it was built from was rounded to fp16"
    assert values["pixel_agreement"] > 99.5


@pytest.mark.parametrize("settings", [{"dims": (8, 16, 24), "scales": (1, 3)}, {"dims": (8, 12), "scales": (1, 2, 5)}])
def test_other_numbers_of_levels_are_right_at_every_size(settings, tmp_path):
    model = segmenters.transformers_model(**settings)
    artifact = build(segmenters.save(tmp_path / "weights", model), tmp_path, imgsz="dynamic")
    for size in ((64, 64), (75, 107), (32, 40)):
        batch = pictures(size)
        theirs = expected(model, batch)
        assert np.abs(first_output(artifact, batch) - theirs).max() / theirs.std() < limit_of(size)


def test_the_build_is_compared_with_transformers_own_forward(folder, tmp_path):
    for output in ("logits", "labels", "scores"):
        artifact = build(folder, tmp_path / output, reference="transformers", imgsz=96, output=output)
        assert artifact.sidecar.reference.startswith("transformers.models.upernet")


def test_multiply_accumulates_count_the_head_where_it_is_built(folder, tmp_path):
    whole = build(folder, tmp_path, imgsz=96).sidecar
    backbone = build(folder, tmp_path, task="features", imgsz=96).sidecar
    assert whole.macs > 2 * backbone.macs
    assert len(backbone.outputs) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("openvino", "--int8", "--keep", "decode_head.fpn_convs.7"), "the network has no such part"),
        (("onnx", "--int8", "--keep", "decode_head.fpn_convs.0"), "it is not quantized anyway; leave it out"),
        (("openvino", "--int8", "--reduce-zero-label"), "--reduce-zero-label: synthetic images have no masks"),
        (("onnx", "--task", "segment,features"), "segment cannot be combined with other tasks"),
        (("onnx", "--task", "segment", "--output", "top5"), "task segment takes logits, logits4, labels or scores"),
        (("onnx", "--task", "features", "--output", "labels"), "it is of each pixel, for --task segment"),
    ],
)
def test_what_is_not_built_is_refused_in_one_line(words, message, folder, tmp_path, run):
    result = run(*words, "--weights", folder, "-o", tmp_path / "build")
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.glob("build/*"))


def test_commands_that_measure_classes_of_images_refuse_segmentation(dynamic, folder, tmp_path, run):
    for words, message in (
        (
            ("package", dynamic.path, "--for", "kserve", "-o", tmp_path / "package"),
            "--for kserve does not support segmentation",
        ),
        (("bisect", dynamic.path), "bisect measures the parts of a classifier"),
    ):
        result = run(*words)
        assert result.code == 2
        assert message in result.err


def test_sizes_below_32_are_refused(folder, run):
    result = run("onnx", "--weights", folder, "--imgsz", 31)
    assert result.code == 2
    assert "'31': expected a whole number from 32 to 4096, two of these (height, width) or dynamic" in result.err


def test_weights_are_the_same_again_for_the_artifact(dynamic):
    assert weights.reload(dynamic).variant.architecture.decoder.scales == (1, 2, 3, 6)
