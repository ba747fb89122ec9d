"""A trained segmenter through the whole way: artifacts in lower precision on held-out scenes with masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import scenes as drawing
from exporter.data.images import normalise
from exporter.verify import VerifyOptions, verify
from tests.conftest import build
from tests.reference import library

pytestmark = pytest.mark.slow


def test_the_network_has_learned_the_held_out_scenes(scenes, half_scenes):
    """mIoU of transformers' own forward, counted pixel by pixel, is what `verify` reports."""
    model = library("transformers").UperNetForSemanticSegmentation.from_pretrained(scenes / "model").eval()
    both, union = np.zeros(5), np.zeros(5)
    for seed in range(drawing.HELD_OUT):
        pixels, mask = drawing.scene(seed, held_out=True)
        with torch.inference_mode():
            classes = model(torch.from_numpy(normalise(pixels, drawing.RECIPE))[None]).logits.argmax(1)[0].numpy()
        for label in range(5):
            both[label] += ((mask == label) & (classes == label)).sum()
            union[label] += ((mask == label) | (classes == label)).sum()
    expected = 100 * (both / union).mean()
    assert expected > 80
    report = verify(half_scenes, VerifyOptions(data=str(scenes / "val")))
    assert report.value("miou_eager") == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_fp16_gives_a_trained_network_the_same_classes(backend, scenes, half_scenes, tmp_path):
    artifact = half_scenes if backend == "onnxruntime" else build(scenes / "model", tmp_path, backend, "fp16")
    report = verify(artifact, VerifyOptions(data=str(scenes / "val"), min_agreement=99.9, max_drop=0.1))
    assert report.passed
    assert report.value("images") == drawing.HELD_OUT
    assert report.value("pixel_agreement") > 99.9
    assert 99 < report.value("boundary_agreement") <= report.value("pixel_agreement"), "classes change at borders first"
    assert {finding.case for finding in report.findings if finding.metric == "iou"} == set(drawing.LABELS)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_gives_nearly_every_pixel_the_same_class(backend, scenes, tmp_path):
    (calib := tmp_path / "calib").mkdir()
    for seed in range(20):
        Image.fromarray(drawing.scene(seed)[0]).save(calib / f"{seed}.png")
    data = {"calib": str(calib), "data": str(scenes / "val")}
    artifact = build(scenes / "model", tmp_path, backend, "int8", **data)
    report = verify(artifact, VerifyOptions(data=str(scenes / "val"), min_agreement=99.0, max_drop=0.3))
    assert report.passed
    assert artifact.sidecar.quantization.images == 16, "are enough for outputs of pixels"
    assert artifact.sidecar.quantization.kept == ()
    in_head = [name for name in artifact.sidecar.quantization.layers if name.startswith("decode_head.")]
    assert len(in_head) == (0 if backend == "onnxruntime" else 10)
