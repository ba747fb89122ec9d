"""Sanity: NaN, infinity, and the same output for every image.

An fp16 ConvNeXt whose LayerNorm overflows returns one constant for every image, without NaN or an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.verify.checks import Check, Moments, Rows, Seen, Subject, moments
from exporter.verify.outputs import is_centred, kinds

MOST_COMPARED = 4096  # values of an image that are compared with those of the image in the batch before


class Sanity:
    """Counts images."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        every = zip(sidecar.outputs, kinds(sidecar, options.outputs), strict=True)
        # Numbers of classes may be equal for images whose probabilities differ.
        numbers = ("top", "pixel_classes")
        self.centred = [None if kind in numbers else is_centred(tensor.holds, kind) for tensor, kind in every]
        self.share = subject.precision.limits.share
        self.images = self.nan = self.infinite = 0
        self.moments = [Moments() for _ in self.centred]
        self.last: dict[int, Array] = {}  # per output (2, V): the last image's, of the artifact and of eager
        self.alike: list[tuple[int, int, float]] = []  # image, output, and how far eager's outputs lie apart

    def measure(self, seen: Seen) -> Rows:
        """Counts of one batch, moments of eager's outputs, images that are alike with their distance in eager, and the
        first and the last image, thinned out."""
        rows: Rows = {
            "bad": np.array([self._count(seen, np.isnan), self._count(seen, np.isinf), len(seen.labels)]),
        }
        for index, (eager, got) in enumerate(zip(seen.eager, seen.outputs, strict=True)):
            if self.centred[index] is None:
                continue
            eager, got = _flat(eager), _flat(got)
            step = -(-got.shape[1] // MOST_COMPARED)
            rows[f"moments {index}"] = moments(eager)
            rows[f"apart {index}"] = _apart(got, eager)
            rows[f"ends {index}"] = np.stack([both[[0, -1], ::step] for both in (got, eager)])
        return rows

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch. Its first image is compared with the last one before, if that has the same size."""
        nan, infinite, images = rows["bad"]
        self.nan += int(nan)
        self.infinite += int(infinite)
        for index in [index for index, centred in enumerate(self.centred) if centred is not None]:
            self.moments[index].add(rows[f"moments {index}"])
            apart, ends = rows[f"apart {index}"].copy(), rows[f"ends {index}"]
            last = self.last.get(index)
            if last is not None and last.shape == ends[:, 1].shape:
                got, eager = np.stack([last, ends[:, 0]], axis=1)
                apart[0] = max(apart[0], _apart(got, eager)[1])
            self.alike += [(self.images + int(row), index, float(apart[row])) for row in np.flatnonzero(apart)]
            self.last[index] = ends[:, 1]
        self.images += int(images)

    def _constant(self) -> int:
        """The number of images whose output is constant. Two images, or two values, that are equal by rounding are not:
        eager's must lie further apart than the largest error of this precision."""
        scales = {
            index: self.moments[index].scale(centred)
            for index, centred in enumerate(self.centred)
            if centred is not None
        }
        return len({image for image, index, apart in self.alike if apart > self.share * scales[index]})

    def _count(self, seen: Seen, is_bad: np.ufunc) -> int:
        bad = [is_bad(output).reshape(len(output), -1).any(1) for output in seen.outputs]
        return int(np.any(bad, axis=0).sum())

    def findings(self) -> list[Finding]:
        """nan_outputs, inf_outputs and constant_outputs: numbers of images, which must be 0."""
        counts = {"nan_outputs": self.nan, "inf_outputs": self.infinite, "constant_outputs": self._constant()}
        return [
            judged(
                Finding(check="sanity", metric=metric, value=count, unit="images", detail=f"of {self.images}"),
                0,
                "low",
            )
            for metric, count in counts.items()
        ]


def _flat(output: Array) -> Array:
    """(N, …) to (N, values)."""
    return output.reshape(len(output), -1)


def _apart(got: Array, eager: Array) -> NDArray[np.float64]:
    """How far eager's values lie apart where those of the artifact are equal: within the image or, if more, from the
    image before. 0 where the artifact's differ."""
    within = np.where(np.ptp(got, axis=1) == 0, np.ptp(eager, axis=1), 0.0)
    again = np.zeros(len(got))
    same = (got[1:] == got[:-1]).all(1)
    again[1:] = np.where(same, np.abs(eager[1:] - eager[:-1]).max(1), 0.0)
    return np.maximum(within, again).astype(np.float64)


CHECK = Check(Sanity)
