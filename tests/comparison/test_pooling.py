"""Counts of several seeds: overdispersion against its definition, and false claims of the pooled test by simulation."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from fastdiff.comparison.pooling import Sides, overdispersion, pool
from fastdiff.comparison.statistics import design_effect


def counter(counts) -> Counter[str]:
    return Counter({str(c): int(n) for c, n in enumerate(counts)})


def test_phi_is_chi_squared_over_its_degrees_of_freedom():
    seeds = [counter((10, 20, 5)), counter((14, 12, 9)), counter((8, 22, 4))]
    found = stats.chi2_contingency([list(seed.values()) for seed in seeds], correction=False)
    assert overdispersion(seeds) == pytest.approx(found.statistic / found.dof, rel=1e-12)
    # a category that no seed has, and a seed without latents, say nothing
    padded = [Counter({**seed, "none": 0}) for seed in seeds] + [Counter()]
    assert overdispersion(padded) == pytest.approx(overdispersion(seeds), rel=1e-12)


@pytest.mark.parametrize("seeds", [[], [counter((3, 4))], [counter((3,)), counter((5,))], [Counter(), Counter()]])
def test_phi_of_nothing_to_compare_is_unknown(seeds):
    assert np.isnan(overdispersion(seeds))


def test_phi_of_independent_latents_is_1_however_few_there_are():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(12, 0.7))
    found = [overdispersion([counter(rng.multinomial(n, shares)) for n in (20, 25, 30)]) for _ in range(400)]
    assert np.nanmean(found) == pytest.approx(1, abs=3 * np.nanstd(found) / 20 + 0.02)


def test_sums_signs_and_q():
    seeds = [
        Sides(Counter(x=4, y=4, none=2), Counter(x=9, y=3)),
        Sides(Counter(x=2, y=4), Counter(x=3, y=6)),
        Sides(Counter(x=1), Counter()),
    ]
    found = pool(seeds, untested=["none"], excess_a=1, excess_b=1)
    assert {name: of.signs for name, of in found.items()} == {"x": "+00", "y": "-00", "none": "-00"}
    assert not any(of.agrees for of in found.values())
    x = found["x"]
    assert (x.count_a, x.total_a, x.count_b, x.total_b) == (7, 17, 12, 21)
    assert x.p == pytest.approx(stats.fisher_exact([[7, 10], [12, 9]]).pvalue)
    assert np.isnan(found["none"].q)
    tested = [found[name] for name in ("x", "y")]
    assert [of.q for of in tested] == pytest.approx(stats.false_discovery_control([of.p for of in tested]))
    halved = pool(seeds, untested=[], excess_a=2, excess_b=2)["x"]
    assert halved.p == pytest.approx(stats.fisher_exact([[4, 4], [6, 4]]).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_false_claims_over_three_seeds_are_rare_also_for_latents_in_concepts(size):
    """Both sides draw from the same shares; all latents of a concept have its category, of mean `size` latents."""
    rng = np.random.default_rng(size)
    shares = rng.dirichlet(np.full(12, 2.0))
    phi_alone = found = 0
    for _ in range(400):
        sides, sizes_of = [], []
        for n in (90, 60):
            seeds, concepts = [], []
            for _seed in range(3):
                sizes = rng.geometric(1 / size, n)
                sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), n)) + 1]
                category = rng.choice(12, size=len(sizes), p=shares)
                seeds.append(counter(np.bincount(category, sizes, minlength=12)))
                concepts += sizes.tolist()
            sides.append(seeds)
            sizes_of.append(concepts)
        both = [Sides(a, b) for a, b in zip(*sides, strict=True)]
        excess = [
            max(1.0, design_effect(sizes), overdispersion(seeds)) for sizes, seeds in zip(sizes_of, sides, strict=True)
        ]
        claims = pool(both, untested=[], excess_a=excess[0], excess_b=excess[1]).values()
        found += any(of.agrees and of.q < 0.05 for of in claims)
        # φ alone must hold too: concepts that are further apart than the thresholds have no design effect
        phi = [max(1.0, overdispersion(seeds)) for seeds in sides]
        claims = pool(both, untested=[], excess_a=phi[0], excess_b=phi[1]).values()
        phi_alone += any(of.agrees and of.q < 0.05 for of in claims)
    assert found <= 0.05 * 400 and phi_alone <= (0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5) * 400


@pytest.mark.slow
def test_without_either_excess_concepts_would_give_false_claims():
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(300):
        both = []
        for _seed in range(3):
            of = []
            for n in (30, 20):
                category = rng.integers(12, size=n)
                of.append(counter(np.bincount(category, np.full(n, 3), minlength=12)))
            both.append(Sides(*of))
        false += any(of.q < 0.05 for of in pool(both, untested=[], excess_a=1, excess_b=1).values())
    assert false > 0.2 * 300
