"""Checks of an artifact. Each module of this folder is one check, and ends in `CHECK = Check(...)`.

A check measures one batch after another, accumulates what it measured, and returns findings. Batches can be measured
in any process: the numbers of a batch depend on nothing but the batch, and they are accumulated in the order of the
images, so the findings have the same bits. A check is independent of backends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter import discover, precision
from exporter.artifact import Artifact
from exporter.backends import Layer, Outputs
from exporter.data.samples import is_synthetic
from exporter.precision import Precision
from exporter.recipe import Checks
from exporter.report import Finding
from exporter.stats import proportion
from exporter.verify import budgets


@dataclass(frozen=True)
class Subject:
    """The artifact that is checked, and its layers."""

    artifact: Artifact
    layers: Sequence[Layer]

    @property
    def precision(self) -> Precision:
        """The precision whose limits hold."""
        return precision.judged_as(self.artifact.sidecar)


Rows = dict[str, NDArray[Any]]
"""What a check keeps of one batch, by name."""


def moments(output: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of squares, the sum and the number of the values of a batch, for `Moments`."""
    wide = output.astype(np.float64)
    return np.array([(wide * wide).sum(), wide.sum(), wide.size])


@dataclass
class Moments:
    """Running sums over one output of eager."""

    squares: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, sums: NDArray[np.float64]) -> None:
        """Accumulate the `moments` of one batch."""
        self.squares += float(sums[0])
        self.total += float(sums[1])
        self.count += int(sums[2])

    def scale(self, centred: bool) -> float:
        """What errors are compared with: the standard deviation, or where not `centred` the root mean square; 1 where
        that is 0."""
        mean = self.total / self.count
        variance = self.squares / self.count - (mean**2 if centred else 0.0)
        return float(np.sqrt(max(variance, 0.0))) or 1.0


@dataclass(frozen=True)
class Seen:
    """One batch: the classes (N,), −1 where unknown, of a multi-label head 0 and 1 for each label (N, L), or of
    masks the class of each pixel (N, H, W), the outputs of eager and of the artifact, and the names of the images."""

    labels: NDArray[np.int64]
    eager: Outputs
    outputs: Outputs
    names: tuple[str, ...] = ()


class Meter(Protocol):
    """A running check."""

    def measure(self, seen: Seen) -> Rows:
        """What the check keeps of one batch. Nothing in the meter changes."""

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate what `measure` returned for one batch, whose images have these names."""

    def findings(self) -> list[Finding]:
        """The findings, with their limits."""


@dataclass(frozen=True)
class Check:
    """A check: `start` creates its meter from the limits and the subject."""

    start: Callable[[Checks, Subject], Meter]


def share(check: str, metric: str, hits: Sequence[float]) -> Finding:
    """A share of the images, in percent with its interval; one sample per image, True or False or a share of it."""
    counted = proportion(sum(hits), len(hits))
    return Finding(
        check=check,
        metric=metric,
        value=counted.value,
        unit="%",
        low=counted.low,
        high=counted.high,
        detail=f"{sum(hits)} of {len(hits)} images",
        samples=tuple(float(hit) for hit in hits),
    )


def agreement(finding: Finding, options: Checks, default_pct: float, has_labels: bool) -> Finding:
    """A share of answers equal to eager's, judged by `--min-agreement` or the precision's own limit.

    Args:
        finding: from `share`.
        options: the limits.
        default_pct: the precision's own limit.
        has_labels: whether labels judge the artifact.
    """
    limit, count, hits = options.min_agreement, len(finding.samples), sum(finding.samples)
    # Where labels judge the accuracy, or the images are synthetic, a warning to take more images helps nobody.
    skip_warning = limit is None and (has_labels or is_synthetic(options.data))
    choice = options.when_unsure or ("pass" if skip_warning else budgets.when_unsure(None, limit is not None))
    budget = budgets.Budget(default_pct if limit is None else limit, "high", choice)

    def interval_of(images: int) -> tuple[float, float]:
        interval = proportion(hits if images == count else round(hits * images / count), images)
        return interval.low, interval.high

    why_passes = ""
    if has_labels and skip_warning and not options.when_unsure:  # their own check says how many images are needed
        why_passes = "not decided by these images; the loss of accuracy is judged instead"
    return budgets.judged(finding, budget, count, interval_of, why_passes)


def start_all(options: Checks, subject: Subject) -> dict[str, Meter]:
    """Start every check of this folder, by name."""
    checks = {name: discover.load(__name__, name, "CHECK") for name in discover.names(__name__)}
    return {name: check.start(options, subject) for name, check in checks.items()}


def measure(meters: Mapping[str, Meter], seen: Seen) -> dict[str, Rows]:
    """What the checks keep of one batch, by the name of the check."""
    return {name: rows for name, meter in meters.items() if (rows := meter.measure(seen))}


def add(meters: Mapping[str, Meter], rows: Mapping[str, Rows], names: Sequence[str]) -> None:
    """Accumulate what `measure` returned for one batch, whose images have these names."""
    for name, measured in rows.items():
        meters[name].add(measured, names)
