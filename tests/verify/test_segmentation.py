"""Segmentation in `verify`: pixels equal to PyTorch's, and mIoU with masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from exporter import report
from exporter.data import synthetic
from exporter.errors import BadRequest
from exporter.model import weights
from exporter.report import tables
from exporter.verify import VerifyOptions, verify
from exporter.verify.checks import Seen, Subject
from exporter.verify.checks.segmentation import (
    Segmentation,
    areas_of,
    classes_of,
    near_borders,
    parts_of_images,
    shares_of,
    shares_of_masks,
)
from tests.artifact.test_sealed import notes
from tests.conftest import build, copy_artifact
from tests.model import segmenters
from tests.reference import library

library("transformers")
PROCESSOR = {
    "image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = segmenters.transformers_model()
    return segmenters.save(tmp_path_factory.mktemp("upernet"), model, PROCESSOR)


@pytest.fixture(scope="module")
def logits(folder, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("logits"))


@pytest.fixture(scope="module")
def labels(folder, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("labels"), output="labels")


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    """Images whose masks are what the network computes, but a stripe without a class and one of class 0."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    network = weights.load(str(folder))
    for seed in range(3):
        pixels = synthetic.dead_leaves(64, seed, 3)
        Image.fromarray(pixels).save(root / f"images/{seed}.png")
        from exporter.data.images import normalise

        with torch.inference_mode():
            classes = network.model()(torch.from_numpy(normalise(pixels, network.preprocessing))[None]).argmax(1)[0]
        mask = classes.numpy().astype(np.uint8)
        mask[:8] = 255
        mask[8:16] = 0
        Image.fromarray(mask).save(root / f"masks/{seed}.png")
    return root


def test_intersection_over_union_is_that_of_the_definition():
    counts = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(shares_of(areas_of(counts)), [3 / 6, 4 / 7, np.nan])


def areas(images, seed):
    """Pixels of the intersection and of the union of five classes: the fourth is in one image, the fifth in none."""
    rng = np.random.default_rng(seed)
    union = rng.integers(1, 1000, (images, 5))
    union[1:, 3] = union[:, 4] = 0
    return np.stack([(union * rng.beta(8, 2, union.shape)).astype(int), union, union], 1)


def test_the_parts_of_images_have_miou_as_their_mean_and_its_spread_over_draws_of_images():
    drawn = areas(200, 0)
    parts = parts_of_images(drawn)
    assert parts.shape == (200,)
    assert parts.mean() == pytest.approx(np.nanmean(shares_of(drawn[:, :2].sum(0))))
    empty = np.zeros((3, 3, 5), int)
    np.testing.assert_allclose(parts_of_images(np.concatenate([drawn, empty])), parts, err_msg="masks without a class")
    drawn = drawn[:, :, :3]  # a draw without the image of the fourth class has one class less
    parts, rng = parts_of_images(drawn), np.random.default_rng(1)
    draws = [np.nanmean(shares_of(drawn[rng.integers(0, 200, 200), :2].sum(0))) for _ in range(4000)]
    assert parts.std(ddof=1) / np.sqrt(200) == pytest.approx(np.std(draws), rel=0.05)


def test_a_class_that_no_mask_has_is_in_no_mean():
    one = np.array([[[80, 0], [100, 0], [100, 0]]] * 4)
    stray = one.copy()
    stray[0, 1, 1] = 1  # a pixel of another class
    np.testing.assert_array_equal(shares_of_masks(stray), [0.8, np.nan])
    assert parts_of_images(one).mean() == parts_of_images(stray).mean() == pytest.approx(0.8)


def test_of_equal_scores_the_first_class_counts():
    scores = np.zeros((1, 3, 2, 2), np.float32)
    scores[0, 2, 0, 0] = 1
    np.testing.assert_array_equal(classes_of(scores), [[[2, 0], [0, 0]]])


def test_the_band_around_borders_has_three_pixels_on_both_sides():
    classes = np.zeros((3, 20, 20), np.int64)
    classes[0, :, 10:] = classes[2, :, :10] = 4
    classes[1, 0, 0] = 1
    band = near_borders(classes)
    assert (band[[0, 2]] == [7 <= column < 13 for column in range(20)]).all()
    np.testing.assert_array_equal(np.argwhere(band[1]), np.argwhere(np.ones((4, 4))))


def test_agreement_at_borders_counts_the_pixels_of_the_band_alone(labels, data):
    eager = np.zeros((3, 64, 64), np.uint8)
    eager[:, :, 32:] = 1
    got = eager.copy()
    got[:, :, [0, 31]] ^= 1  # one column far from the border, one of the six beside it
    meter = Segmentation(VerifyOptions(data=str(data)), Subject(labels, []))
    meter.add(meter.measure(Seen(np.full(3, -1), (eager,), (got,))), ())
    findings = {finding.metric: finding for finding in meter.findings()}
    assert findings["pixel_agreement"].value == pytest.approx(100 * 62 / 64)
    assert findings["boundary_agreement"].value == pytest.approx(100 * 5 / 6)
    assert findings["boundary_agreement"].detail.startswith("9.4 % of the pixels lie within 3 pixels")
    assert findings["boundary_agreement"].limit is None


@pytest.mark.parametrize("artifact", ["logits", "labels"])
def test_an_artifact_has_the_pixels_and_the_miou_of_pytorch(artifact, data, request):
    report = verify(request.getfixturevalue(artifact), VerifyOptions(data=str(data)))
    assert report.passed
    assert report.value("images") == 3
    assert report.value("pixel_agreement") == pytest.approx(100, abs=0.1)
    assert report.value("miou_to_eager") == pytest.approx(100, abs=0.5)
    drop = report.find("miou_drop")
    assert drop.value == pytest.approx(0, abs=0.1)
    assert drop.low <= drop.value <= drop.high
    assert len(report.find("miou").samples) == 3
    assert np.mean(report.find("miou").samples) == pytest.approx(report.value("miou"), abs=1e-3)
    by_class = {finding.case: finding.value for finding in report.findings if finding.metric == "iou"}
    assert set(by_class) <= set(segmenters.LABELS)
    assert report.value("miou") == pytest.approx(np.mean(list(by_class.values())))
    assert 50 < report.value("miou") < 99, "a stripe has another class than the network says"
    assert any(finding.metric == "cosine" for finding in report.findings) == (artifact == "logits")


def test_without_masks_each_class_is_compared_with_pytorch(labels):
    report = verify(labels, VerifyOptions(samples=3))
    assert report.passed
    assert report.value("miou") is None
    assert {finding.case for finding in report.findings if finding.metric == "iou_to_eager"} <= set(segmenters.LABELS)


def test_other_pixels_than_pytorchs_fail(labels, folder, data):
    class Shifted:
        """A network whose classes are those of the next pixel."""

        def __init__(self, network):
            self.network = network

        def __call__(self, images):
            with torch.inference_mode():
                return (np.roll(self.network(torch.from_numpy(images)).numpy(), 1, -1).astype(np.float32),)

    network = weights.load(str(folder)).model(labels.sidecar.spec)
    report = verify(labels, VerifyOptions(data=str(data)), reference_session=Shifted(network))
    failed = {finding.metric for finding in report.findings if not finding.passed}
    assert {"pixel_agreement", "miou_to_eager"} <= failed


def test_the_gate_compares_miou_on_the_same_masks(labels, data, tmp_path, run):
    for name in ("base", "head"):
        (tmp_path / name).mkdir()
    copies = [copy_artifact(labels, tmp_path / name) for name in ("base", "head")]
    for one in copies:
        assert run("verify", one.path, "--data", data).code == 0
    paths = [f"{one.path}.report.json" for one in copies]
    same = run("compare", *paths, "--fail-on", "miou_drop:0.3", "--json")
    (finding,) = same.json["findings"]
    assert (same.code, finding["value"], finding["low"], finding["high"]) == (0, 0, 0, 0)
    worse = report.load(Path(paths[1]))
    lost = tuple(
        replace(
            one, value=one.value - 5, samples=tuple(part - 5 + 0.1 * index for index, part in enumerate(one.samples))
        )
        if one.metric == "miou"
        else one
        for one in worse.findings
    )
    report.save(replace(worse, findings=lost), Path(paths[1]))
    result = run("compare", *paths, "--fail-on", "miou_drop:0.3")
    assert result.code == 6
    assert "REGRESSION of miou_drop" in result.out
    assert run("compare", *(one.path for one in copies), "--data", data, "--fail-on", "miou_drop:0.3").code == 0


def test_a_class_of_one_pixel_decides_nothing(labels):
    """Its IoU is 0 where rounding flips that pixel, and the mean of few classes would fall by many points."""
    meter = Segmentation(VerifyOptions(), Subject(labels, []))
    eager = np.zeros((1, 200, 200), np.int64)
    eager[0, :, 100:] = 1
    got = eager.copy()
    eager[0, 0, 0] = 2
    meter.add(meter.measure(Seen(np.full(1, -1), (eager,), (got,))), ("a",))
    findings = {finding.metric: finding for finding in meter.findings()}
    assert findings["miou_to_eager"].passed
    assert findings["miou_to_eager"].detail.startswith("mean over 2 of")


def test_limits_of_the_user_hold(labels, data):
    assert verify(labels, VerifyOptions(data=str(data), max_drop=1, min_agreement=99)).passed
    report = verify(labels, VerifyOptions(data=str(data), max_drop=-1))
    assert [finding.metric for finding in report.findings if not finding.passed] == ["miou_drop"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 1}, "--max-drop: synthetic has no labels to measure a drop on"),
        ({"reduce_zero_label": True}, "--reduce-zero-label: synthetic has no masks for this artifact"),
        ({"min_cosine": 0.9}, "--min-cosine: the outputs are pixel_classes"),
        ({"atol": 0.1}, "--atol: numbers of classes have no largest error; give --min-agreement"),
        ({"outputs": "classes"}, "--outputs classes: the outputs of task segment are"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, labels):
    with pytest.raises(BadRequest, match=message):
        verify(labels, VerifyOptions(**options))


def test_masks_without_any_class_fail_and_no_difference_is_looked_for(labels, data, tmp_path, run):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "masks").iterdir():
        Image.new("L", (64, 64), 255).save(path)
    result = run("verify", copy_artifact(labels, tmp_path).path, "--data", tmp_path / "data")
    assert result.code == 5
    assert "no pixel of the masks has a class" in " ".join(result.out.split())
    assert "the report is" in result.out.splitlines()[-1]


def test_pixels_that_differ_are_looked_for_in_the_blocks(logits, data, tmp_path, run):
    path = copy_artifact(logits, tmp_path).path
    result = run("verify", path, "--data", data, "--atol", 1e-12)
    assert result.code == 5
    following = f"find the block that differs: convnext-export verify {path} --data {data} --blocks"
    assert result.out.splitlines()[-1] == following
    result = run("verify", path, "--data", data, "--atol", 1e-12, "--reduce-zero-label")
    assert result.out.splitlines()[-1] == following.replace("--blocks", "--reduce-zero-label --blocks")


def test_images_without_masks_have_a_note(labels, data):
    with notes() as lines:
        verify(labels, VerifyOptions(data=str(data / "images")))
    assert f"{data / 'images'} has no masks: pixels are compared with PyTorch's, and mIoU is not measured" in lines


def test_masks_of_0_and_255_are_noted_as_they_have_one_class_alone(labels, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    half = np.kron([[0, 255]], np.ones((64, 32))).astype(np.uint8)
    for path in (tmp_path / "data" / "masks").iterdir():
        Image.fromarray(half).save(path)
    with notes() as lines:
        verify(labels, VerifyOptions(data=str(tmp_path / "data")))
    assert any(line.startswith("the masks have class 0 alone; 255 is no class") for line in lines)
    with notes() as lines:
        verify(labels, VerifyOptions(data=str(data)))
    assert not any("the masks have class" in line for line in lines)


def test_masks_that_count_from_one_are_read_so(labels, data):
    first = verify(labels, VerifyOptions(data=str(data)))
    other = verify(labels, VerifyOptions(data=str(data), reduce_zero_label=True))
    assert other.value("miou") < first.value("miou")


def test_outputs_before_the_resize_use_the_images_and_say_that_masks_are_not_used(folder, data, tmp_path, run):
    result = run("verify", build(folder, tmp_path, output="logits4").path, "--data", data)
    assert f"{data}: masks are ignored, because the artifact returns no classes" in " ".join(result.err.split())
    assert f"3 images of {data}" in " ".join(result.err.split()), "masks are no images"


def test_the_table_of_reports_has_miou_and_pixels(labels, data):
    table = tables.accuracy([verify(labels, VerifyOptions(data=str(data)))])
    (row,) = table.rows
    assert table.columns[3:6] == ("mIoU", "eager", "agreement")
    assert row[3] == row[4], "the artifact is as accurate as PyTorch"
    assert row[3].startswith("mIoU ")
    assert row[5] == "100.00 %"
