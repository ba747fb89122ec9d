"""What is asked of an artifact. Each module of this folder is one check, and ends in `CHECK = Check(...)`.

A check measures: it watches batches go by, keeps what it needs in constant memory, and makes findings. It sees
outputs, never a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter import discover
from exporter.artifact import Artifact
from exporter.backends import Layer, Outputs
from exporter.recipe import Checks
from exporter.report import Finding
from exporter.stats import proportion


@dataclass(frozen=True)
class Subject:
    """What is checked: the artifact and the layers it is made of."""

    artifact: Artifact
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Seen:
    """One batch: the classes (N,), −1 where unknown, and what eager and the artifact gave for it."""

    labels: NDArray[np.int64]
    eager: Outputs
    outputs: Outputs


class Meter(Protocol):
    """A check at work."""

    def see(self, seen: Seen) -> None:
        """Take in one batch."""

    def findings(self) -> list[Finding]:
        """What was measured, judged."""


@dataclass(frozen=True)
class Check:
    """A check: how it starts, given the limits and what is checked."""

    start: Callable[[Checks, Subject], Meter]


def share(check: str, metric: str, hits: Sequence[bool]) -> Finding:
    """How many of the images, in percent with its interval; one sample per image."""
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


def start_all(options: Checks, subject: Subject) -> list[Meter]:
    """Every check of this folder, started."""
    checks = [discover.load(__name__, name, "CHECK") for name in discover.names(__name__)]
    return [check.start(options, subject) for check in checks]
