"""Files of `<run>/analysis/` that other stages read: `latents.csv` and `summary.json`."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from fastdiff.errors import InputError
from fastdiff.results.table import Table, read_table
from fastdiff.rundir import read_json, write_text

DIRECTORY = "analysis"
SUMMARY, LATENTS = "summary.json", "latents.csv"
SUMMARY_SCHEMA = 1

# what each column of latents.csv means, in their order; row i is latent i
LATENT_COLUMNS = {
    "latent": "index in the dictionary",
    "class": "by delta_norm only: tuned_only > 0.9, base_only < 0.1, shared 0.4 to 0.6, else other",
    "delta_norm": "½((‖W_dec tuned‖ - ‖W_dec base‖)/max + 1): 0 only base, 0.5 equal, 1 only tuned",
    "cosine": "between the two decoder rows",
    "nu_error": "β_base/β_tuned of the error along the tuned row (delta_norm >= 0.5), else β_tuned/β_base along the "
    "base row: about 0 = the other model lacks it, about 1 = it has it",
    "nu_reconstruction": "the same for the reconstruction",
    "nu_activation": "the same for the activation",
    "norm_base": "‖W_dec base‖",
    "norm_tuned": "‖W_dec tuned‖",
    "frequency": "share of tokens on which it fires",
    "count": "tokens on which it fires",
    "max_activation": "largest f·(norm_base + norm_tuned)",
    "label": "empty here; annotate/labels.jsonl has it",
    "category": "empty here; annotate/labels.jsonl has it",
    "specific": "model that alone has it by latent scaling, its class not being shared: tuned, base or empty",
    "beta_error_base": "β of the base model's error along the direction that nu_error uses",
    "beta_error_tuned": "β of the tuned model's error along it",
    "beta_reconstruction_base": "β of the base model's reconstruction along it",
    "beta_reconstruction_tuned": "β of the tuned model's reconstruction along it",
    "beta_activation_base": "β of the base model's activation along it",
    "beta_activation_tuned": "β of the tuned model's activation along it",
    "unmatched": "energy that only tuned has of it minus what only base has, over all: -1 only base … 1 only tuned",
    "mean_activation": "mean of f·(norm_base + norm_tuned) over the tokens on which it fires",
    "top_tokens": "JSON list of the tokens on which it fires most strongly, one per document, no token twice",
    "stability": "share of the run's other seeds that have it too, by the thresholds under stability; empty without "
    "other seeds, or if it fired on none of the tokens compared",
    "concept": "of a latent that one model alone has: the smallest of the latents that stand for one thing with it, "
    "by decoder cosine and co-activation; else empty",
}
LATENT_TEXT = ("class", "label", "category", "specific")
_TOKENS = TypeAdapter(list[str])


def read_analysis_summary(run: Path) -> dict[str, Any]:
    """`summary.json` of a run's analysis.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    facts: dict[str, Any] = read_json(run / DIRECTORY / SUMMARY, SUMMARY_SCHEMA, f"fastdiff analyze {run}")
    return facts


def source_categories(summary: Mapping[str, Any]) -> tuple[list[str], NDArray[np.int64]]:
    """The categories of the text, and which sources belong to each.

    Sources of the same category are one category; a data set without categories is its own.

    Args:
        summary: What `read_analysis_summary` gave.

    Returns:
        Names in order, and [sources, categories] of 0 and 1; a store without sources is "all text".
    """
    names = [source["category"] or source["dataset"] for source in summary["sources"]] or ["all text"]
    categories = sorted(set(names))
    return categories, np.array([[name == category for category in categories] for name in names], dtype=np.int64)


def write_latents(run: Path, table: Mapping[str, NDArray[Any]]) -> None:
    """Write `latents.csv`, whole or not at all.

    Args:
        run: The run directory.
        table: (F,) of every column in the order of `LATENT_COLUMNS`; NaN becomes an empty cell.

    Raises:
        ResourceError: The disk is full.
    """
    assert list(table) == list(LATENT_COLUMNS)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow([_cell(value) for value in row])
    write_text(run / DIRECTORY / LATENTS, out.getvalue())


def read_latents(run: Path) -> Table:
    """Read `latents.csv`; row i is latent i, and all columns but the text ones hold numbers.

    Raises:
        InputError: It is missing or damaged, or lacks a column (an analysis of an earlier version).
    """
    path = run / DIRECTORY / LATENTS
    table = read_table(path, list(LATENT_COLUMNS))
    for name in LATENT_COLUMNS:
        if name in (*LATENT_TEXT, "top_tokens"):
            continue
        try:
            table.numbers(name)
        except ValueError as error:
            raise InputError(f"{path}: column {name}: {error}") from error
    if table.text("latent") != [str(i) for i in range(len(table.rows))]:
        raise InputError(f"{path}: row i must be latent i")
    return table


def top_tokens(run: Path, latents: Table) -> list[list[str]]:
    """By latent, the tokens on which it fires most strongly.

    Args:
        run: The run directory, for messages.
        latents: What `read_latents` gave.

    Raises:
        InputError: A cell is no list of tokens.
    """
    try:
        return [_TOKENS.validate_python(json.loads(cell or "[]")) for cell in latents.text("top_tokens")]
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{run / DIRECTORY / LATENTS}: column top_tokens: {first}") from error


def _cell(value: Any) -> str:
    if isinstance(value, np.floating):
        return f"{value:.9g}" if np.isfinite(value) else ""
    return str(value)
