"""Sanity: NaN, infinity, and the same output for every image.

An fp16 ConvNeXt whose LayerNorm overflows returns one constant for every image, without NaN or an error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.verify.checks import Check, Seen, Subject


class Sanity:
    """Counts images."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        del options, subject
        self.images = self.nan = self.infinite = self.constant = 0
        self.last: list[tuple[Array, Array]] = []  # per output, what the last image got, and from eager

    def see(self, seen: Seen) -> None:
        """Accumulate one batch."""
        self.images += len(seen.labels)
        self.nan += self._count(seen, np.isnan)
        self.infinite += self._count(seen, np.isinf)
        pairs = [(_flat(got), _flat(eager)) for got, eager in zip(seen.outputs, seen.eager, strict=True)]
        last = self.last or [(got[:0], eager[:0]) for got, eager in pairs]
        constant = [
            _constant(np.vstack([a, got]), np.vstack([b, eager]))
            for (a, b), (got, eager) in zip(last, pairs, strict=True)
        ]
        self.constant += int(np.any([bad[-len(seen.labels) :] for bad in constant], axis=0).sum())
        self.last = [(got[-1:], eager[-1:]) for got, eager in pairs]

    def _count(self, seen: Seen, is_bad: np.ufunc) -> int:
        bad = [is_bad(output).reshape(len(output), -1).any(1) for output in seen.outputs]
        return int(np.any(bad, axis=0).sum())

    def findings(self) -> list[Finding]:
        """nan_outputs, inf_outputs and constant_outputs: numbers of images, which must be 0."""
        counts = {"nan_outputs": self.nan, "inf_outputs": self.infinite, "constant_outputs": self.constant}
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


def _constant(got: Array, eager: Array) -> NDArray[np.bool_]:
    """Whether each output is one constant, or equals the output before, where eager's outputs differ."""
    throughout = (np.ptp(got, axis=1) == 0) & (np.ptp(eager, axis=1) > 0)
    again = np.zeros(len(got), bool)
    again[1:] = (got[1:] == got[:-1]).all(1) & (eager[1:] != eager[:-1]).any(1)
    constant: NDArray[np.bool_] = throughout | again
    return constant


CHECK = Check(Sanity)
