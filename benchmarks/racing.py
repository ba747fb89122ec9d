"""Arms timed in turn, and what one is over another: what the benchmarks share."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path

import msgspec

from benchmarks.provenance import commit
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.bench import Arm, Launch, Opener, Plan, Timing, flat, latency, supervisor, worker
from exporter.stats import center

Ratio = tuple[float, float, float]


def race(
    arms: Sequence[Arm], recipe: Preprocessing, batch: int, seconds: float, opener: Opener = worker.open_arm
) -> Timing:
    """All arms timed in fresh processes, `seconds` of timing in all."""
    timing = Timing(Plan(arms=tuple(arms), preprocessing=recipe, batch=batch, seconds=seconds / supervisor.PROCESSES))
    supervisor.measure(timing, opener, supervisor.PROCESSES)
    return timing


def race_in_turn(timings: Sequence[Timing], folder: Path, opener: Opener = worker.open_arm) -> None:
    """Time several groups of arms, which together would not fit into memory: one process of each in turn, as many times
    as one race has processes. Processes that others disturbed are kept. Each is stored in the folder at once, and a run
    that was interrupted goes on from there."""
    each = [
        (timing, supervisor.launches(timing, opener), folder / f"{number}.json")
        for number, timing in enumerate(timings)
    ]
    for timing, _, path in each:
        resume(timing, path)
    for number in range(supervisor.PROCESSES):
        print(f"round {number + 1} of {supervisor.PROCESSES}", file=sys.stderr, flush=True)
        for timing, launches, path in each:
            if len(timing.launches) <= number:
                next(launches, None)
                keep(timing, path)


class Kept(Record, frozen=True):
    """The processes of a timing in a file, and the commit that measured them."""

    commit: str
    plan: Plan
    launches: tuple[Launch, ...]
    failures: dict[str, str]


def resume(timing: Timing, path: Path) -> None:
    """Take the processes of an interrupted run, if they are of the same plan and commit."""
    if path.is_file():
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        if (kept.commit, kept.plan) == (commit(), timing.plan):
            timing.launches[:] = kept.launches
            timing.failures |= kept.failures


def keep(timing: Timing, path: Path) -> None:
    """Store the processes of a timing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = Kept(commit=commit(), plan=timing.plan, launches=tuple(timing.launches), failures=timing.failures)
    write_file(path, msgspec.json.encode(kept))


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
