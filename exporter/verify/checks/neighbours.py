"""Neighbours: whether feature vectors find the same nearest images as those of eager PyTorch.

Search and clustering compare vectors with each other; a cosine to eager's vector does not say whether their order
remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.data.samples import is_synthetic
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.verify.checks import Check, Rows, Seen, Subject, agreement, share
from exporter.verify.outputs import first, kinds

NEAREST = 10
LEAST_IMAGES = 2 * NEAREST + 1  # with fewer, half of all images are among the nearest by chance
ROWS = 512  # of the matrix of similarities at once
TIE = 1e-6  # cosines that differ by less are equal but for rounding


class Neighbours:
    """Keeps the feature vectors of every image, 4 bytes for each number, eager's and the artifact's."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        is_first = first(sidecar, options.outputs) == "embedding"  # a limit of agreement is that of the first output
        options = options if is_first else replace(options, min_agreement=None)
        self.options, self.limits = options, subject.precision.limits
        self.places = [place for place, kind in enumerate(kinds(sidecar, options.outputs)) if kind == "embedding"]
        self.eager: list[Array] = []
        self.got: list[Array] = []
        # Untrained networks, and patterns that are no photographs, have vectors that are nearly alike.
        self.is_random = is_synthetic(options.data) or sidecar.weights.layout == "random"

    def measure(self, seen: Seen) -> Rows:
        """The feature vectors of one batch."""
        return {  # a network has one feature vector
            name: outputs[place].copy()
            for place in self.places
            for name, outputs in (("eager", seen.eager), ("got", seen.outputs))
        }

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        self.eager.append(rows["eager"])
        self.got.append(rows["got"])

    def findings(self) -> list[Finding]:
        """neighbour_agreement; none where no output is a feature vector."""
        count = sum(map(len, self.got))
        if not count:
            return []
        if count < LEAST_IMAGES:
            detail = f"not measured: the {NEAREST} nearest of {count} images say little; give at least {LEAST_IMAGES}"
            finding = Finding(check="neighbours", metric="neighbour_agreement", value=None, unit="%", detail=detail)
            limit = self.options.min_agreement
            return [finding if limit is None else judged(finding, limit, "high")]
        recalls = recall(np.concatenate(self.eager), np.concatenate(self.got))
        finding = share("neighbours", "neighbour_agreement", recalls.tolist())
        finding = replace(finding, detail=f"of the {NEAREST} nearest of {count} images, the mean over all of them")
        if self.is_random and self.options.min_agreement is None:
            return [finding]
        return [agreement(finding, self.options, self.limits.neighbours_pct, has_labels=False)]


def recall(expected: Array, got: Array) -> NDArray[np.float64]:
    """For each image (N,) the share of its `NEAREST` nearest images by `expected` (N, C) that are so by `got` (N, C).

    Nearest are those with the largest cosine; of several that are equally near all count, as identical images are. A
    vector that is not finite has no neighbours.
    """
    units = [_units(vectors) for vectors in (expected, got)]
    shares = []
    for start in range(0, len(got), ROWS):
        first, second = (_similarities(vectors, start) for vectors in units)
        nearest = np.argpartition(-second, NEAREST, axis=1)[:, :NEAREST]
        least = -np.partition(-first, NEAREST - 1, axis=1)[:, NEAREST - 1 : NEAREST]
        shares.append((np.take_along_axis(first, nearest, 1) >= least - TIE).mean(1))
    return np.where(np.isfinite(got).all(1), np.concatenate(shares), 0.0)


def _units(vectors: Array) -> Array:
    finite = np.nan_to_num(vectors, nan=0.0, posinf=0.0, neginf=0.0)
    units: Array = finite / np.maximum(np.linalg.norm(finite, axis=1, keepdims=True), 1e-20).astype(np.float32)
    return units


def _similarities(units: Array, start: int) -> Array:
    """The cosines (R, N) of the images from `start` on with all, −∞ with themselves."""
    similar: Array = units[start : start + ROWS] @ units.T
    similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
    return similar


CHECK = Check(Neighbours)
