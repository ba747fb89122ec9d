"""Feature vectors are judged by whom they have as neighbours."""

import numpy as np
import pytest
from msgspec.structs import replace
from scipy.spatial import cKDTree

from exporter.errors import BadRequest
from exporter.recipe import Checks
from exporter.verify import checks
from exporter.verify.checks import Seen, Subject
from exporter.verify.checks.neighbours import NEAREST, recall
from exporter.verify.outputs import refuse_limits


def vectors(count, seed=0, width=16):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def by_tree(expected, got):
    """The same by scipy's tree: of unit vectors the nearest by distance are those of the largest cosine."""
    nearest = []
    for rows in (expected, got):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        nearest.append(cKDTree(units).query(units, NEAREST + 1)[1][:, 1:])
    return [len(set(a) & set(b)) / NEAREST for a, b in zip(*nearest, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_recall_is_that_of_a_tree(noise):
    eager = vectors(700)
    got = 3 * eager + noise * vectors(700, seed=1)
    assert recall(eager, got).tolist() == pytest.approx(by_tree(eager, got))


def test_of_equal_images_it_does_not_matter_which_are_nearest():
    eager = vectors(60)
    eager[:30] = eager[0]
    got = eager.copy()
    got[:30] += 1e-3 * vectors(30, seed=1)
    assert recall(eager, got)[:30].tolist() == [1.0] * 30


def measured(artifacts, eager, got, **options):
    artifact = artifacts["onnxruntime", "fp32"]
    output = replace(artifact.sidecar.outputs[0], name="embedding", holds="embedding", shape=("batch", 16))
    weights = replace(artifact.sidecar.weights, layout="timm")
    subject = Subject(
        type(artifact)(artifact.path, replace(artifact.sidecar, task="embed", outputs=(output,), weights=weights)), []
    )
    meters = checks.start_all(Checks(data="photos", **options), subject)
    for start in range(0, len(eager), 7):
        names = tuple(f"{number}.jpg" for number in range(start, min(start + 7, len(eager))))
        batch = slice(start, start + 7)
        add(meters, Seen(np.full(len(names), -1), (eager[batch],), (got[batch],), names))
    return {finding.metric: finding for meter in meters.values() for finding in meter.findings()}


def test_a_limit_of_agreement_is_refused_where_the_first_output_has_none(artifacts):
    """It would be that of no check."""
    sidecar = artifacts["onnxruntime", "fp32"].sidecar
    values = replace(sidecar.outputs[0], shape=("batch", 1))
    vector = replace(sidecar.outputs[0], name="embedding", holds="embedding", shape=("batch", 16))
    sidecar = replace(sidecar, task="classify,embed", outputs=(values, vector))
    with pytest.raises(BadRequest, match="--min-agreement: the outputs are values, without a top-1; leave it out"):
        refuse_limits(sidecar, Checks(min_agreement=90), labelled=False)
    sidecar = replace(sidecar, task="embed", outputs=(vector,))
    refuse_limits(sidecar, Checks(min_agreement=90), labelled=False)


def add(meters, seen):
    checks.add(meters, checks.measure(meters, seen), seen.names)


def test_the_same_vectors_have_the_same_neighbours(artifacts):
    findings = measured(artifacts, vectors(60), vectors(60), min_agreement=90)
    assert findings["neighbour_agreement"].value == 100
    assert findings["neighbour_agreement"].passed


def test_two_vectors_in_each_others_place_are_seen(artifacts):
    """Each has a cosine near that of the other, so only their neighbours show it."""
    eager = vectors(2000) + 20
    got = eager.copy()
    got[::2], got[1::2] = eager[1::2], eager[::2]
    findings = measured(artifacts, eager, got)
    assert findings["cosine"].value > 0.99
    assert findings["neighbour_agreement"].value < 5
    assert not findings["neighbour_agreement"].passed


def test_the_image_with_the_smallest_cosine_is_named(artifacts):
    eager, got = vectors(30), vectors(30)
    got[17] *= -1
    assert "(17.jpg)" in measured(artifacts, eager, got)["cosine"].detail


def test_a_vector_that_is_not_finite_has_no_neighbours(artifacts):
    eager, got = vectors(50), vectors(50)
    got[3] = np.nan
    assert recall(eager, got)[3] == 0


def test_too_few_images_are_not_judged(artifacts):
    finding = measured(artifacts, vectors(20), vectors(20))["neighbour_agreement"]
    assert finding.value is None
    assert "at least 21" in finding.detail


def test_a_limit_of_agreement_is_not_passed_by_too_few_images(artifacts):
    assert not measured(artifacts, vectors(20), vectors(20), min_agreement=90)["neighbour_agreement"].passed


def test_numbers_of_classes_may_be_alike(artifacts):
    artifact = artifacts["onnxruntime", "fp32"]
    classes = replace(artifact.sidecar.outputs[0], name="classes", holds="classes", shape=("batch", 5), dtype="int64")
    probabilities = replace(artifact.sidecar.outputs[0], name="probabilities", holds="top5", shape=("batch", 5))
    subject = Subject(type(artifact)(artifact.path, replace(artifact.sidecar, outputs=(classes, probabilities))), [])
    meters = checks.start_all(Checks(), subject)
    same = np.tile(np.arange(5, dtype=np.float32), (30, 1))
    other = same.copy()
    other[::2] = other[::2, ::-1]
    values = np.sort(np.abs(vectors(30, width=5)), axis=1)[:, ::-1].copy()
    add(meters, Seen(np.full(30, -1), (other, values), (same, values)))
    findings = {finding.metric: finding for meter in meters.values() for finding in meter.findings()}
    assert findings["constant_outputs"].value == 0
    assert findings["top1_agreement"].value == 50
