"""Whether side columns are possible, and what the hash of a shard should be; a piece of rows at a time."""

import hashlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.rundir import canonical_json
from fastdiff.store.format import COLUMNS, NORM_TYPE, NORMS, SCHEMA, StoreMeta
from fastdiff.store.index import ShardIndex
from fastdiff.store.left_out import BOS, FIRST, USED, Medians, Rule

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
        told = meta.left_out
        self._told = told if told is not None and told.is_recorded else None
        self._rule = Rule(meta, 0.0 if self._told is None else self._told.max_norm)
        self._medians: Medians | None = None
        self._n_rows = self._n_bos = self._n_first = self._n_left_out = 0
        self._without_norms = False
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
            if name == NORMS:
                problem = None
                for start, values in _pieces(file[name]):
                    problem = problem or _check_norms(start, values)
                    digest.update(np.ascontiguousarray(values, NORM_TYPE).data)
                problems += [] if problem is None else [problem]
                continue
            found = []
            for start, values in _pieces(file[name]):
                found.append(self._check(name, start, values))
                digest.update(np.ascontiguousarray(values, COLUMNS[name]).data)
            problems += [problem for problem in found if problem is not None][:1]
        facts = {"n_rows": shard.n_rows, "n_models": shard.n_models, "d_model": shard.d_model, "dtype": shard.dtype}
        digest.update(canonical_json({"schema": SCHEMA, **facts}).encode())
        self._n_rows += shard.n_rows
        self._count(shard, file)
        return problems, digest.hexdigest()

    def whole(self) -> Iterator[str]:
        """What is wrong once all shards have been seen."""
        if self._sequences:
            torn = torn_sequence(np.concatenate(self._sequences), np.concatenate(self._sequence_rows))
            if torn is not None:
                yield torn
        # which rows a rule leaves out cannot be told without their norms
        if self._without_norms:
            return
        yield from self._wrong_counts()
        usable = self._n_rows - self._n_bos - self._n_left_out
        if self._stats is not None and self._stats.n_rows != usable:
            yield (
                f"stats in store.json are over {self._stats.n_rows} rows, but {usable} are usable; "
                "remove them there, and they are computed"
            )

    def _count(self, shard: ShardIndex, file: h5py.File) -> None:
        """Count what is left out of use, as store.json says."""
        if self._told is None or not self._told.max_norm:
            return
        if NORMS not in shard.columns:
            self._without_norms = True
            return
        if self._medians is None:
            self._medians = Medians(shard.n_models)
        for start in range(0, shard.n_rows, _PIECE):
            columns = {name: file[name][start : start + _PIECE] for name in ("roles", "positions") if name in file}
            norms = file[NORMS][start : start + _PIECE]
            codes = self._rule.codes(columns, norms, self._told.median, len(norms))
            self._medians.add(norms, codes == BOS)
            self._n_first += int(np.count_nonzero(codes == FIRST))
            self._n_left_out += int(np.count_nonzero((codes != USED) & (codes != BOS)))

    def _wrong_counts(self) -> Iterator[str]:
        if self._told is None:
            return
        median = None if self._medians is None else self._medians.result()
        told = self._told.median
        fits = len(told or []) == len(median or []) and np.allclose(told or [], median or [], rtol=1e-6, atol=0)
        if not fits:
            yield f"left_out in store.json has the median {told}, but it is {median} of the norms; extract it again"
        for name, count in (("rows", self._n_left_out), ("position_0", self._n_first)):
            if getattr(self._told, name) != count:
                yield (
                    f"left_out in store.json says {name} {getattr(self._told, name)}, but its rule leaves out {count}; "
                    "extract it again"
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


def _check_norms(start: int, values: NDArray[np.floating]) -> str | None:
    """What is wrong with norms [n, M], the first of them in row `start` of the shard."""
    wrong = ~(values >= 0).all(axis=1)
    if not wrong.any():
        return None
    row = int(np.argmax(wrong))
    return f"/norms of row {start + row} are {values[row].tolist()}, but no norm is negative or NaN; extract it again"


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


def _pieces(data_set: h5py.Dataset) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, data_set.shape[0], _PIECE):
        yield start, data_set[start : start + _PIECE]
