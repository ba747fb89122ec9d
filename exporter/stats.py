"""Estimates, intervals and rank tests for counts and for times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

Z = 1.959964  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Share:
    """A share in percent with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drop:
    """A loss in percentage points with its 95 % interval, and the images behind it."""

    value: float
    low: float
    high: float
    lost: int
    won: int


def proportion(hits: float, count: int) -> Share:
    """`hits` of `count`, with Clopper and Pearson's exact interval (Biometrika 1934), never too narrow for few.

    `hits` may be a sum of shares, one for each of the `count`. The interval is then too wide, never too narrow: among
    all numbers from 0 to 1 with one mean, those that are only 0 or 1 vary most (Hoeffding, "Probability inequalities
    for sums of bounded random variables", 1963).
    """
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return Share(100 * hits / count, 100 * low, 100 * high)


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> Drop:
    """The loss between two answers to the same questions, with its `drop_interval`."""
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    count, lost, won = len(first), int((first & ~second).sum()), int((~first & second).sum())
    return Drop(100 * (lost - won) / count, *drop_interval(lost, won, count), lost, won)


def drop_interval(lost: float, won: float, count: int) -> tuple[float, float]:
    """The 95 % interval, in points, of a loss of `lost` and `won` answers among `count`.

    It is Agresti and Min's for paired proportions: Wald's after half an observation is added to each of the four cells
    ("Simple improved confidence intervals for comparing matched proportions", 2005).
    """
    n, b, c = count + 2, lost + 0.5, won + 0.5
    middle, half = (b - c) / n, Z * sqrt(b + c - (b - c) ** 2 / n) / n
    return 100 * (middle - half), 100 * (middle + half)


def mean_half_width(values: Sequence[float], count: int | None = None) -> float | None:
    """Half of Student's 95 % interval of a mean, in the unit of the values.

    Args:
        values: fewer than three have no interval, as they are equal too often by chance.
        count: the interval of so many values with the same spread, instead of those that are there.
    """
    from scipy.stats import t

    if len(values) < 3:
        return None
    count = count or len(values)
    return float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / sqrt(count))


@dataclass(frozen=True)
class Center:
    """A location with the ends of its interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval."""
        return (self.high - self.low) / 2


def center(values: Sequence[float]) -> Center:
    """The Hodges–Lehmann estimate and its exact 95 % interval, from the signed ranks.

    The estimate is the median of all pairwise means (Walsh averages), the interval those of them that Wilcoxon's
    signed-rank test does not reject (Hollander, Wolfe and Chicken, "Nonparametric statistical methods", 3.2–3.3). With
    fewer than six values that reaches no 95 %, and Student's interval is added to it.
    """
    found = np.asarray(values, float)
    rows, columns = np.triu_indices(len(found))
    walsh = np.sort((found[rows] + found[columns]) / 2)
    cut = _signed_rank_cut(len(found), 0.025)
    low, high = float(walsh[cut]), float(walsh[-1 - cut])
    if len(found) > 1 and 0.5 ** (len(found) - 1) > 0.05:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / sqrt(len(found)))
        low, high = min(low, found.mean() - half), max(high, found.mean() + half)
    return Center(float(np.median(walsh)), float(low), float(high))


def _signed_rank_cut(count: int, tail: float) -> int:
    """How many Walsh averages lie outside the interval at each end: the largest c with P(T⁺ ≤ c) ≤ tail."""
    ways = np.ones(1)
    for rank in range(1, count + 1):  # the number of subsets of 1…count with each sum
        ways = np.concatenate([ways, np.zeros(rank)]) + np.concatenate([np.zeros(rank), ways])
    below = np.cumsum(ways) / 2.0**count
    return max(0, int(np.searchsorted(below, tail, side="right")) - 1)


def p_above(values: Sequence[float]) -> float:
    """The p-value of values above 0: Wilcoxon's signed-rank test, one-sided."""
    from scipy.stats import wilcoxon

    if not np.any(values):
        return 1.0
    return float(wilcoxon(values, alternative="greater").pvalue)


def p_larger(before: Sequence[float], after: Sequence[float]) -> float:
    """The p-value of an `after` larger than `before`: Mann and Whitney's test, one-sided."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(after, before, alternative="greater").pvalue)


def shift(before: Sequence[float], after: Sequence[float]) -> Center:
    """How far `after` lies above `before`: Hodges and Lehmann's estimate for two samples, with its 95 % interval from
    the normal approximation of Mann and Whitney's statistic (Hollander, Wolfe and Chicken, 4.2–4.3)."""
    differences = np.sort(np.subtract.outer(np.asarray(after, float), np.asarray(before, float)).ravel())
    m, n = len(before), len(after)
    cut = max(0, int(m * n / 2 - Z * sqrt(m * n * (m + n + 1) / 12)) - 1)
    return Center(float(np.median(differences)), float(differences[cut]), float(differences[-1 - cut]))


def holm(chances: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, corrected so that the chance of any false alarm among them is that of one
    (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    corrected, worst = [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[index]))
        corrected[index] = worst
    return corrected


def percent(log_ratio: float) -> float:
    """A logarithm of a ratio as a change in percent."""
    return 100 * (exp(log_ratio) - 1)


def log_change(change_pct: float) -> float:
    """A change in percent as the logarithm of a ratio."""
    return log(1 + change_pct / 100)
