"""Whether side columns are possible, and what the hash of a shard should be; a piece of rows at a time."""

import hashlib
from collections.abc import Iterator

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.rundir import canonical_json
from fastdiff.store.format import COLUMNS, SCHEMA, StoreMeta
from fastdiff.store.index import ShardIndex

# values read at a time: 8 MB of the widest column
_PIECE = 1 << 20


class ColumnCheck:
    """The columns of a store, shard by shard in row order.

    Args:
        meta: What the columns index into.
    """

    def __init__(self, meta: StoreMeta):
        # values that are possible, and why no others are
        self._limits = {
            "token_ids": (range(1 << 31), "no token id is negative"),
            "positions": (range(1 << 31), "no position is negative"),
        }
        for name, listed in (("roles", meta.roles), ("sources", meta.sources)):
            if listed is not None:
                self._limits[name] = (range(len(listed)), f"store.json lists {len(listed)} {name}")
        self._bos = meta.roles.index("bos") if meta.roles and "bos" in meta.roles else None
        self._stats = meta.stats
        self._n_rows = self._n_bos = 0
        self._last_sequence: int | None = None
        self._sequences: list[NDArray[np.int64]] = []
        self._sequence_rows: list[NDArray[np.int64]] = []

    def shard(self, shard: ShardIndex, file: h5py.File) -> tuple[list[str], str]:
        """Check the columns of the next shard.

        Args:
            shard: Which.
            file: Its file, open.

        Returns:
            What is wrong, and the hash that `store.json` should have for it.
        """
        digest = hashlib.sha256()
        problems = []
        if shard.has_crc:
            for _, values in _pieces(file["crc32c"]):
                digest.update(np.ascontiguousarray(values, "<u4").data)
        for name in shard.columns:
            found = []
            for start, values in _pieces(file[name]):
                found.append(self._check(name, start, values))
                digest.update(np.ascontiguousarray(values, COLUMNS[name]).data)
            problems += [problem for problem in found if problem is not None][:1]
        facts = {"n_rows": shard.n_rows, "n_models": shard.n_models, "d_model": shard.d_model, "dtype": shard.dtype}
        digest.update(canonical_json({"schema": SCHEMA, **facts}).encode())
        self._n_rows += shard.n_rows
        return problems, digest.hexdigest()

    def whole(self) -> Iterator[str]:
        """What is wrong once all shards have been seen."""
        if self._sequences:
            torn = torn_sequence(np.concatenate(self._sequences), np.concatenate(self._sequence_rows))
            if torn is not None:
                yield torn
        usable = self._n_rows - self._n_bos
        if self._stats is not None and self._stats.n_rows != usable:
            yield (
                f"stats in store.json are over {self._stats.n_rows} rows, but {usable} are usable; "
                "remove them there, and they are computed"
            )

    def _check(self, name: str, start: int, values: NDArray[np.integer]) -> str | None:
        """What is wrong with some values of a column, the first of them in row `start` of the shard."""
        limits = np.iinfo(COLUMNS[name])
        if name == "sequence_ids":
            self._take_sequences(start, values)
        wrong = (values < limits.min) | (values > limits.max)
        if wrong.any():
            row = int(np.argmax(wrong))
            return f"/{name} of row {start + row} is {values[row]}, which does not fit {COLUMNS[name]}"
        if name == "roles" and self._bos is not None:
            self._n_bos += int(np.count_nonzero(values == self._bos))
        if name not in self._limits:
            return None
        possible, why = self._limits[name]
        wrong = (values < possible.start) | (values >= possible.stop)
        if wrong.any():
            row = int(np.argmax(wrong))
            return f"/{name} of row {start + row} is {values[row]}, but {why}; extract it again"
        return None

    def _take_sequences(self, start: int, values: NDArray[np.integer]) -> None:
        ids = values.astype(np.int64)
        begins = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        if self._last_sequence is not None and ids[0] == self._last_sequence:
            begins = begins[1:]
        self._last_sequence = int(ids[-1])
        self._sequences.append(ids[begins])
        self._sequence_rows.append(begins + start + self._n_rows)


def torn_sequence(ids: NDArray[np.integer], rows: NDArray[np.int64]) -> str | None:
    """What is wrong if a document does not lie in one piece.

    Args:
        ids: (s,) the document of each piece.
        rows: (s,) the row each piece begins at.
    """
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    torn = np.sort(first[counts > 1])
    if not len(torn):
        return None
    again = rows[np.flatnonzero(ids == ids[torn[0]])[1]]
    return (
        f"sequence {ids[torn[0]]} begins at row {rows[torn[0]]} and again at row {again} "
        f"({len(torn)} such sequences); the rows of a document must lie together"
    )


def _pieces(data_set: h5py.Dataset) -> Iterator[tuple[int, NDArray[np.integer]]]:
    for start in range(0, data_set.shape[0], _PIECE):
        yield start, data_set[start : start + _PIECE]
