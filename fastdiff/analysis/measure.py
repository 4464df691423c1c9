"""What one pass over a store measures of a crosscoder's latents, whichever seed it was trained with."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.analysis.classes import classify, decoder_cosine, delta_norm, specific
from fastdiff.analysis.concepts import concepts
from fastdiff.analysis.firing import Firing
from fastdiff.analysis.scaling import TARGETS, ScalingSums, nu, unmatched_energy
from fastdiff.analysis.stability import SAMPLE
from fastdiff.config import AnalyzeConfig
from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.rows import spread_rows
from fastdiff.errors import InputError
from fastdiff.progress import Progress
from fastdiff.store.reader import ActivationStore


def one_pass(
    store: ActivationStore,
    crosscoder: Crosscoder,
    n_rows: int,
    rows: NDArray[np.int64],
    batch_size: int,
    examples: int,
    progress: Progress,
) -> tuple[ScalingSums, Firing, dict[str, list[Any]]]:
    """Read the first rows of a store once, in order, in batches of whole documents.

    Args:
        store: The activations.
        crosscoder: On the device to compute on.
        n_rows: How many rows.
        rows: Which of these are in use, (n,), ascending.
        batch_size: Tokens in one pass through the encoder, at least; a document is never split.
        examples: Strongest documents to keep of each latent.
        progress: Where to report.

    Returns:
        Scaling, firing, and by source: tokens [S], documents [S], energy [S][M], which is Σ‖x‖² of each model.

    Raises:
        InputError: A row holds NaN or infinity.
    """
    sources, roles = store.column("sources"), store.column("roles")
    n_sources, n_roles = len(store.meta.sources or [None]), len(store.meta.roles or [None])
    nothing = np.zeros(n_rows, np.int64)
    sources = nothing if sources is None else sources[:n_rows].astype(np.int64)
    roles = nothing if roles is None else roles[:n_rows].astype(np.int64)
    documents = store.column("sequence_ids")
    documents = np.arange(n_rows) if documents is None else documents[:n_rows]
    usable = np.zeros(n_rows, bool)
    usable[rows] = True
    first_of_document = np.concatenate(([True], documents[1:] != documents[:-1]))
    document_number = np.cumsum(first_of_document) - 1
    tokens = np.bincount(document_number[usable], minlength=document_number[-1] + 1)
    sums = ScalingSums.zeros(crosscoder.dict_size, store.n_models)
    firing = Firing.zeros(crosscoder.dict_size, n_sources, n_roles, examples)
    models = chosen_models(crosscoder.inputs, store.n_models)
    energy = np.zeros((n_sources, len(models)))
    norm = crosscoder.code_norm().detach().double()
    W_dec, b_dec = crosscoder.W_dec.detach().double(), crosscoder.b_dec.detach().double()
    with progress.task("analyze", n_rows, "tokens") as task:
        for start, stop in _document_batches(documents, batch_size):
            batch = store.slice(start, stop)[torch.from_numpy(usable[start:stop])]
            at = start + np.flatnonzero(usable[start:stop])
            x = crosscoder.normalize(batch)
            finite = torch.isfinite(x).flatten(1).all(dim=1)
            if not bool(finite.all()):
                row = at[int((~finite).nonzero()[0])]
                raise InputError(f"{store.path}: row {row} holds NaN or infinity; extract it again")
            np.add.at(energy, sources[at], batch[:, models].double().square().sum(dim=-1).numpy())
            values, selection = crosscoder.encode(x)
            sums.add(W_dec, b_dec, x, values, selection)
            row = at[selection.row.cpu().numpy()]
            firing.add(
                latent=selection.col.cpu().numpy(),
                value=(values.double() * norm[selection.col]).cpu().numpy(),
                row=row,
                document=documents[row],
                source=sources[row],
                role=roles[row],
                tokens=tokens[document_number[row]],
            )
            task.advance(stop - start)
    totals = {
        "tokens": np.bincount(sources[usable], minlength=n_sources).tolist(),
        "documents": np.bincount(sources[first_of_document], minlength=n_sources).tolist(),
        "energy": energy.tolist(),
    }
    return sums, firing, totals


def latent_table(
    crosscoder: Crosscoder, sums: ScalingSums, firing: Firing, n_tokens: int, config: AnalyzeConfig
) -> dict[str, np.ndarray]:
    """The columns of latents.csv that follow from one pass; (F,) each."""
    W_dec = crosscoder.W_dec.detach().cpu()
    delta = delta_norm(W_dec)
    betas = sums.betas(W_dec)
    ratio = {target: nu(betas[target], delta).numpy() for target in TARGETS}
    norms = W_dec.double().norm(dim=-1).numpy()
    F = crosscoder.dict_size
    table = {
        "latent": np.arange(F),
        "class": classify(delta.numpy()),
        "delta_norm": delta.numpy(),
        "cosine": decoder_cosine(W_dec).numpy(),
        **{f"nu_{target}": ratio[target] for target in TARGETS},
        "norm_base": norms[:, 0],
        "norm_tuned": norms[:, 1],
        "frequency": firing.count / n_tokens,
        "count": firing.count,
        "max_activation": firing.largest,
        "label": np.full(F, ""),
        "category": np.full(F, ""),
        "specific": specific(
            delta.numpy(),
            ratio["error"],
            ratio["reconstruction"],
            nu_error_max=config.nu_error_max,
            nu_reconstruction_max=config.nu_reconstruction_max,
        ),
    }
    along = (delta >= 0.5).long()
    for target in TARGETS:
        picked = betas[target][torch.arange(F), along].numpy()  # [F, 2 models]
        table[f"beta_{target}_base"], table[f"beta_{target}_tuned"] = picked[:, 0], picked[:, 1]
    table["unmatched"] = unmatched_energy(betas["error"], W_dec).numpy()
    with np.errstate(invalid="ignore"):
        table["mean_activation"] = firing.total / firing.count
    return table


def concepts_of_sides(
    store: ActivationStore,
    crosscoder: Crosscoder,
    rows: NDArray[np.int64],
    table: dict[str, np.ndarray],
    config: AnalyzeConfig,
    progress: Progress,
) -> np.ndarray:
    """The column `concept` of latents.csv, (F,): of each side apart, from the column `specific` of `table`."""
    sample, found = spread_rows(rows, SAMPLE), np.full(crosscoder.dict_size, -1)
    for side in ("base", "tuned"):
        members = table["specific"] == side
        if members.any():
            of = concepts(crosscoder, store, sample, members, batch_size=config.batch_size, progress=progress)
            found[members] = of[members]
    return np.array([str(number) if number >= 0 else "" for number in found])


def _document_batches(documents: np.ndarray, batch_size: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at least `batch_size` rows that end where a document ends."""
    ends = np.concatenate((np.flatnonzero(np.diff(documents)) + 1, [len(documents)]))
    start = 0
    while start < len(documents):
        stop = int(ends[np.searchsorted(ends, min(start + batch_size, len(documents)))])
        yield start, stop
        start = stop
