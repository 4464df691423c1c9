"""The latents that one model alone has, in the crosscoders of a run's seeds that were not analysed themselves.

    <run>/analysis/seeds.safetensors    `SeedLatents`, a tensor per field
    <run>/annotate/seeds.csv            `SEED_COLUMNS`, a row per latent

`seeds` of analysis/summary.json, {"analysed": 0, "others": [1, 2]}, says which seeds were counted, also where one of
them has no such latent.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastdiff.errors import InputError
from fastdiff.results.table import read_table
from fastdiff.rundir import atomic_path, write_text

SEEDS = "seeds.safetensors"
SEED_LABELS = "seeds.csv"
SIDES = ("base", "tuned")
SEED_COLUMNS = ("seed", "latent", "specific", "concept", "category")


@dataclass(frozen=True)
class SeedLatents:
    """P latents; the sums over documents are those of `fastdiff.analysis.firing`.

    Attributes:
        seed: (P,) of the crosscoder.
        latent: (P,) in it.
        side: (P,) index into `SIDES`: the model that alone has it.
        concept: (P,) smallest of the latents that stand for one thing with it.
        count: (P,) tokens on which it fires.
        documents_by_source: (P, S).
        mean_by_source: (P, S).
        squares_by_source: (P, S).
        peaks_by_source: (P, S).
    """

    seed: NDArray[np.int64]
    latent: NDArray[np.int64]
    side: NDArray[np.int64]
    concept: NDArray[np.int64]
    count: NDArray[np.int64]
    documents_by_source: NDArray[np.int64]
    mean_by_source: NDArray[np.float64]
    squares_by_source: NDArray[np.float64]
    peaks_by_source: NDArray[np.float64]

    @classmethod
    def none(cls, n_sources: int) -> "SeedLatents":
        """No latent, of a store of S sources."""
        numbers, sums = np.zeros(0, np.int64), np.zeros((0, n_sources))
        return cls(numbers, numbers, numbers, numbers, numbers, sums.astype(np.int64), sums, sums, sums)

    @classmethod
    def joined(cls, parts: list["SeedLatents"]) -> "SeedLatents":
        """One after the other."""
        return cls(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )


class SeedLabel(NamedTuple):
    """A row of `seeds.csv`; the category is empty where the latent has no label."""

    seed: int
    latent: int
    specific: str
    concept: int
    category: str


def write_seed_latents(analysis: Path, found: SeedLatents) -> None:
    """Write `seeds.safetensors`, whole or not at all.

    Raises:
        ResourceError: The disk is full.
    """
    with atomic_path(analysis / SEEDS) as temporary:
        save_file({field.name: getattr(found, field.name) for field in fields(found)}, temporary)


def read_seed_latents(run: Path) -> SeedLatents:
    """Read `seeds.safetensors`.

    Raises:
        InputError: It is missing (an analysis of an earlier version) or damaged.
    """
    path = run / "analysis" / SEEDS
    try:
        tensors = load_file(path)
        found = SeedLatents(**{field.name: tensors[field.name] for field in fields(SeedLatents)})
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not readable ({error}); run `fastdiff analyze {run}` again") from error
    shapes = [getattr(found, field.name).shape for field in fields(found)]
    tables = {shape for shape in shapes if len(shape) == 2}
    if {shape[0] for shape in shapes} != {len(found.seed)} or len(tables) != 1 or not set(found.side) <= {0, 1}:
        raise InputError(f"{path}: its tensors do not belong together; run `fastdiff analyze {run}` again")
    return found


def write_seed_labels(run: Path, labels: Iterable[SeedLabel]) -> None:
    """Write `seeds.csv`, whole or not at all.

    Raises:
        ResourceError: The disk is full.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(SEED_COLUMNS)
    writer.writerows(labels)
    write_text(run / "annotate" / SEED_LABELS, out.getvalue())


def read_seed_labels(run: Path) -> list[SeedLabel]:
    """Read `seeds.csv`.

    Raises:
        InputError: It is missing (labels of an earlier version) or damaged.
    """
    path = run / "annotate" / SEED_LABELS
    if not path.exists():
        raise InputError(f"{path}: no such file; run `fastdiff analyze {run}` and `fastdiff annotate {run}` again")
    table = read_table(path, SEED_COLUMNS)
    seeds, latents, specific, concepts, categories = (table.text(name) for name in SEED_COLUMNS)
    found = []
    for i, (seed, latent, side, concept, category) in enumerate(
        zip(seeds, latents, specific, concepts, categories, strict=True), start=2
    ):
        if side not in SIDES or not (seed.isdecimal() and latent.isdecimal() and concept.isdecimal()):
            raise InputError(f"{path}: line {i} is no latent of a seed; run `fastdiff annotate {run}` again")
        found.append(SeedLabel(int(seed), int(latent), side, int(concept), category))
    return found
