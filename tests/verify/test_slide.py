"""Sliding windows: their places, the mean of their logits, and what the command refuses."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from msgspec import to_builtins
from msgspec.structs import replace
from PIL import Image

from benchmarks import scenes as drawing
from exporter.data.images import Unreadable, normalise
from exporter.errors import BadRequest
from exporter.model import weights
from exporter.verify import VerifyOptions, verify
from exporter.verify.slide import Windows, over, starts, whole, windows_of
from tests.conftest import build
from tests.model import segmenters
from tests.reference import library

library("transformers")


@pytest.mark.parametrize("side", [64, 65, 100, 106, 107, 150, 500])
def test_windows_lie_where_mmsegmentation_puts_them(side):
    """Its documentation of `slide_inference`: ⌈(side − window) / stride⌉ + 1 windows, the last one moved back."""
    window, stride = 64, 42
    count = math.ceil((side - window) / stride) + 1
    expected = [min(number * stride, side - window) for number in range(count)]
    assert starts(side, window, stride) == expected


def test_logits_are_the_mean_of_the_windows_over_a_pixel():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def run(pixels):
        assert pixels.shape == (1, 3, 32, 32)
        return (torch.nn.functional.conv2d(torch.from_numpy(pixels), weight, padding=1).numpy(),)

    pixels = np.random.default_rng(0).normal(size=(1, 3, 41, 75)).astype(np.float32)
    (logits,) = over(Windows((32, 32), (21, 21)), run, pixels)
    total, count = torch.zeros(1, 5, 41, 75), torch.zeros(41, 75)
    for top in (0, 9):
        for left in (0, 21, 42, 43):
            part = run(pixels[:, :, top : top + 32, left : left + 32])[0]
            total += torch.nn.functional.pad(torch.from_numpy(part), (left, 43 - left, top, 9 - top))
            count[top : top + 32, left : left + 32] += 1
    np.testing.assert_allclose(logits, total / count, atol=1e-6)


def test_an_image_keeps_its_ratio_of_sides(tmp_path):
    Image.new("RGB", (200, 90)).save(tmp_path / "a.png")
    recipe = whole(drawing.RECIPE, Windows((64, 64), (42, 42)), tmp_path / "a.png")
    assert (recipe.size, recipe.resize, recipe.crop) == ((64, 142), (64, 142), "squash")
    Image.new("RGB", (20, 400)).save(tmp_path / "b.png")
    with pytest.raises(Unreadable, match="20×400 pixels: one side is more than 16 times the other"):
        whole(drawing.RECIPE, Windows((64, 64), (42, 42)), tmp_path / "b.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("upernet"), segmenters.transformers_model())


@pytest.fixture(scope="module")
def fixed(folder, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("fixed"), imgsz=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 64}, "--window: only applies to sliding windows; add --slide"),
        ({"slide": True, "window": 96}, "--window 96: the artifact takes 64 pixels; leave it out, or build it"),
        ({"slide": True, "stride": 65}, "--stride 65: larger than the windows of 64"),
        ({"slide": True, "blocks": True}, "--blocks: compares images of one size, and --slide keeps their aspect"),
        ({"slide": True}, "--slide: synthetic has no masks to measure mIoU with"),
    ],
)
def test_windows_that_do_not_fit_are_refused(options, message, fixed):
    with pytest.raises(BadRequest, match=message):
        verify(fixed, VerifyOptions(**options))


def test_outputs_that_cannot_be_averaged_are_refused(fixed, artifacts):
    export = fixed.sidecar.recipe["export"] | {"output": "labels"}
    labels = replace(fixed.sidecar, recipe=fixed.sidecar.recipe | {"export": export})
    with pytest.raises(BadRequest, match="the artifact returns labels; build it with --output logits"):
        windows_of(labels, VerifyOptions(slide=True))
    with pytest.raises(BadRequest, match="windows are for --task segment, and this is classify"):
        windows_of(artifacts["onnxruntime", "fp32"].sidecar, VerifyOptions(slide=True))


def test_the_configuration_of_a_checkpoint_says_the_windows(fixed, tmp_path):
    model = segmenters.transformers_model()
    text = "model = dict(decode_head=dict(type='UPerHead'), {})"
    slide = "test_cfg=dict(mode='slide', crop_size=(96, 96), stride=(61, 61))"
    of_loop = f"test_cfg = dict(type='TestLoop')\n{slide}"
    for words, expected in (
        ("test_cfg=dict(mode='whole')", ()),
        (slide, (96, 96, 61, 61)),
        (of_loop, (96, 96, 61, 61)),
    ):
        path = tmp_path / "a.pth"
        torch.save({"meta": {"config": text.format(words)}, "state_dict": segmenters.state_of(model)}, path)
        arch = weights.load(str(path)).variant.architecture
        assert arch.decoder.windows == expected
    of_any_size = (replace(fixed.sidecar.outputs[0], shape=("batch", 7, "height", "width")),)
    sidecar = replace(fixed.sidecar, architecture=to_builtins(arch), outputs=of_any_size)
    assert windows_of(sidecar, VerifyOptions(slide=True)) == Windows((96, 96), (61, 61))
    assert windows_of(sidecar, VerifyOptions(slide=True, window=48)) == Windows((48, 48), (32, 32))


@pytest.mark.slow
def test_sliding_over_scenes_of_any_ratio_gives_the_miou_of_windows(scenes, tmp_path):
    """Scenes of 96 × 144 beside each other, whose windows are computed again with transformers' forward."""
    artifact = build(scenes / "model", tmp_path, imgsz=96)
    wide = {}
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    for seed in range(4):
        pairs = [drawing.scene(seed, True), drawing.scene(seed + 50, True)]
        pixels, mask = (np.hstack([one[:, :72] for one in arrays]) for arrays in zip(*pairs, strict=True))
        wide[seed] = pixels, mask
        Image.fromarray(pixels).save(tmp_path / f"images/{seed}.png")
        Image.fromarray(mask).save(tmp_path / f"annotations/{seed}.png")
    report = verify(artifact, VerifyOptions(data=str(tmp_path), slide=True))
    assert report.passed
    assert re.search(r"in windows of 96 pixels, stride 64, over images", report.find("images").detail)
    model = library("transformers").UperNetForSemanticSegmentation.from_pretrained(scenes / "model").eval()
    both, union = np.zeros(5), np.zeros(5)
    for pixels, mask in wide.values():
        batch = torch.from_numpy(normalise(pixels, drawing.RECIPE))[None]
        with torch.inference_mode():
            parts = [model(batch[..., left : left + 96]).logits for left in (0, 48)]
        total = torch.zeros(1, 5, 96, 144)
        total[..., :96] += parts[0]
        total[..., 48:] += parts[1]
        total[..., 48:96] /= 2
        classes = total.argmax(1)[0].numpy()
        for label in range(5):
            both[label] += ((mask == label) & (classes == label)).sum()
            union[label] += ((mask == label) | (classes == label)).sum()
    assert report.value("miou_eager") == pytest.approx(100 * (both / union).mean(), abs=1e-3)
    assert report.value("pixel_agreement") > 99.9
    assert verify(artifact, VerifyOptions(data=str(tmp_path))).value("miou") < report.value("miou") - 1
