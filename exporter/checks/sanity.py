"""Sanity: no NaN, no infinity, and not the same answer to everything.

An fp16 ConvNeXt whose LayerNorm overflows gives one constant for every image, and looks healthy until it is used.
"""

from __future__ import annotations

import numpy as np

from exporter.backends import Array
from exporter.checks import Check, Options, Seen, Subject
from exporter.report import Finding, judged


class Sanity:
    """Counts images."""

    def __init__(self, options: Options, subject: Subject) -> None:
        del options, subject
        self.images = self.nan = self.infinite = self.constant = 0
        self.first: tuple[Array, Array] | None = None

    def see(self, seen: Seen) -> None:
        """Take in one batch."""
        self.images += len(seen.labels)
        self.nan += self._count(seen, np.isnan)
        self.infinite += self._count(seen, np.isinf)
        got, eager = (outputs[-1].reshape(len(seen.labels), -1) for outputs in (seen.outputs, seen.eager))
        self.constant += int((np.ptp(got, axis=1) == 0).sum())
        if self.first is None:
            self.first = got[0], eager[0]
            got, eager = got[1:], eager[1:]
        # The same answer to another image, which eager tells apart.
        same = (got == self.first[0]).all(1) & ~(eager == self.first[1]).all(1) & (np.ptp(got, axis=1) > 0)
        self.constant += int(same.sum())

    def _count(self, seen: Seen, is_bad: np.ufunc) -> int:
        bad = [is_bad(output).reshape(len(output), -1).any(1) for output in seen.outputs]
        return int(np.any(bad, axis=0).sum())

    def findings(self) -> list[Finding]:
        """nan_outputs, inf_outputs and constant_outputs: images, none of which may be."""
        counts = {"nan_outputs": self.nan, "inf_outputs": self.infinite, "constant_outputs": self.constant}
        return [
            judged(
                Finding(check="sanity", metric=metric, value=count, unit="images", detail=f"of {self.images}"),
                0,
                "low",
            )
            for metric, count in counts.items()
        ]


CHECK = Check(Options, Sanity)
