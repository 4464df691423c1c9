"""Maximum-activating examples with their context, in one SQLite file.

    examples(latent, rank, sequence_id, row, position, dataset, category, activation, peak, tokens, activations)
    latents(latent, why)             why: "tuned" or "base" (exclusive to that model), "shared" (a control),
                                     "nats" (none of these, but most nats run through it in some category)

`tokens` and `activations` are JSON lists of the same length, `peak` is the index of the maximum; activations are
f·s, 0 where the latent is silent.
"""

import json
import sqlite3
from pathlib import Path

import numpy as np
import torch

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.rundir import atomic_path
from fastdiff.store.reader import ActivationStore

_SCHEMA = """
CREATE TABLE latents (latent INTEGER PRIMARY KEY, why TEXT NOT NULL);
CREATE TABLE examples (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, sequence_id INTEGER NOT NULL, row INTEGER NOT NULL,
    position INTEGER NOT NULL, dataset TEXT, category TEXT, activation REAL NOT NULL, peak INTEGER NOT NULL,
    tokens TEXT NOT NULL, activations TEXT NOT NULL, PRIMARY KEY (latent, rank)
);
"""


def write_examples(
    path: Path,
    store: ActivationStore,
    crosscoder: Crosscoder,
    chosen: dict[int, str],
    top_value: np.ndarray,
    top_row: np.ndarray,
    *,
    context: int,
    batch_size: int,
) -> None:
    """Write the examples of some latents.

    Args:
        path: The SQLite file; written whole or not at all.
        store: Where the rows are. Without token and sequence ids there is no text: the examples stay empty.
        crosscoder: To read activations around a peak.
        chosen: Latent → why it is shown.
        top_value: Strongest activation per latent and rank, [F, n], 0 where there are fewer.
        top_row: Its row, [F, n].
        context: Tokens on each side of a peak, within the document.
        batch_size: Rows in one pass through the encoder.
    """
    token_ids, sequence_ids = store.column("token_ids"), store.column("sequence_ids")
    spots: list[tuple[int, int, int, int, int]] = []  # latent, rank, row, first row, last row + 1
    if token_ids is not None and sequence_ids is not None:
        starts, stops = _document_bounds(sequence_ids)
        for latent in sorted(chosen):
            for rank in np.flatnonzero(top_value[latent] > 0).tolist():
                row = int(top_row[latent, rank])
                first, stop = max(int(starts[row]), row - context), min(int(stops[row]), row + context + 1)
                spots.append((latent, rank, row, first, stop))
    heat = _Heat(store, crosscoder, np.array(sorted(chosen), np.int64), spots, batch_size)
    positions, sources = store.column("positions"), store.column("sources")
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        with sqlite3.connect(temporary) as db:
            db.executescript(_SCHEMA)
            db.executemany("INSERT INTO latents VALUES (?, ?)", sorted(chosen.items()))
            for latent, rank, row, first, stop in spots:
                assert token_ids is not None and sequence_ids is not None
                source = store.meta.sources[sources[row]] if store.meta.sources and sources is not None else None
                tokens = [display(store.vocabulary, int(i)) for i in token_ids[first:stop]]
                db.execute(
                    "INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        latent,
                        rank,
                        int(sequence_ids[row]),
                        row,
                        int(positions[row]) if positions is not None else row - int(starts[row]),
                        source.dataset if source else None,
                        source.category if source else None,
                        float(f"{top_value[latent, rank]:.5g}"),
                        row - first,
                        json.dumps(tokens, ensure_ascii=False),
                        json.dumps([float(f"{v:.4g}") for v in heat.of(latent, first, stop)]),
                    ),
                )
        db.close()


class _Heat:
    """Activations of the chosen latents on the rows around their peaks."""

    def __init__(
        self,
        store: ActivationStore,
        crosscoder: Crosscoder,
        chosen: np.ndarray,
        spots: list[tuple[int, int, int, int, int]],
        batch_size: int,
    ):
        wanted = [np.arange(first, stop) for *_, first, stop in spots]
        self._rows = np.unique(np.concatenate(wanted)) if wanted else np.zeros(0, np.int64)
        self._dict_size = crosscoder.dict_size
        norm = crosscoder.code_norm().detach().cpu()
        is_chosen = torch.zeros(crosscoder.dict_size, dtype=torch.bool)
        is_chosen[torch.from_numpy(chosen)] = True
        keys, values = [np.zeros(0, np.int64)], [np.zeros(0)]
        for begin in range(0, len(self._rows), batch_size):
            rows = self._rows[begin : begin + batch_size]
            f, selection = crosscoder.encode(crosscoder.normalize(store.rows(rows)))
            row, latent = selection.row.cpu(), selection.col.cpu()
            keep = is_chosen[latent]
            keys.append(((row[keep] + begin) * self._dict_size + latent[keep]).numpy())
            values.append((f.cpu() * norm[latent])[keep].double().numpy())
        self._keys, self._values = np.concatenate(keys), np.concatenate(values)  # keys ascend

    def of(self, latent: int, first: int, stop: int) -> np.ndarray:
        """Activations [stop - first]."""
        begin = np.searchsorted(self._rows, first)
        wanted = np.arange(begin, begin + stop - first) * self._dict_size + latent
        at = np.searchsorted(self._keys, wanted)
        found = np.zeros(len(wanted))
        inside = at < len(self._keys)
        hit = inside.copy()
        hit[inside] = self._keys[at[inside]] == wanted[inside]
        found[hit] = self._values[at[hit]]
        return found


def _document_bounds(sequence_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and last row + 1 of the document of each row."""
    edges = np.flatnonzero(np.diff(sequence_ids)) + 1
    starts, stops = np.concatenate(([0], edges)), np.concatenate((edges, [len(sequence_ids)]))
    document = np.searchsorted(edges, np.arange(len(sequence_ids)), side="right")
    return starts[document], stops[document]


def display(vocabulary: list[str] | None, token_id: int) -> str:
    """A token as text; its number where the store has no vocabulary."""
    return vocabulary[token_id] if vocabulary is not None and token_id < len(vocabulary) else f"#{token_id}"
