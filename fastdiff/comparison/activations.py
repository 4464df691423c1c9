"""What the activations alone say of a category, without a word about behaviour.

    norm ratio   sqrt(Σ‖x_tuned‖² / Σ‖x_base‖²) over the category's rows in use: whether its activations grew
    lean         to which model the latents that are labelled with the category lean, by a rank test of their unmatched
                 energy (see `fastdiff.analysis.scaling.unmatched_energy`)

Neither tells what a model does: on real models a lean was right about as often as a coin.
"""

import csv
import math
from pathlib import Path

import numpy as np

from fastdiff.annotation.annotate import read_labels
from fastdiff.comparison.verdict import LabelledLatents, lean_rows, leans
from fastdiff.errors import InputError
from fastdiff.results.analysis import read_analysis_summary
from fastdiff.results.verdict import Verdict

# a latent that fires on fewer tokens has no place in a rank test
_LEAST_COUNT = 10


def activation_rows(run: Path, *, alpha: float) -> list[Verdict]:
    """A row per category with its lean and its norm ratio, and nothing else.

    Raises:
        InputError: The analysis or its labels are missing, or of a version that did not measure this.
    """
    summary, path = read_analysis_summary(run), run / "analysis" / "latents.csv"
    names = [source["category"] or source["dataset"] for source in summary["sources"]]
    categories = sorted(set(names))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if "energy_by_source" not in summary or (rows and "unmatched" not in rows[0]):
        raise InputError(f"{path}: of an earlier version, without `unmatched`; run `fastdiff analyze {run}` again")
    number = {category: i for i, category in enumerate(categories)}
    labels = {latent: number.get(label.category, -1) for latent, label in read_labels(run).items()}
    known = [row for row in rows if int(row["count"]) >= _LEAST_COUNT and row["unmatched"] not in ("", "nan")]
    seed = LabelledLatents(
        unmatched=np.array([float(row["unmatched"]) for row in known]),
        labels=np.array([labels.get(int(row["latent"]), -1) for row in known], np.int64),
    )
    return lean_rows(leans([seed], categories, alpha=alpha), norm_ratios(summary, categories))


def norm_ratios(summary: dict[str, list[dict[str, str]]], categories: list[str]) -> list[float | None]:
    """Of each category; None where base has no energy there.

    Args:
        summary: `summary.json` of the analysis.
        categories: Their names.
    """
    names = [source["category"] or source["dataset"] for source in summary["sources"]]
    energy = np.array(summary["energy_by_source"], np.float64).reshape(-1, 2)
    found: list[float | None] = []
    for category in categories:
        base, tuned = energy[[name == category for name in names]].sum(axis=0)
        found.append(math.sqrt(tuned / base) if base > 0 else None)
    return found
