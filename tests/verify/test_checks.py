"""Checks measure right, judge by the limits, and find what they are for."""

import numpy as np
import pytest
from msgspec.structs import replace

from exporter import discover
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Tensor
from exporter.recipe import Checks
from exporter.stats import paired_drop, proportion
from exporter.verify import checks
from exporter.verify.checks import Seen, Subject


@pytest.fixture
def subject(artifacts):
    return Subject(artifacts["onnxruntime", "fp32"], [])


def measure(subject, eager, got, labels=None, options=None, batch=4):
    meters = checks.start_all(options or Checks(), subject)
    labels = np.full(len(eager), -1) if labels is None else np.asarray(labels)
    for start in range(0, len(eager), batch):
        part = slice(start, start + batch)
        add(meters, Seen(labels[part], (eager[part],), (got[part],)))
    return findings_of(meters)


def add(meters, seen):
    checks.add(meters, checks.measure(meters, seen), seen.names)


def findings_of(meters):
    return {finding.metric: finding for meter in meters.values() for finding in meter.findings()}


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)


def test_every_check_is_found():
    assert discover.names("exporter.verify.checks") == [
        "accuracy",
        "differences",
        "multilabel",
        "neighbours",
        "parity",
        "sanity",
        "segmentation",
        "structure",
        "values",
    ]


def test_equal_outputs_pass_everything(subject, logits):
    found = measure(subject, logits, logits.copy())
    assert all(finding.passed for finding in found.values())
    assert found["cosine"].value == pytest.approx(1)
    assert found["max_abs"].value == 0
    assert found["top1_agreement"].value == 100


def test_parity_is_what_the_formulas_give(subject, logits):
    got = logits + np.random.default_rng(1).normal(size=logits.shape).astype(np.float32) * 0.1
    found = measure(subject, logits, got)
    a, b = logits.astype(float), got.astype(float)
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert found["cosine"].value == pytest.approx(np.mean(cosines))
    assert found["cosine"].samples == pytest.approx(cosines)
    assert found["max_abs"].value == pytest.approx(np.abs(a - b).max())
    assert found["mean_abs"].value == pytest.approx(np.abs(a - b).mean())
    assert found["sqnr_db"].value == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert found["top1_agreement"].value == pytest.approx(100 * (a.argmax(1) == b.argmax(1)).mean())


def test_a_bad_output_does_not_hide_behind_good_ones(artifacts):
    """Three maps are equal, and one points elsewhere in the second image."""
    artifact = artifacts["onnxruntime", "fp32"]
    maps = tuple(Tensor(name=f"map_{number}", shape=("n", 8, 2, 2), holds="map") for number in range(4))
    subject = Subject(Artifact(artifact.path, replace(artifact.sidecar, outputs=maps)), [])
    eager = [np.random.default_rng(number).normal(size=(2, 8, 2, 2)).astype(np.float32) for number in range(4)]
    got = [output.copy() for output in eager]
    got[2][1] = -got[2][1]
    meters = checks.start_all(Checks(), subject)
    add(meters, Seen(np.full(2, -1), tuple(eager), tuple(got)))
    cosine = findings_of(meters)["cosine"]
    assert cosine.samples == pytest.approx([1, -1])
    assert not cosine.passed


def test_an_error_in_one_logit_of_one_image_fails(subject, logits):
    got = logits.copy()
    got[7, 3] += 2e-4 * logits.std()
    found = measure(subject, logits, got)
    assert not found["max_abs"].passed
    assert found["max_abs"].limit == pytest.approx(1e-4 * logits.std(), rel=1e-3)


def test_limits_of_ones_own_are_used(subject, logits):
    got = logits + np.float32(0.01)
    assert not measure(subject, logits, got)["max_abs"].passed
    assert measure(subject, logits, got, options=Checks(atol=0.02))["max_abs"].passed
    assert not measure(subject, logits, got, options=Checks(min_cosine=0.9999999))["cosine"].passed


@pytest.mark.parametrize(
    ("bad", "metric"), [(np.nan, "nan_outputs"), (np.inf, "inf_outputs"), (-np.inf, "inf_outputs")]
)
def test_nan_and_infinity_are_findings_of_their_own(bad, metric, subject, logits):
    got = logits.copy()
    got[6, 2] = bad
    found = measure(subject, logits, got)
    assert (found[metric].value, found[metric].passed) == (1, False)
    assert not found["max_abs"].passed
    assert found["max_abs"].value is None or np.isfinite(found["max_abs"].value)


def test_one_answer_to_every_image_is_found(subject, logits):
    """What an overflowing LayerNorm does (ConvNeXt#80)."""
    found = measure(subject, logits, np.tile(logits[:1], (10, 1)))
    assert (found["constant_outputs"].value, found["constant_outputs"].passed) == (9, False)


def test_one_answer_is_found_whenever_it_begins(subject, logits):
    got = logits.copy()
    got[1:] = got[1]
    assert measure(subject, logits, got, batch=3)["constant_outputs"].value == 8


def test_a_constant_feature_map_is_found(artifacts):
    made = artifacts["onnxruntime", "fp32"]
    outputs = tuple(replace(made.sidecar.outputs[0], name=f"stage{i}", holds="map") for i in (1, 2))
    features = type(made)(made.path, replace(made.sidecar, task="features", outputs=outputs))
    maps = tuple(np.random.default_rng(i).normal(size=(2, 4, 8, 8)).astype(np.float32) for i in (0, 1))
    meters = checks.start_all(Checks(), Subject(features, []))
    add(meters, Seen(np.array([-1, -1]), maps, (np.zeros_like(maps[0]), maps[1])))
    found = findings_of(meters)
    assert found["constant_outputs"].value == 2


def test_a_limit_of_zero_is_a_limit(subject, logits):
    assert measure(subject, logits, logits.copy(), options=Checks(min_cosine=0.0))["cosine"].limit == 0


def test_one_value_in_every_logit_is_found(subject, logits):
    found = measure(subject, logits, np.full_like(logits, 0.5))
    assert (found["constant_outputs"].value, found["constant_outputs"].passed) == (10, False)


def test_images_that_eager_cannot_tell_apart_either_are_no_finding(subject, logits):
    same = np.tile(logits[:1], (10, 1))
    assert measure(subject, same, same.copy())["constant_outputs"].passed


def test_accuracy_counts_right_answers(subject):
    eager = np.tile(np.eye(10, dtype=np.float32), (10, 1))
    got = eager.copy()
    got[3::10] = np.roll(got[3::10], 1, axis=1)
    found = measure(subject, eager, got, labels=np.tile(np.arange(10), 10))
    assert (found["top1_eager"].value, found["top1"].value) == (100, 90)
    assert found["top1_drop"].value == 10
    assert not found["top1_drop"].passed
    assert found["top1_drop"].detail == "10 images lost, 0 won"
    assert found["top1"].low < 90 < found["top1"].high


def test_of_equal_logits_the_first_counts_as_higher(subject):
    """As argmax has it: rounding to bf16 makes ties, and a tie is no right answer for both."""
    tied = np.zeros((2, 10), np.float32)
    tied[:, 2:4] = 1
    found = measure(subject, tied, tied.copy(), labels=[2, 3])
    assert found["top1"].value == 50
    assert found["top5"].value == 100


def test_top5_is_the_five_highest(subject):
    ranks = np.tile(np.arange(10, dtype=np.float32)[::-1], (10, 1))
    assert measure(subject, ranks, ranks.copy(), labels=np.arange(10))["top5"].value == 50


def test_a_row_of_nan_is_never_right(subject, logits):
    got = logits.copy()
    got[0] = np.nan
    found = measure(subject, logits, got, labels=logits.argmax(1))
    assert found["top1"].value == 90


def test_without_labels_there_is_no_accuracy(subject, logits):
    assert "top1" not in measure(subject, logits, logits.copy())


def test_limits_fit_the_precision(artifacts, logits):
    got = logits + np.random.default_rng(1).normal(size=logits.shape).astype(np.float32) * 3e-3
    verdicts = {
        p: measure(Subject(artifacts["onnxruntime", p], []), logits, got)["max_abs"].passed for p in ("fp32", "fp16")
    }
    assert verdicts == {"fp32": False, "fp16": True}


def test_features_are_checked_map_by_map(artifacts):
    made = artifacts["onnxruntime", "fp32"]
    outputs = tuple(replace(made.sidecar.outputs[0], name=f"stage{i}", holds="map") for i in (1, 2))
    features = type(made)(made.path, replace(made.sidecar, task="features", outputs=outputs))
    meters = checks.start_all(Checks(), Subject(features, []))
    maps = tuple(np.random.default_rng(i).normal(size=(2, 4, 8, 8)).astype(np.float32) * 10**i for i in (0, 2))
    spoilt = (maps[0] + np.float32(0.01), maps[1])
    add(meters, Seen(np.array([-1, -1]), maps, spoilt))
    found = findings_of(meters)
    assert not found["max_abs"].passed  # hidden if it were held against the larger map
    assert "of the standard deviation of stage1" in found["max_abs"].detail
    assert "top1_agreement" not in found


def test_products_in_tf32_have_the_limits_of_fp16(artifacts):
    artifact = artifacts["onnxruntime", "fp32"]
    rounded = Artifact(artifact.path, replace(artifact.sidecar, target={"tf32": True}))
    assert (Subject(artifact, []).precision.name, Subject(rounded, []).precision.name) == ("fp32", "fp16")


@pytest.mark.parametrize(("atol", "passed"), [(2.0, False), (6.0, True)])
def test_a_limit_of_the_largest_error_is_one_of_every_map(atol, passed, artifacts):
    """The error of the second map is larger, and a smaller share of its spread."""
    artifact = artifacts["onnxruntime", "fp32"]
    outputs = tuple(replace(artifact.sidecar.outputs[0], name=f"stage{i}", holds="map") for i in (1, 2))
    features = type(artifact)(artifact.path, replace(artifact.sidecar, task="features", outputs=outputs))
    meters = checks.start_all(Checks(atol=atol), Subject(features, []))
    maps = tuple(np.random.default_rng(i).normal(size=(2, 4, 8, 8)).astype(np.float32) * 10**i for i in (0, 2))
    add(meters, Seen(np.array([-1, -1]), maps, (maps[0] + np.float32(0.5), maps[1] + np.float32(5))))
    finding = findings_of(meters)["max_abs"]
    assert (finding.value, finding.passed) == (pytest.approx(5, rel=1e-3), passed)


def test_the_interval_of_a_share_is_the_textbooks():
    """Newcombe, Statistics in Medicine 1998, table I, Clopper and Pearson: 81 of 263 gives 0.2527 to 0.3676."""
    share = proportion(81, 263)
    assert (share.low, share.high) == (pytest.approx(25.27, abs=0.01), pytest.approx(36.76, abs=0.01))


def test_a_paired_drop_knows_lost_from_won():
    before = [True] * 60 + [False] * 40
    after = [False] * 6 + [True] * 54 + [True] * 2 + [False] * 38
    drop = paired_drop(before, after)
    assert (drop.value, drop.lost, drop.won) == (4, 6, 2)
    assert drop.low < 0 < 4 < drop.high


def test_the_paired_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        before = rng.uniform(size=400) < 0.7
        after = np.where(rng.uniform(size=400) < 0.03, ~before, before)
        truth = 100 * (0.7 * 0.03 - 0.3 * 0.03)
        drop = paired_drop(before.tolist(), after.tolist())
        inside += drop.low <= truth <= drop.high
    assert inside >= 0.92 * 300
