"""One rule for budgets, with labels and without: beyond fails, within passes, and in between nothing is claimed."""

import numpy as np
import pytest

from exporter.progress import REPORTER, Silent
from exporter.recipe import Checks
from exporter.stats import drop_interval, proportion
from exporter.verify import budgets
from exporter.verify.checks import Subject
from tests.conftest import PX
from tests.verify.test_checks import measure

LOOSE = {"atol": 1e9, "min_cosine": -1.0}


@pytest.fixture
def subject(artifacts):
    return Subject(artifacts["onnxruntime", "int8"], [])


def flipped(images, flips, labelled, subject, **options):
    """The finding of a budget, where so many answers of so many images are others."""
    eager = np.tile(np.eye(10, dtype=np.float32), (images // 10 + 1, 1))[:images]
    got = eager.copy()
    got[:flips] = np.roll(got[:flips], 1, axis=1)
    labels = eager.argmax(1) if labelled else None
    found = measure(subject, eager, got, labels=labels, options=Checks(**LOOSE, **options), batch=100)
    return found["top1_drop" if labelled else "top1_agreement"]


def budget_of(labelled, points):
    return {"max_drop": points} if labelled else {"min_agreement": 100 - points}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("images", "flips", "verdict"),
    [(2000, 0, "within"), (2000, 60, "beyond"), (256, 4, "unsure"), (100, 0, "unsure"), (2000, 9, "unsure")],
)
def test_the_interval_is_judged_with_labels_and_without(images, flips, verdict, labelled, subject):
    for choice in ("fail", "pass", "warn"):
        finding = flipped(images, flips, labelled, subject, **budget_of(labelled, 0.5), when_unsure=choice)
        passed = {"within": True, "beyond": False, "unsure": choice != "fail"}[verdict]
        assert finding.passed == passed, finding
        assert finding.unsure == (verdict == "unsure" and choice == "warn")
        assert ("are needed" in finding.detail) == (verdict == "unsure")
        assert finding.limit == (0.5 if labelled else 99.5)


def test_four_flips_of_256_are_not_half_a_point(subject):
    """Their interval reaches from 0.4 to 4 points."""
    finding = flipped(256, 4, False, subject, min_agreement=99.5, when_unsure="fail")
    assert finding.high > 99.5
    assert not finding.passed
    assert "cannot tell with 256 images, about 290 are needed" in finding.detail


@pytest.mark.parametrize(("images", "flips"), [(256, 4), (300, 1), (500, 0)])
def test_the_number_that_is_needed_is_enough(images, flips, subject):
    finding = flipped(images, flips, True, subject, max_drop=1.0)
    if "cannot tell" not in finding.detail:
        assert drop_interval(flips, 0, images)[1] <= 1
        return
    needed = int(finding.detail.partition("about ")[2].partition(" ")[0].replace(",", ""))
    low, high = drop_interval(flips * needed / images, 0, needed)
    assert low > 1 or high <= 1
    low, high = drop_interval(flips * needed * 0.9 / images, 0, int(needed * 0.9))
    assert low <= 1 < high, "a tenth fewer are not"


def test_no_number_of_images_decides_a_loss_at_the_limit(subject):
    assert "no number of images is enough" in flipped(200, 1, True, subject, max_drop=0.5).detail


@pytest.mark.parametrize(
    ("ci", "choice"), [("true", "fail"), ("1", "fail"), ("", "warn"), ("false", "warn"), (None, "warn")]
)
def test_in_ci_a_budget_that_few_images_leave_open_fails(ci, choice, subject, monkeypatch):
    if ci is not None:
        monkeypatch.setenv("CI", ci)
    assert budgets.when_unsure(None) == choice
    with monkeypatch.context() as azure:
        azure.setenv("TF_BUILD", "True")
        assert budgets.when_unsure(None) == "fail"
    assert budgets.when_unsure("pass") == "pass"
    for labelled in (True, False):
        assert flipped(256, 4, labelled, subject, **budget_of(labelled, 0.5)).passed == (choice == "warn")


def test_the_limit_of_a_precision_warns_in_ci_too(artifacts, monkeypatch):
    """100 images without one lost answer cannot show that fp32 loses less than 0.1 points."""
    monkeypatch.setenv("CI", "true")
    fp32 = Subject(artifacts["onnxruntime", "fp32"], [])
    finding = flipped(100, 0, True, fp32)
    assert (finding.passed, finding.unsure) == (True, True)
    assert not flipped(100, 0, True, fp32, when_unsure="fail").passed


def test_agreement_on_synthetic_images_warns_of_nothing(subject):
    few = flipped(16, 0, False, subject)
    assert (few.passed, few.unsure) == (True, False)
    assert "16 images are too few to judge by, about 130 are needed" in few.detail
    assert not flipped(16, 8, False, subject).passed


def test_of_labelled_images_only_the_loss_says_how_many_are_needed(subject):
    eager = np.tile(np.eye(10, dtype=np.float32), (10, 1))
    findings = measure(subject, eager, eager.copy(), labels=eager.argmax(1), options=Checks(**LOOSE), batch=100)
    assert "are needed" in findings["top1_drop"].detail
    assert findings["top1_agreement"].detail == (
        "100 of 100 images; not decided by these images; the loss of accuracy is judged instead"
    )
    own = measure(
        subject, eager, eager.copy(), labels=eager.argmax(1), options=Checks(**LOOSE, when_unsure="pass"), batch=100
    )
    assert "are needed" in own["top1_agreement"].detail


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def test_a_warning_is_a_note(subject):
    notes = Notes()
    token = REPORTER.set(notes)
    try:
        flipped(256, 4, True, subject, max_drop=0.5)
        flipped(256, 4, True, subject, max_drop=0.5, when_unsure="pass")
    finally:
        REPORTER.reset(token)
    (text,) = notes.texts
    assert text.startswith("top1_drop 1.562 points, limit 0.5: cannot tell with 256 images, about")


@pytest.mark.parametrize(("points", "labelled"), [(0.5, True), (0.5, False), (3, False)])
def test_the_fewest_images_are_those_on_which_nothing_is_lost(points, labelled):
    enough = budgets.fewest_images(points, labelled)
    for count, shown in ((enough, True), (int(0.9 * enough), False)):
        high = drop_interval(0, 0, count)[1] if labelled else 100 - proportion(count, count).low
        assert (high <= points) == shown


def test_the_option_is_in_the_program(onnx_copy, run, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "few.npz", images=rng.integers(0, 256, (12, PX, PX, 3), dtype=np.uint8), labels=np.arange(12) % 10
    )
    words = (
        "verify",
        onnx_copy.path,
        "--data",
        tmp_path / "few.npz",
        "--max-drop",
        0.5,
        "-o",
        tmp_path / "a.report.json",
    )
    assert run(*words, "--when-unsure", "fail").code == 5
    warned = run(*words, "--when-unsure", "warn")
    assert warned.code == 0
    assert "cannot tell with 12 images, about 390 are needed" in warned.err
    assert "unsure" in warned.out
    assert "passes, unsure of top1_drop" in run("report", tmp_path / "a.report.json").out
    assert (
        "::warning title=custom_fp32.onnx%3A top1_drop"
        in run("report", tmp_path / "a.report.json", "--format", "github").out
    )
    silent = run(*words, "--when-unsure", "pass")
    assert (silent.code, "cannot tell" in silent.err) == (0, False)


def test_int8_is_not_built_for_a_budget_that_its_images_cannot_show(tiny, refused, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", images=rng.integers(0, 256, (20, PX, PX, 3), dtype=np.uint8))
    words = ("onnx", "--int8", "--weights", tiny, "--calib", tmp_path / "few.npz", "--max-drop", 0.5, "-o", tmp_path)
    refusal = refused(2, *words, "--when-unsure", "fail", folder=tmp_path)
    assert "cannot tell with 20 images" in refusal
    assert "about 740 are needed" in refusal
