"""`package` of segmentation: masks as `predict` writes them, without PyTorch and without this tool."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from exporter import backends, package, predict
from exporter.data.synthetic import dead_leaves
from exporter.errors import BadRequest
from exporter.package.destinations.triton import TritonOptions
from exporter.predict import PredictOptions
from exporter.recipe import PreprocessingOptions
from exporter.verify import VerifyOptions, verify
from tests.artifact.test_sealed import notes
from tests.conftest import build
from tests.model import segmenters
from tests.package.conftest import execute
from tests.package.servers import served
from tests.reference import library

library("transformers")
PROCESSOR = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("upernet"), segmenters.transformers_model(), PROCESSOR)


def predicted_mask(artifact, folder):
    """The file and the classes of the mask that `predict` writes for `photo.jpg`."""
    predict.predict(artifact, [str(folder / "photo.jpg")], PredictOptions(), folder / "masks")
    (path,) = (folder / "masks").rglob("photo.png")
    return path, np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("destination", "imgsz"), [("triton", None), ("triton", "dynamic"), ("ovms", None)], ids=lambda value: str(value)
)
def test_the_masks_of_a_client_of_a_server_are_those_of_predict(destination, imgsz, folder, bare, tmp_path):
    artifact, out = build(folder, tmp_path, output="labels", imgsz=imgsz), tmp_path / "package"
    package.package(artifact, destination, out)
    Image.fromarray(dead_leaves((75, 107), 3)).save(tmp_path / "photo.jpg")
    runtime, sidecar = backends.runtime("onnxruntime"), artifact.sidecar
    with runtime.open(artifact, runtime.options()) as session:

        def labels(batch):
            return [session(batch)[0].astype(np.uint8)]

        with served(artifact.path.stem, labels, sidecar.inputs[0], sidecar.outputs) as url:
            result = execute(bare, "client.py", "--url", url, tmp_path / "photo.jpg", folder=out)
            tested = execute(bare, "selftest.py", url, folder=out)
    assert result.returncode == 0, result.stderr
    _, expected = predicted_mask(artifact, tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(out / json.loads(result.stdout)["mask"])), expected)
    assert tested.stdout.splitlines() == ["labels: 0 % of the pixels have another class, limit 0.1 %", "passed"]


def test_triton_gets_the_types_and_sides_of_masks(folder, tmp_path):
    artifact = build(folder, tmp_path, output="labels", imgsz="dynamic")
    package.package(artifact, "triton", tmp_path / "package", own=TritonOptions(ensemble=True))
    config = (tmp_path / "package" / "models" / artifact.path.stem / "config.pbtxt").read_text()
    assert re.search(r'output \{\s+name: "labels"\s+data_type: TYPE_UINT8\s+dims: \[-1, -1\]', config)
    assert "Pillow" in (tmp_path / "package" / "requirements.txt").read_text(), "the client writes masks"


@pytest.mark.parametrize(("backend", "output"), [("onnxruntime", "labels"), ("openvino", "logits")])
def test_the_masks_of_a_package_are_those_of_predict(backend, output, folder, bare, tmp_path):
    artifact, out = build(folder, tmp_path, backend, output=output), tmp_path / "package"
    package.package(artifact, "python", out)
    assert (out / "expected.npz").stat().st_size < 20_000, "classes, not logits"
    Image.fromarray(dead_leaves((75, 107), 3)).save(tmp_path / "photo.jpg")
    result = execute(bare, "predict.py", tmp_path / "photo.jpg", folder=out)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    path, expected = predicted_mask(artifact, tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(out / record["mask"])), expected)
    assert expected.shape == (75, 107)
    assert sum(one["share"] for one in record["classes"]) == pytest.approx(1, abs=1e-5)
    assert record["classes"][0]["label"] == segmenters.LABELS[record["classes"][0]["class"]]
    result = execute(bare, "predict.py", path, path, folder=out)
    assert result.returncode == 1
    assert result.stderr.startswith("two images have one name, and so would their masks")
    result = execute(bare, "predict.py", tmp_path / "photo.jpg", folder=out)
    assert (result.returncode, result.stdout) == (1, ""), "the mask is there"
    assert result.stderr.startswith("photo_mask.png already exists")
    result = execute(bare, "selftest.py", folder=out)
    assert result.stdout.splitlines() == [f"{output}: 0 % of the pixels have another class, limit 0.1 %", "passed"]
    with np.load(out / "expected.npz") as arrays:
        np.savez(out / "expected.npz", **{name: arrays[name] ^ 1 for name in arrays})
    result = execute(bare, "selftest.py", folder=out)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "FAILED")


def test_a_mask_of_an_image_that_is_stretched_and_cut_is_that_of_predict(folder, bare, tmp_path):
    artifact, out = (
        build(folder, tmp_path, output="labels", preprocessing=PreprocessingOptions(resize=72)),
        tmp_path / "package",
    )
    package.package(artifact, "python", out)
    Image.fromarray(dead_leaves((75, 107), 3)).save(tmp_path / "photo.jpg")
    result = execute(bare, "predict.py", tmp_path / "photo.jpg", folder=out)
    assert result.returncode == 0, result.stderr
    _, expected = predicted_mask(artifact, tmp_path)
    assert expected.shape == (64, 64)
    np.testing.assert_array_equal(np.asarray(Image.open(out / json.loads(result.stdout)["mask"])), expected)


def write_pair(folder):
    """An image and its mask of 0 and 1, as those of a network of one class."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(dead_leaves(64, 1, 3)).save(folder / "images" / "a.png")
    Image.fromarray(np.kron([[0, 1]], np.ones((64, 32))).astype(np.uint8)).save(folder / "masks" / "a.png")


def test_masks_of_one_class_are_refused(tmp_path):
    model = segmenters.transformers_model(dims=(4, 8), width=4, labels=["road"])
    artifact = build(segmenters.save(tmp_path / "weights", model, PROCESSOR), tmp_path)
    with pytest.raises(BadRequest, match="the network has one class, so every pixel of a mask would have it"):
        package.package(artifact, "python", tmp_path / "package")
    with pytest.raises(BadRequest, match="the network has one class, so every pixel of a mask would have it"):
        predict.predict(artifact, ["photo.jpg"], PredictOptions(), tmp_path / "masks")
    write_pair(tmp_path / "data")
    with notes() as lines:
        report = verify(artifact, VerifyOptions(data=str(tmp_path / "data")))
    assert f"{tmp_path / 'data'}: masks are ignored, because the network has one class" in lines
    assert report.passed
    report = verify(artifact, VerifyOptions(samples=2))
    assert report.find("pixel_agreement") is None
    assert report.find("cosine") is not None
    with pytest.raises(BadRequest, match="the network has one class, which every pixel has; give --min-cosine"):
        verify(artifact, VerifyOptions(samples=2, min_agreement=99))


def test_masks_that_no_package_has_are_refused(folder, tmp_path):
    artifact = build(folder, tmp_path, output="logits4")
    with pytest.raises(BadRequest, match="built with --output logits4; package one with --output labels or logits"):
        package.package(artifact, "python", tmp_path / "package")
    with pytest.raises(BadRequest, match=r"built with --output logits4; package one with --output labels$"):
        package.package(artifact, "web", tmp_path / "package")
    with pytest.raises(BadRequest, match="does not support segmentation; give --for ovms, python, triton or web"):
        package.package(artifact, "kserve", tmp_path / "package")
