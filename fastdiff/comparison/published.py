"""The published view: the latents that only one model has, counted by category.

One run compares the latents only the base model has (lost by tuning) with those only the tuned model has (gained). Two
runs with the same base are triangulated as in Boughorbel et al. 2025, arXiv:2509.18792: what each tuned model gained
over the base is compared with what the other did, and likewise what each lost. It says nothing of behaviour, as
`fastdiff.comparison.verdict` does. What the crosscoders of all seeds show stands beside it, by
`fastdiff.comparison.pooling`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff import rundir
from fastdiff.comparison.pooling import Pooled, Sides, overdispersion, pool
from fastdiff.comparison.statistics import Difference, compare_shares, design_effect
from fastdiff.config import CompareConfig
from fastdiff.errors import InputError
from fastdiff.results.analysis import read_analysis_summary, read_latents
from fastdiff.results.labels import UNINTERPRETABLE, UNLABELLED, read_labels
from fastdiff.results.seeds import SIDES, read_seed_labels
from fastdiff.results.statistics import (
    BY_SEED,
    BY_SEED_COLUMNS,
    CATEGORIES,
    CATEGORY_NUMBERS,
    CATEGORY_TEXT,
    STATISTICS,
    STATISTICS_SCHEMA,
)

_COLUMNS = (*CATEGORY_TEXT, *CATEGORY_NUMBERS)
_NO_CATEGORY = (UNINTERPRETABLE, UNLABELLED)


@dataclass(frozen=True)
class LatentSet:
    """Exclusive latents of one model, by category."""

    name: str
    counts: Counter[str]
    mass: dict[str, float]  # Σ count · mean activation
    concepts: list[int]  # how many of the latents each concept has
    seeds: dict[int, "SeedSet"]  # the same side in the crosscoder of every seed, the analysed one too

    @property
    def total(self) -> int:
        """All latents of the set, whatever their label."""
        return self.counts.total()

    @property
    def deff(self) -> float:
        """Design effect of its concepts."""
        return design_effect(self.concepts)


class SeedSet(NamedTuple):
    """Exclusive latents of one model in the crosscoder of one seed: how many of each category, and of each concept."""

    counts: Counter[str]
    concepts: list[int]


@dataclass(frozen=True)
class Comparison:
    """Two sets of latents and how their categories differ."""

    name: str
    a: LatentSet
    b: LatentSet
    explanation: str
    more: str  # what it means that B has more of a category
    less: str
    differences: list[Difference]
    runs: list[str]  # whose latents are compared
    seeds: dict[int, Sides]
    phi: tuple[float, float]  # of A and B; NaN where it cannot be told
    pooled: dict[str, Pooled]

    def significant(self, difference: Difference, alpha: float) -> bool:
        """Whether a category differs: in all seeds and their sum, or, if there is one seed only, in its two tests."""
        if len(self.seeds) > 1:
            pooled = self.pooled[difference.category]
            return pooled.agrees and pooled.q < alpha
        return difference.q < alpha and difference.q_concepts < alpha


def write_published_view(
    target: Path, runs: list[Path], described: list[dict[str, str]], config: CompareConfig
) -> None:
    """Write `categories.csv`, `seeds.csv` and `statistics.json`.

    Args:
        target: `<dir>/compare`.
        runs: One run, or two with a common base.
        described: What statistics.json says of each: `name`, `path`, and the names of `base` and `tuned`.
        config: `alpha` and `confidence`.

    Raises:
        InputError: Latents or labels of a run are missing, damaged or of an earlier version.
        ResourceError: The disk is full.
    """
    comparisons = _comparisons(described, [_exclusive(run) for run in runs], config)
    rundir.write_text(target / CATEGORIES, _csv(comparisons, config))
    rundir.write_text(target / BY_SEED, _seeds_csv(comparisons))
    rundir.write_json(target / STATISTICS, _statistics(comparisons, described, config))


def _exclusive(run: Path) -> dict[str, LatentSet]:
    """The latents that only one model of a run has, by side."""
    labels = read_labels(run)
    counts: dict[str, Counter[str]] = {"base": Counter(), "tuned": Counter()}
    mass: dict[str, dict[str, float]] = {"base": {}, "tuned": {}}
    sources = read_analysis_summary(run)["sources"]
    known = {source["category"] for source in sources if source["category"]}
    for category in known | {label.category for label in labels.values()}:
        for side in counts:  # every category is in the table, also where nothing changed
            counts[side][category] += 0
    latents = read_latents(run)
    analysed, seeds = _other_seeds(run)
    concepts: dict[str, Counter[str]] = {"base": Counter(), "tuned": Counter()}
    weights = latents.numbers("count") * latents.numbers("mean_activation")
    concept = latents.text("concept")
    for latent, side in enumerate(latents.text("specific")):
        if not side:
            continue
        concepts[side][concept[latent] or str(latent)] += 1
        category = labels[latent].category if latent in labels else UNLABELLED
        counts[side][category] += 1
        mass[side][category] = mass[side].get(category, 0.0) + float(weights[latent])
    found = {}
    for side in counts:
        sizes = list(concepts[side].values())
        of = {analysed: SeedSet(counts[side], sizes)} | {seed: sets[side] for seed, sets in seeds.items()}
        found[side] = LatentSet(side, counts[side], mass[side], sizes, dict(sorted(of.items())))
    return found


def _other_seeds(run: Path) -> tuple[int, dict[int, dict[str, SeedSet]]]:
    """The seed that was analysed, and the exclusive latents of each model in the crosscoders of the others.

    Raises:
        InputError: The labels are of a version that knew one seed only, or damaged.
    """
    facts = read_analysis_summary(run).get("seeds")
    labels = read_seed_labels(run)
    if facts is None:
        raise InputError(f"{run / 'analysis'}: does not say which seeds it counted; run `fastdiff analyze {run}` again")
    found: dict[int, dict[str, SeedSet]] = {}
    for seed in facts["others"]:
        found[seed] = {}
        for side in SIDES:
            mine = [label for label in labels if (label.seed, label.specific) == (seed, side)]
            concepts = Counter(label.concept for label in mine)
            categories = Counter(label.category or UNLABELLED for label in mine)
            found[seed][side] = SeedSet(categories, list(concepts.values()))
    return facts["analysed"], found


def _comparisons(
    facts: list[dict[str, str]], sides: list[dict[str, LatentSet]], config: CompareConfig
) -> list[Comparison]:
    names, found = [fact["name"] for fact in facts], []
    for name, fact, exclusive in zip(names, facts, sides, strict=True):
        base, tuned = fact["base"], fact["tuned"]
        found.append(
            _compare_sets(
                "base→tuned" if len(names) == 1 else name,
                replace(exclusive["base"], name=f"only {base}"),
                replace(exclusive["tuned"], name=f"only {tuned}"),
                f"Latents only {tuned} has (gained by tuning) against those only {base} has (lost).",
                f"gained from {base} to {tuned}",
                f"lost from {base} to {tuned}",
                config,
                [name],
            )
        )
    if len(names) == 2:
        for kind, side, direction in (("gained", "tuned", "over"), ("lost", "base", "from")):
            first, second = (sides[i][side] for i in (0, 1))
            found.append(
                _compare_sets(
                    kind,
                    replace(first, name=f"{kind} by {names[0]}"),
                    replace(second, name=f"{kind} by {names[1]}"),
                    f"Latents {kind} {direction} {facts[0]['base']}: by {names[1]} against by {names[0]}.",
                    f"{kind} more by {names[1]} than by {names[0]}",
                    f"{kind} less by {names[1]} than by {names[0]}",
                    config,
                    names,
                )
            )
    return found


def _compare_sets(
    name: str,
    a: LatentSet,
    b: LatentSet,
    explanation: str,
    more: str,
    less: str,
    config: CompareConfig,
    runs: list[str],
) -> Comparison:
    differences = compare_shares(
        dict(a.counts),
        a.total,
        dict(b.counts),
        b.total,
        confidence=config.confidence,
        untested=_NO_CATEGORY,
        deff_a=a.deff,
        deff_b=b.deff,
    )
    seeds = {seed: Sides(a.seeds[seed].counts, b.seeds[seed].counts) for seed in a.seeds if seed in b.seeds}
    phi, excess = [], []
    for i, side in enumerate((a, b)):
        phi.append(overdispersion([of[i] for of in seeds.values()]))
        deff = design_effect([size for seed in seeds for size in side.seeds[seed].concepts])
        excess.append(max(1.0, deff, 0.0 if math.isnan(phi[i]) else phi[i]))
    pooled = pool(list(seeds.values()), untested=_NO_CATEGORY, excess_a=excess[0], excess_b=excess[1])
    return Comparison(name, a, b, explanation, more, less, differences, runs, seeds, (phi[0], phi[1]), pooled)


def _csv(comparisons: list[Comparison], config: CompareConfig) -> str:
    lines = [",".join(_COLUMNS)]
    for comparison in comparisons:
        a, b = comparison.a, comparison.b
        for d in comparison.differences:
            numbers = {
                "share_a": d.share_a,
                "share_b": d.share_b,
                "delta_percent": d.delta_percent,
                "percent_low": d.percent_low,
                "percent_high": d.percent_high,
                "delta_points": d.delta_points,
                "points_low": d.points_low,
                "points_high": d.points_high,
                "p": d.p,
                "q": d.q,
                "q_concepts": d.q_concepts,
                "detectable_ratio": d.detectable_ratio,
                "mass_a": _share(a.mass, d.category),
                "mass_b": _share(b.mass, d.category),
            }
            over_seeds = comparison.pooled[d.category] if len(comparison.seeds) > 1 else None
            if over_seeds is not None:
                numbers |= {"pooled_p": over_seeds.p, "pooled_q": over_seeds.q}
            cells = {
                "comparison": _quoted(comparison.name),
                "category": _quoted(d.category),
                "side_a": _quoted(a.name),
                "side_b": _quoted(b.name),
                "count_a": d.count_a,
                "total_a": d.total_a,
                "count_b": d.count_b,
                "total_b": d.total_b,
                "significant": int(comparison.significant(d, config.alpha)),
                **{name: f"{value:.6g}" if math.isfinite(value) else "" for name, value in numbers.items()},
            }
            if over_seeds is not None:
                cells |= {"signs": over_seeds.signs}
                for side in ("a", "b"):
                    for name in ("count", "total"):
                        cells[f"pooled_{name}_{side}"] = getattr(over_seeds, f"{name}_{side}")
            # what only several seeds can tell is empty with one
            lines.append(",".join(str(cells.get(column, "")) for column in _COLUMNS))
    return "\n".join(lines) + "\n"


def _seeds_csv(comparisons: list[Comparison]) -> str:
    lines = [",".join(BY_SEED_COLUMNS)]
    for comparison in comparisons:
        for seed, (a, b) in comparison.seeds.items():
            total_a, total_b = a.total(), b.total()
            for category in sorted(comparison.pooled):
                points = ""
                if total_a and total_b:
                    points = f"{100 * (b[category] / total_b - a[category] / total_a):.6g}"
                row = (seed, _quoted(category), a[category], total_a, b[category], total_b, points)
                lines.append(",".join(map(str, (_quoted(comparison.name), *row))))
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A CSV cell. Python 3.11's csv leaves a carriage return bare when lines end with a newline."""
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def _share(mass: Mapping[str, float], category: str) -> float:
    total = sum(mass.values())
    return mass.get(category, 0.0) / total if total else math.nan


def _statistics(comparisons: list[Comparison], runs: list[dict[str, str]], config: CompareConfig) -> dict[str, Any]:
    return {
        "schema": STATISTICS_SCHEMA,
        "kind": "pair" if len(runs) == 1 else "triangulated",
        "alpha": config.alpha,
        "confidence": config.confidence,
        "runs": runs,
        "comparisons": [
            {
                "name": c.name,
                "runs": c.runs,
                "side_a": c.a.name,
                "side_b": c.b.name,
                "total_a": c.a.total,
                "total_b": c.b.total,
                "unlabelled_a": c.a.counts[UNLABELLED] + c.a.counts[UNINTERPRETABLE],
                "unlabelled_b": c.b.counts[UNLABELLED] + c.b.counts[UNINTERPRETABLE],
                "deff_a": c.a.deff,
                "deff_b": c.b.deff,
                "seeds": list(c.seeds),
                "phi_a": None if math.isnan(c.phi[0]) else c.phi[0],
                "phi_b": None if math.isnan(c.phi[1]) else c.phi[1],
                "n_categories": _n_categories(c),
                "explanation": c.explanation,
            }
            for c in comparisons
        ],
        "verdict": [sentence for c in comparisons for sentence in _verdict(c, config)],
        "method": (
            "A latent counts for the model that alone has it by latent scaling (column `specific`). A "
            "category's share of one side's latents is compared with its share of the other's: Fisher's "
            "exact test, two-sided, with Benjamini-Hochberg over the categories of a comparison, and again with all "
            "counts divided by the design effects of the sides' concepts; "
            f"{100 * config.confidence:g} % intervals by Newcombe. Unlabelled and uninterpretable latents stay in the "
            "denominators and are not tested. Counts, shares and intervals are those of one crosscoder. Where several "
            f"seeds were counted, a category is significant if every seed gives its difference the same sign and q < "
            f"{config.alpha:g} for the sums over the seeds, divided by what they vary more than independent latents "
            f"would; with one seed, if both tests give q < {config.alpha:g}. Seeds draw the dictionary anew, not the "
            "models and not the text."
        ),
    }


def _n_categories(comparison: Comparison) -> int:
    return sum(d.category not in _NO_CATEGORY for d in comparison.differences)


def _verdict(comparison: Comparison, config: CompareConfig) -> list[str]:
    """One sentence per direction that has significant categories, or one that says there are none."""
    a, b = comparison.a, comparison.b
    if a.total == 0 or b.total == 0:
        empty = a.name if a.total == 0 else b.name
        return [f"{comparison.name}: no latent is {empty!r}, so categories cannot be compared."]
    real = [d for d in comparison.differences if comparison.significant(d, config.alpha)]
    sentences = []
    for words, chosen in (
        (comparison.more, [d for d in real if d.delta_points > 0]),
        (comparison.less, [d for d in reversed(real) if d.delta_points < 0]),
    ):
        if chosen:
            listed = "; ".join(
                f"{d.category} ({_counted(comparison, d)}"
                f"{f'; its {composition}' if (composition := d.composition) else ''})"
                for d in chosen
            )
            sentences.append(f"{words[0].upper()}{words[1:]}: {listed}.")
    n = _n_categories(comparison)
    if n == 0:
        return [
            f"{comparison.name}: the text has no categories, so there is none to compare; "
            "extract it with --category-field."
        ]
    if not sentences:
        seeds = f"{len(comparison.seeds)} seeds, " if len(comparison.seeds) > 1 else ""
        sentences.append(
            f"{comparison.name}: no category differs beyond noise (q < {config.alpha:g}, {n} categories, {seeds}"
            f"{b.total} latents against {a.total})."
        )
    return sentences


def _counted(comparison: Comparison, d: Difference) -> str:
    counts = f"{d.count_b}/{comparison.b.total} against {d.count_a}/{comparison.a.total} latents"
    if len(comparison.seeds) < 2:
        return f"{counts}, q = {d.q:.1g}"
    pooled = comparison.pooled[d.category]
    return (
        f"{counts}; in {len(comparison.seeds)} seeds {pooled.count_b}/{pooled.total_b} against "
        f"{pooled.count_a}/{pooled.total_a}, signs {pooled.signs}, q = {pooled.q:.1g}"
    )
