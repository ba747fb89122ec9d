"""Differences: the images on which the answers of the artifact and of eager PyTorch differ most, for the page.

Images whose class changed come first, then those where the probability of the reference's class changed most. Of a
multi-label head the label that changed most counts. Values, features and pixels have no answers with a probability:
there is no such list for them, and `segmentation` has pictures of its own.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import PROBABILITIES
from exporter.backends import Array, Outputs
from exporter.errors import as_utf8
from exporter.recipe import Checks
from exporter.report import Difference, Finding, Prediction, number
from exporter.verify.checks import Check, Rows, Seen, Subject
from exporter.verify.outputs import decision, kinds
from exporter.verify.thumbnails import JPEG_KEY, RANKS, SIZES_KEY, leading

LEAST = 0.001  # a smaller change of a probability is not shown
CHANGED = 2.0  # added to the rank of an image whose class changed; changes are at most 1
DIGITS = 6


@dataclass(frozen=True)
class Entry:
    """An image that differs, and its rank."""

    rank: float
    difference: Difference


class Differences:
    """Keeps the images that differ most, and nothing of the others."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        self.kinds, self.labels = kinds(sidecar, options.outputs), sidecar.labels
        self.kind, holds = (self.kinds[0], sidecar.outputs[0].holds) if self.kinds else ("features", "")
        self.active = self.kind in ("classes", "top", "multilabel")
        self.has_probabilities = holds in PROBABILITIES
        self.cut = decision(options, holds)
        self.count = 0
        self.entries: list[Entry] = []

    def measure(self, seen: Seen) -> Rows:
        """For each image of one batch (N,) its rank, both classes with their probability, and the change of the
        probability of the reference's class; the labels."""
        if not self.active:
            return {}
        with np.errstate(all="ignore"):
            rows = {"classes": _classes, "top": _top, "multilabel": self._multilabel}[self.kind](
                seen.eager, seen.outputs, self.has_probabilities
            )
        return {**rows, "labels": seen.labels}

    def _multilabel(self, eager: Outputs, got: Outputs, has_probabilities: bool) -> Rows:
        """Of scores (N, L) the label of each image with the largest rank (N,), as class of the reference and of the
        artifact, with both probabilities of it."""
        reference_scores, artifact_scores = (outputs[0].reshape(len(outputs[0]), -1) for outputs in (eager, got))
        changed = (reference_scores >= self.cut) != (artifact_scores >= self.cut)
        reference_probabilities, artifact_probabilities = (
            scores if has_probabilities else 1 / (1 + np.exp(-scores)) for scores in (reference_scores, artifact_scores)
        )
        changes = np.abs(reference_probabilities - artifact_probabilities)
        ranks = _ranks(changed, changes)
        label = ranks.argmax(1)
        chosen = np.arange(len(ranks)), label
        probabilities = reference_probabilities[chosen], artifact_probabilities[chosen]
        return _rows(ranks[chosen], (label, label), probabilities, changes[chosen], changed[chosen])

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        ranks = rows[RANKS]
        kept = leading(np.concatenate([[entry.rank for entry in self.entries], ranks]))
        before = len(self.entries)
        self.entries = [
            self.entries[place] if place < before else self._entry(rows, names, int(place) - before) for place in kept
        ]
        self.count += len(ranks)

    def _entry(self, rows: Rows, names: Sequence[str], place: int) -> Entry:
        indexes, probabilities = rows["indexes"][place].tolist(), rows["probabilities"][place].tolist()
        reference, artifact = (self._prediction(*one) for one in zip(indexes, probabilities, strict=True))
        known, labels = rows["labels"][place], None
        if known.ndim:
            labels = tuple(self._prediction(int(label)) for label in np.flatnonzero(known > 0))
        elif known >= 0:
            labels = (self._prediction(int(known)),)
        difference = Difference(
            image=as_utf8(names[place]) if place < len(names) else f"image {self.count + place}",
            reference=reference,
            artifact=artifact,
            changed=bool(rows["changed"][place]),
            probability_change=_rounded(rows["probability_changes"][place]),
            labels=labels,
            thumbnail=_thumbnail(rows, place),
        )
        return Entry(float(rows[RANKS][place]), difference)

    def _prediction(self, index: int, probability: float | None = None) -> Prediction:
        name = self.labels[index] if 0 <= index < len(self.labels) else ""
        return Prediction(index=index, name=name, probability=None if probability is None else _rounded(probability))

    def findings(self) -> list[Finding]:
        """None: parity and multilabel judge the answers of all images."""
        return []


def _classes(eager: Outputs, got: Outputs, has_probabilities: bool) -> Rows:
    """Of scores (N, C) the class of the largest score of each image (N,), with its probability (N,)."""
    reference_class, artifact_class = eager[0].argmax(1), got[0].argmax(1)
    reference_probability, artifact_probability, artifact_probability_of_reference_class = (
        _probability(scores, classes, has_probabilities)
        for scores, classes in ((eager[0], reference_class), (got[0], artifact_class), (got[0], reference_class))
    )
    return _compared(
        (reference_class, artifact_class),
        (reference_probability, artifact_probability),
        artifact_probability_of_reference_class,
    )


def _top(eager: Outputs, got: Outputs, _: bool) -> Rows:
    """Of the most probable classes (N, 5) and their probabilities (N, 5). Where the reference's class is not among
    those of the artifact, the artifact's fifth probability is used, which is an upper bound of it."""
    (reference_class, reference_probability), (artifact_class, artifact_probability) = (
        (classes[:, 0].astype(np.int64), probabilities[:, 0]) for classes, probabilities, *_ in (eager, got)
    )
    is_reference_class = got[0] == reference_class[:, None]
    artifact_probability_of_reference_class = np.where(
        is_reference_class.any(1), (got[1] * is_reference_class).sum(1), got[1][:, -1]
    )
    return _compared(
        (reference_class, artifact_class),
        (reference_probability, artifact_probability),
        artifact_probability_of_reference_class,
    )


def _compared(
    classes: tuple[NDArray[np.int64], NDArray[np.int64]],
    probabilities: tuple[Array, Array],
    artifact_probability_of_reference_class: Array,
) -> Rows:
    """The rows of images whose classes (N,) of the reference and of the artifact have these probabilities (N,)."""
    changes = np.abs(probabilities[0] - artifact_probability_of_reference_class)
    changed = classes[0] != classes[1]
    return _rows(_ranks(changed, changes), classes, probabilities, changes, changed)


def _probability(scores: Array, classes: NDArray[np.intp], has_probabilities: bool) -> Array:
    """The probability (N,) of one class of each image: its score, or the softmax of all scores (N, C)."""
    own = np.take_along_axis(scores, classes[:, None], axis=1)[:, 0]
    if has_probabilities:
        return own
    largest = scores.max(1)
    shares: Array = np.exp(own - largest) / np.exp(scores - largest[:, None]).sum(1)
    return shares


def _ranks(changed: NDArray[np.bool_], changes: Array) -> NDArray[np.float64]:
    """Sort key (N,) or (N, L): ∞ for non-finite probabilities, 2 + change where the class changed, else the change; 0
    below `LEAST`."""
    ranks = CHANGED * changed + np.where(changes >= LEAST, changes, 0.0)
    return np.where(np.isfinite(changes), ranks, np.inf)


def _rows(
    ranks: NDArray[np.float64],
    indexes: tuple[NDArray[np.int64], NDArray[np.int64]],
    probabilities: tuple[Array, Array],
    probability_changes: Array,
    changed: NDArray[np.bool_],
) -> Rows:
    return {
        RANKS: ranks,
        "indexes": np.stack(indexes, 1),
        "probabilities": np.stack(probabilities, 1),
        "probability_changes": probability_changes,
        "changed": changed,
    }


def _rounded(value: float) -> float | None:
    finite = number(value)
    return None if finite is None else round(finite, DIGITS)


def _thumbnail(rows: Rows, place: int) -> str:
    """The JPEG of an image in base64; "" where none was drawn."""
    if SIZES_KEY not in rows:
        return ""
    start = int(rows[SIZES_KEY][:place].sum())
    return base64.b64encode(rows[JPEG_KEY][start : start + int(rows[SIZES_KEY][place])].tobytes()).decode()


CHECK = Check(Differences)
