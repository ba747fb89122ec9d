"""What is a regression and what is not, on numbers whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.compare import Change, compare_answers, compare_exact, judge, parse_limit, parse_limits, processes_needed
from exporter.errors import BadRequest
from exporter.report import Finding
from exporter.stats import center, log_change, p_above


def change(limit="p50_ms:5%", shift_pct=0.0, noise_pct=0.5, launches=16, floor_pct=1.0, seed=0):
    rng = np.random.default_rng(seed)
    effects = list(np.log1p(shift_pct / 100) + rng.normal(0, noise_pct / 100, launches))
    return Change(
        limit=parse_limit(limit),
        case="batch 1",
        found=center(effects),
        effects=effects,
        chance=p_above(effects),
        floor=log_change(floor_pct),
        base=10.0,
        head=10.0,
    )


def passed(*changes, confirmed=True):
    return [finding.passed for finding in judge(changes, confirmed)]


def test_a_regression_is_above_its_limit_beyond_the_floor_and_significant():
    assert passed(change(shift_pct=10)) == [False]
    assert passed(change(shift_pct=4)) == [True], "below the limit"
    assert passed(change(shift_pct=5.7)) == [True], "above the limit, within the floor"
    assert passed(change(shift_pct=5.7, floor_pct=0.2)) == [False]
    assert passed(change(shift_pct=-20)) == [True]


def test_few_launches_are_never_significant():
    assert passed(change(shift_pct=30, launches=5)) == [True]
    assert passed(change(shift_pct=30, launches=8)) == [False]


def test_the_correction_is_for_all_that_is_compared():
    """Eight launches give p = 0.004: enough alone, not among three."""
    one = change(shift_pct=30, launches=8)
    assert passed(one) == [False]
    assert passed(one, change(seed=1), change(seed=2))[0]


@pytest.mark.parametrize(("comparisons", "processes"), [(1, 7), (2, 8), (40, 12), (41, 13), (1000, 17)])
def test_as_many_processes_are_needed_as_make_one_comparison_significant(comparisons, processes):
    assert processes_needed(comparisons) == processes
    others = [change(seed=seed) for seed in range(1, comparisons)]
    assert passed(change(shift_pct=30, launches=processes), *others)[0] is False
    assert passed(change(shift_pct=30, launches=processes - 1), *others)[0] is True


def test_too_few_launches_for_so_many_comparisons_are_said():
    few = replace(change(shift_pct=30, launches=6), least_chance=0.5**6)
    (finding,) = judge([few], confirmed=True)
    assert (finding.passed, finding.unsure) == (True, True)
    assert "too few processes for so many comparisons: compare fewer at once" in finding.detail
    enough = replace(few, least_chance=0.5**7)
    assert "too few" not in judge([enough], confirmed=True)[0].detail


def test_a_change_whose_interval_reaches_beyond_the_limit_is_unsure():
    (noisy,) = judge([change(noise_pct=15, shift_pct=2)], confirmed=False)
    assert (noisy.passed, noisy.unsure) == (True, True)
    assert (
        "no regression, but the interval reaches beyond the limit (timing for longer, with --duration, narrows it)"
        in noisy.detail
    )
    (within_the_floor,) = judge([change(shift_pct=5.7)], True)
    assert (within_the_floor.passed, within_the_floor.unsure) == (True, True)
    (quiet,) = judge([change(noise_pct=0.1)], True)
    assert (quiet.passed, quiet.unsure) == (True, False)
    (regressed,) = judge([change(shift_pct=10)], True)
    assert (regressed.passed, regressed.unsure) == (False, False)


def test_a_first_look_never_fails():
    assert passed(change(shift_pct=50), confirmed=False) == [True]
    assert change(shift_pct=50).is_suspicious
    assert not change(shift_pct=3).is_suspicious


def test_it_says_what_it_saw_and_what_it_could_have_seen():
    (finding,) = judge([change(shift_pct=10)], True)
    assert finding.value == pytest.approx(10, abs=0.5)
    assert finding.low < finding.value < finding.high
    assert finding.limit == 5
    assert "regressed" in finding.detail
    assert "16 processes" in finding.detail
    assert "the noise is 1.0 %" in finding.detail
    noisy, quiet = (change(noise_pct=noise).detectable() for noise in (5, 0.1))
    assert noisy > quiet >= log_change(5) + log_change(1)


def test_throughput_falls_where_time_grows():
    (finding,) = judge([change("throughput_ips:5%", shift_pct=25)], True)
    assert finding.value == pytest.approx(-20, abs=0.5)
    assert finding.low < finding.value < finding.high
    assert not finding.passed
    assert finding.limit == -5


def test_half_the_throughput_is_twice_the_time():
    assert passed(change("throughput_ips:50%", shift_pct=80)) == [True]
    assert passed(change("throughput_ips:50%", shift_pct=110)) == [False]


def test_a_thousand_comparisons_of_nothing_raise_no_alarm():
    """Noise of 3 %, and a floor that is only half of it."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        effects = list(rng.normal(0, 0.03, 16))
        alarms += (
            effects
            and not passed(
                Change(parse_limit("p50_ms:0%"), "", center(effects), effects, p_above(effects), 0.015, 1, 1)
            )[0]
        )
    assert alarms <= 10


def test_exact_numbers_have_no_noise():
    assert compare_exact(parse_limit("bytes:1%"), 1000, 1010).passed
    assert not compare_exact(parse_limit("bytes:1%"), 1000, 1011).passed
    assert not compare_exact(parse_limit("nodes:0"), 100, 101).passed
    assert compare_exact(parse_limit("nodes:0"), 100, 90).passed


def answers(samples):
    return Finding(check="accuracy", metric="top1", value=100 * sum(samples) / len(samples), samples=tuple(samples))


def test_a_drop_must_be_significant_too():
    limit = parse_limit("top1_drop:0.3")
    base = [1.0] * 1000
    assert not compare_answers(limit, answers(base), answers([1.0] * 950 + [0.0] * 50)).passed
    assert not compare_answers(limit, answers(base), answers(base)).unsure
    few = compare_answers(limit, answers([1.0] * 10), answers([1.0] * 9 + [0.0]))
    assert (few.passed, few.unsure) == (True, True)
    assert compare_answers(limit, answers([1.0] * 10), answers([1.0] * 10)).unsure
    assert few.passed
    assert few.value == pytest.approx(10)
    assert "within the noise of few images" in few.detail
    with pytest.raises(BadRequest, match="same --data"):
        compare_answers(limit, answers(base), answers(base[:-1]))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("p50_ms", "METRIC:NUMBER"),
        ("p50_ms:x%", "METRIC:NUMBER"),
        ("p50ms:5%", "did you mean 'p50_ms'"),
        ("p50_ms:5", "in percent"),
        ("top1_drop:1%", "in points"),
        ("throughput_ips:100%", "less than 100"),
        ("p50_ms:-5%", "METRIC:NUMBER"),
    ],
)
def test_limits_that_mean_nothing_are_refused(word, said):
    with pytest.raises(BadRequest, match=said):
        parse_limits([word])


def test_a_metric_has_one_limit_and_there_is_a_default():
    with pytest.raises(BadRequest, match="twice"):
        parse_limits(["bytes:1%", "bytes:2%"])
    assert [str(limit) for limit in parse_limits([])] == ["p50_ms:5%"]
