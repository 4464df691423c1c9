"""Writes a store: all space reserved first, rows placed by positioned writes, `store.json` last.

A shard is made under the name `.shard-00000.h5.tmp`, filled, synced and renamed. HDF5 has closed the file
before the first row arrives, so a killed process leaves no file that HDF5 has to repair.

A commit syncs the rows appended so far and acknowledges them in the journal (`journal.py`); only then are shards
that have become full renamed, so the journal alone says what is there. A new writer continues at the first row
that is not acknowledged, and the store it finishes is byte for byte the one of a writer that was never cut off.

Statistics are over the rows in use (`left_out.py`), which are known once 50,000 rows other than BOS have told the
median norm. Rows until then are read back once and counted; where a store ends before, at its end. Of two models of
width 3,584 in bfloat16 that is 0.7 GB, whatever the size of the store. Later rows are counted as they come.
"""

import base64
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import FastdiffError, InputError, OptionError
from fastdiff.rundir import fsync_directory, write_json
from fastdiff.store.directory import disk_errors, lock_directory, remove_store, temporary
from fastdiff.store.format import (
    COLUMNS,
    NORMS,
    STORE_FILE,
    TORCH_DTYPES,
    DtypeName,
    LeftOut,
    ShardInfo,
    StoreMeta,
    create_shard,
    find_shard,
    shard_name,
    shard_sha256,
)
from fastdiff.store.journal import JOURNAL, Journal, read_journal, store_key, write_journal
from fastdiff.store.left_out import BOS, FIRST, USED, Medians, Rule, norms_of
from fastdiff.store.open_shard import OpenShard, Staging
from fastdiff.store.statistics import PartedStats

# a commit took 10 to 30 ms: every 10 s that is 0.3 %, and a kill costs 10 s of the models' work at most
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 10.0
# rows that are read back at a time
_READ_ROWS = 4096


class StoreWriter:
    """Writes one store. Use it in a `with` block.

    The end of the block finishes the store. An exception in it first acknowledges what was appended, and keeps
    that for a writer with `resume=True`; if no row was acknowledged, nothing is left. After a call that failed
    on the disk, make a new writer. Equal calls write equal bytes, however often they were cut off and resumed,
    if the rows are appended in the same portions.

    Args:
        path: Directory of the store.
        n_rows: Rows that will be appended, exactly.
        n_models: M.
        d_model: D.
        dtype: Type to store.
        shard_rows: Rows per shard; the last one has what is left.
        meta: Fields of `StoreMeta` without `shards`, `stats` and `dtype`.
        columns: Side columns of the store: those that are known of every row. `norms` comes by itself.
        resume: Continue an unfinished store of the same arguments, if `path` holds one with acknowledged rows;
            append from row `n_appended` on. Otherwise, and if False, everything the writer finds there of a
            store, finished or not, is gone as soon as it is made.
        max_norm: Rows whose norm is over so many times the median are left out of use, and so is position 0 without
            BOS; 0 for none of it.

    Attributes:
        n_appended: Rows so far, those of the writers before included.
        n_acknowledged: How many of them survive a kill.

    Raises:
        OptionError: `path` is a file, or the unfinished store there has other arguments.
        InputError: The unfinished store is damaged.
        ResourceError: The disk cannot hold the store.
        LockedError: Another writer is at work there.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_rows: int,
        n_models: int,
        d_model: int,
        dtype: DtypeName,
        shard_rows: int,
        meta: dict[str, Any],
        columns: Collection[str] = tuple(COLUMNS),
        resume: bool = False,
        max_norm: float = 0.0,
    ):
        if min(n_rows, n_models, d_model, shard_rows) < 1:
            raise ValueError(f"{n_rows=}, {n_models=}, {d_model=} and {shard_rows=} must be at least 1")
        self._path = Path(path)
        self._meta = StoreMeta.model_validate(
            {"schema": 1, **meta, "dtype": dtype, "left_out": {"max_norm": float(max_norm)}}
        )
        if len(self._meta.models) != n_models:
            raise ValueError(f"meta names {len(self._meta.models)} models, the activations have {n_models}")
        self.n_rows, self.n_models, self.d_model, self.dtype = n_rows, n_models, d_model, dtype
        self._row_bytes = n_models * d_model * TORCH_DTYPES[dtype].itemsize
        self._columns = [name for name in COLUMNS if name in columns]
        self._sizes = [min(shard_rows, n_rows - start) for start in range(0, n_rows, shard_rows)]
        self._rule = Rule(self._meta, float(max_norm))
        self._stats = PartedStats(n_models, d_model)
        self._medians = Medians(n_models)
        self._median: list[float] | None = None
        self._n_first = 0
        # rows are counted as they come: what is in use is known
        self._counts = self._rule.max_norm == 0
        self._done: list[ShardInfo] = []
        self.n_appended = self.n_acknowledged = 0
        self._shard: OpenShard | None = None
        self._failed = False
        self._committed_at = time.monotonic()
        self._key = store_key(
            n_rows=n_rows, n_models=n_models, d_model=d_model, dtype=dtype, shard_rows=shard_rows,
            columns=self._columns, meta=self._meta.to_json(),
        )  # fmt: skip
        if self._path.exists() and not self._path.is_dir():
            raise OptionError(f"{self._path}: is a file; a store is a directory, choose another -o")
        with self._disk():
            self._path.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, lock_directory(self._path))
        self._staging = Staging(self._row_bytes, self._sizes[0])
        try:
            self._start(resume)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._unlock.alive:
            return
        try:
            if error is None:
                self._finish()
            elif not self._failed:
                self._acknowledge_despite(error)
        finally:
            if self.n_acknowledged:
                self._release()
            else:
                self.discard()

    def discard(self) -> None:
        """Remove everything, acknowledged or not, and end the writer."""
        self._close_files()
        remove_store(self._path)
        self._release()

    def append(
        self,
        activations: Tensor,
        *,
        token_ids: NDArray[Any] | None = None,
        sequence_ids: NDArray[Any] | None = None,
        positions: NDArray[Any] | None = None,
        roles: NDArray[Any] | None = None,
        sources: NDArray[Any] | None = None,
    ) -> None:
        """Write the next n rows, with every column that the store has, and no other.

        Args:
            activations: [n, M, D], any float type; rounded to the store's type, to nearest, ties to even.
            token_ids: (n,).
            sequence_ids: (n,), the document of each row.
            positions: (n,), the position of each row in its sequence.
            roles: (n,), index into the roles of the metadata.
            sources: (n,), index into the sources of the metadata.

        Raises:
            InputError: A value is NaN or infinite, or too large for the store's type. No row of the call is taken.
            ResourceError: The disk is full.
            FastdiffError: It cannot be written.
            ValueError: A shape or the columns are wrong, or there are more rows than were promised.
        """
        self._require_usable()
        n = activations.shape[0]
        if activations.shape != (n, self.n_models, self.d_model):
            want = f"[n, {self.n_models}, {self.d_model}]"
            raise ValueError(f"activations have shape {list(activations.shape)}, expected {want}")
        if self.n_appended + n > self.n_rows:
            raise ValueError(f"{self.n_appended + n} rows appended, but n_rows={self.n_rows}")
        given = {
            "token_ids": token_ids,
            "sequence_ids": sequence_ids,
            "positions": positions,
            "roles": roles,
            "sources": sources,
        }
        columns = {name: _column(name, values, n) for name, values in given.items() if values is not None}
        if list(columns) != self._columns:
            raise ValueError(f"columns {list(columns)} given, but the store has {self._columns}")
        stored = activations.detach().to(device="cpu", dtype=TORCH_DTYPES[self.dtype]).contiguous()
        self._check_finite(activations, stored, columns)
        columns[NORMS] = norms_of(stored)
        # an interrupt from here on leaves rows and numbers that do not agree
        self._failed = True
        with self._disk():
            data = stored.view(torch.uint8).numpy().reshape(n, self._row_bytes)
            start = 0
            while start < n:
                shard = self._current()
                stop = min(n, start + shard.n_rows - shard.n_written)
                shard.write(data[start:stop], {name: values[start:stop] for name, values in columns.items()})
                start = stop
                if shard.n_written == shard.n_rows:
                    self._finish_shard()
        self.n_appended += n
        if self._counts:
            self._count(stored, columns)
        else:
            self._take_norms(columns)
            if self._medians.complete:
                self._begin_to_count()
        self._failed = False
        due = (self.n_appended - self.n_acknowledged) * self._row_bytes >= _COMMIT_BYTES
        if due or time.monotonic() - self._committed_at >= _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Acknowledge every appended row: from now on it survives a kill and a power cut.

        This happens by itself every 256 MiB, after 10 s, and at the end of the `with` block.

        Raises:
            ResourceError: The disk is full.
            FastdiffError: It cannot be written.
        """
        self._require_usable()
        if self.n_appended == self.n_acknowledged:
            return
        self._failed = True
        with self._disk():
            if self._shard is not None:
                self._shard.sync()
            journal = Journal(
                key=self._key,
                n_rows=self.n_appended,
                checked_from=self.n_acknowledged,
                shards=self._done,
                sums={} if self._shard is None else self._shard.sums(),
                last_sum=0 if self._shard is None else self._shard.last_sum(),
                first_positions=self._n_first,
                stats=base64.b64encode(self._stats.to_bytes()).decode(),
            )
            write_journal(self._path, journal)
            self.n_acknowledged = self.n_appended
            self._rename_finished()
        self._failed = False
        self._committed_at = time.monotonic()

    def _take_norms(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Let the next rows tell the median."""
        self._medians.add(columns[NORMS], self._rule.bos(columns, len(columns[NORMS])))

    def _begin_to_count(self) -> None:
        """Count every row so far, now that the median is known, and from now on as they come."""
        self._median = self._medians.result()
        self._counts = True
        with self._disk():
            for rows, columns in self._read_back():
                self._count(rows, columns)

    def _count(self, rows: Tensor, columns: Mapping[str, NDArray[Any]]) -> None:
        """Take rows [n, M, D], as they are stored, into the statistics of their part."""
        codes = self._rule.codes(columns, columns[NORMS], self._median, len(rows))
        self._n_first += int(np.count_nonzero(codes == FIRST))
        self._stats.add(rows, codes == USED, (codes != USED) & (codes != BOS))

    def _read_back(self) -> Iterator[tuple[Tensor, dict[str, NDArray[Any]]]]:
        """All rows so far, [n, M, D] in the stored type at a time, and their columns."""
        for index in range(len(self._done)):
            shard = self._open(index)
            try:
                shard.read_back(shard.n_rows)
                yield from self._rows_of(shard)
            finally:
                shard.close()
        if self._shard is not None:
            self._shard.sync()
            yield from self._rows_of(self._shard)

    def _rows_of(self, shard: OpenShard) -> Iterator[tuple[Tensor, dict[str, NDArray[Any]]]]:
        for start in range(0, shard.n_written, _READ_ROWS):
            stop = min(shard.n_written, start + _READ_ROWS)
            rows = torch.from_numpy(shard.read_rows(start, stop)).view(TORCH_DTYPES[self.dtype])
            columns = {name: values[start:stop] for name, values in shard.columns.items()}
            yield rows.view(-1, self.n_models, self.d_model), columns

    def _check_finite(self, given: Tensor, stored: Tensor, columns: Mapping[str, NDArray[Any]]) -> None:
        row = _native.first_nonfinite_row(stored.view(torch.uint8).numpy(), self.dtype)
        if row < 0:
            return
        model, unit = (int(i) for i in (~torch.isfinite(stored[row])).nonzero()[0])
        value = float(given[row, model, unit])
        where = f"model {self._meta.models[model].name}, "
        if "sequence_ids" in columns and "positions" in columns:
            where += f"sequence {columns['sequence_ids'][row]}, position {columns['positions'][row]}"
        else:
            where += f"row {self.n_appended + row}"
        if np.isfinite(value):
            raise InputError(
                f"{self._path}: {where}: activation {value:g} is too large for {self.dtype}; store bfloat16"
            )
        raise InputError(
            f"{self._path}: {where}: activation is {value}; run the models in float32 or bfloat16, "
            "or leave that text out"
        )

    def _start(self, resume: bool) -> None:
        journal = read_journal(self._path) if resume else None
        if journal is None:
            remove_store(self._path)
            try:
                with self._disk():
                    self._offsets = self._each_shard(create_shard)
            except BaseException:
                remove_store(self._path)
                raise
            return
        if journal.key != self._key:
            raise OptionError(
                f"{self._path}: holds an unfinished store of other options; choose another -o, "
                "or --overwrite to replace it"
            )
        with self._disk():
            self._reopen(journal)

    def _reopen(self, journal: Journal) -> None:
        """Take up what the journal acknowledges.

        Raises:
            InputError: It is not there as it was written.
        """
        self._done = list(journal.shards)
        self._rename_finished()
        self._offsets = self._each_shard(find_shard)
        first = 0
        for index, info in enumerate(journal.shards):
            shard = self._open(index)
            shard.read_back(shard.n_rows)
            if self._sha256(shard) != info.sha256:
                raise InputError(
                    f"{self._file(index)}: rows {first} to {first + shard.n_rows - 1} have other side columns or "
                    "checksums than were written; check the disk, then start again with --overwrite"
                )
            if journal.checked_from < first + shard.n_rows:
                shard.check(max(0, journal.checked_from - first))
            self._recall(shard)
            shard.close()
            first += shard.n_rows
        if journal.n_rows > first:
            self._shard = self._open(len(journal.shards))
            self._shard.read_back(journal.n_rows - first, journal.last_sum)
            if self._shard.sums() != journal.sums:
                raise InputError(
                    f"{self._file(len(journal.shards))}: rows {first} to {journal.n_rows - 1} have other side columns "
                    "or checksums than were written; check the disk, then start again with --overwrite"
                )
            self._shard.check(max(0, journal.checked_from - first))
            self._recall(self._shard)
            self._shard.refill()
        self._stats = PartedStats.from_bytes(journal.stats_state, self.n_models, self.d_model)
        self._n_first = journal.first_positions
        if self._medians.complete:
            self._median, self._counts = self._medians.result(), True
        # the writer before may have been killed while it wrote one of these, or behind its last row
        for name in (f".{JOURNAL}.tmp", f".{STORE_FILE}.tmp", STORE_FILE):
            (self._path / name).unlink(missing_ok=True)
        self.n_appended = self.n_acknowledged = journal.n_rows

    def _recall(self, shard: OpenShard) -> None:
        """Let rows that were written before tell the median."""
        if self._rule.max_norm:
            self._take_norms({name: values[: shard.n_written] for name, values in shard.columns.items()})

    def _current(self) -> OpenShard:
        if self._shard is None:
            self._shard = self._open(len(self._done))
        return self._shard

    def _open(self, index: int) -> OpenShard:
        path = self._file(index)
        if not path.exists():  # full, but not yet acknowledged
            path = temporary(self._path, index)
        return OpenShard(path, self._offsets[index], self._sizes[index], self._row_bytes, self._staging, self.n_models)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._shard.sync()
        self._shard.close()
        index = len(self._done)
        sha256 = self._sha256(self._shard)
        self._shard = None
        self._done.append(ShardInfo(file=shard_name(index), n_rows=self._sizes[index], sha256=sha256))

    def _finish(self) -> None:
        self.commit()
        if self.n_appended != self.n_rows:
            raise ValueError(f"{self.n_appended} rows appended, but n_rows={self.n_rows}")
        if not self._counts:
            self._begin_to_count()
        self._meta.shards = self._done
        self._meta.left_out = LeftOut(
            max_norm=self._rule.max_norm,
            median=self._median,
            rows=self._stats.n_left_out,
            position_0=self._n_first,
            variance_share=self._stats.variance_share(),
        )
        self._meta.stats = self._stats.result()
        with self._disk():
            write_json(self._path / STORE_FILE, self._meta.to_json())
            (self._path / JOURNAL).unlink()
            fsync_directory(self._path)

    def _acknowledge_despite(self, error: BaseException) -> None:
        try:
            self.commit()
        except FastdiffError as second:
            error.add_note(f"and rows from {self.n_acknowledged} on could not be kept: {second}")

    def _require_usable(self) -> None:
        if self._failed or not self._unlock.alive:
            raise ValueError(f"{self._path}: this writer has failed or ended; make a new one with resume=True")

    def _close_files(self) -> None:
        # the threads first: they use the shard's file
        self._staging.close()
        if self._shard is not None:
            self._shard.close()

    def _release(self) -> None:
        self._close_files()
        self._unlock()

    def _rename_finished(self) -> None:
        """Give shards that the journal calls finished their names."""
        waiting = [index for index in range(len(self._done)) if temporary(self._path, index).exists()]
        for index in waiting:
            temporary(self._path, index).replace(self._path / shard_name(index))
        if waiting:
            fsync_directory(self._path)

    def _file(self, index: int) -> Path:
        return self._path / shard_name(index) if index < len(self._done) else temporary(self._path, index)

    def _each_shard(self, do: Callable[..., dict[str, int]]) -> list[dict[str, int]]:
        """Create or find every shard; where their data sets begin."""
        columns = (*self._columns, NORMS)
        return [
            do(
                self._file(index),
                n_rows=n_rows,
                n_models=self.n_models,
                d_model=self.d_model,
                dtype=self.dtype,
                columns=columns,
            )
            for index, n_rows in enumerate(self._sizes)
        ]

    def _sha256(self, shard: OpenShard) -> str:
        return shard_sha256(
            shard.crc32c,
            shard.columns,
            n_rows=shard.n_rows,
            n_models=self.n_models,
            d_model=self.d_model,
            dtype=self.dtype,
        )

    def _disk(self) -> AbstractContextManager[None]:
        return disk_errors(self._path, self.n_rows * self._row_bytes)


def _column(name: str, values: NDArray[Any], n: int) -> NDArray[Any]:
    """A side column in its stored type; a value that does not fit is refused, not wrapped."""
    values = np.asarray(values)
    kind = COLUMNS[name]
    if values.shape != (n,) or values.dtype.kind not in "iub":
        raise ValueError(f"{name} must be ({n},) integers, got {values.shape} {values.dtype}")
    limits = np.iinfo(kind)
    if n and values.dtype != kind and (int(values.min()) < limits.min or int(values.max()) > limits.max):
        raise ValueError(f"{name} reach from {values.min()} to {values.max()}, which does not fit {kind}")
    return values.astype(kind, copy=False)
