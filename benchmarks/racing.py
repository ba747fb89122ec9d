"""Arms timed in turn, and what one is over another: what the benchmarks share."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from math import exp

from exporter.artifact.sidecar import Preprocessing
from exporter.bench import Arm, Opener, Plan, Timing, flat, latency, supervisor, worker
from exporter.stats import center

Ratio = tuple[float, float, float]


def race(
    arms: Sequence[Arm], recipe: Preprocessing, batch: int, seconds: float, opener: Opener = worker.open_arm
) -> Timing:
    """All arms timed in fresh processes, `seconds` of timing in all."""
    timing = Timing(Plan(arms=tuple(arms), preprocessing=recipe, batch=batch, seconds=seconds / supervisor.PROCESSES))
    supervisor.measure(timing, opener, supervisor.PROCESSES)
    return timing


def race_in_turn(timings: Sequence[Timing], opener: Opener = worker.open_arm) -> None:
    """Time several groups of arms, which together would not fit into memory: one process of each in turn, as many times
    as one race has processes. Processes that others disturbed are kept."""
    each = [supervisor.launches(timing, opener) for timing in timings]
    for number in range(supervisor.PROCESSES):
        print(f"round {number + 1} of {supervisor.PROCESSES}", file=sys.stderr, flush=True)
        for launches in each:
            next(launches, None)


def ratio(timing: Timing, name: str, over: str) -> Ratio:
    """How many times as fast as another, in pairs of the same rounds, with the 95 % interval over processes."""
    found = center(latency.speedups(timing, name, over))
    return exp(found.value), exp(found.low), exp(found.high)


def samples(timing: Timing, name: str) -> tuple[tuple[float, ...], ...]:
    """Milliseconds, process by process."""
    return tuple(tuple(round(one, 4) for one in flat(launch.blocks.get(name, []))) for launch in timing.launches)


def typical(launches: Sequence[Sequence[float]]) -> float:
    """The median of all of them."""
    return statistics.median(sample for launch in launches for sample in launch)


def words(found: Ratio) -> str:
    """A ratio with its interval."""
    return "{:.2f} ({:.2f}–{:.2f})".format(*found)
