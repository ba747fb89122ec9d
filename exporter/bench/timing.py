"""Times callables in turn. Independent of models, processes and files.

In a *launch* all models are loaded once, in a fresh process; a *round* runs every arm once, in random order; a *block*
is a few timed back-to-back runs of one arm. The arms of a round see the same state of the machine, so their blocks are
compared in pairs. The place of a model in memory changes its speed and is fixed when it is loaded, so intervals are
computed over launches.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from exporter.errors import ExporterError

BLOCK_MS = 20.0
LEAD_MS = 2.0
LEAST_ROUNDS = 3
SETTLED = 0.03  # the medians of two successive halves differ by no more
MAX_BAD_ROUNDS = 20

Clock = Callable[[], int]


class ClockError(ExporterError):
    """The clock of this machine cannot be used for timing."""

    exit_code = 3


@dataclass(frozen=True)
class Pace:
    """The schedule of a warm arm: untimed and timed runs of a block, and whether the latency had settled."""

    lead: int
    block: int
    settled: bool


@dataclass(frozen=True)
class Rounds:
    """Timed rounds: for each arm a list of blocks of milliseconds, one block a round, and the number of rounds dropped
    because the clock went backwards or stood still."""

    blocks: dict[str, list[list[float]]]
    dropped: int


@contextmanager
def undisturbed() -> Iterator[None]:
    """Disable the garbage collector inside the `with` block."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def settle(run: Callable[[], None], least_s: float, most_s: float, clock: Clock = time.perf_counter_ns) -> Pace:
    """Run until the latency no longer changes; return the pace.

    Args:
        run: one inference.
        least_s: minimum duration in seconds.
        most_s: maximum duration; the latency may then not have settled.
        clock: nanoseconds.
    """
    taken: list[float] = []
    settled = False
    while not settled and sum(taken) < most_s * 1e3:
        taken += _block(run, 1, clock)
        if len(taken) >= 6 and sum(taken) >= least_s * 1e3:
            half = len(taken) // 3
            before, after = statistics.median(taken[-2 * half : -half]), statistics.median(taken[-half:])
            settled = abs(before - after) <= SETTLED * after
        if len(taken) > MAX_BAD_ROUNDS and sum(taken) <= 0:
            raise ClockError("the clock of this machine stands still or goes backwards; nothing can be timed with it")
    typical = max(statistics.median(taken[len(taken) // 2 :]), 1e-3)
    return Pace(max(1, round(LEAD_MS / typical)), max(1, round(BLOCK_MS / typical)), settled)


def interleave(
    runs: Mapping[str, Callable[[], None]],
    paces: Mapping[str, Pace],
    seconds: float,
    shuffle: random.Random,
    starting: Callable[[str], None],
    clock: Clock = time.perf_counter_ns,
) -> Rounds:
    """Run all arms in turn, in random order, for a number of seconds and at least `LEAST_ROUNDS` rounds.

    `starting` is called with the name of each arm before its block. A round in which the clock did not go forwards is
    dropped for all arms, so that pairs stay complete.

    Raises: ClockError when this happens all the time.
    """
    blocks: dict[str, list[list[float]]] = {name: [] for name in runs}
    elapsed = dropped = kept = 0
    names = list(runs)
    while elapsed < seconds * 1e9 or kept < LEAST_ROUNDS:
        begin, taken = clock(), {}
        for name in shuffle.sample(names, len(names)):
            starting(name)
            for _ in range(paces[name].lead):
                runs[name]()
            taken[name] = _block(runs[name], paces[name].block, clock)
        elapsed += max(0, clock() - begin)
        if min(min(block) for block in taken.values()) > 0:
            kept += 1
            for name, block in taken.items():
                blocks[name].append(block)
        else:
            dropped += 1
            if dropped > MAX_BAD_ROUNDS + kept:
                raise ClockError("the clock of this machine goes backwards; nothing can be timed with it")
    return Rounds(blocks, dropped)


def _block(run: Callable[[], None], count: int, clock: Clock) -> list[float]:
    taken = []
    for _ in range(count):
        before = clock()
        run()
        taken.append(clock() - before)
    return [ns / 1e6 for ns in taken]
