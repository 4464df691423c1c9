"""Rows of a store in batches: those that are evaluated on, with the source and role of each, and samples of others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.crosscoder.metrics import Batch, Quality, evaluate
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.store.reader import ActivationStore


@dataclass(frozen=True)
class EvaluationRows:
    """The rows a crosscoder is measured on; made once, since it reads columns of the whole store."""

    store: ActivationStore
    numbers: NDArray[np.int64]
    left_out: NDArray[np.int64]  # as large a share of the rows there that are left out of use, though not BOS
    name: Literal["held-out", "training"]
    groups: dict[str, tuple[NDArray[Any], list[str]]]  # by grouping: the group of each row, and the groups' names

    def measure(self, crosscoder: Crosscoder, batch_size: int, *, check_crc: bool = False) -> Quality:
        """Quality on these rows.

        Raises:
            InputError: A row holds NaN or infinity, or is not what was written.
        """
        names = {grouping: of for grouping, (_, of) in self.groups.items()}
        left_out = row_batches(self.store, self.left_out, batch_size, check_crc=check_crc)
        return evaluate(crosscoder, self._batches(batch_size, check_crc), names, left_out=left_out)

    def _batches(self, batch_size: int, check_crc: bool) -> Iterator[Batch]:
        at = 0
        for batch in row_batches(self.store, self.numbers, batch_size, check_crc=check_crc):
            part = slice(at, at + len(batch))
            yield batch, {grouping: codes[part] for grouping, (codes, _) in self.groups.items()}
            at += len(batch)


def evaluation_rows(store: ActivationStore, holdout: float, most: int | None = None) -> EvaluationRows:
    """The held-out rows in use, or all where none are held out; at most so many, evenly spread."""
    start = store.n_train(holdout)
    held_out = start < store.n_rows
    rows = np.arange(start if held_out else 0, store.n_rows, dtype=np.int64)
    usable = store.usable_rows()
    left_out = rows[:0]
    if usable is not None:
        parts = store.left_out()
        left_out = rows[(parts.sinks | parts.first)[rows]]
        rows = np.intersect1d(rows, usable)
    if most is not None and most < len(rows):
        left_out = spread_rows(left_out, -(-len(left_out) * most // len(rows)))
        rows = spread_rows(rows, most)
    # numbered: two data sets may have the same name, and one may have several categories
    sources = [f"{i} {s.category or s.dataset}" for i, s in enumerate(store.meta.sources or [])]
    groups = {}
    for grouping, column, names in (("source", "sources", sources), ("role", "roles", store.meta.roles or [])):
        codes = store.column(column) if names else None
        if codes is not None:
            groups[grouping] = (codes[rows], names)
    return EvaluationRows(store, rows, left_out, "held-out" if held_out else "training", groups)


def spread_rows(rows: int | NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of these rows, or of [0, rows), evenly spread."""
    n = rows if isinstance(rows, int) else len(rows)
    chosen = np.arange(n, dtype=np.int64) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)
    return chosen if isinstance(rows, int) else rows[chosen]


def row_batches(
    store: ActivationStore, rows: NDArray[np.int64], batch_size: int, *, check_crc: bool = False
) -> Iterator[Tensor]:
    """Stored activations of these rows, [B, M_stored, D] each."""
    crc = store.crc32c() if check_crc else None
    for begin in range(0, len(rows), batch_size):
        yield store.rows(rows[begin : begin + batch_size], crc=crc)
