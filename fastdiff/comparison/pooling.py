"""Category tests over the crosscoders of several seeds: signs, overdispersion, and a pooled test.

Seeds draw the dictionary anew, not the models and not the text. A pooled p therefore says that a difference is more
than what the draw of one dictionary makes of it, and no more; it is never shown without the signs and φ.

    sign_s  of b_s/N_bs - a_s/N_as in seed s
    φ       of a side: Pearson's χ² of the table of its latents, seeds × categories, over its degrees of freedom; 1
            where the seeds differ as independent latents would (McCullagh and Nelder 1989, Generalized Linear Models,
            section 4.5)
    p       Fisher's exact test of the sums over the seeds, each side's counts and total divided by what they vary more
            than independent latents, max(1, φ, design effect of its concepts), and rounded;  q  as for one seed

φ and the design effect are two estimates of the same excess: φ misses that a category is split alike in every seed, the
design effect misses concepts that are further apart than its thresholds. So the larger one counts, not their product.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from fastdiff.comparison.statistics import fisher


class Sides(NamedTuple):
    """Latents of both sides in one seed, by category; those without a label are a category of their own."""

    a: Counter[str]
    b: Counter[str]


@dataclass(frozen=True)
class Pooled:
    """One category over all seeds.

    Attributes:
        signs: A character per seed: + where its share is larger in B, - where it is larger in A, 0 where neither.
        count_a: Sum over the seeds.
        total_a: Likewise, of all latents.
        count_b: Likewise.
        total_b: Likewise.
        p: See the module.
        q: NaN for a group that is no category.
    """

    signs: str
    count_a: int
    total_a: int
    count_b: int
    total_b: int
    p: float
    q: float

    @property
    def agrees(self) -> bool:
        """Whether every seed says the same."""
        return self.signs in ("+" * len(self.signs), "-" * len(self.signs))


def overdispersion(seeds: Sequence[Counter[str]]) -> float:
    """φ of one side; NaN where there is nothing to compare: one seed with latents, or one category."""
    categories = sorted(set().union(*seeds))
    if not categories:
        return float("nan")
    counts = np.array([[seed[category] for category in categories] for seed in seeds], dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0]
    counts = counts[:, counts.sum(axis=0) > 0]
    freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    if freedom <= 0:
        return float("nan")
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum() / freedom)


def pool(seeds: Sequence[Sides], *, untested: Collection[str], excess_a: float, excess_b: float) -> dict[str, Pooled]:
    """All categories over all seeds.

    Args:
        seeds: In the order of the signs.
        untested: Names that are no category; they get no q.
        excess_a: How many times more the counts of side A vary than those of independent latents, at least 1.
        excess_b: Of side B.

    Returns:
        By category; p = q = 1 where a side has no latent.
    """
    sum_a, sum_b = (sum((of[side] for of in seeds), Counter[str]()) for side in (0, 1))
    total_a, total_b = sum_a.total(), sum_b.total()
    categories = sorted(set().union(*(of.a for of in seeds), *(of.b for of in seeds)))
    p = {
        category: fisher(
            round(sum_a[category] / excess_a),
            round(total_a / excess_a),
            round(sum_b[category] / excess_b),
            round(total_b / excess_b),
        )
        for category in categories
    }
    family = [category for category in categories if category not in untested]
    q = stats.false_discovery_control([p[category] for category in family]) if family else []
    corrected = dict(zip(family, map(float, q), strict=True))
    return {
        category: Pooled(
            signs="".join(_sign(of, category) for of in seeds),
            count_a=sum_a[category],
            total_a=total_a,
            count_b=sum_b[category],
            total_b=total_b,
            p=p[category],
            q=corrected.get(category, float("nan")),
        )
        for category in categories
    }


def _sign(of: Sides, category: str) -> str:
    # without fractions, so that equal shares are equal
    difference = of.b[category] * of.a.total() - of.a[category] * of.b.total()
    return "+" if difference > 0 else "-" if difference < 0 else "0"
