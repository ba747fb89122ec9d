"""Timing with clocks and callables whose truth is known."""

import gc
import itertools
import random

import numpy as np
import pytest

from exporter.bench import timing
from exporter.bench.timing import ClockError, Pace


class World:
    """A clock that callables move."""

    def __init__(self):
        self.now = 0
        self.log = []

    def clock(self):
        return self.now

    def takes(self, name, ms):
        steps = itertools.cycle(ms if isinstance(ms, list) else [ms])

        def run():
            self.log.append(name)
            self.now += int(next(steps) * 1e6)

        return run


PACES = {"a": Pace(1, 3, True), "b": Pace(2, 2, True)}


def interleaved(world, seconds=1.0, seed=0, runs=None):
    runs = runs or {"a": world.takes("a", 4), "b": world.takes("b", 9)}
    started = []
    rounds = timing.interleave(runs, PACES, seconds, random.Random(seed), started.append, world.clock)
    return rounds, started


def test_every_round_takes_every_arm_once_and_times_only_the_block():
    world = World()
    rounds, started = interleaved(world)
    assert all(sorted(started[i : i + 2]) == ["a", "b"] for i in range(0, len(started), 2))
    assert {tuple(block) for block in rounds.blocks["a"]} == {(4.0, 4.0, 4.0)}
    assert {tuple(block) for block in rounds.blocks["b"]} == {(9.0, 9.0)}
    assert len(rounds.blocks["a"]) == len(rounds.blocks["b"]) == pytest.approx(1000 / (4 * 4 + 4 * 9), abs=1)
    assert world.log.count("a") == 4 * len(rounds.blocks["a"]), "one run leads into three"


def test_the_order_is_random_and_the_seed_repeats_it():
    orders = [interleaved(World(), seed=seed)[1] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    firsts = orders[0][::2]
    assert 0.2 < firsts.count("a") / len(firsts) < 0.8


def test_a_slow_model_still_gets_its_rounds():
    rounds, _ = interleaved(World(), seconds=0.001)
    assert len(rounds.blocks["a"]) == timing.LEAST_ROUNDS


def test_a_round_in_which_the_clock_goes_back_is_dropped_whole():
    world = World()
    back = {"a": world.takes("a", [4] * 40 + [-50]), "b": world.takes("b", 9)}
    rounds, _ = interleaved(world, runs=back)
    assert rounds.dropped >= 1
    assert len(rounds.blocks["a"]) == len(rounds.blocks["b"])
    assert min(min(block) for block in rounds.blocks["a"]) > 0


@pytest.mark.parametrize("step", [0, -1])
def test_a_clock_that_cannot_be_measured_with_is_refused(step):
    world = World()
    stuck = {"a": world.takes("a", step), "b": world.takes("b", step)}
    with pytest.raises(ClockError, match="clock"):
        interleaved(world, runs=stuck)
    with pytest.raises(ClockError, match="clock"):
        timing.settle(stuck["a"], 0.1, 1, world.clock)


def test_it_warms_up_until_the_pace_no_longer_changes():
    world = World()
    falling = world.takes("a", [*np.geomspace(50, 5, 40), *[5] * 10_000])
    pace = timing.settle(falling, 0.05, 10, world.clock)
    assert pace.settled
    assert len(world.log) > 40
    assert pace.block == 4, "20 ms of 5 ms"


def test_what_never_settles_is_said_to_have_not():
    world = World()
    pace = timing.settle(world.takes("a", list(np.geomspace(1, 1e6, 400))), 0.05, 0.5, world.clock)
    assert not pace.settled


def test_the_garbage_collector_keeps_still_and_is_woken_again():
    assert gc.isenabled()
    with timing.undisturbed():
        assert not gc.isenabled()
    assert gc.isenabled()
