"""What the activations alone say of a category, without a word about behaviour.

    norm ratio   sqrt(Σ‖x_tuned‖² / Σ‖x_base‖²) over the category's rows in use: whether its activations grew
    lean         to which model the latents of the category lean, by a rank test of their unmatched energy
                 (see `fastdiff.analysis.scaling.unmatched_energy`)

Neither tells what a model does: on real models a lean was right about as often as a coin.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fastdiff.comparison.verdict import LabelledLatents, lean_rows, leans
from fastdiff.errors import InputError
from fastdiff.results.analysis import read_analysis_summary, read_latents, source_categories
from fastdiff.results.verdict import Verdict

LEAST_LIFT = 2.0
LEAST_FIRINGS = 10
LEAST_DOCUMENTS = 3


def activation_rows(run: Path, *, alpha: float) -> list[Verdict]:
    """A row per category of a run's text with its lean and its norm ratio, and nothing else.

    Raises:
        InputError: The analysis is missing, damaged, or of a version that did not measure this.
    """
    summary, directory = read_analysis_summary(run), run / "analysis"
    if not summary["sources"]:
        return []
    if "energy_by_source" not in summary:
        raise InputError(f"{directory}: of an earlier version of fastdiff; run `fastdiff analyze {run}` again")
    latents = read_latents(run)
    categories, member = source_categories(summary)
    fired = load_file(directory / "firing.safetensors")
    labels = token_labels(
        fired["count_by_source"] @ member,
        fired["documents_by_source"] @ member,
        np.array(summary["tokens_by_source"]) @ member,
    )
    unmatched = np.where(latents.numbers("count") >= LEAST_FIRINGS, latents.numbers("unmatched"), math.nan)
    energy = np.array(summary["energy_by_source"], dtype=np.float64).T @ member
    ratios = [math.sqrt(tuned / base) if base > 0 else None for base, tuned in energy.T]
    return lean_rows(leans([LabelledLatents(unmatched, labels)], categories, alpha=alpha), ratios)


def token_labels(
    firings: NDArray[np.int64], documents: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The category on whose tokens each latent fires most often, against all other tokens.

    Args:
        firings: [latents, categories] tokens on which a latent fires.
        documents: [latents, categories] documents in which it does.
        tokens: [categories] tokens in all.

    Returns:
        [latents] index of the category; -1 for a latent with fewer than 10 firings, a lift below 2, or fewer than 3
        documents of the category.
    """
    total = firings.sum(axis=1, keepdims=True)
    others = tokens.sum() - tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        inside, outside = firings / tokens, (total - firings) / others
    lift = np.nan_to_num(inside) / np.maximum(np.nan_to_num(outside), 1e-12)
    best = lift.argmax(axis=1)
    at = np.arange(len(best))
    named = (total[:, 0] >= LEAST_FIRINGS) & (lift[at, best] >= LEAST_LIFT) & (documents[at, best] >= LEAST_DOCUMENTS)
    return np.where(named, best, -1).astype(np.int64)
