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
from exporter.artifact.sidecar import Record
from exporter.backends import Layer, Outputs
from exporter.errors import BadRequest
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


class Options(Record, frozen=True):
    """The limits a user may set; None is the check's own for the artifact's precision."""

    min_cosine: float | None = None
    atol: float | None = None
    min_agreement: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class Check:
    """A check: how it starts, given the limits and what is checked."""

    start: Callable[[Options, Subject], Meter]


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


def check_options(options: Options) -> None:
    """Refuse limits that no number can be held against.

    Raises: BadRequest.
    """
    for name, low, high in (
        ("min_cosine", -1, 1),
        ("atol", 0, float("inf")),
        ("min_agreement", 0, 100),
        ("max_drop", -100, 100),
    ):
        limit = getattr(options, name)
        if limit is not None and not low <= limit <= high:
            raise BadRequest(f"--{name.replace('_', '-')} {limit}: expected a number from {low} to {high}")


def start_all(options: Options, subject: Subject) -> list[Meter]:
    """Every check of this folder, started."""
    checks = [discover.load(__name__, name, "CHECK") for name in discover.names(__name__)]
    return [check.start(options, subject) for check in checks]
