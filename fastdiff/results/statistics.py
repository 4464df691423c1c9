"""Files of `<dir>/compare/` beside the verdict: the paper's view of specific latents by category, the demo's truth."""

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdiff.results.validation import validated
from fastdiff.rundir import read_json

CATEGORIES = "categories.csv"
CATEGORY_TEXT = ("comparison", "category", "side_a", "side_b", "signs")
CATEGORY_NUMBERS = (
    *("count_a", "total_a", "share_a", "count_b", "total_b", "share_b"),
    *("delta_percent", "percent_low", "percent_high", "delta_points", "points_low", "points_high"),
    *("p", "q", "q_concepts", "detectable_ratio", "mass_a", "mass_b"),
    *("pooled_count_a", "pooled_total_a", "pooled_count_b", "pooled_total_b", "pooled_p", "pooled_q", "significant"),
)
# the same counts, a row per comparison, seed and category
BY_SEED = "seeds.csv"
BY_SEED_COLUMNS = ("comparison", "seed", "category", "count_a", "total_a", "count_b", "total_b", "delta_points")
STATISTICS = "statistics.json"
STATISTICS_SCHEMA: Final = 3
TRUTH_SCHEMA = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ComparedRun(_Model):
    """A run that was compared; `path` is relative to the directory that holds `compare/`."""

    name: str
    path: str
    base: str
    tuned: str


class Family(_Model):
    """One family of category tests: latents of side a against latents of side b.

    Attributes:
        name: As in `categories.csv`.
        runs: Names of the runs whose latents are compared.
        side_a: Whose latents.
        side_b: Against these.
        total_a: All latents of that side, whatever their label.
        total_b: Likewise.
        unlabelled_a: Of these, without a category.
        unlabelled_b: Likewise.
        deff_a: Design effect of that side's concepts: its latents count as so many times fewer.
        deff_b: Likewise.
        seeds: Of the crosscoders that were counted, in the order of the signs; of two runs those that both have.
        phi_a: Overdispersion of that side's latents over the seeds; None where it cannot be told.
        phi_b: Likewise.
        n_categories: That were tested.
        explanation: In a sentence.
    """

    name: str
    runs: list[str]
    side_a: str
    side_b: str
    total_a: int
    total_b: int
    unlabelled_a: int
    unlabelled_b: int
    deff_a: float
    deff_b: float
    seeds: list[int]
    phi_a: float | None
    phi_b: float | None
    n_categories: int
    explanation: str


class Statistics(_Model):
    """`statistics.json`."""

    schema_: Literal[3] = Field(STATISTICS_SCHEMA, alias="schema")
    kind: Literal["pair", "triangulated"]
    alpha: float
    confidence: float
    runs: list[ComparedRun]
    comparisons: list[Family]
    verdict: list[str]
    method: str


def read_statistics(compare: Path) -> Statistics:
    """Read `statistics.json`.

    Args:
        compare: `<dir>/compare`.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    path = compare / STATISTICS
    value: Any = read_json(path, STATISTICS_SCHEMA, "fastdiff compare")
    return validated(Statistics, value, path, "run the same `fastdiff compare` again")


def compared_runs(compare: Path) -> dict[str, Path]:
    """Run directories of a comparison by the names it gives them, below the working directory as relative paths.

    Raises:
        InputError: As `read_statistics`.
    """
    here = Path.cwd()
    paths = {run.name: (compare.parent / run.path).resolve() for run in read_statistics(compare).runs}
    return {name: path.relative_to(here) if path.is_relative_to(here) else path for name, path in paths.items()}
