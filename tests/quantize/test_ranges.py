"""What eight bits stand for: each method does what its name says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exporter.quantize.ranges import choose, scale_of

METHODS = ("minmax", "percentile", "mse", "entropy")
BINS = 4096


def histogram(values, low=None, high=None):
    low, high = min(0.0, values.min()) if low is None else low, max(0.0, values.max()) if high is None else high
    return np.histogram(values, BINS, (low, high))[0].astype(float), float(low), float(high)


def rounded(values, low, high):
    scale, zero = scale_of(low, high, symmetric=False)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def test_minmax_takes_what_was_seen():
    counts, low, high = histogram(np.array([-0.17, 0.5, 4.0]))
    assert choose(counts, low, high, "minmax", False) == (-0.17, 4.0)
    assert choose(counts, low, high, "minmax", True) == (-4.0, 4.0)


def test_percentile_leaves_out_five_in_a_hundred_thousand_at_each_end():
    values = np.linspace(-1, 3, 2_000_001)
    found = choose(*histogram(values), "percentile", False)
    assert found == pytest.approx(np.percentile(values, (0.005, 99.995)), abs=2 * 4 / BINS)


def test_mse_has_less_error_than_any_other_range():
    values = np.random.default_rng(0).laplace(size=200_000)
    counts, low, high = histogram(values)
    best = choose(counts, low, high, "mse", False)
    error = np.mean((values - rounded(values, *best)) ** 2)
    assert high > best[1] > 0
    for share in (0.3, 0.5, 0.7, 0.9, 1.0):
        other = np.mean((values - rounded(values, share * low, share * high)) ** 2)
        assert error <= other * 1.002, share


def test_mse_of_a_gaussian_is_that_of_the_books():
    """The best clipping of a Gaussian at eight bits is near 3.92 σ (Banner et al., NeurIPS 2019, table 1)."""
    edges = np.linspace(-8, 8, BINS + 1)
    counts = 1e6 * np.diff(stats.norm.cdf(edges))
    low, high = choose(counts, -8.0, 8.0, "mse", True)
    assert high == pytest.approx(3.92, abs=0.15)
    assert low == -high


def test_entropy_clips_a_lonely_outlier_and_leaves_a_flat_range_alone():
    rng = np.random.default_rng(0)
    lonely = np.append(rng.normal(size=100_000), 60.0)
    assert choose(*histogram(lonely), "entropy", False)[1] < 20
    flat = rng.uniform(-1, 1, 100_000)
    assert choose(*histogram(flat), "entropy", False)[1] > 0.9


@settings(deadline=None)  # and no subnormal numbers: a library in the same process may have switched them off
@given(
    low=st.floats(-100, 0, allow_subnormal=False),
    high=st.floats(0, 100, allow_subnormal=False),
    seed=st.integers(0, 99),
    method=st.sampled_from(METHODS),
    symmetric=st.booleans(),
)
def test_every_range_is_inside_what_was_seen_and_has_zero(low, high, seed, method, symmetric):
    counts = np.random.default_rng(seed).integers(0, 50, BINS).astype(float)
    first, last = choose(counts, low, high, method, symmetric)
    most = max(-low, high)
    assert -most <= first <= 0 <= last <= most
    assert not symmetric or first == -last
    scale, zero = scale_of(first, last, symmetric)
    assert np.isfinite(scale)
    assert scale > 0
    assert (zero == 0) if symmetric else (0 <= zero <= 255)


def test_a_layer_that_is_only_ever_given_zero_has_a_range():
    for method in METHODS:
        assert choose(np.zeros(BINS), 0.0, 0.0, method, False) == (0.0, 0.0)
    assert scale_of(0.0, 0.0, symmetric=False)[0] > 0


def test_zero_stays_zero():
    for low, high in ((-0.17, 3.1), (-5.0, 0.0), (0.0, 2.0)):
        assert rounded(np.zeros(1), low, high) == 0
