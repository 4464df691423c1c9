"""Tests and intervals against brute force, published numbers and simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fastdiff.comparison.statistics import (
    compare_shares,
    design_effect,
    detectable_ratio,
    newcombe,
    ratio_interval,
    wilson,
)


def compare(a, n_a, b, n_b, confidence=0.95):
    """The one category of two sets."""
    (difference,) = compare_shares({"x": a}, n_a, {"x": b}, n_b, confidence=confidence)
    return difference


def fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    """Two-sided by the definition: the probability of all tables that are no more likely than this one."""
    total, k = n_a + n_b, a + b

    def probability(i: int) -> Fraction:
        return Fraction(math.comb(n_a, i) * math.comb(n_b, k - i), math.comb(total, k))

    tables = range(max(0, k - n_b), min(n_a, k) + 1)
    return float(sum(probability(i) for i in tables if probability(i) <= probability(a)))


def benjamini_hochberg(p: list[float]) -> list[float]:
    """q_i = min over j with p_j >= p_i of p_j · n / (number of p up to p_j)."""
    n = len(p)
    return [min(1.0, min(pj * n / sum(pk <= pj for pk in p) for pj in p if pj >= pi)) for pi in p]


def test_p_is_fishers():
    rng = np.random.default_rng(0)
    for _ in range(150):
        n_a, n_b = (int(n) for n in rng.integers(1, 60, size=2))
        a, b = int(rng.integers(0, n_a + 1)), int(rng.integers(0, n_b + 1))
        assert compare(a, n_a, b, n_b).p == pytest.approx(fisher(a, n_a, b, n_b), rel=1e-9), (a, n_a, b, n_b)


def test_p_of_the_lady_tasting_tea():
    assert compare(3, 4, 1, 4).p == pytest.approx(34 / 70)


def test_q_is_benjamini_hochbergs():
    rng = np.random.default_rng(1)
    for n in (1, 2, 5, 13):
        counts = [{f"c{i}": int(c) for i, c in enumerate(rng.integers(0, 40, size=n))} for _ in range(2)]
        totals = [sum(c.values()) + 5 for c in counts]
        found = compare_shares(counts[0], totals[0], counts[1], totals[1], confidence=0.95)
        assert len(found) == n
        assert [d.q for d in found] == pytest.approx(benjamini_hochberg([d.p for d in found]), rel=1e-12)
        assert all(d.q >= d.p for d in found)


def test_a_group_that_is_no_category_does_not_change_the_q_of_others():
    a, b = {"code": 30, "law": 20, "unlabelled": 0}, {"code": 18, "law": 22, "unlabelled": 60}
    without = compare_shares({"code": 30, "law": 20}, 60, {"code": 18, "law": 22}, 110, confidence=0.95)
    found = compare_shares(a, 60, b, 110, confidence=0.95, untested=("unlabelled", "uninterpretable"))
    by_name = {d.category: d for d in found}
    assert [by_name[d.category] for d in without] == without
    assert math.isnan(by_name["unlabelled"].q) and by_name["unlabelled"].p < 1e-6
    (alone,) = compare_shares({"unlabelled": 3}, 5, {}, 7, confidence=0.95, untested=["unlabelled"])
    assert math.isnan(alone.q)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(count, total, low, high):
    assert wilson(count, total, 0.95) == pytest.approx((low, high), abs=5e-5)
    flipped = wilson(total - count, total, 0.95)
    assert flipped == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_solves_its_equation():
    z = stats.norm.ppf(0.95)
    for count, total in ((3, 17), (40, 41), (12, 300)):
        for end in wilson(count, total, 0.9):
            assert abs(count / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total))


@pytest.mark.parametrize(
    ("b", "n_b", "a", "n_a", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10; its first sample is side B here
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_points_have_the_published_intervals_of_b_minus_a(b, n_b, a, n_a, low, high):
    assert newcombe(a, n_a, b, n_b, 0.95) == pytest.approx((low, high), abs=5e-5)
    found = compare(a, n_a, b, n_b)
    assert (found.points_low, found.points_high) == pytest.approx((100 * low, 100 * high), abs=5e-3)
    assert found.delta_points == pytest.approx(100 * (b / n_b - a / n_a))


def test_percentages_are_those_of_the_paper():
    # counts inferred from Boughorbel et al. 2025, arXiv:2509.18792
    assert compare(18, 112, 19, 89).delta_percent == pytest.approx(32.8, abs=0.05)
    assert compare(9, 112, 4, 89).delta_percent == pytest.approx(-44.1, abs=0.05)
    for counts in ((18, 112, 19, 89), (9, 112, 4, 89)):
        assert compare(*counts).q > 0.05


def test_swapped_sides_flip_the_difference_and_keep_p():
    rng = np.random.default_rng(2)
    for _ in range(50):
        n_a, n_b = (int(n) for n in rng.integers(1, 80, size=2))
        a, b = int(rng.integers(0, n_a + 1)), int(rng.integers(0, n_b + 1))
        one, other = compare(a, n_a, b, n_b), compare(b, n_b, a, n_a)
        assert one.p == pytest.approx(other.p, rel=1e-9)
        assert one.delta_points == pytest.approx(-other.delta_points)
        assert (one.points_low, one.points_high) == pytest.approx((-other.points_high, -other.points_low))
        ratio = 1 + one.percent_low / 100, 1 + one.percent_high / 100
        swapped = 1 + other.percent_low / 100, 1 + other.percent_high / 100
        assert ratio == pytest.approx((1 / swapped[1], 1 / swapped[0]))


def test_the_ratio_interval_is_walters():
    low, high = ratio_interval(9, 112, 4, 89, 0.95)
    centre = math.log(4.5 / 89.5) - math.log(9.5 / 112.5)
    half = 1.959964 * math.sqrt(1 / 4.5 - 1 / 89.5 + 1 / 9.5 - 1 / 112.5)
    assert (math.log(low), math.log(high)) == pytest.approx((centre - half, centre + half), rel=1e-6)


@pytest.mark.parametrize(("a", "n_a", "b", "n_b"), [(0, 20, 5, 30), (5, 20, 0, 30), (0, 20, 0, 30), (20, 20, 30, 30)])
def test_intervals_do_not_collapse_at_zero_or_full_counts(a, n_a, b, n_b):
    found = compare(a, n_a, b, n_b)
    assert found.points_low < found.delta_points < found.points_high or abs(found.delta_points) == 100
    assert found.points_high - found.points_low > 5
    assert 0 < found.p <= 1
    if a == 0:
        assert math.isnan(found.delta_percent)
    if 0 < a + b < n_a + n_b:
        assert math.isfinite(found.percent_low) and found.percent_low < found.percent_high


@pytest.mark.parametrize(("n_a", "n_b"), [(0, 10), (10, 0), (0, 0)])
def test_an_empty_side_has_no_effect_and_no_significance(n_a, n_b):
    found = compare_shares({"x": min(3, n_a)}, n_a, {"y": min(3, n_b)}, n_b, confidence=0.95)
    assert [d.category for d in found] == ["x", "y"]
    for d in found:
        assert (d.p, d.q) == (1.0, 1.0)
        assert all(math.isnan(v) for v in (d.delta_points, d.points_low, d.points_high, d.delta_percent))
    assert math.isnan(found[0].share_a) == (n_a == 0) and math.isnan(found[0].share_b) == (n_b == 0)


def test_no_categories_give_no_rows():
    assert compare_shares({}, 0, {}, 0, confidence=0.95) == []


def test_rows_are_ordered_by_difference_then_name():
    found = compare_shares({"a": 1, "b": 5, "d": 2, "c": 2}, 10, {"a": 5, "b": 1, "c": 2, "d": 2}, 10, confidence=0.9)
    assert [d.category for d in found] == ["a", "c", "d", "b"]


def test_higher_confidence_is_wider():
    narrow, wide = compare(5, 40, 12, 50, 0.8), compare(5, 40, 12, 50, 0.99)
    assert wide.points_low < narrow.points_low < narrow.points_high < wide.points_high
    assert wide.percent_low < narrow.percent_low < narrow.percent_high < wide.percent_high


def test_the_points_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    draws = 4000
    n_a, n_b = rng.integers(20, 150, size=(2, draws))
    share_a, share_b = rng.beta(1, 6, size=(2, draws))
    a, b = rng.binomial(n_a, share_a), rng.binomial(n_b, share_b)
    covered = 0
    for i in range(draws):
        low, high = newcombe(int(a[i]), int(n_a[i]), int(b[i]), int(n_b[i]), 0.95)
        covered += low <= share_b[i] - share_a[i] <= high
    assert 0.94 <= covered / draws <= 0.98


def test_the_percent_interval_covers_the_true_ratio():
    rng = np.random.default_rng(4)
    covered, draws = 0, 2000
    for _ in range(draws):
        n_a, n_b = (int(n) for n in rng.integers(40, 200, size=2))
        share_a, share_b = rng.uniform(0.05, 0.3, size=2)
        low, high = ratio_interval(rng.binomial(n_a, share_a), n_a, rng.binomial(n_b, share_b), n_b, 0.95)
        covered += low <= share_b / share_a <= high
    assert 0.94 <= covered / draws <= 0.985


@pytest.mark.slow
def test_two_draws_from_one_distribution_rarely_differ():
    rng = np.random.default_rng(5)
    false, simulations = 0, 400
    for _ in range(simulations):
        shares = rng.dirichlet([1.0] * 8)
        n_a, n_b = (int(n) for n in rng.integers(30, 200, size=2))
        counts = [dict(enumerate(rng.multinomial(n, shares).tolist())) for n in (n_a, n_b)]
        a, b = ({f"c{i}": n for i, n in side.items()} for side in counts)
        false += any(d.q < 0.05 for d in compare_shares(a, n_a, b, n_b, confidence=0.95))
    # three standard errors above 5 %; Fisher's test is conservative, so the true rate is near 2 %
    assert false / simulations <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / simulations)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(50):
        a, b = rng.binomial(150, 0.1), rng.binomial(150, 0.35)
        found += compare(int(a), 150, int(b), 150).q < 0.05
    assert found >= 48


@pytest.mark.parametrize(
    ("a", "n_a", "b", "n_b", "wanted"),
    [
        (10, 20, 15, 90, "share fell while the count rose"),
        (15, 90, 10, 20, "share rose while the count fell"),
        (10, 20, 10, 90, None),
        (10, 90, 15, 90, None),
        (10, 20, 5, 20, None),
        (0, 0, 5, 20, None),
    ],
)
def test_a_share_that_moves_against_its_count_is_composition(a, n_a, b, n_b, wanted):
    (found,) = compare_shares({"c": a}, n_a, {"c": b}, n_b, confidence=0.95)
    assert found.composition == wanted


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_latents_in_concepts_are_found_in_next_to_no_null_once_their_counts_are_divided(size):
    """Two sets of 90 latents over 12 categories; all latents of a concept have its category."""
    rng = np.random.default_rng(size)
    plain = divided = 0
    for _ in range(300):
        sets, effects = [], []
        for _side in range(2):
            sizes = rng.geometric(1 / size, 90)
            sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), 90)) + 1]
            category = rng.integers(12, size=len(sizes))
            sets.append({str(c): int(sizes[category == c].sum()) for c in range(12)})
            effects.append(design_effect(sizes.tolist()))
        found = compare_shares(
            sets[0], sum(sets[0].values()), sets[1], sum(sets[1].values()),
            confidence=0.95, deff_a=effects[0], deff_b=effects[1],
        )  # fmt: skip
        plain += any(d.q < 0.05 for d in found)
        divided += any(d.q_concepts < 0.05 for d in found)
    assert divided <= 0.05 * 300
    # otherwise this test could not fail
    assert size == 1 or plain > 0.2 * 300


def test_the_design_effect_is_the_mean_size_of_a_latents_concept():
    assert design_effect([]) == design_effect([1, 1, 1]) == 1
    assert design_effect([3, 1]) == pytest.approx((3 + 3 + 3 + 1) / 4)


def test_the_detectable_ratio_is_found_in_four_of_five():
    rng = np.random.default_rng(0)
    n_a, n_b, a = 400, 300, 60
    ratio = detectable_ratio(a, n_a, n_b, n_a)
    first = rng.binomial(n_a, a / n_a, 20_000) / n_a
    second = rng.binomial(n_b, ratio * a / n_a, 20_000) / n_b
    z = 2 * (np.arcsin(np.sqrt(second)) - np.arcsin(np.sqrt(first))) / math.sqrt(1 / n_a + 1 / n_b)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.02)
    assert detectable_ratio(11, 112, 89, 112) == pytest.approx(2.5, abs=0.1)
    assert math.isnan(detectable_ratio(0, 10, 10, 10)) and detectable_ratio(9, 10, 2, 10) == math.inf
