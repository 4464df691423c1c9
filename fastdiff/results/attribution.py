"""What `fastdiff attribute` writes: per document how a model's change came about, per latent its nats.

    <run>/attribution/
        summary.json             `Summary`
        documents.safetensors    `DocumentTable`, a tensor per field; only if checked
        latents.safetensors      `nats` [S, N_nats, F] float32, of the documents with nats in the order of the table

Nats are per scored token and positive where the tuned model does better. S is the number of seeds, N of documents,
F of latents. For each document with nats, and each seed,

    latents + offset + error + left_out + bos  ≈  layer

to the share that `largest_gap` says. Nothing in these files depends on the time of day.
"""

import hashlib
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastdiff.errors import InputError
from fastdiff.results.validation import validated
from fastdiff.rundir import atomic_path, canonical_json, read_json, write_json

SCHEMA: Final = 2
DIRECTORY = "attribution"
SUMMARY, DOCUMENTS, LATENTS = "summary.json", "documents.safetensors", "latents.safetensors"
# of an attribution that was checked
OUTPUTS = (DOCUMENTS, LATENTS, SUMMARY)
# what a hook may read besides the residual stream
BRANCHES = ("mlp_out", "attn_out")
# below this many documents a category's verdict is "cannot tell"
FEW_DOCUMENTS = 8
# Σ parts = L within this share of max(|L|, tau), in the mean of each category
GAP_MOST = 0.03


class Summary(BaseModel):
    """`summary.json`.

    Attributes:
        schema_version: `schema` in the file.
        state: Whether the models could be run.
        reason: Why not.
        remedy: What to do about it.
        scored: Whose tokens count: of all text, or of the assistant's answers.
        branch: The branch that was read, where it is not the residual stream.
        models: Base and tuned.
        layer: Where their activations were read.
        hook: Likewise.
        seeds: Of the crosscoders, in the order of S.
        categories: Names; documents refer to them by index.
        unigram_entropy: Of the scored tokens of each category, in nats, corrected for bias by Miller and Madow.
        largest_gap: Largest |Σ parts - L| / max(|L|, tau) of a category's means.
        tau: What counts as a change at all, in nats per token.
        too_short: Documents of the store that have fewer than two scored tokens; they are in no file.
        documents: Of each category.
        documents_with_nats: Of each category.
        few_documents: Categories with fewer than 8 documents with nats.
        none_long_enough: Categories of the store of which no document has two scored tokens.
        dict_size: F.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    schema_version: Literal[2] = Field(SCHEMA, alias="schema")
    state: Literal["checked", "not checked"]
    reason: str | None = None
    remedy: str | None = None
    scored: Literal["all text", "answers"] = "all text"
    branch: Literal["mlp_out", "attn_out"] | None = None
    models: list[str] = []
    layer: int | None = None
    hook: str | None = None
    seeds: list[int] = []
    categories: list[str] = []
    unigram_entropy: dict[str, float] = {}
    largest_gap: float | None = None
    tau: float
    too_short: int = 0
    documents: dict[str, int] = {}
    documents_with_nats: dict[str, int] = {}
    few_documents: list[str] = []
    none_long_enough: list[str] = []
    dict_size: int | None = None


@dataclass(frozen=True)
class DocumentTable:
    """N documents; NaN where a document has no nats.

    Attributes:
        document: (N,) sequence id in the store.
        text: (N,) number of its text, equal in every run; see `text_number`.
        category: (N,) index into the summary's categories.
        held_out: (N,) whether no crosscoder was trained on it.
        scored: (N,) its scored tokens.
        ce: (N, 2) cross entropy of base and tuned.
        has_nats: (N,) whether the rest is known.
        steps: (N,) midpoints of the integral; 0 where a document has no nats.
        layer: (N,) L: what all that happens up to the layer changes.
        latents: (S, N) part of L that runs through the latents.
        offset: (S, N) part of the shift of the mean and of the decoder's bias.
        error: (S, N) part of what the crosscoder does not reconstruct.
        left_out: (N,) part of the rows that are left out of use, but for the first position.
        bos: (N,) part of the first position, where it is left out of use.
    """

    document: NDArray[np.int64]
    text: NDArray[np.int64]
    category: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    scored: NDArray[np.int64]
    ce: NDArray[np.float64]
    has_nats: NDArray[np.bool_]
    steps: NDArray[np.int64]
    layer: NDArray[np.float64]
    latents: NDArray[np.float64]
    offset: NDArray[np.float64]
    error: NDArray[np.float64]
    left_out: NDArray[np.float64]
    bos: NDArray[np.float64]


@dataclass(frozen=True)
class Attribution:
    """All of it; without tables if it says "not checked"."""

    summary: Summary
    documents: DocumentTable | None
    nats: NDArray[np.float32] | None  # [S, N_nats, F]


_BOOLEANS = ("held_out", "has_nats")
_INTEGERS = ("document", "text", "category", "scored", "steps")
_TYPES = dict.fromkeys(_INTEGERS, np.int64) | dict.fromkeys(_BOOLEANS, np.uint8)
# what is known of documents with nats
_TRACED = ("layer", "latents", "offset", "error", "left_out", "bos")
_SHAPES = {"ce": "N2", "latents": "SN", "offset": "SN", "error": "SN"}


def text_number(ids: NDArray[np.int64]) -> int:
    """The first 8 bytes of the sha256 of a document's token ids as int64, little endian: its number in every run."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def write_attribution(directory: Path, found: Attribution) -> list[str]:
    """Write the files, each whole or not at all, and take away those of an earlier result that no longer belong.

    Returns:
        Their names, `OUTPUTS` or, of what was not checked, the summary alone.

    Raises:
        ResourceError: The disk is full.
    """
    tables: dict[str, dict[str, NDArray[Any]]] = {}
    if found.documents is not None and found.nats is not None:
        columns = {field.name: getattr(found.documents, field.name) for field in fields(DocumentTable)}
        columns |= {name: columns[name].astype(np.uint8) for name in _BOOLEANS}
        tables = {DOCUMENTS: columns, LATENTS: {"nats": found.nats}}
    directory.mkdir(parents=True, exist_ok=True)
    # all are written before the first takes its place, so that a full disk leaves what was there
    with ExitStack() as stack:
        for name, table in tables.items():
            temporary = stack.enter_context(atomic_path(directory / name))
            arrays = {key: np.ascontiguousarray(array) for key, array in table.items()}
            save_file(arrays, temporary, metadata={"fastdiff": canonical_json({"schema": SCHEMA})})
    for name in (DOCUMENTS, LATENTS):
        if name not in tables:
            (directory / name).unlink(missing_ok=True)
    write_json(directory / SUMMARY, found.summary.model_dump(by_alias=True))
    return [*tables, SUMMARY]


def read_summary(directory: Path) -> Summary:
    """Read `summary.json`.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    path = directory / SUMMARY
    facts = read_json(path, SCHEMA, f"fastdiff attribute {directory.parent}")
    return validated(Summary, facts, path, _again(directory))


def read_attribution(directory: Path) -> Attribution:
    """Read what `write_attribution` wrote.

    Args:
        directory: `<run>/attribution`.

    Raises:
        InputError: A file is missing, damaged, of another schema, or does not fit the others.
    """
    summary = read_summary(directory)
    if summary.state == "not checked":
        return Attribution(summary, None, None)
    columns = _load(directory, DOCUMENTS)
    nats = _load(directory, LATENTS).get("nats")
    names = [field.name for field in fields(DocumentTable)]
    path = directory / DOCUMENTS
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"{path}: has no {missing[0]}; {_again(directory)}")
    sizes = {"N": len(columns["document"]), "S": len(summary.seeds), "2": 2}
    for name in names:
        wanted = tuple(sizes[letter] for letter in _SHAPES.get(name, "N"))
        if columns[name].shape != wanted:
            raise InputError(f"{path}: {name} is {columns[name].shape}, expected {wanted}; {_again(directory)}")
        if columns[name].dtype != _TYPES.get(name, np.float64):
            raise InputError(f"{path}: {name} is of type {columns[name].dtype}; {_again(directory)}")
    for name in ("ce", *_TRACED):
        known = columns[name] if name == "ce" else columns[name][..., columns["has_nats"].astype(bool)]
        if not np.isfinite(known).all():
            raise InputError(f"{path}: {name} holds NaN or infinity; {_again(directory)}")
    if any(not math.isfinite(summary.unigram_entropy.get(name, math.nan)) for name in summary.categories):
        raise InputError(f"{directory / SUMMARY}: lacks the unigram entropy of a category; {_again(directory)}")
    category = columns["category"]
    if len(category) and not 0 <= category.min() <= category.max() < len(summary.categories):
        raise InputError(f"{path}: a document is of a category that {SUMMARY} does not name; {_again(directory)}")
    columns |= {name: columns[name].astype(bool) for name in _BOOLEANS}
    shape = (len(summary.seeds), int(columns["has_nats"].sum()), summary.dict_size)
    if nats is None or nats.shape != shape:
        found = "missing" if nats is None else nats.shape
        raise InputError(f"{directory / LATENTS}: nats is {found}, expected {shape}; {_again(directory)}")
    return Attribution(summary, DocumentTable(**{name: columns[name] for name in names}), nats)


def category_means(found: Attribution) -> dict[str, dict[str, Any]]:
    """Means over the documents of each category, in nats per scored token.

    Returns:
        By category: `B` over all its documents; over those with nats `L`, `left_out`, `bos`, and a value per seed of
        `V` (latents + offset), `latents`, `offset` and `error`. Empty where nothing was checked.
    """
    table = found.documents
    if table is None:
        return {}
    means: dict[str, dict[str, Any]] = {}
    for code, name in enumerate(found.summary.categories):
        mine = table.category == code
        traced = mine & table.has_nats
        by_seed = {part: getattr(table, part)[:, traced].mean(axis=1) for part in ("latents", "offset", "error")}
        by_seed = {"V": by_seed["latents"] + by_seed["offset"], **by_seed}
        means[name] = {
            "B": float((table.ce[mine, 0] - table.ce[mine, 1]).mean()),
            "L": float(table.layer[traced].mean()),
            "left_out": float(table.left_out[traced].mean()),
            "bos": float(table.bos[traced].mean()),
            **{part: values.tolist() for part, values in by_seed.items()},
        }
    return means


def _load(directory: Path, name: str) -> dict[str, NDArray[Any]]:
    try:
        return load_file(directory / name)
    except FileNotFoundError as error:
        raise InputError(f"{directory / name}: no such file; {_again(directory)}") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{directory / name}: not readable as safetensors ({error}); {_again(directory)}") from error


def _again(directory: Path) -> str:
    return f"run `fastdiff attribute {directory.parent}` again"
