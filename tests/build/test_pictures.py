"""`--input image`: pictures of any size go in, and the artifact resizes them as Pillow does."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from exporter import backends
from exporter.artifact.sidecar import Preprocessing
from exporter.bench import Arm, Plan, worker
from exporter.bisect import BisectOptions, bisect
from exporter.data import images, synthetic
from exporter.errors import Unavailable
from exporter.model import picture
from exporter.verify import VerifyOptions, verify
from tests import conftest

RUNTIMES = ("onnxruntime", "openvino")
SIZES = [(97, 211), (300, 200), (227, 640), (480, 333), (511, 187)]
ODD_SIZES = [(1, 1), (1, 700), (200, 1), (2, 3), (64, 64), (73, 73)]  # whose sums are often exactly half a level
CROPS = {
    "center": {"size": 64, "resize": 73},
    "center, half a pixel down": {"size": 64, "resize": 73, "offset": "floor"},
    "center of two sides": {"size": (48, 64), "resize": (50, 80)},
    "squash": {"size": (48, 64), "resize": (48, 64), "crop": "squash"},
    "squash and crop": {"size": 64, "resize": 73, "crop": "squash"},
    "border": {"size": 64, "resize": 64, "crop": "border"},
    "border and fill": {"size": (48, 64), "resize": (40, 57), "crop": "border", "mean": (0.1, 0.5, 0.9)},
    "smaller than the crop": {"size": 80, "resize": 70, "mean": (0.1, 0.5, 0.9)},
}


def pixels_of(size, seed=0, channels=3):
    return synthetic.dead_leaves(size, seed, channels)


def by_pillow(pixels, recipe):
    """What `exporter.data` gives, as whole numbers (C, height, width)."""
    normalized = images.preprocess_pictures(pixels[None], recipe)[0]
    mean, std = (np.array(values)[:, None, None] for values in (recipe.mean, recipe.std))
    return np.rint((normalized * std + mean) * 255)


def differences(recipe, sizes):
    """The largest difference in levels and the share of values that differ, over pictures of several sizes."""
    module, errors = picture.Picture(recipe), []
    for size in sizes:
        pixels = pixels_of(size)
        try:
            expected = by_pillow(pixels, recipe)
        except images.Unreadable:
            continue
        errors.append(np.abs(module(torch.tensor(pixels))[0].numpy() - expected).ravel())
    return np.concatenate(errors).max(), np.mean(np.concatenate(errors) > 0)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("interpolation", ["bilinear", *picture.FILTERS])
def test_every_crop_and_filter_gives_the_pixels_of_pillow(interpolation, crop):
    recipe = Preprocessing(interpolation=interpolation, **CROPS[crop])
    largest, share = differences(recipe, SIZES)
    assert largest <= 1
    assert share <= 0.005
    largest, share = differences(recipe, ODD_SIZES)
    assert largest <= 1
    assert share <= 0.005


def test_the_order_of_passes_is_that_of_pillow(monkeypatch):
    """Of the Pillow that is installed here, and of one that begins with rows."""
    recipe, size = Preprocessing(size=(48, 64), resize=(48, 64), crop="squash"), (73, 73)
    assert differences(recipe, [size])[0] <= 1
    real = Image.Image.resize

    def rows_first(image, wanted, resample):
        return real(real(image, (wanted[0], image.height), resample), wanted, resample)

    monkeypatch.setattr(Image.Image, "resize", rows_first)
    monkeypatch.setattr(picture, "may_begin_with_columns", picture.may_begin_with_columns.__wrapped__)
    assert not picture.may_begin_with_columns()
    assert differences(recipe, [size])[0] <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", *picture.FILTERS])
def test_a_picture_of_the_right_size_is_not_changed(interpolation):
    recipe = Preprocessing(size=64, resize=64, interpolation=interpolation)
    assert differences(recipe, [(64, 64), (64, 100), (300, 64)]) == (0, 0)


def test_another_filter_would_be_seen(monkeypatch):
    monkeypatch.setitem(picture.FILTERS, "bicubic", picture.FILTERS["hamming"])
    largest, share = differences(Preprocessing(size=64, resize=73), SIZES)
    assert largest > 5
    assert share > 0.1


@pytest.mark.parametrize("crop", CROPS)
def test_sizes_are_those_of_the_data(crop):
    """Halves of a pixel apart, which floats round either way."""
    recipe, draw = Preprocessing(**CROPS[crop]), np.random.default_rng(0)
    different = 0
    for height, width in draw.integers(1, 3000, (4000, 2)).tolist():
        try:
            expected = images._resized(width, height, recipe)[::-1]
        except images.Unreadable:
            continue
        rows_and_columns = picture.resized(height, width, recipe)
        different += rows_and_columns != expected
        assert np.abs(np.subtract(rows_and_columns, expected)).max() <= 1
    assert different <= 2


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A function that builds the tiny network for a runtime and precision once."""
    folder, known = tmp_path_factory.mktemp("pictures"), {}

    def build(name="onnxruntime", precision="fp32", **fields):
        key = name, precision, json.dumps(fields)
        if key not in known:
            out = folder / str(len(known))
            known[key] = conftest.build(tiny, out, name, precision, input="image", **fields)
        return known[key]

    return build


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_a_stock_runtime_takes_a_decoded_photograph(built, color, tmp_path):
    artifact = built(color=color)
    (tensor,) = artifact.sidecar.inputs
    assert (tensor.shape, tensor.dtype) == (("height", "width", 3), "uint8")
    pixels = pixels_of((231, 333))
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    taken = pixels if color == "rgb" else np.ascontiguousarray(pixels[..., ::-1])
    (got,) = session.run(None, {"images": taken})
    eager = backends.runtime("eager")
    with eager.open(artifact, eager.options()) as reference:
        (expected,) = reference(pixels[None])
    assert got.shape == (1, 10)
    assert np.abs(got - expected).max() <= 2e-3 * expected.std()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_it_is_verified_with_the_pictures_themselves(built, name, precision, tmp_path):
    artifact = built(name, precision)
    for index, size in enumerate(SIZES):
        Image.fromarray(pixels_of(size, index)).save(tmp_path / f"{index}.png")
    report = verify(artifact, VerifyOptions(data=str(tmp_path)))
    assert report.passed, [finding for finding in report.findings if not finding.passed]
    assert report.value("images") == len(SIZES)


def test_wrong_pixels_do_not_pass(built, monkeypatch):
    """The images of PyTorch are Pillow's, so a picture that is resized otherwise is seen."""
    artifact, real = built(), backends.onnxruntime.as_taken

    def shifted(pictures, recipe):
        return np.roll(real(pictures, recipe), 9, axis=1)

    monkeypatch.setattr(backends.onnxruntime, "as_taken", shifted)
    assert not verify(artifact, VerifyOptions(samples=4)).passed


def test_predict_and_bench_give_it_pictures(built, run, tmp_path):
    artifact = built()
    for index, size in enumerate(SIZES):
        Image.fromarray(pixels_of(size, index)).save(tmp_path / f"{index}.png")
    done = run("predict", artifact.path, tmp_path, "--top", 1, "--json")
    assert done.code == 0, done.err
    eager = backends.runtime("eager")
    lines = [json.loads(line) for line in done.out.splitlines()]
    with eager.open(artifact, eager.options()) as reference:
        for index, size in enumerate(SIZES):
            (logits,) = reference(pixels_of(size, index)[None])
            assert lines[index]["predictions"][0]["class"] == logits.argmax()
    plan = Plan(arms=(Arm(name="a", path="a"),), preprocessing=artifact.sidecar.preprocessing)
    assert [one.shape for one in worker.inputs(plan)] == [(1, *synthetic.picture_size(1), 3)] * 4
    assert artifact.sidecar.batch == 1


def test_bisect_runs_the_network_on_pillows_pixels(built):
    report = bisect(built(), BisectOptions(samples=3))
    assert report.passed, [finding for finding in report.findings if not finding.passed]


def test_a_grey_network_takes_grey_pictures(tmp_path):
    folder = conftest.write_tiny(tmp_path / "w", in_chans=1)
    artifact = conftest.build(folder, tmp_path / "out", input="image", opset=13)
    assert artifact.sidecar.inputs[0].shape == ("height", "width", 1)
    assert verify(artifact, VerifyOptions(samples=4)).passed


REFUSED = {
    ("--layout", "nhwc"): "--layout nhwc: it is for batches, and a picture is (H, W, C)",
    ("--imgsz", "dynamic"): "--imgsz dynamic: pictures of any size are resized to one size",
    ("--batch", "4"): "--batch 4: pictures of any size run one at a time",
    ("--interpolation", "nearest"): "--input image: nearest picks pixels by the last bit of a sum",
    ("--interpolation", "box"): "--input image: box picks pixels by the last bit of a sum",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_options_that_no_graph_has_are_refused(words, tiny, refused, tmp_path):
    message = refused(2, "onnx", "--weights", tiny, "--input", "image", *words, "-o", tmp_path / "o", folder=tmp_path)
    assert REFUSED[words] in message


@pytest.mark.parametrize(("name", "precision"), [("openvino", "bf16"), ("trt", "fp16")])
def test_targets_that_cannot_resize_say_why(name, precision, tiny, refused, tmp_path):
    words = name, "--weights", tiny, f"--{precision}", "--input", "image", "-o", tmp_path / "o"
    message = refused(2, *words, folder=tmp_path)
    assert "--input image: " in message
    assert "give --input uint8, and resize images before the artifact" in message


def test_four_channels_are_refused(refused, tmp_path):
    folder = conftest.write_tiny(tmp_path / "w", in_chans=4)
    message = refused(2, "onnx", "--weights", folder, "--input", "image", "-o", tmp_path / "o", folder=tmp_path)
    assert "--input image: the network takes 4 channels, and pictures have 1 (grey) or 3" in message


def test_a_device_with_other_arithmetic_is_refused(built):
    from exporter.backends.openvino.devices import arithmetic_of

    artifact = built("openvino", "fp16")
    assert arithmetic_of(artifact, "CPU", ["CPU"]) == "f32"
    with pytest.raises(Unavailable, match="pictures are resized in fp32, and GPU computes all of it in f16"):
        arithmetic_of(artifact, "GPU", ["GPU"])


def test_artifacts_of_pictures_and_of_tensors_are_not_timed_together(built, tiny, refused, tmp_path):
    other = conftest.build(tiny, tmp_path)
    message = refused(2, "bench", built().path, other.path)
    assert "its input differs from that of" in message
    assert "takes pictures of any size" in refused(2, "compare", built().path, other.path)


@pytest.mark.parametrize("name", RUNTIMES)
def test_photographs_give_the_classes_of_pillow(name, tmp_path):
    """A network that was trained on photographs answers as PyTorch does for 50 of them."""
    weights = conftest.shared("data", "weights", "convnextv2_atto_imagenette.safetensors")
    photos = conftest.shared("data", "images", "val")
    recipe = {"preprocessing": _options(resize=128), "imgsz": 112, "input": "image"}
    artifact = conftest.build(weights, tmp_path, name, **recipe)
    report = verify(artifact, VerifyOptions(data=str(photos), samples=50))
    assert report.value("top1_agreement") == 100
    assert report.value("cosine") > 0.99999


def _options(**fields):
    from exporter.recipe import PreprocessingOptions

    return PreprocessingOptions(**fields)
