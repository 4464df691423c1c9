"""Is a category's share different in two sets of latents? Counts, intervals, exact tests.

Set A holds N_a latents, a of them in the category; set B holds N_b, b of them.

    Δ%      = 100 · ((b/N_b) / (a/N_a) - 1)        as in Boughorbel et al. 2025, arXiv:2509.18792
    points  = 100 · (b/N_b - a/N_a)
    p       Fisher's exact test, two-sided;  q  Benjamini-Hochberg over the categories of one comparison

Groups that are no category (unlabelled latents) have a p but no q: in the family they would, when they
differ, lower the q of every real category.

Latents come in concepts (`fastdiff.analysis.concepts`): several latents for one thing are no independent draws. Beside
q stands that of counts and totals divided by the side's design effect Σs²/Σs over its concepts of s latents (Rao and
Scott 1981, J. Am. Stat. Assoc. 76:221), rounded; only what both find is called significant.

Intervals: points by Newcombe's hybrid of two Wilson intervals; Δ% by the logarithm of the ratio with ½ added
to every count (Walter). Neither collapses at zero counts, as a bootstrap over latents does.
"""

import math
from collections.abc import Collection, Sequence
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
    q_concepts: float  # the same for counts divided by the design effects
    detectable_ratio: float  # least b/N_b over a/N_a that would be found; NaN where a is 0 or a set is empty

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


def fisher(a: int, n_a: int, b: int, n_b: int) -> float:
    """P of Fisher's exact test, two-sided, that a/n_a and b/n_b differ; 1 for an empty set."""
    if n_a == 0 or n_b == 0:
        return 1.0
    return min(1.0, float(stats.fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue))


def design_effect(sizes: Sequence[int]) -> float:
    """Σs²/Σs over concepts of s latents: by how much they count less than as many independent ones; 1 for none."""
    of = np.asarray(sizes, dtype=np.float64)
    return float((of**2).sum() / of.sum()) if len(of) else 1.0


def detectable_ratio(a: int, n_a: float, n_b: float, total_a: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The least ratio of shares above 1 that one test would find with a given power.

    By arcsines of shares (Cohen 1988, Statistical Power Analysis, chapter 6), before any correction for many tests.

    Args:
        a: Latents of the category in set A.
        n_a: Effective number of latents in set A.
        n_b: In set B.
        total_a: Latents in set A, of which `a` are a share.
        power: Of the test.
        alpha: Its level.

    Returns:
        The ratio; NaN where a is 0 or a set is empty, infinity where not even a share of 1 would be found.
    """
    if not a or not n_a or not n_b:
        return math.nan
    share = a / total_a
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    angle = math.asin(math.sqrt(share)) + z * math.sqrt(1 / n_a + 1 / n_b) / 2
    return math.sin(angle) ** 2 / share if angle < math.pi / 2 else math.inf


def compare_shares(
    counts_a: dict[str, int],
    total_a: int,
    counts_b: dict[str, int],
    total_b: int,
    *,
    confidence: float,
    untested: Collection[str] = (),
    deff_a: float = 1.0,
    deff_b: float = 1.0,
) -> list[Difference]:
    """Compare two sets of latents category by category.

    Args:
        counts_a: Latents of set A by category; a missing category counts 0.
        total_a: Latents in set A, labelled or not.
        counts_b: The same for set B.
        total_b: Latents in set B.
        confidence: Coverage of the intervals, in (0, 1).
        untested: Names that are no category; they get no q.
        deff_a: Design effect of set A, at least 1.
        deff_b: Of set B.

    Returns:
        One difference per category, by descending effect; empty sets give NaN effects, p = q = 1.
    """
    categories = sorted(set(counts_a) | set(counts_b))
    rows = []
    for category in categories:
        a, b = counts_a.get(category, 0), counts_b.get(category, 0)
        if total_a == 0 or total_b == 0:
            rows.append((category, a, b, (math.nan,) * 6, 1.0, 1.0))
            continue
        p = fisher(a, total_a, b, total_b)
        p_concepts = fisher(round(a / deff_a), round(total_a / deff_a), round(b / deff_b), round(total_b / deff_b))
        points = 100 * (b / total_b - a / total_a)
        percent = 100 * ((b / total_b) / (a / total_a) - 1) if a else math.nan
        ratio = ratio_interval(a, total_a, b, total_b, confidence)
        low, high = newcombe(a, total_a, b, total_b, confidence)
        effect = (percent, 100 * (ratio[0] - 1), 100 * (ratio[1] - 1), points, 100 * low, 100 * high)
        rows.append((category, a, b, effect, p, p_concepts))
    family = [i for i, row in enumerate(rows) if row[0] not in untested]
    q, q_concepts = np.full(len(rows), math.nan), np.full(len(rows), math.nan)
    if family:
        q[family] = stats.false_discovery_control([rows[i][4] for i in family])
        q_concepts[family] = stats.false_discovery_control([rows[i][5] for i in family])
    found = [
        Difference(
            category, a, total_a, b, total_b, *effect, p=p, q=float(q[i]), q_concepts=float(q_concepts[i]),
            detectable_ratio=detectable_ratio(a, total_a / deff_a, total_b / deff_b, total_a),
        )
        for i, (category, a, b, effect, p, _) in enumerate(rows)
    ]  # fmt: skip
    return sorted(found, key=lambda d: (-d.delta_points if d.delta_points == d.delta_points else 0.0, d.category))
