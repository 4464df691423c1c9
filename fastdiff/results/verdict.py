"""`compare/verdict.json`: what fine-tuning changed, one row per category and comparison.

Nats are per scored token; positive means that the tuned model does better.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdiff import rundir
from fastdiff.results.validation import validated

SCHEMA: Literal[1] = 1
Number = Annotated[float, Field(allow_inf_nan=False)]
Change = Literal["gained", "lost", "none"]
Word = Literal[
    "confirmed",
    "suggestive",
    "composition only",
    "no change",
    "neither has it",
    "cancelled later",
    "both directions",
    "cannot tell",
]
Reason = Literal[
    "not held by the latents",
    "by a mean shift",
    "not by this layer",
    "inside: cannot tell",
    "too few documents",
    "too few traced documents",
    "interval too wide",
    "too few labelled latents",
]
Lean = Literal["tuned", "base"]
# what each word says, for a reader who sees no more than the word; {tau} in nats
MEANINGS: dict[Word, str] = {
    "confirmed": "behaviour changed by {tau} nats or more, and what comes about up to the layer and what runs through "
    "the latents has the same sign, in the crosscoder of every seed",
    "suggestive": "behaviour changed by {tau} nats or more, but this layer or these latents do not show it; the reason "
    "stands beside it",
    "no change": "behaviour changed by less than {tau} nats, or by nothing that can be told from chance",
    "composition only": "behaviour did not change, though the labelled latents lean to one of the models",
    "neither has it": "even the better model predicts this text no better than the frequencies of its tokens do, so "
    "that the numbers of the row, however large, say nothing of a capability",
    "cancelled later": "behaviour did not change, though up to this layer it did: later layers make up for it",
    "both directions": "behaviour changed; up to this layer and through the latents the change has the other sign",
    "cannot tell": "too few documents, or too wide an interval",
}
REASONS: dict[Reason, str] = {
    "not held by the latents": "the change comes about up to this layer, but the crosscoder's error holds it and not "
    "its latents",
    "by a mean shift": "it runs through a shift that all tokens have alike, and through no latents",
    "not by this layer": "it comes about in later layers",
    "inside: cannot tell": "whether it runs through this layer and its latents cannot be told from chance",
    "too few documents": "fewer than eight documents",
    "too few traced documents": "fewer than eight documents were traced to the latents (--documents of attribute)",
    "interval too wide": "the documents differ so much that more of them are needed",
    "too few labelled latents": "fewer than five latents have this category's label",
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Model):
    """A mean over documents in nats; None where too few documents leave it without a value or an interval."""

    mean: Number | None
    low: Number | None
    high: Number | None


class Tested(Estimate):
    """An estimate with its p and, in the family of the comparison's categories, its q."""

    p: Number
    q: Number | None  # None for a category outside the family: too few documents


class TopLatent(_Model):
    """A latent and the nats that run through it in one category, mean over the category's documents."""

    seed: int
    latent: int
    nats: Number


class Verdict(_Model):
    """One category of one comparison. Without nats (not checked) only `category`, `lean` and `norm_ratio` speak."""

    category: str
    change: Change
    verdict: Word
    reason: Reason | None = None
    documents: int = 0
    documents_nats: int = 0
    documents_needed: int | None = None
    ce_base: Number | None = None
    ce_tuned: Number | None = None
    unigram_entropy: Number | None = None
    B: Tested | None = None
    L: Tested | None = None
    V: Tested | None = None  # latents + offset, mean over seeds
    latents: Estimate | None = None  # the latents' part of V alone
    offset: Number | None = None
    seed_means: list[Number] = []
    signs: str = ""
    share: Number | None = None  # V/L; never decides
    share_of_B: Number | None = None
    norm_ratio: Number | None = None
    lean: Lean | None = None
    better_documents: Number | None = None
    worse_documents: Number | None = None
    top_latents: list[TopLatent] = []


class Comparison(_Model):
    """A run's two models (pair), or two runs with one base (difference: second minus first)."""

    name: str
    kind: Literal["pair", "difference"]
    runs: list[str]
    base: str
    tuned: str
    state: Literal["checked", "not checked"]
    reason: str | None = None
    remedy: str | None = None
    scored: Literal["all text", "answers"] | None = None
    branch: Literal["mlp_out", "attn_out"] | None = None
    seeds: list[int] = []
    sentences: Annotated[list[str], Field(max_length=4)] = []
    rows: list[Verdict] = []


class TauFrom(_Model):
    """The A/A run that τ was taken from, and the largest |B| or |V| it showed."""

    run: str
    largest: Number


class VerdictFile(_Model):
    """The whole file. `schema` is its own number, apart from other files'."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(SCHEMA, alias="schema")
    tau: Number
    tau_from: TauFrom | None = None
    alpha: Number
    confidence: Number
    comparisons: list[Comparison]


def write(path: Path, file: VerdictFile) -> None:
    """Write `verdict.json`, whole or not at all.

    Raises:
        ResourceError: The disk is full.
    """
    rundir.write_json(path, file.model_dump(by_alias=True))


def read(path: Path) -> VerdictFile:
    """Read `verdict.json`.

    Raises:
        InputError: The file is missing, not JSON, of another schema, or not of this shape; names the remedy.
    """
    value = rundir.read_json(path, SCHEMA, "fastdiff compare")
    return validated(VerdictFile, value, path, "run `fastdiff compare` again")


def facts(file: VerdictFile) -> dict[str, Any]:
    """The whole verdict for scripts: `verdict` has the sentences, `rows` those of all comparisons with their names."""
    found = file.model_dump(exclude={"schema_", "comparisons"})
    found["verdict"] = [sentence for comparison in file.comparisons for sentence in comparison.sentences]
    found["comparisons"] = [comparison.model_dump(exclude={"rows"}) for comparison in file.comparisons]
    found["rows"] = [
        {"comparison": comparison.name, **row.model_dump()}
        for comparison in file.comparisons
        for row in comparison.rows
    ]
    return found


def meanings(file: VerdictFile) -> list[tuple[str, str]]:
    """The words of a file's rows and reasons, each once and with what it says."""
    rows = [row for comparison in file.comparisons if comparison.state == "checked" for row in comparison.rows]
    used = {row.verdict for row in rows} | {row.reason for row in rows}
    said: list[tuple[str, str]] = [*MEANINGS.items(), *REASONS.items()]
    return [(word, says.format(tau=f"{file.tau:g}")) for word, says in said if word in used]


def words(row: Verdict) -> str:
    """The verdict of a row as a reader sees it. Without nats it says at most to which model the latents lean."""
    if row.B is None:
        if row.lean is not None:
            return f"leans to {row.lean} (activations only)"
        return f"cannot tell: {row.reason}" if row.reason else "no lean (activations only)"
    said = row.verdict if row.change == "none" else f"{row.change}, {row.verdict}"
    return said if row.reason is None else f"{said}: {row.reason}"


def lines(file: VerdictFile) -> list[str]:
    """The whole verdict as text: of each comparison its sentences, then a line per category.

    A category's line has B, L and V in nats per scored token with the interval of B and V, and the signs of V over the
    crosscoder seeds.
    """
    found = []
    for comparison in file.comparisons:
        found.append(f"{comparison.name}: {' '.join(comparison.sentences)}")
        if comparison.state == "not checked" and comparison.remedy:
            found.append(f"  to check it: {comparison.remedy}")
        width = max((len(row.category) for row in comparison.rows), default=0)
        said = [words(row) for row in comparison.rows]
        room = max(map(len, said), default=0)
        for row, word in zip(comparison.rows, said, strict=True):
            numbers = ""
            if row.B is not None and row.L is not None and row.V is not None:
                numbers = f"  B {_range(row.B)}  L {_nats(row.L.mean)}  V {_range(row.V)} {row.signs}"
            found.append(f"  {row.category:{width}}  {word:{room}}{numbers}".rstrip())
    return found


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _range(of: Estimate) -> str:
    return f"{_nats(of.mean)} [{_nats(of.low)} {_nats(of.high)}]"
