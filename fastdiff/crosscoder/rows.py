"""Which rows of a store are evaluated on, in batches with the source and role of each row."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastdiff.crosscoder.metrics import Batch
from fastdiff.store.reader import ActivationStore

# store column, by grouping
_GROUPINGS = {"source": "sources", "role": "roles"}


def evaluation_rows(
    store: ActivationStore, holdout: float, most: int | None = None
) -> tuple[NDArray[np.int64], Literal["held-out", "training"]]:
    """Numbers of the held-out rows, or of all where none are held out, without BOS; at most so many, evenly spread."""
    start = store.n_train(holdout)
    held_out = start < store.n_rows
    rows = np.arange(start if held_out else 0, store.n_rows, dtype=np.int64)
    usable = store.usable_rows()
    if usable is not None:
        rows = np.intersect1d(rows, usable)
    return spread_rows(rows, most or len(rows)), "held-out" if held_out else "training"


def spread_rows(rows: int | NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of these rows, or of [0, rows), evenly spread."""
    n = rows if isinstance(rows, int) else len(rows)
    chosen = np.arange(n, dtype=np.int64) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)
    return chosen if isinstance(rows, int) else rows[chosen]


def evaluation_groups(store: ActivationStore) -> dict[str, list[str]]:
    """Names of the groups of rows, by grouping; only of groupings that the store has."""
    names: dict[str, list[str]] = {}
    if store.meta.sources and store.column("sources") is not None:
        # numbered: two data sets may have the same name, and one may have several categories
        names["source"] = [f"{i} {s.category or s.dataset}" for i, s in enumerate(store.meta.sources)]
    if store.meta.roles and store.column("roles") is not None:
        names["role"] = list(store.meta.roles)
    return names


def evaluation_batches(
    store: ActivationStore, rows: NDArray[np.int64], batch_size: int, *, groups: bool = False, check_crc: bool = False
) -> Iterator[Batch]:
    """Stored activations of these rows [B, M_stored, D], with the group of each row where that is asked for."""
    crc = store.crc32c() if check_crc else None
    columns = {name: store.column(_GROUPINGS[name]) for name in evaluation_groups(store)} if groups else {}
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        batch = store.rows(part, crc=crc)
        codes = {name: column[part] for name, column in columns.items() if column is not None}
        yield (batch, codes) if groups else batch
