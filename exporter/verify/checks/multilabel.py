"""Multi-label heads, with one sigmoid for each label: decisions at a threshold, and mean average precision (mAP)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from exporter.backends import Array, Outputs
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.verify import average_precision, budgets
from exporter.verify.average_precision import Ranking
from exporter.verify.checks import Check, Moments, Rows, Seen, Subject, agreement, moments, share
from exporter.verify.outputs import THRESHOLD, decision, is_centred, kinds


class Multilabel:
    """Keeps one number per image and a few per label; of images with labels, every score of the first output."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        self.options, self.precision = options, subject.precision
        self.places = [place for place, kind in enumerate(kinds(sidecar, options.outputs)) if kind == "multilabel"]
        self.names = [
            sidecar.labels[label] if not place and label < len(sidecar.labels) else f"{output.name}[{label}]"
            for place, output in enumerate(sidecar.outputs)
            for label in range(int(output.shape[-1]) if place in self.places else 0)
        ]
        holds = sidecar.outputs[self.places[0]].holds if self.places else ""
        self.cut, self.centred = decision(options, holds), is_centred(holds, "multilabel")
        self.shares: list[float] = []
        self.equal = np.zeros(len(self.names), np.int64)
        self.moments = Moments()
        self.ends: list[NDArray[np.float64]] = []  # (2, L) of eager and of the artifact: the lowest and the highest
        self.truth: list[NDArray[np.int64]] = []
        self.eager: list[Array] = []
        self.got: list[Array] = []

    def measure(self, seen: Seen) -> Rows:
        """Equal decisions, moments and extremes of one batch, and the scores of images with labels."""
        if not self.places:
            return {}
        eager, got = (self._columns(outputs) for outputs in (seen.eager, seen.outputs))
        equal = ((eager >= self.cut) == (got >= self.cut)) & np.isfinite(got)
        ends = [np.stack([column.min(0), column.max(0)]).astype(np.float64) for column in (eager, got)]
        rows = {"shares": equal.mean(1), "equal": equal.sum(0), "moments": moments(eager), "ends": np.stack(ends)}
        if seen.labels.ndim == 2:
            rows |= {"truth": seen.labels, "eager": seen.eager[0].copy(), "got": seen.outputs[0].copy()}
        return rows

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        self.shares += rows["shares"].tolist()
        self.equal += rows["equal"]
        self.moments.add(rows["moments"])
        now = list(rows["ends"])
        before = self.ends or now
        self.ends = [
            np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])]) for a, b in zip(before, now, strict=True)
        ]
        if "truth" in rows:
            self.truth.append(rows["truth"])
            self.eager.append(rows["eager"])
            self.got.append(rows["got"])

    def _columns(self, outputs: Outputs) -> Array:
        """The scores of all labels (N, L)."""
        return np.concatenate([outputs[place].reshape(len(outputs[place]), -1) for place in self.places], 1)

    def findings(self) -> list[Finding]:
        """label_agreement, constant_labels and, of images with labels, map_eager, map and map_drop; none where no
        output is multi-label."""
        if not self.places:
            return []
        return [*self._precisions(), self._agreement(), self._constant()]

    def _agreement(self) -> Finding:
        """Image and label pairs with eager's decision. The unit of the interval is the image, as the decisions of one
        depend on each other: an image with a share of equal decisions counts as that share (`stats.proportion`)."""
        finding = share("multilabel", "label_agreement", self.shares)
        images, worst = len(self.shares), int(self.equal.argmin())
        threshold = THRESHOLD if self.options.threshold is None else self.options.threshold
        detail = (
            f"{self.equal.sum()} of {images * len(self.names)} decisions, {images} images, at threshold {threshold}"
        )
        if self.equal[worst] < images:
            detail += f"; worst label {self.names[worst]}, {100 * self.equal[worst] / images:.4g} %"
        limit = self.precision.limits.agreement_pct
        return agreement(
            replace(finding, detail=detail), self.options, limit, any(labels.any() for labels in self.truth)
        )

    def _constant(self) -> Finding:
        """The number of labels with one score for every image, where eager's lie further apart than the largest error
        of this precision. A label whose eager score is constant too is not counted."""
        eager, got = (ends[1] - ends[0] for ends in self.ends)
        stuck = np.flatnonzero((got == 0) & (eager > self.precision.limits.share * self.moments.scale(self.centred)))
        named = f": {', '.join(self.names[label] for label in stuck[:3])}" if len(stuck) else ""
        named += " …" if len(stuck) > 3 else ""
        detail = f"of {len(self.names)}{named}"
        finding = Finding(check="multilabel", metric="constant_labels", value=len(stuck), unit="labels", detail=detail)
        return judged(finding, 0, "low")

    def _precisions(self) -> list[Finding]:
        """map_eager, map and map_drop, which is not measured where no image of any label is positive."""
        if not self.truth:
            return []
        truth = np.concatenate(self.truth)
        if not truth.any():
            detail = f"not measured: none of {len(truth)} images has a label"
            finding = Finding(check="multilabel", metric="map_drop", value=None, unit="points", detail=detail)
            limit = self.options.max_drop
            return [finding if limit is None else judged(finding, limit, "low")]
        ranked = [average_precision.rankings(truth, np.concatenate(scores)) for scores in (self.eager, self.got)]
        labels = f"{len(ranked[0])} of {truth.shape[1]} labels have a positive image, {len(truth)} images"
        findings = [_map(metric, one, labels) for metric, one in zip(("map_eager", "map"), ranked, strict=True)]
        return [*findings, self._drop(ranked[0], ranked[1], np.flatnonzero(truth.sum(0)))]

    def _drop(self, eager: Sequence[Ranking], got: Sequence[Ranking], labels: NDArray[np.intp]) -> Finding:
        loss = average_precision.loss(eager, got)
        low, high = loss.interval(loss.images)
        each = 100 * (average_precision.precisions(eager) - average_precision.precisions(got))
        worst = int(each.argmax())
        detail = (
            f"worst label {self.names[labels[worst]]}, {each[worst]:.3g} points" if each[worst] > 0 else "no label lost"
        )
        finding = Finding(
            check="multilabel", metric="map_drop", value=loss.value, unit="points", low=low, high=high, detail=detail
        )
        limit = self.options.max_drop
        unsure = budgets.when_unsure(self.options.when_unsure, limit is not None)
        budget = budgets.Budget(self.precision.max_drop_points if limit is None else limit, "low", unsure)
        return budgets.judged(finding, budget, loss.images, loss.interval)


def _map(metric: str, ranked: Sequence[Ranking], detail: str) -> Finding:
    """Mean average precision in percent, with the pseudo-value of each image as its samples."""
    samples = tuple((100 * average_precision.pseudo_values(ranked)).round(4).tolist())
    value = 100 * float(average_precision.precisions(ranked).mean())
    return Finding(check="multilabel", metric=metric, value=value, unit="%", detail=detail, samples=samples)


CHECK = Check(Multilabel)
