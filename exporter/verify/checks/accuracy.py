"""Accuracy on labelled images: top-1 and top-5 of the artifact and of eager PyTorch, on the same pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.recipe import Checks
from exporter.report import Finding
from exporter.stats import drop_interval, paired_drop
from exporter.verify.budgets import Budget, judged, when_unsure
from exporter.verify.checks import Check, Rows, Seen, Subject, share
from exporter.verify.outputs import first, has_classes


class Accuracy:
    """Keeps one bit per image for each of top-1 and top-5."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        default = subject.precision.max_drop_points
        is_set = options.max_drop is not None
        limit = default if options.max_drop is None else options.max_drop
        self.budget = Budget(limit, "low", when_unsure(options.when_unsure, is_set))
        self.classify = has_classes(sidecar, options.outputs)
        self.ranked = first(sidecar, options.outputs) == "top"
        self.classes = sidecar.weights.num_classes
        self.right: dict[str, list[bool]] = {"top1_eager": [], "top1": [], "top5_eager": [], "top5": []}

    def measure(self, seen: Seen) -> Rows:
        """Which images of one batch are right; those without a label are skipped."""
        known, rows = seen.labels >= 0, Rows()
        if not self.classify or not known.any():
            return rows
        for name, outputs in (("_eager", seen.eager), ("", seen.outputs)):
            scores, labels = outputs[0][known], seen.labels[known]
            for k in (1, 5):
                right = (scores[:, :k] == labels[:, None]).any(1) if self.ranked else _within(scores, labels, k)
                rows[f"top{k}{name}"] = right
        return rows

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        for metric, right in rows.items():
            self.right[metric] += right.tolist()

    def findings(self) -> list[Finding]:
        """top1_eager, top1, top1_drop and, of more than five classes, top5_eager and top5; none without labels."""
        if not self.right["top1"]:
            return []
        metrics = ["top1_eager", "top1", *(["top5_eager", "top5"] if self.classes > 5 else [])]
        return [*(share("accuracy", metric, self.right[metric]) for metric in metrics), self._drop()]

    def _drop(self) -> Finding:
        drop = paired_drop(self.right["top1_eager"], self.right["top1"])
        noise = "; inside the noise" if drop.low <= 0 <= drop.high and drop.value else ""
        finding = Finding(
            check="accuracy",
            metric="top1_drop",
            value=drop.value,
            unit="points",
            low=drop.low,
            high=drop.high,
            detail=f"{drop.lost} images lost, {drop.won} won{noise}",
        )
        count = len(self.right["top1"])
        return judged(
            finding,
            self.budget,
            count,
            lambda images: drop_interval(drop.lost * images / count, drop.won * images / count, images),
        )


def _within(logits: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether the label is among the k highest logits.

    Of equal logits, which are frequent in bf16, the first counts as the higher, as in argmax. A row with NaN or
    infinity is never right.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(1)
    right: NDArray[np.bool_] = (rank < k) & np.isfinite(logits).all(1)
    return right


CHECK = Check(Accuracy)
