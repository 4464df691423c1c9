"""The shapes of what the report reads: files of earlier stages, and a run put together from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdiff.results.labels import Label
from fastdiff.results.nats import LatentNats
from fastdiff.results.statistics import Statistics
from fastdiff.results.table import Table
from fastdiff.results.verdict import VerdictFile

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Quality(_Model):
    """How well the crosscoder reconstructs."""

    fve: list[Number] = []
    fve_pooled: Number = None
    l0_mean: Number = None
    silent_fraction: Number = None
    rows: str = ""
    n_rows: int | None = None


class Histogram(_Model):
    """Δ_norm of the latents that fire."""

    edges: list[float]
    counts: list[int]


class Thresholds(_Model):
    """Below these a latent is specific to one model."""

    nu_error_max: float
    nu_reconstruction_max: float


class Stability(_Model):
    """How many latents at least half of the run's other seeds have too."""

    seeds: list[int]
    observed: int
    stable: int
    exclusive: int
    exclusive_stable: int


class Summary(_Model):
    """`analysis/summary.json`."""

    n_tokens: int
    dict_size: int
    k: int | None = None
    models: list[dict[str, Any]]
    classes: dict[str, int]
    specific: dict[str, int]
    never_fired: int
    quality: Quality
    delta_norm_histogram: Histogram
    thresholds: Thresholds
    stability: Stability | None = None


class Behaviour(_Model):
    """Nats per scored token that a tuned model does better, with its interval."""

    mean: Number = None
    low: Number = None
    high: Number = None


class Change(_Model):
    """One cell: what was planted there, and the verdict."""

    category: str
    expected: Literal["lost", "gained", "unchanged"]
    verdict: str | None = None
    change: str | None = None
    B: Behaviour | None = None
    recovered: bool


class PlantedPair(_Model):
    """The cells of one comparison."""

    run: str
    changes: list[Change]


class Truth(_Model):
    """`compare/truth.json`."""

    pairs: list[PlantedPair]
    sentence: str


class Point(_Model):
    """One line of `events.jsonl` that training wrote, without its time of day."""

    model_config = ConfigDict(extra="ignore")

    step: int
    loss: Number = None
    fve: list[Number] | None = None
    l0: Number = None
    dead: Number = None


@dataclass(frozen=True)
class Example:
    """One context in which a latent fires: T tokens, T activations, and the index of the peak."""

    sequence_id: int
    position: int
    dataset: str
    category: str
    activation: float
    peak: int
    tokens: list[str]
    activations: list[float]


@dataclass(frozen=True)
class Card:
    """A latent that has examples; `why` is tuned, base, shared (the control sample) or nats (most in some category)."""

    latent: int
    why: str
    examples: list[Example]


@dataclass(frozen=True)
class Run:
    """All of one run that the report shows; `nats` is None where its latents were not attributed."""

    name: str
    path: Path
    base: str
    tuned: str
    summary: Summary
    latents: Table
    labels: dict[int, Label]
    top_tokens: list[list[str]]
    cards: list[Card]
    seed: int
    nats: LatentNats | None
    curves: list[Point]
    settings: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    commands: list[str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Findings:
    """A reported directory: its comparison and the runs it compares.

    `categories` is `category_table` with its numbers read, one dict per row.
    """

    path: Path
    verdict: VerdictFile
    statistics: Statistics
    category_table: Table
    categories: list[dict[str, Any]]
    truth: Truth | None
    runs: list[Run]
    stages: dict[str, dict[str, Any]]
    commands: list[str]
