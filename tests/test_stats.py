"""Rank statistics against tables, other libraries and simulation."""

import numpy as np
import pytest

from exporter import stats


def test_the_estimate_is_the_median_of_pairwise_means():
    assert stats.center([1.0, 2.0, 6.0]).value == pytest.approx(np.median([1, 1.5, 3.5, 2, 4, 6]))


@pytest.mark.parametrize(("count", "cut"), [(6, 0), (8, 3), (10, 8), (20, 52)])
def test_the_interval_is_cut_where_the_tables_of_the_signed_rank_say(count, cut):
    """Largest c with P(T⁺ ≤ c) ≤ 0.025: 0, 3, 8, 52 (Wilcoxon 1945, Hollander and Wolfe table A.4)."""
    assert stats._signed_rank_cut(count, 0.025) == cut


@pytest.mark.parametrize("count", [6, 8, 16])
def test_nineteen_intervals_in_twenty_hold_the_truth(count):
    rng = np.random.default_rng(0)
    drawn = [stats.center(rng.standard_t(3, count)) for _ in range(2000)]
    held = np.mean([found.low <= 0 <= found.high for found in drawn])
    assert 0.94 < held < 0.99


def test_two_samples_shift_by_what_was_put_between_them():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        found = stats.shift(rng.normal(size=8), rng.normal(2, 1, size=8))
        held.append(found.low <= 2 <= found.high)
    assert 0.93 < np.mean(held) < 0.99


def test_a_rank_test_is_one_sided_and_as_strong_as_its_launches():
    up = [0.1, 0.2, 0.15, 0.12, 0.3, 0.11, 0.14, 0.13]
    assert stats.p_above(up) == pytest.approx(1 / 2**8)
    assert stats.p_above([-x for x in up]) > 0.99
    assert stats.p_above([0.0] * 8) == 1.0
    assert stats.p_larger(list(range(6)), list(range(10, 16))) == pytest.approx(1 / 924, rel=0.01)


def test_holm_corrects_as_statsmodels_does():
    """0.01, 0.04, 0.03 of three: 0.03, 0.06, 0.06."""
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.02]) == [0.02]


def test_false_alarms_among_many_comparisons_stay_rare():
    rng = np.random.default_rng(0)
    alarms = [min(stats.holm([stats.p_above(rng.normal(size=16)) for _ in range(6)])) < 0.05 for _ in range(300)]
    assert np.mean(alarms) < 0.08


def test_percent_and_logarithm_are_each_others_inverse():
    assert stats.percent(stats.log_change(5)) == pytest.approx(5)
    assert stats.log_change(-50) == pytest.approx(-np.log(2))


def test_half_an_interval_of_a_mean_is_that_of_scipy_and_needs_three_values():
    from scipy.stats import t

    from exporter.stats import mean_half_width

    values = [1.0, 2.0, 4.0, 4.5]
    low, high = t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert mean_half_width(values) == pytest.approx((high - low) / 2)
    assert mean_half_width([16.7, 16.7]) is None
