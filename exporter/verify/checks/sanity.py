"""Sanity: NaN, infinity, and the same output for every image.

An fp16 ConvNeXt whose LayerNorm overflows returns one constant for every image, without NaN or an error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.verify.checks import Check, Moments, Seen, Subject
from exporter.verify.outputs import is_centred, kinds


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
        self.last: list[tuple[Array, Array]] = []  # per output, what the last image got, and from eager
        self.alike: list[tuple[int, int, float]] = []  # image, output, and how far eager's outputs lie apart

    def see(self, seen: Seen) -> None:
        """Accumulate one batch."""
        self.nan += self._count(seen, np.isnan)
        self.infinite += self._count(seen, np.isinf)
        pairs = [(_flat(got), _flat(eager)) for got, eager in zip(seen.outputs, seen.eager, strict=True)]
        none = [(got[:0], eager[:0]) for got, eager in pairs]
        # Images of another size than the last one are not compared with it.
        same = bool(self.last) and all(a[0].shape[1:] == b[0].shape[1:] for a, b in zip(self.last, none, strict=True))
        last = self.last if same else none
        for index, ((a, b), (got, eager)) in enumerate(zip(last, pairs, strict=True)):
            if self.centred[index] is None:
                continue
            self.moments[index].see(eager)
            apart = _apart(np.vstack([a, got]), np.vstack([b, eager]))[len(a) :]
            self.alike += [(self.images + int(row), index, float(apart[row])) for row in np.flatnonzero(apart)]
        self.last = [(got[-1:], eager[-1:]) for got, eager in pairs]
        self.images += len(seen.labels)

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
