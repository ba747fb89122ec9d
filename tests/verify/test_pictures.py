"""Pictures of masks in a report and on its page."""

from __future__ import annotations

import base64
import io
import re

import msgspec
import numpy as np
import pytest
from PIL import Image

from exporter import report as reports
from exporter.data.masks import colors
from exporter.report import rendering
from exporter.verify import VerifyOptions, verify
from exporter.verify.pictures import EQUAL_GREY, MOST, NO_CLASS_GREY, SIDE, Worst, compared


def pixels(png):
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        return np.asarray(image.convert("RGB"))


def test_the_images_that_differ_most_are_kept_worst_first():
    worst = Worst()
    reference = np.zeros((10, 8, 8), np.int64)
    got = reference.copy()
    for index in range(10):
        got[index].flat[: (7 * index) % 10] = 1  # 0, 7, 4, 1, 8, 5, 2, 9, 6, 3 pixels
    worst.add([f"{index}.png" for index in range(5)], compared(reference[:5], got[:5]), "masks")
    worst.add([f"{index}.png" for index in range(5, 10)], compared(reference[5:], got[5:]), "masks")
    pictures = worst.pictures()
    assert [picture.name for picture in pictures] == ["7.png", "4.png", "1.png", "8.png", "5.png", "2.png"]
    assert len(pictures) == MOST
    assert pictures[0].agreement == pytest.approx(100 * 55 / 64)


def test_a_picture_has_the_colours_of_classes_and_of_differences():
    expected = np.full((1, 300, 1000), 2)
    expected[0, :, 500:] = -1
    classes = expected.clip(0)
    classes[0, :150, :500] = 3
    worst = Worst()
    worst.add([], compared(expected, classes), "masks")
    (picture,) = worst.pictures()
    assert picture.agreement == 50
    reference, artifact, difference = map(pixels, picture.images)
    assert reference.shape[0] < reference.shape[1] <= SIDE
    assert [*reference[0, 0]] == [*colors()[2]]
    assert [*reference[0, -1]] == [NO_CLASS_GREY] * 3 == [*difference[0, -1]]
    assert [*artifact[0, 0]] == [*colors()[3]]
    assert [*difference[0, 0]] == [*colors()[3].clip(90)]
    assert [*difference[-1, 0]] == [EQUAL_GREY] * 3


@pytest.mark.slow
def test_the_page_shows_six_images_of_a_trained_network(half_scenes, scenes, tmp_path):
    report = verify(half_scenes, VerifyOptions(data=str(scenes / "val")))
    assert len(report.pictures) == 6
    assert {picture.reference for picture in report.pictures} == {"masks"}
    reports.save(report, tmp_path / "a.report.json")
    assert (tmp_path / "a.report.json").stat().st_size < 300_000
    page, _ = rendering.rendered([tmp_path / "a.report.json"], "html")
    assert page.count('src="data:image/png;base64,') == 18
    shown = re.findall(r'base64,([^"]+)"', page)
    np.testing.assert_array_equal(pixels(shown[1]), pixels(report.pictures[0].images[1]))
    assert (
        f"{report.pictures[0].name}: {report.pictures[0].agreement:.2f} % of the pixels have the class on the left"
        in page
    )
    without = verify(half_scenes, VerifyOptions(samples=1))
    assert without.pictures[0].reference == "eager PyTorch"


def test_a_later_timing_keeps_the_pictures(tmp_path):
    worst = Worst()
    worst.add(["a"], compared(np.zeros((1, 4, 4), np.int64), np.ones((1, 4, 4), np.int64)), "masks")
    finding = reports.Finding(check="segmentation", metric="miou", value=1.0)
    verified = reports.Report(
        passed=True, recipe={"verify": {}}, artifact={"sha256": "0"}, environment={}, findings=(finding,),
        pictures=worst.pictures(),
    )  # fmt: skip
    timed = msgspec.structs.replace(verified, recipe={"bench": {}}, pictures=(), findings=())
    reports.save_merged(verified, tmp_path / "a.json")
    assert reports.save_merged(timed, tmp_path / "a.json").pictures == verified.pictures
    again = msgspec.structs.replace(verified, pictures=())
    assert reports.save_merged(again, tmp_path / "a.json").pictures == ()


def test_a_name_or_picture_of_a_report_stays_text(tmp_path):
    attack = '"><script>document.title=1</script>'
    picture = reports.Picture(name=attack, reference=attack, agreement=1.0, images=(attack, attack, attack))
    report = reports.Report(passed=True, recipe={}, artifact={}, environment={}, findings=(), pictures=(picture,))
    reports.save(report, tmp_path / "a.json")
    page, _ = rendering.rendered([tmp_path / "a.json"], "html")
    assert page.count("<script") == 1, "that of the page itself"
    assert attack not in page
