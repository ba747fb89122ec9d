"""Which models a race drops, and when it ends: on processes that were written down."""

import pytest
from msgspec.structs import replace

from exporter.artifact.sidecar import Preprocessing
from exporter.bench import Arm, Launch, Plan
from exporter.machine import Conditions
from exporter.optimize.race import Race, Runner
from exporter.optimize.result import Accuracy, Row, front

QUIET = Conditions(load=0.0, others_pct=0.0, steal_pct=0.0, throttled=0, mhz=None)


def launch(noise=0.0, rounds=6, **ms):
    """One process in which each model took so many milliseconds, a little more or less in each round."""
    blocks = {
        name: [[value * (1 + noise * (-1) ** (turn + len(name)))] for turn in range(rounds)]
        for name, value in ms.items()
    }
    return Launch(
        blocks=blocks, cosine=dict.fromkeys(ms, 1.0), streams=dict.fromkeys(ms, 1), facts={}, settled={}, dropped=0,
        conditions=QUIET,
    )  # fmt: skip


def runner(launches, names, groups=None, **numbers):
    arms = tuple(Arm(name=name, path="", runtime="eager" if name == "eager" else "artifact") for name in names)
    groups = groups or {name: "all" for name in names if name != "eager"}
    plan = Plan(arms=arms, preprocessing=Preprocessing())
    started = Runner(plan, groups, Race(launches=tuple(launches)), lambda _: None, **{"most": 12, **numbers})
    started._drop()
    return started


def test_after_one_process_only_the_hopeless_is_dropped():
    one = runner([launch(eager=9, a=1.0, b=1.1, c=1.5)], ("eager", "a", "b", "c"))
    assert set(one.dropped) == {"c"}
    assert one.dropped["c"] == "1.50 × slower than a"
    assert [arm.name for arm in one.timing.plan.arms] == ["eager", "a", "b"]


def test_from_three_processes_on_the_interval_decides():
    three = [launch(0.001, eager=9, a=1.0 + i / 1000, b=1.05, c=1.0) for i in range(3)]
    assert set(runner(three, ("eager", "a", "b", "c")).dropped) == {"b"}
    wide = [launch(eager=9, a=1.0, b=ms) for ms in (0.9, 1.3, 1.1)]
    assert not runner(wide, ("eager", "a", "b")).dropped


def test_the_next_best_is_timed_to_the_end_where_it_is_asked_for():
    launches = [launch(eager=9, a=1.0, b=2.0, c=3.0)]
    assert set(runner(launches, ("eager", "a", "b", "c"), keep=2).dropped) == {"c"}


def test_a_model_that_could_not_be_built_before_is_timed_with_the_others():
    """A race that is done is another one where a model was added."""
    plan = Plan(arms=tuple(Arm(name=name, path="") for name in ("eager", "a", "b")), preprocessing=Preprocessing())
    done = Race(launches=(launch(eager=9, a=1.0),), done=True)
    assert not Runner(plan, {"a": "all", "b": "all"}, done, lambda _: None, most=12).done
    assert Runner(plan, {"a": "all"}, replace(done, failures={"b": "crashed"}), lambda _: None, most=12).done


def test_each_group_has_its_own_winner():
    groups = {"a": "fp32", "b": "fp32", "c": "int8", "d": "int8"}
    one = runner([launch(eager=9, a=1, b=2, c=10, d=20)], ("eager", "a", "b", "c", "d"), groups)
    assert set(one.dropped) == {"b", "d"}
    assert one.standing("int8") == ["c"]


def test_it_is_decided_when_nothing_can_win_by_more_than_two_percent():
    equal = [launch(eager=9, a=1.0, b=1.0 + i / 1000) for i in range(3)]
    assert runner(equal, ("eager", "a", "b"))._is_decided()
    unsure = [launch(eager=9, a=1.0, b=ms) for ms in (0.9, 1.3, 1.1)]
    assert not runner(unsure, ("eager", "a", "b"))._is_decided()


def test_batches_at_once_count_as_speed():
    both = launch(eager=9, a=2.0, b=3.6)
    both.streams["b"] = 2
    assert runner([both], ("eager", "a", "b")).standing("all") == ["b", "a"]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 90), (2, 95), (3, 94)], [True, True, False]),
        ([(1, 90), (1, 90)], [True, True]),
        ([(2, 90), (1, 90)], [False, True]),
        ([(None, 90), (1, 10)], [False, True]),
    ],
)
def test_the_front_is_what_nothing_else_beats_in_both(points, expected):
    rows = [
        Row(backend="x", precision="y", p50_ms=ms, accuracy=Accuracy(metric="top1", value=v, low=v, high=v, exact=v))
        for ms, v in points
    ]
    assert front(rows, "latency") == expected


def test_models_beyond_the_limit_drop_none_that_keeps_it():
    """Four batches at once are faster, and each takes too long."""
    three = [launch(0.001, eager=90, a=20.0 + i / 1000, b=21.0, c=8.0) for i in range(3)]
    for one in three:
        one.streams.update({"a": 4, "b": 4})
    assert set(runner(three, ("eager", "a", "b", "c")).dropped) == {"b", "c"}
    assert not runner(three, ("eager", "a", "b", "c"), limit_ms=10).dropped
    assert set(runner(three, ("eager", "a", "b", "c"), limit_ms=1).dropped) == {"b", "c"}, "none keeps it"


def test_dropped_models_are_found_after_the_race():
    one = runner([launch(eager=9, a=1.0, b=2.0)], ("eager", "a", "b"), most=1)
    assert set(one.dropped) == {"b"}
    one.done = True
    one.run(None)
    assert one.timing.arm("b").name == "b"
