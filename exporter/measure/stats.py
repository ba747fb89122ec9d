"""Intervals for what was counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

_Z = 1.959964  # the 97.5 % point of the normal distribution


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


def proportion(hits: int, count: int) -> Share:
    """`hits` of `count`, with Clopper and Pearson's exact interval (Biometrika 1934), never too narrow for few."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(method="exact")
    return Share(100 * hits / count, 100 * float(interval.low), 100 * float(interval.high))


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> Drop:
    """The loss between two answers to the same questions.

    The interval is Agresti and Min's for paired proportions: Wald's after half an observation is added to each of
    the four cells ("Simple improved confidence intervals for comparing matched proportions", 2005).
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    count, lost, won = len(first), int((first & ~second).sum()), int((~first & second).sum())
    n, b, c = count + 2, lost + 0.5, won + 0.5
    middle, half = (b - c) / n, _Z * sqrt(b + c - (b - c) ** 2 / n) / n
    return Drop(100 * (lost - won) / count, 100 * (middle - half), 100 * (middle + half), lost, won)
