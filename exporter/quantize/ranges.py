"""Chooses the range of a quantized type from a histogram of activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from exporter.recipe import CalibMethod

Counts = NDArray[np.float64]
PERCENTILE = 99.99
SHRINKINGS: list[float] = np.linspace(0.2, 1.0, 81).tolist()  # of each end of the range that was seen
_TINY = 1e-12


def choose(counts: Counts, low: float, high: float, method: CalibMethod, symmetric: bool) -> tuple[float, float]:
    """Choose the quantized range: within the observed values, and including zero.

    Args:
        counts: (bins,) number of activations in each of equal bins from `low` to `high`; empty for `minmax`.
        low, high: the smallest and the largest observed value, zero included.
        method: `minmax` takes these; `percentile` leaves out 0.005 % at each end; `mse` has the least mean square
            error of rounding and clipping; `entropy` loses the least information, by the Kullback–Leibler divergence
            between the histogram before and after (Migacz, "8-bit inference with TensorRT", GTC 2017).
        symmetric: whether zero must be in the middle.

    Returns: (low, high).
    """
    most = max(-low, high)
    if method == "minmax" or high - low < _TINY:
        return (-most, most) if symmetric else (low, high)
    if symmetric:
        counts, low, high = _mirrored(counts, low, high, most), -most, most
    centers = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    if method == "percentile":
        return _percentile(counts, centers, low, high, symmetric)
    loss = _square_error if method == "mse" else _divergence
    return _least(lambda a, b: loss(counts, centers, a, b), low, high, symmetric)


def _mirrored(counts: Counts, low: float, high: float, most: float) -> Counts:
    """The histogram extended to −most … most."""
    centers = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    return np.histogram(centers, bins=len(counts), range=(-most, most), weights=counts)[0] if most > 0 else counts


def _percentile(counts: Counts, centers: Counts, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    share = np.cumsum(counts) / max(counts.sum(), 1)
    outside = (1 - PERCENTILE / 100) / 2
    ends = np.searchsorted(share, [outside, 1 - outside]).clip(max=len(centers) - 1)
    first, last = centers[ends].tolist()
    first, last = max(low, min(first, 0.0)), min(high, max(last, 0.0))
    most = max(-first, last)
    return (-most, most) if symmetric else (first, last)


def _least(loss: Callable[[float, float], float], low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """The smaller range with the least loss. In an asymmetric range the ends are moved one after the other."""
    if symmetric:
        best = min(SHRINKINGS, key=lambda t: loss(t * low, t * high))
        return best * low, best * high
    top = min(SHRINKINGS, key=lambda t: loss(low, t * high)) if high > 0 else 1.0
    bottom = min(SHRINKINGS, key=lambda t: loss(t * low, top * high)) if low < 0 else 1.0
    return bottom * low, top * high


def _square_error(counts: Counts, centers: Counts, low: float, high: float) -> float:
    step = (high - low) / 255
    rounded = np.rint((centers.clip(low, high) - low) / step) * step + low
    return float((counts * (centers - rounded) ** 2).sum())


def _divergence(counts: Counts, centers: Counts, low: float, high: float) -> float:
    """Divergence of the clipped histogram from its version in 256 levels, each spread over its non-empty bins."""
    inside = (centers >= low) & (centers <= high)
    clipped = counts[inside].copy()
    if not clipped.sum():
        return float("inf")
    clipped[0] += counts[centers < low].sum()
    clipped[-1] += counts[centers > high].sum()
    level = np.rint((centers[inside] - low) / ((high - low) / 255)).astype(int).clip(0, 255)
    kept, used = counts[inside], counts[inside] > 0
    total, bins = np.bincount(level, kept, 256), np.bincount(level, used, 256)
    spread = np.where(used, (total / np.maximum(bins, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), _TINY)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], _TINY))).sum())


def scale_of(low: float, high: float, symmetric: bool, largest: int = 127) -> tuple[float, int]:
    """Scale and zero point of a range: 0 … 255, or −`largest` … `largest` around zero. Zero itself is always exact."""
    if symmetric:
        return max(-low, high, largest * _TINY) / largest, 0
    scale = max(high - low, 255 * _TINY) / 255
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))
