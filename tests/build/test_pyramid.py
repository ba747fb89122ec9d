"""Artifacts of feature pyramids: one graph that is right at every size, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.data import images, synthetic
from exporter.model import weights
from exporter.verify import VerifyOptions, verify
from tests.build.maps import outputs, pictures
from tests.conftest import build, needs_bf16
from tests.model import detectors
from tests.reference import library

library("transformers")
SIZES = ((256, 256), (320, 448), (300, 451), (75, 107), (33, 47), (32, 32))
NOISE = 1e-5  # of the spread of a map
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def model():
    return detectors.detector()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return detectors.save(tmp_path_factory.mktemp("detector") / "mask_rcnn.pth", model)


def differences(artifact, model, batch):
    """Of each map, as a share of its spread."""
    theirs = detectors.maps(model, torch.from_numpy(batch))
    ours = outputs(artifact, batch)
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    return [np.abs(a - b).max() / b.std() for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture(scope="module", params=BACKENDS)
def dynamic(request, source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("dynamic"), request.param, imgsz="dynamic")


def test_one_dynamic_graph_gives_every_map_at_every_size(dynamic, model):
    sidecar = dynamic.sidecar
    assert sidecar.task == "pyramid"
    assert [tensor.name for tensor in sidecar.outputs] == ["p2", "p3", "p4", "p5", "p6"]
    assert sidecar.outputs[1].shape == ("batch", 12, "height/8", "width/8")
    for size in SIZES:
        assert max(differences(dynamic, model, pictures(size, 2 if size[0] < 100 else 1))) < NOISE, size


def test_a_graph_of_one_size_takes_bytes_with_channels_last(model, source, tmp_path):
    artifact = build(source, tmp_path, form="linear", imgsz=(75, 107), input="uint8", layout="nhwc", color="bgr")
    assert [tensor.shape[2:] for tensor in artifact.sidecar.outputs] == [(18, 26), (9, 13), (4, 6), (2, 3), (1, 2)]
    recipe = artifact.sidecar.preprocessing.of_network()
    batch = images.normalise(synthetic.dead_leaves((75, 107), 0, 3), recipe)[None]
    assert max(differences(artifact, model, batch)) < 3 * NOISE


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "fp16"), ("openvino", "fp16"), ("openvino", "bf16")]
)
def test_lower_precisions_pass_verification_map_by_map(backend, precision, model, source, tmp_path):
    needs_bf16(backend, precision)
    artifact = build(source, tmp_path, backend, precision, imgsz=(75, 107))
    assert max(differences(artifact, model, pictures((75, 107)))) < (0.02 if precision == "fp16" else 0.2)
    report = verify(artifact, VerifyOptions(samples=3))
    assert report.passed
    assert "of the standard deviation of p" in report.find("max_abs").detail


def test_a_map_that_differs_fails(dynamic, source):
    class Shifted:
        """A network whose third map is that of the next position."""

        def __init__(self):
            self.network = weights.load(str(source)).model()

        def __call__(self, batch):
            with torch.inference_mode():
                maps = [one.numpy() for one in self.network(torch.from_numpy(batch))]
            maps[2] = np.roll(maps[2], 1, -1)
            return tuple(maps)

    report = verify(dynamic, VerifyOptions(samples=1), reference_session=Shifted())
    assert not report.find("max_abs").passed
    assert "of p4" in report.find("max_abs").detail


def test_levels_by_convolutions_are_named_by_their_strides(tmp_path):
    model = detectors.detector(start_level=1, added="on_output", relu=True)
    neck = (
        "dict(type='FPN', in_channels=[8, 16, 24, 32], out_channels=12, start_level=1, num_outs=5, "
        "add_extra_convs='on_output', relu_before_extra_convs=True)"
    )
    artifact = build(detectors.save(tmp_path / "a.pth", model, neck=neck), tmp_path, imgsz="dynamic")
    assert [tensor.name for tensor in artifact.sidecar.outputs] == ["p3", "p4", "p5", "p6", "p7"]
    for size in ((75, 107), (128, 160)):
        assert max(differences(artifact, model, pictures(size))) < NOISE


def test_the_build_is_compared_with_the_users_own_detector(source, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from tests.model import detectors\n\n\ndef model():\n    return detectors.detector()"
    )
    monkeypatch.chdir(tmp_path)
    artifact = build(source, tmp_path / "out", reference="mine:model", imgsz=64)
    assert artifact.sidecar.reference == "tests.model.detectors.Detector"


def test_an_engine_is_built_and_its_graph_has_the_same_maps_in_fp16(source, tmp_path, run):
    result = run("trt", "--fp16", "--weights", source, "--imgsz", 64, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    report = run("verify", result.json["artifact"]["path"], "--samples", 1, "--json").json
    values = {finding["metric"]: finding["value"] for finding in report["findings"]}
    assert values["simulated"] == 1
    assert values["cosine"] > 0.9999


def test_the_backbone_alone_has_fewer_multiply_accumulates(dynamic, source, tmp_path):
    backbone = build(source, tmp_path, task="features", imgsz=(800, 1344)).sidecar
    assert dynamic.sidecar.macs > 1.5 * backbone.macs
    assert [tensor.name for tensor in backbone.outputs] == ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("onnx", "--int8"), "--task pyramid: an FPN is not quantized, so int8 is not built; give fp16"),
        (("onnx", "--task", "pyramid,features"), "pyramid cannot be combined with other tasks"),
        (("onnx", "--output", "labels"), "it is of each pixel, for --task segment"),
        (("onnx", "--task", "segment"), "--task segment takes UPerNet"),
    ],
)
def test_what_is_not_built_is_refused_in_one_line(words, message, source, tmp_path, run):
    result = run(*words, "--weights", source, "-o", tmp_path / "build")
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.glob("build/*"))


def test_commands_take_a_pyramid_or_refuse_it_in_one_line(dynamic, source, tmp_path, run):
    result = run("inspect", dynamic.path)
    assert result.code == 0
    assert "level 6 of the feature pyramid" in result.out
    Image.fromarray(synthetic.dead_leaves((60, 80), 0, 3)).save(tmp_path / "a.png")
    result = run("predict", dynamic.path, tmp_path / "a.png", "-o", tmp_path / "maps.npz")
    assert result.code == 0, result.err
    with np.load(tmp_path / "maps.npz") as arrays:
        assert arrays["p2"].shape == (1, 12, 200, 336)
        assert arrays["p6"].shape == (1, 12, 13, 21)
    for words, message in (
        (("predict", dynamic.path, tmp_path / "a.png"), "the outputs are maps or tokens; write them with -o FILE.npz"),
        (
            ("optimize", "--weights", source, "-o", tmp_path / "best"),
            "optimize measures accuracy, and maps of --task pyramid have none",
        ),
        (("bisect", dynamic.path), "this is --task pyramid; verify --blocks"),
    ):
        result = run(*words)
        assert result.code == 2
        assert message in result.err
