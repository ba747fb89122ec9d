"""Mean average precision (mAP) of a multi-label head, and the interval of a loss of it.

The average precision of a label is Σ (Rₙ − Rₙ₋₁) Pₙ over its distinct scores, as in scikit-learn's
`average_precision_score`. mAP is the mean over the labels that have a positive image (macro average). `truth` (N, L)
holds 0 and 1, `scores` (N, L) are logits or probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.stats import Z

RESAMPLES = 1000
SEED = 0
AT_ONCE = 1 << 22  # weights in memory

Floats = NDArray[np.floating[Any]]
Truth = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """The images of one label, the highest score first.

    order: the images by rank (N,); ends: for each rank, the last rank of the same score (N,); positives: the ranks of
    positive images (P,); hits: how many positive images have the score of each positive one or a higher (P,).
    """

    order: NDArray[np.intp]
    ends: NDArray[np.intp]
    positives: NDArray[np.intp]
    hits: NDArray[np.intp]

    def precision(self, weights: Floats) -> Floats:
        """The average precision if images count as often as `weights` (N, B) say: (B,), NaN without a positive one."""
        ranked = weights[self.order]
        own = ranked[self.positives]
        with np.errstate(invalid="ignore", divide="ignore"):
            precisions = np.cumsum(own, 0)[self.hits - 1] / np.cumsum(ranked, 0)[self.ends[self.positives]]
            total: Floats = np.where(own > 0, own * precisions, 0.0).sum(0) / own.sum(0)
        return total

    def without_each(self) -> NDArray[np.float64]:
        """The average precision without one image, for each image (N,).

        Positive images with higher scores keep their precision. The others move up by one rank, and lose a hit if the
        image was positive.
        """
        is_positive = np.zeros(len(self.order), np.intp)
        is_positive[self.positives] = 1
        ends = self.ends[self.positives]
        kept = np.concatenate([[0.0], np.cumsum(self.hits / (ends + 1))])
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = np.nan_to_num((self.hits - np.array([[0], [1]])) / ends, posinf=0.0)  # (2, P)
            sums = np.concatenate([np.cumsum(moved[:, ::-1], 1)[:, ::-1], np.zeros((2, 1))], 1)
            first = np.searchsorted(ends, self.ends)  # the first positive image that is not above
            total = kept[first] + sums[is_positive, first]
            total[self.positives] -= moved[1]
            ranked = total / (len(self.positives) - is_positive)
        without = np.empty(len(self.order))
        without[self.order] = ranked
        return without


def ranking(truth: Truth, scores: Floats) -> Ranking:
    """The images of one label by score; a score that is not finite counts as wrong, whatever the label is."""
    worst = np.where(truth > 0, -np.inf, np.inf)
    scores = np.where(np.isfinite(scores), scores, worst)
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], truth[order] > 0
    ends = np.searchsorted(-ordered, -ordered, "right") - 1
    positives = np.flatnonzero(positive)
    return Ranking(order, ends, positives, np.cumsum(positive, dtype=np.intp)[ends[positives]])


def rankings(truth: Truth, scores: Floats) -> list[Ranking]:
    """The ranking of each label that has a positive image."""
    return [ranking(truth[:, label], scores[:, label]) for label in np.flatnonzero(truth.sum(0))]


def precisions(ranked: Sequence[Ranking]) -> NDArray[np.float64]:
    """The average precision of each label."""
    return np.array([float(one.precision(np.ones((len(one.order), 1)))[0]) for one in ranked])


def pseudo_values(ranked: Sequence[Ranking]) -> NDArray[np.float64]:
    """The share of each image in mAP (N,): N × mAP − (N − 1) × mAP without the image.

    They are the jackknife's pseudo-values (Tukey, "Bias and confidence in not-quite large samples", 1958). Those of two
    artifacts for the same images are paired numbers.
    """
    count = len(ranked[0].order)
    without = np.zeros(count)
    labels = np.zeros(count)
    for one in ranked:
        each = one.without_each()
        without += np.nan_to_num(each)
        labels += ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        left = np.nan_to_num(without / labels)
    return count * float(precisions(ranked).mean()) - (count - 1) * left


@dataclass(frozen=True)
class Loss:
    """A loss of mAP in points.

    low, high: distances in points from the value to the ends of the bootstrap's 95 % interval; spread: the standard
    error of the added images, in points; images: how many there are.
    """

    value: float
    low: float
    high: float
    spread: float
    images: int

    def interval(self, images: int) -> tuple[float, float]:
        """The 95 % interval, if so many images had given the same shares."""
        ratio = images / self.images
        floor = (Z * self.spread / ratio) ** 2
        low, high = (sqrt(end**2 / ratio + floor) for end in (self.low, self.high))
        return self.value - low, self.value + high


def loss(before: Sequence[Ranking], after: Sequence[Ranking]) -> Loss:
    """The loss of mAP between two rankings of the same images, with its interval.

    The interval is the percentile bootstrap over images, all labels of an image together (Efron and Tibshirani, "An
    introduction to the bootstrap", 1993, 13.3), which has zero width where no image changed its rank. So half an image
    that was lost and half an image that was won are added to the positive images of each label, as in Agresti and Min's
    interval for paired proportions (see `stats.drop_interval`): of one label it is theirs where nothing was lost.
    """
    count = len(before[0].order)
    value = 100 * float(precisions(before).mean() - precisions(after).mean())
    drops = []
    for weights in _resamples(count):
        shares = [np.array([one.precision(weights) for one in ranked]) for ranked in (before, after)]
        with np.errstate(invalid="ignore"):
            known = ~np.isnan(shares[0])
            drops.append(100 * np.nansum(shares[0] - shares[1], 0)[known.any(0)] / known.sum(0)[known.any(0)])
    low, high = np.percentile(np.concatenate(drops), [2.5, 97.5])
    positives = np.array([len(one.positives) for one in before])
    spread = 100 * sqrt(float((1.0 / (positives + 2) ** 2).sum())) / len(before)
    return Loss(value, max(0.0, value - float(low)), max(0.0, float(high) - value), spread, count)


def _resamples(count: int) -> Iterator[NDArray[np.float32]]:
    """How often each image is drawn in each resample: (N, B), in parts that fit in memory."""
    rng = np.random.default_rng(SEED)
    size = max(1, min(RESAMPLES, AT_ONCE // count))
    for start in range(0, RESAMPLES, size):
        drawn = rng.integers(0, count, (min(size, RESAMPLES - start), count))
        yield np.stack([np.bincount(one, minlength=count) for one in drawn], 1).astype(np.float32)
