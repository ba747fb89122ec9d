"""Models timed in turn, in one fresh process after another; a model that cannot win any more is dropped.

This is successive halving, with intervals in place of a fixed share: after the first process, models that are slower by
more than `HOPELESS` are dropped; from the third on, those that the 95 % interval over processes excludes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log
from statistics import median

import msgspec
import numpy as np

from exporter.artifact.sidecar import Record
from exporter.bench import Launch, Opener, Plan, Timing, flat, latency, supervisor, turns
from exporter.progress import track
from exporter.stats import Center, center

EAGER = latency.EAGER
HOPELESS = 1.25
EQUAL = 1.02
"""A model that could be faster by no more than this is not worth another process."""
SURELY = 0.95
"""A model keeps a limit surely if the time of each process is at most this share of it."""
LEAST = 3
"""Processes before an interval is looked at."""


class Race(Record, frozen=True):
    """What was measured: the processes, the models that were dropped or failed, each with the reason."""

    launches: tuple[Launch, ...] = ()
    dropped: dict[str, str] = msgspec.field(default_factory=dict)
    failures: dict[str, str] = msgspec.field(default_factory=dict)
    done: bool = False

    def names(self) -> set[str]:
        """The models that were timed, dropped or failed."""
        timed = (name for launch in self.launches for name in launch.blocks)
        return {*timed, *self.dropped, *self.failures}


class Runner:
    """A race that goes on from what was measured before.

    plan: the models, eager first.
    groups: the group of each other model by its name; the winner of each group is looked for.
    before: what was measured before.
    save: is called with the race after each process.
    least, most: numbers of processes.
    keep: so many of a group are timed to the end, the fastest ones.
    limit_ms: the largest median time of a winner, if there is one that keeps it.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Mapping[str, str],
        before: Race | None,
        save: Callable[[Race], None],
        most: int,
        least: int = LEAST,
        keep: int = 1,
        limit_ms: float | None = None,
    ) -> None:
        self.plan, self.groups, self.save = plan, groups, save
        self.most, self.least, self.keep, self.limit_ms = most, least, keep, limit_ms
        names = {arm.name for arm in plan.arms}
        if before is None or not names <= before.names():  # a model that could not be built then
            before = Race()
        self.timing = Timing(plan, list(before.launches), dict(before.failures))
        self.dropped, self.done = dict(before.dropped), before.done

    def run(self, opener: Opener) -> None:
        """Time until each group has a winner, or `most` processes were timed."""
        try:
            if not self.done:
                self._run(opener)
        finally:
            self.timing.plan = self.plan  # with the models that were dropped

    def _run(self, opener: Opener) -> None:
        self._drop()
        left = max(0, self.most - len(self.timing.launches))
        with turns.alone():
            for _ in track(supervisor.launches(self.timing, opener), left, "processes", lambda _: 1):
                self._drop()
                count = len(self.timing.launches)
                self.done = count >= self.most or (count >= self.least and self._is_decided())
                self.save(self.race())
                if self.done:
                    return
        self.done = True  # nothing is left to time
        self.save(self.race())

    def race(self) -> Race:
        """What was measured so far."""
        return Race(
            launches=tuple(self.timing.launches),
            dropped=self.dropped,
            failures=self.timing.failures,
            done=self.done,
        )

    def standing(self, group: str) -> list[str]:
        """The models of a group that may win, the fastest first."""
        names = [
            arm.name
            for arm in self.timing.standing()
            if self.groups.get(arm.name) == group and arm.name not in self.dropped and self._was_timed(arm.name)
        ]
        return sorted(names, key=lambda name: -self.speed(name))

    def _best(self, group: str) -> list[str]:
        """The models of a group that may win and surely keep the limit, or all of them if none does, the fastest
        first."""
        standing = self.standing(group)
        within = [
            name
            for name in standing
            if self.limit_ms is None or max(times_ms(self.timing, name)) <= SURELY * self.limit_ms
        ]
        return within or standing

    def _was_timed(self, name: str) -> bool:
        return any(name in launch.blocks for launch in self.timing.launches)

    def speed(self, name: str) -> float:
        """The logarithm of the speed-up over eager, the median over processes; where eager failed, of the number of
        runs a millisecond."""
        if ratios := latency.speedups(self.timing, name, EAGER):
            return median(ratios)
        times = [median(flat(one.blocks[name])) for one in self.timing.launches if name in one.blocks]
        return -log(median(times))

    def _drop(self) -> None:
        """Drop what cannot win, and time it no more."""
        for group in set(self.groups.values()):
            best = self._best(group)
            for name in self.standing(group):
                if name not in best[: self.keep] and (reason := self._loses(name, best[0])):
                    self.dropped[name] = reason
        arms = tuple(arm for arm in self.plan.arms if arm.name not in self.dropped)
        self.timing.plan = msgspec.structs.replace(self.plan, arms=arms)

    def _loses(self, name: str, leader: str) -> str:
        """Why a model cannot win against the fastest of its group, or ""."""
        if len(self.timing.launches) < LEAST:
            over = within_one(self.timing.launches[-1], leader, name)
            return f"{exp(over.value):.2f} × slower than {leader}" if over and over.low > log(HOPELESS) else ""
        over = self.over(leader, name)
        return f"{text(over)} slower than {leader}" if over and over.low > 0 else ""

    def over(self, name: str, other: str) -> Center | None:
        """The logarithm of how many times faster a model is than another, over the processes that timed both."""
        ratios = latency.speedups(self.timing, name, other)
        return center(ratios) if len(ratios) >= LEAST else None

    def _is_decided(self) -> bool:
        return all(self._is_group_decided(group) for group in set(self.groups.values()))

    def _is_group_decided(self, group: str) -> bool:
        """Whether no other model can be faster than the first by more than `EQUAL`."""
        best = self._best(group)
        ahead = [self.over(best[0], name) for name in best[1:]]
        return all(one is not None and one.low > -log(EQUAL) for one in ahead)


def text(ratio: Center) -> str:
    """A ratio with its interval, from logarithms: `1.31 × (1.28–1.35)`."""
    return f"{exp(ratio.value):.2f} × ({exp(ratio.low):.2f}–{exp(ratio.high):.2f})"


def within_one(launch: Launch, name: str, other: str) -> Center | None:
    """The logarithm of how many times faster one model was than another in the rounds of one process."""
    if name not in launch.blocks or other not in launch.blocks:
        return None
    rounds = zip(launch.blocks[other], launch.blocks[name], strict=True)
    share = float(np.log(launch.streams[name] / launch.streams[other]))
    return center([float(np.log(median(slow) / median(fast))) + share for slow, fast in rounds])


def times_ms(timing: Timing, name: str) -> list[float]:
    """The median milliseconds of a run in each process."""
    return [median(flat(launch.blocks[name])) for launch in timing.launches if name in launch.blocks]
