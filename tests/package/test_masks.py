"""`package --for python` of segmentation: masks as `predict` writes them, without PyTorch and without this tool."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from exporter import package, predict
from exporter.data.synthetic import dead_leaves
from exporter.errors import BadRequest
from exporter.predict import PredictOptions
from tests.conftest import build
from tests.model import segmenters
from tests.package.conftest import execute
from tests.reference import library

library("transformers")
PROCESSOR = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("upernet"), segmenters.transformers_model(), PROCESSOR)


@pytest.mark.parametrize(("backend", "output"), [("onnxruntime", "labels"), ("openvino", "logits")])
def test_the_masks_of_a_package_are_those_of_predict(backend, output, folder, bare, tmp_path):
    artifact, out = build(folder, tmp_path, backend, output=output), tmp_path / "package"
    package.package(artifact, "python", out)
    assert (out / "expected.npz").stat().st_size < 20_000, "classes, not logits"
    Image.fromarray(dead_leaves((75, 107), 3)).save(tmp_path / "photo.jpg")
    result = execute(bare, "predict.py", tmp_path / "photo.jpg", folder=out)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    predict.predict(artifact, [str(tmp_path / "photo.jpg")], PredictOptions(), tmp_path / "masks")
    (path,) = (tmp_path / "masks").rglob("photo.png")
    expected = np.asarray(Image.open(path))
    np.testing.assert_array_equal(np.asarray(Image.open(out / record["mask"])), expected)
    assert expected.shape == (75, 107)
    assert sum(one["share"] for one in record["classes"]) == pytest.approx(1, abs=1e-5)
    assert record["classes"][0]["label"] == segmenters.LABELS[record["classes"][0]["class"]]
    result = execute(bare, "predict.py", path, path, folder=out)
    assert result.returncode == 1
    assert result.stderr.startswith("two images have one name, and so would their masks")
    result = execute(bare, "selftest.py", folder=out)
    assert result.stdout.splitlines() == [f"{output}: 0 % of the pixels have another class, limit 0.1 %", "passed"]
    with np.load(out / "expected.npz") as arrays:
        np.savez(out / "expected.npz", **{name: arrays[name] ^ 1 for name in arrays})
    result = execute(bare, "selftest.py", folder=out)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "FAILED")


def test_masks_that_no_package_has_are_refused(folder, tmp_path):
    artifact = build(folder, tmp_path, output="logits4")
    with pytest.raises(BadRequest, match="built with --output logits4; package one with --output labels or logits"):
        package.package(artifact, "python", tmp_path / "package")
    with pytest.raises(BadRequest, match="--for web does not support segmentation; give --for python"):
        package.package(artifact, "web", tmp_path / "package")
