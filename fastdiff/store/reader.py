"""Reads a store: rows by positioned reads without HDF5, side columns through it."""

import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import InputError, OptionError
from fastdiff.run import read_json, sha256_file, sha256_text
from fastdiff.store.documents import cut_before_holdout
from fastdiff.store.format import (
    COLUMNS,
    STORE_FILE,
    TORCH_DTYPES,
    VOCABULARY_FILE,
    ModelInfo,
    Stats,
    StoreMeta,
)
from fastdiff.store.index import ShardIndex, index_shard, open_hdf5
from fastdiff.store.statistics import RunningStats

# rows read at a time for statistics: 4096 rows of 2 x 3584 bfloat16 are 59 MB
_PASS_ROWS = 4096


class ActivationStore:
    """A store directory, or a bare HDF5 file with `/activations`, open for reading.

    Close it with `close()` or a `with` block.

    Attributes:
        path: What was opened.
        meta: `store.json`; for a bare file only names for the models.
        n_rows: N, over all shards.
        n_models: M.
        d_model: D.
        dtype: Type of the stored values, and of what `rows` returns.

    Raises:
        InputError: It is missing, incomplete, of another schema, or not readable row by row.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        meta, files = _find(self.path)
        self._shards = [index_shard(file) for file in files]
        first = self._shards[0]
        self.n_models, self.d_model = first.n_models, first.d_model
        self.dtype = TORCH_DTYPES[first.dtype]
        self.meta = meta or StoreMeta(models=_unnamed_models(self.n_models))
        _check_agreement(self.path, self.meta, self._shards)
        self._first_rows = np.cumsum([0, *(shard.n_rows for shard in self._shards)], dtype=np.int64)
        self.n_rows = int(self._first_rows[-1])
        self._offsets = np.array([shard.offset for shard in self._shards], np.int64)
        self._stats = self.meta.stats
        self._sha256: str | None = None
        self._vocabulary: list[str] | None = None
        fds: list[int] = []
        self._close = weakref.finalize(self, _close_all, fds)
        for shard in self._shards:
            fds.append(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
        self._fds = np.array(fds, np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading rows afterwards is an error; closing again is not."""
        self._close()

    def sha256(self) -> str:
        """Hash of `store.json`, which holds the hashes of the shards; where it does not, of the shards too.

        A bare file, and a shard without a recorded hash, is read whole.
        """
        if self._sha256 is None:
            known = {info.file for info in self.meta.shards or [] if info.sha256 is not None}
            unknown = [shard.path for shard in self._shards if shard.path.name not in known]
            parts = [self.path / STORE_FILE] * self.path.is_dir() + unknown
            hashes = [sha256_file(part) for part in parts]
            self._sha256 = hashes[0] if len(hashes) == 1 else sha256_text(" ".join(hashes))
        return self._sha256

    def rows(self, rows: NDArray[np.int64], *, n_threads: int = 2) -> Tensor:
        """Read rows.

        Args:
            rows: (n,) row numbers in [0, N), in any order, repeats allowed.
            n_threads: Threads that read.

        Returns:
            [n, M, D] in the stored type.

        Raises:
            InputError: A file is shorter than it was, or cannot be read.
            IndexError: A row number is outside [0, N).
        """
        if not self._close.alive:
            raise ValueError(f"{self.path}: the store is closed")
        out = torch.empty((len(rows), self.n_models, self.d_model), dtype=self.dtype)
        try:
            _native.gather_rows(
                self._fds,
                self._offsets,
                self._first_rows,
                np.ascontiguousarray(rows, np.int64),
                out.view(torch.uint8).numpy(),
                n_threads=n_threads,
            )
        except _native.ReadError as error:
            raise self._explained(error) from error
        return out

    def slice(self, start: int, stop: int) -> Tensor:
        """Read rows [start, stop): [stop - start, M, D] in the stored type."""
        return self.rows(np.arange(start, stop, dtype=np.int64))

    def column(self, name: str) -> NDArray[Any] | None:
        """A side column over all shards: (N,), or None if the store has none.

        Args:
            name: token_ids, sequence_ids, positions, roles or sources.

        Raises:
            InputError: A file cannot be read.
        """
        if name not in COLUMNS:
            raise ValueError(f"no column {name!r}; there are {', '.join(COLUMNS)}")
        if name not in self._shards[0].columns:
            return None
        parts = []
        for shard in self._shards:
            with open_hdf5(shard.path) as file:
                try:
                    parts.append(file[name][:])
                except OSError as error:
                    raise InputError(f"{shard.path}: /{name} cannot be read ({error})") from error
        return np.concatenate(parts).astype(COLUMNS[name], copy=False)

    def stats(self) -> Stats:
        """Mean, variance and mean norm over the usable rows, from `store.json` or by one pass in float64.

        Raises:
            InputError: There are no usable rows, or a value is NaN or infinite.
        """
        if self._stats is None:
            self._stats = self._compute_stats()
        return self._stats

    def usable_rows(self) -> NDArray[np.int64] | None:
        """Numbers of the rows whose role is not "bos": (n,), ascending, or None if that is all rows."""
        roles = self.meta.roles or []
        column = self.column("roles") if "bos" in roles else None
        if column is None:
            return None
        usable = np.flatnonzero(column != roles.index("bos"))
        return None if len(usable) == self.n_rows else usable

    def n_train(self, holdout: float) -> int:
        """Rows [0, n_train) are for training, the others for evaluation.

        Args:
            holdout: Share of the documents at the end that is kept for evaluation, in [0, 1). A document is
                never split; without sequence ids the share is one of rows.

        Raises:
            OptionError: `holdout` is outside [0, 1).
        """
        if not 0 <= holdout < 1:
            raise OptionError(f"holdout is {holdout}: it must be at least 0 and less than 1")
        if holdout == 0:
            return self.n_rows
        ids = self.column("sequence_ids")
        if ids is None:
            return max(1, self.n_rows - max(1, round(holdout * self.n_rows)))
        return cut_before_holdout(ids, holdout)

    @property
    def vocabulary(self) -> list[str] | None:
        """Display string of each token id, or None if the store has no `vocabulary.json`."""
        if self._vocabulary is None and self.path.is_dir():
            path = self.path / VOCABULARY_FILE
            wanted = self.meta.vocabulary_sha256
            if wanted is None and not path.exists():
                return None
            if wanted is not None and sha256_file(path) != wanted:
                raise InputError(f"{path}: changed since the store was written; extract it again")
            found = read_json(path, schema=None)
            if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
                raise InputError(f"{path}: expected a JSON list of strings; extract it again")
            self._vocabulary = found
        return self._vocabulary

    def _compute_stats(self) -> Stats:
        usable = self.usable_rows()
        n = self.n_rows if usable is None else len(usable)
        running = RunningStats(self.n_models, self.d_model)
        for start in range(0, n, _PASS_ROWS):
            numbers = np.arange(start, min(n, start + _PASS_ROWS), dtype=np.int64)
            block = self.rows(numbers if usable is None else usable[numbers])
            finite = torch.isfinite(block)
            if not bool(finite.all()):
                at, model = (int(i) for i in (~finite).nonzero()[0][:2])
                row = int(numbers[at] if usable is None else usable[numbers[at]])
                name = self.meta.models[model].name
                raise InputError(f"{self.path}: row {row} of model {name} holds NaN or infinity; extract it again")
            running.add(block)
        found = running.result()
        if found is None:
            raise InputError(f"{self.path}: every row has the role bos, so there is nothing to learn from")
        return found

    def _explained(self, error: _native.ReadError) -> InputError:
        _, shard, offset, wanted, got, code = error.args
        path = self._shards[shard].path
        if code:
            return InputError(f"{path}: cannot be read at byte {offset} ({os.strerror(code)}); check the disk")
        return InputError(f"{path}: truncated, {got} of {wanted} bytes left at byte {offset}; copy or extract it again")


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _unnamed_models(n_models: int) -> list[ModelInfo]:
    names = ["base", "tuned"] if n_models == 2 else [f"model-{i}" for i in range(n_models)]
    return [ModelInfo(name=name) for name in names]


def _find(path: Path) -> tuple[StoreMeta | None, list[Path]]:
    """The metadata, if any, and the files of a store."""
    if not path.exists():
        raise InputError(f"{path}: no such store; `fastdiff extract` makes one")
    if not path.is_dir():
        return None, [path]
    if not (path / STORE_FILE).exists():
        begun = any(path.glob("shard-*.h5")) or any(path.glob(".shard-*.h5.tmp"))
        why = "the store was not finished" if begun else "not a store"
        raise InputError(f"{path}: no {STORE_FILE}, {why}; run `fastdiff extract` (again)")
    raw = read_json(path / STORE_FILE)
    try:
        meta = StoreMeta.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path / STORE_FILE}: {where}: {first['msg']}; extract it again") from error
    if meta.shards is not None:
        files = [path / shard.file for shard in meta.shards]
    else:
        files = sorted(file for file in path.glob("*.h5") if not file.name.startswith("."))
    if not files:
        raise InputError(f"{path}: {STORE_FILE} without any shard-00000.h5 beside it; extract it again")
    return meta, files


def _check_agreement(path: Path, meta: StoreMeta, shards: list[ShardIndex]) -> None:
    """All shards have one width, type and set of columns, and are what `store.json` says."""
    first = shards[0]
    for shard in shards[1:]:
        for name in ("n_models", "d_model", "dtype", "columns"):
            here, there = getattr(shard, name), getattr(first, name)
            if here != there:
                raise InputError(f"{shard.path}: {name} is {here}, but {there} in {first.path.name}; extract it again")
    if len(meta.models) != first.n_models:
        raise InputError(
            f"{path}: {STORE_FILE} names {len(meta.models)} models, /activations holds {first.n_models}; "
            f"list each model once in {STORE_FILE}"
        )
    if meta.dtype is not None and meta.dtype != first.dtype:
        raise InputError(f"{path}: {STORE_FILE} says {meta.dtype}, the shards are {first.dtype}; extract it again")
    for told, shard in zip(meta.shards or [], shards, strict=False):
        if told.n_rows != shard.n_rows:
            raise InputError(
                f"{shard.path}: {shard.n_rows} rows, but {STORE_FILE} says {told.n_rows}; extract it again"
            )
    if meta.stats is not None:
        told_shape = (len(meta.stats.mean), {len(row) for row in meta.stats.mean})
        sizes = {len(meta.stats.variance), len(meta.stats.mean_norm), first.n_models}
        if told_shape != (first.n_models, {first.d_model}) or len(sizes) != 1:
            raise InputError(
                f"{path}: stats in {STORE_FILE} are not for {first.n_models} models of width "
                f"{first.d_model}; remove them there, and they are computed"
            )
