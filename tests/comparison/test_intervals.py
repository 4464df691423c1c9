"""Intervals of a mean over documents: coverage by simulation, formulas by brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from fastdiff.comparison.intervals import adjusted, mean_interval, mean_intervals

documents = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=30)


def coverage(samples, truth):
    found = mean_intervals(samples)
    return float(((found.low <= truth) & (truth <= found.high)).mean())


@pytest.mark.parametrize("n", [8, 12, 20, 40])
def test_normal_documents_are_covered(n):
    assert coverage(np.random.default_rng(n).normal(0.3, 2, (8000, n)), 0.3) >= 0.93


@pytest.mark.parametrize("n", [20, 40])
def test_exponential_documents_are_covered_where_plain_t_is_not(n):
    samples = np.random.default_rng(n).exponential(size=(8000, n))
    assert coverage(samples, 1.0) >= 0.93
    plain = np.abs(samples.mean(1) - 1) < stats.t.ppf(0.975, n - 1) * samples.std(1, ddof=1) / math.sqrt(n)
    assert plain.mean() < coverage(samples, 1.0)


def test_heavy_tails_are_covered():
    assert coverage(np.random.default_rng(0).standard_t(5, (8000, 20)), 0.0) >= 0.93


def brute(x, confidence):
    """Both intervals from their definitions, the ends by root finding."""
    n, mean, s = len(x), x.mean(), x.std(ddof=1)
    q = stats.t.ppf((1 + confidence) / 2, n - 1)
    a = ((x - mean) ** 3).sum() / (n * s**3) / math.sqrt(n)

    def hall(mu):
        t = math.sqrt(n) * (mean - mu) / s
        return t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6

    far = 1e3 * s
    ends = [optimize.brentq(lambda mu, q=q: hall(mu) - q, mean - far, mean + far, xtol=1e-13) for q in (q, -q)]
    t = math.sqrt(n) * mean / s
    p = max(2 * stats.t.sf(abs(t), n - 1), 2 * stats.t.sf(abs(hall(0.0)), n - 1))
    half = q * s / math.sqrt(n)
    return min(ends[0], mean - half), max(ends[1], mean + half), p


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_ends_and_p_follow_their_definitions(confidence, seed):
    x = np.random.default_rng(seed).gamma(1 + seed, size=9 + seed) - 0.3
    low, high, p = brute(x, confidence)
    found = mean_interval(x, confidence)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-8)
    assert found.p == pytest.approx(p, rel=1e-8)


@given(documents)
def test_interval_off_zero_is_p_below_one_minus_confidence(x):
    found = mean_interval(x)
    if abs(found.p - 0.05) > 1e-9:
        assert found.off_zero == (found.p < 0.05)
    assert found.low <= found.mean <= found.high


@given(documents, st.sampled_from([1e-9, 0.5, 7.0]))
def test_scaling_scales_and_negation_mirrors(x, factor):
    found, scaled, mirrored = mean_interval(x), mean_interval(np.multiply(x, factor)), mean_interval(np.negative(x))
    size = max(map(abs, x))
    assert (scaled.low, scaled.high) == pytest.approx(
        (found.low * factor, found.high * factor), abs=1e-9 * size * factor
    )
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9 * size)
    assert mirrored.p == pytest.approx(found.p, abs=1e-6)


def test_edges():
    assert mean_interval([0.3] * 8).low == pytest.approx(0.3) and mean_interval([0.3] * 8).p == 0.0
    assert mean_interval([0.0] * 8).p == 1.0
    one = mean_interval([0.2])
    assert (one.mean, one.low, one.high, one.p) == (0.2, -math.inf, math.inf, 1.0)
    assert math.isnan(mean_interval([]).mean)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.1, math.nan])
    assert mean_interval([-1.0, 1.0, -1.0, 1.0]).inside(5) and not mean_interval([-1.0, 1.0, -1.0, 1.0]).inside(1)


def test_adjusted_is_benjamini_hochberg():
    p = [0.01, 0.04, 0.03, 0.5]
    by_hand = [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    assert adjusted(p) == pytest.approx(by_hand) and adjusted([]) == []
