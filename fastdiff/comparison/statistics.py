"""Is a category's share different in two sets of latents? Counts, intervals, exact tests.

Set A holds N_a latents, a of them in the category; set B holds N_b, b of them.

    Δ%      = 100 · ((b/N_b) / (a/N_a) - 1)        as in Boughorbel et al. 2025, arXiv:2509.18792
    points  = 100 · (b/N_b - a/N_a)
    p       Fisher's exact test, two-sided;  q  Benjamini-Hochberg over the categories of one comparison

Groups that are no category (unlabelled latents) have a p but no q: in the family they would, when they
differ, lower the q of every real category.

Intervals: points by Newcombe's hybrid of two Wilson intervals; Δ% by the logarithm of the ratio with ½ added
to every count (Walter). Neither collapses at zero counts, as a bootstrap over latents does.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """One category in two sets; shares from 0 to 1, points and percents as printed."""

    category: str
    count_a: int
    total_a: int
    count_b: int
    total_b: int
    delta_percent: float  # NaN where undefined
    percent_low: float
    percent_high: float
    delta_points: float  # NaN where a set is empty
    points_low: float
    points_high: float
    p: float
    q: float  # NaN for a group that is no category

    @property
    def share_a(self) -> float:
        """Share of the category in A; NaN for an empty set."""
        return self.count_a / self.total_a if self.total_a else math.nan

    @property
    def share_b(self) -> float:
        """Share of the category in B; NaN for an empty set."""
        return self.count_b / self.total_b if self.total_b else math.nan

    @property
    def composition(self) -> str | None:
        """What a share hides: it can fall while the category has more latents, since all shares sum to one."""
        if self.delta_points < 0 and self.count_b > self.count_a:
            return "share fell while the count rose"
        if self.delta_points > 0 and self.count_b < self.count_a:
            return "share rose while the count fell"
        return None


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a share, in [0, 1]. Source: Wilson 1927."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share = count / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def newcombe(a: int, n_a: int, b: int, n_b: int, confidence: float) -> tuple[float, float]:
    """Interval of b/n_b - a/n_a. Source: Newcombe 1998, Statistics in Medicine 17:873, method 10."""
    share_a, share_b = a / n_a, b / n_b
    low_a, high_a = wilson(a, n_a, confidence)
    low_b, high_b = wilson(b, n_b, confidence)
    difference = share_b - share_a
    return (
        difference - math.hypot(share_b - low_b, high_a - share_a),
        difference + math.hypot(high_b - share_b, share_a - low_a),
    )


def ratio_interval(a: int, n_a: int, b: int, n_b: int, confidence: float) -> tuple[float, float]:
    """Interval of (b/n_b) / (a/n_a), ½ added to each count. Source: Walter 1975, Biometrika 62:371."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = math.log((b + 0.5) / (n_b + 0.5)) - math.log((a + 0.5) / (n_a + 0.5))
    half = z * math.sqrt(max(0.0, 1 / (a + 0.5) - 1 / (n_a + 0.5) + 1 / (b + 0.5) - 1 / (n_b + 0.5)))
    return math.exp(centre - half), math.exp(centre + half)


def compare_shares(
    counts_a: dict[str, int],
    total_a: int,
    counts_b: dict[str, int],
    total_b: int,
    *,
    confidence: float,
    untested: Collection[str] = (),
) -> list[Difference]:
    """Compare two sets of latents category by category.

    Args:
        counts_a: Latents of set A by category; a missing category counts 0.
        total_a: Latents in set A, labelled or not.
        counts_b: The same for set B.
        total_b: Latents in set B.
        confidence: Coverage of the intervals, in (0, 1).
        untested: Names that are no category; they get no q.

    Returns:
        One difference per category, by descending effect; empty sets give NaN effects, p = q = 1.
    """
    categories = sorted(set(counts_a) | set(counts_b))
    rows = []
    for category in categories:
        a, b = counts_a.get(category, 0), counts_b.get(category, 0)
        if total_a == 0 or total_b == 0:
            rows.append((category, a, b, (math.nan,) * 6, 1.0))
            continue
        p = float(stats.fisher_exact([[a, total_a - a], [b, total_b - b]]).pvalue)
        points = 100 * (b / total_b - a / total_a)
        percent = 100 * ((b / total_b) / (a / total_a) - 1) if a else math.nan
        ratio = ratio_interval(a, total_a, b, total_b, confidence)
        low, high = newcombe(a, total_a, b, total_b, confidence)
        effect = (percent, 100 * (ratio[0] - 1), 100 * (ratio[1] - 1), points, 100 * low, 100 * high)
        rows.append((category, a, b, effect, min(1.0, p)))
    q = np.full(len(rows), math.nan)
    family = [i for i, row in enumerate(rows) if row[0] not in untested]
    if family:
        q[family] = stats.false_discovery_control([rows[i][4] for i in family])
    found = [
        Difference(category, a, total_a, b, total_b, *effect, p=p, q=float(adjusted))
        for (category, a, b, effect, p), adjusted in zip(rows, q, strict=True)
    ]
    return sorted(found, key=lambda d: (-d.delta_points if d.delta_points == d.delta_points else 0.0, d.category))
