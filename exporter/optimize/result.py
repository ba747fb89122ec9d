"""The result of a search: everything that was tried, and why one artifact was chosen."""

from __future__ import annotations

from typing import Any, Literal

from exporter.artifact.sidecar import Record
from exporter.optimize.options import Goal, OptimizeOptions

State = Literal["chosen", "not chosen", "dropped", "beyond the budget", "failed", "not tried"]
Interval = tuple[float, float, float]
"""A value with the ends of its 95 % interval."""


class Accuracy(Record, frozen=True):
    """The metric that candidates are judged by, its value, its interval, and the value of PyTorch."""

    metric: str
    value: float
    low: float
    high: float
    exact: float


class Row(Record, frozen=True):
    """One way of building and running the network.

    threads, hint: how it was timed; None and "" where it was not.
    p50_ms: median latency of a batch.
    images_s: images a second.
    speedup: over eager PyTorch of the same processes.
    state, reason: what became of it, and why.
    unsure: the metrics that passed with a warning, because the images are too few.
    on_front: whether no other one is both faster and more accurate.
    """

    backend: str
    precision: str
    form: str = ""
    scope: str = ""
    threads: int | None = None
    hint: Literal["", "latency", "throughput"] = ""
    p50_ms: float | None = None
    images_s: float | None = None
    speedup: Interval | None = None
    bytes: int | None = None
    kept: tuple[str, ...] = ()
    accuracy: Accuracy | None = None
    state: State = "not tried"
    reason: str = ""
    unsure: tuple[str, ...] = ()
    noise: str = ""
    on_front: bool = False


class Result(Record, frozen=True):
    """A search with all its rows.

    passed: whether the chosen artifact is within the budgets and, unless the goal is size, faster than eager PyTorch.
    artifact, recipe: their files; "" before they are written.
    certainty: how far the chosen one is ahead of the next, with its interval.
    eager_p50_ms: of PyTorch, in the last comparison.
    """

    passed: bool
    rows: tuple[Row, ...]
    chosen: int
    certainty: str
    options: OptimizeOptions
    environment: dict[str, Any]
    eager_p50_ms: float | None = None
    artifact: str = ""
    recipe: str = ""
    sha256: str = ""
    seconds: float = 0.0
    schema: Literal[1] = 1

    @property
    def winner(self) -> Row:
        """The chosen row."""
        return self.rows[self.chosen]


def front(rows: list[Row], goal: Goal) -> list[bool]:
    """Whether each row is on the front of accuracy and speed: no other verified one is as fast and as accurate, and
    better in one of both. For throughput, speed is in images a second, else it is the median latency."""
    costs = [-(row.images_s or 0) if goal == "throughput" else row.p50_ms for row in rows]
    known = [
        (cost, row.accuracy.value) if row.accuracy and cost else None for row, cost in zip(rows, costs, strict=True)
    ]
    return [
        one is not None
        and not any(other is not None and other[0] <= one[0] and other[1] >= one[1] and other != one for other in known)
        for one in known
    ]
