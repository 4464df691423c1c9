"""Writes a store: all space reserved first, rows placed by positioned writes, `store.json` last.

A shard is made under the name `.shard-00000.h5.tmp`, filled, synced and renamed. HDF5 has closed the file
before the first row arrives, so a killed process leaves no file that HDF5 has to repair, only temporary
names and whole shards without a `store.json`, which nothing takes for a store.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.run import fsync_directory, write_json
from fastdiff.store.format import (
    COLUMNS,
    CRC_ROWS,
    STORE_FILE,
    TORCH_DTYPES,
    DtypeName,
    ShardInfo,
    StoreMeta,
    crc_blocks,
    create_shard,
    shard_name,
    shard_sha256,
    write_at,
)
from fastdiff.store.statistics import RunningStats

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreWriter:
    """Writes one store. Use it in a `with` block.

    The end of the block finishes the store; an exception in it removes what was written. A store that was in
    `path` before is gone as soon as the writer is made. Equal calls write equal bytes.

    Args:
        path: Directory of the store.
        n_rows: Rows that will be appended, exactly.
        n_models: M.
        d_model: D.
        dtype: Type to store.
        shard_rows: Rows per shard; the last one has what is left.
        meta: Fields of `StoreMeta` without `shards`, `stats` and `dtype`.

    Raises:
        OptionError: `path` is a file.
        ResourceError: The disk cannot hold the store.
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
    ):
        if min(n_rows, n_models, d_model, shard_rows) < 1:
            raise ValueError(f"{n_rows=}, {n_models=}, {d_model=} and {shard_rows=} must be at least 1")
        self._path = Path(path)
        self._meta = StoreMeta.model_validate({"schema": 1, **meta, "dtype": dtype})
        if len(self._meta.models) != n_models:
            raise ValueError(f"meta names {len(self._meta.models)} models, the activations have {n_models}")
        self.n_rows, self.n_models, self.d_model, self.dtype = n_rows, n_models, d_model, dtype
        self._row_bytes = n_models * d_model * TORCH_DTYPES[dtype].itemsize
        self._sizes = [min(shard_rows, n_rows - start) for start in range(0, n_rows, shard_rows)]
        roles = self._meta.roles or []
        self._bos = roles.index("bos") if "bos" in roles else None
        self._stats = RunningStats(n_models, d_model)
        self._done: list[ShardInfo] = []
        self._n_appended = 0
        self._shard: _OpenShard | None = None
        if self._path.exists() and not self._path.is_dir():
            raise OptionError(f"{self._path}: is a file; a store is a directory, choose another -o")
        self._path.mkdir(parents=True, exist_ok=True)
        self._remove_all()
        try:
            self._offsets = [self._reserve(index) for index in range(len(self._sizes))]
        except BaseException:
            self._remove_all()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def append(
        self,
        activations: Tensor,
        *,
        token_ids: NDArray[Any],
        sequence_ids: NDArray[Any],
        positions: NDArray[Any],
        roles: NDArray[Any],
        sources: NDArray[Any],
    ) -> None:
        """Write the next n rows.

        Args:
            activations: [n, M, D], any float type; rounded to the store's type, to nearest, ties to even.
            token_ids: (n,).
            sequence_ids: (n,), the document of each row.
            positions: (n,), the position of each row in its sequence.
            roles: (n,), index into the roles of the metadata.
            sources: (n,), index into the sources of the metadata.

        Raises:
            InputError: A value is NaN or infinite, or too large for the store's type.
            ResourceError: The disk is full.
            ValueError: A shape is wrong, or there are more rows than were promised.
        """
        n = activations.shape[0]
        if activations.shape != (n, self.n_models, self.d_model):
            want = f"[n, {self.n_models}, {self.d_model}]"
            raise ValueError(f"activations have shape {list(activations.shape)}, expected {want}")
        if self._n_appended + n > self.n_rows:
            raise ValueError(f"{self._n_appended + n} rows appended, but n_rows={self.n_rows}")
        given = {
            "token_ids": token_ids,
            "sequence_ids": sequence_ids,
            "positions": positions,
            "roles": roles,
            "sources": sources,
        }
        columns = {name: _column(name, given[name], n) for name in COLUMNS}
        stored = activations.detach().to(device="cpu", dtype=TORCH_DTYPES[self.dtype]).contiguous()
        self._check_finite(activations, stored, columns)
        start = 0
        while start < n:
            shard = self._current()
            stop = min(n, start + shard.n_rows - shard.n_written)
            with self._room():
                shard.write(stored[start:stop], {k: v[start:stop] for k, v in columns.items()})
            start = stop
            if shard.n_written == shard.n_rows:
                self._close_shard()
        counted = stored if self._bos is None else stored[torch.from_numpy(columns["roles"] != self._bos)]
        self._stats.add(counted)
        self._n_appended += n

    def _check_finite(self, given: Tensor, stored: Tensor, columns: Mapping[str, NDArray[Any]]) -> None:
        finite = torch.isfinite(stored)
        if bool(finite.all()):
            return
        row, model, unit = (int(i) for i in (~finite).nonzero()[0])
        value = float(given[row, model, unit])
        where = (
            f"model {self._meta.models[model].name}, sequence {columns['sequence_ids'][row]}, "
            f"position {columns['positions'][row]}"
        )
        if np.isfinite(value):
            raise InputError(
                f"{self._path}: {where}: activation {value:g} is too large for {self.dtype}; store bfloat16"
            )
        raise InputError(
            f"{self._path}: {where}: activation is {value}; run the models in float32 or bfloat16, "
            "or leave that text out"
        )

    def _current(self) -> "_OpenShard":
        if self._shard is None:
            index = len(self._done)
            self._shard = _OpenShard(self._temporary(index), self._offsets[index], self._sizes[index], self._row_bytes)
        return self._shard

    def _close_shard(self) -> None:
        assert self._shard is not None
        index = len(self._done)
        with self._room():
            self._shard.finish()
            self._temporary(index).rename(self._path / shard_name(index))
            fsync_directory(self._path)
        sha256 = shard_sha256(
            self._shard.crc32c,
            self._shard.columns,
            n_rows=self._sizes[index],
            n_models=self.n_models,
            d_model=self.d_model,
            dtype=self.dtype,
        )
        self._shard = None
        self._done.append(ShardInfo(file=shard_name(index), n_rows=self._sizes[index], sha256=sha256))

    def _finish(self) -> None:
        if self._n_appended != self.n_rows:
            raise ValueError(f"{self._n_appended} rows appended, but n_rows={self.n_rows}")
        self._meta.shards = self._done
        self._meta.stats = self._stats.result()
        write_json(self._path / STORE_FILE, self._meta.to_json())

    def _abandon(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        self._remove_all()

    def _remove_all(self) -> None:
        # the mark of a whole store goes first
        (self._path / STORE_FILE).unlink(missing_ok=True)
        for pattern in (".shard-*.h5.tmp", "shard-*.h5"):
            for file in self._path.glob(pattern):
                file.unlink()

    def _temporary(self, index: int) -> Path:
        return self._path / f".{shard_name(index)}.tmp"

    def _reserve(self, index: int) -> dict[str, int]:
        with self._room():
            return create_shard(
                self._temporary(index),
                n_rows=self._sizes[index],
                n_models=self.n_models,
                d_model=self.d_model,
                dtype=self.dtype,
            )

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            total = self.n_rows * self._row_bytes / 1e9
            raise ResourceError(
                f"{self._path}: no room for {total:.3g} GB of activations ({error.strerror}); "
                "free some or store fewer tokens"
            ) from error


class _OpenShard:
    """The shard being filled: activations go to the file at once, columns and CRCs at its end."""

    def __init__(self, path: Path, offsets: Mapping[str, int], n_rows: int, row_bytes: int):
        self.n_rows, self.n_written = n_rows, 0
        self.columns = {name: np.zeros(n_rows, kind) for name, kind in COLUMNS.items()}
        self.crc32c = np.zeros(crc_blocks(n_rows), np.uint32)
        self._offsets, self._row_bytes = offsets, row_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, activations: Tensor, columns: Mapping[str, NDArray[Any]]) -> None:
        start, stop = self.n_written, self.n_written + activations.shape[0]
        data = activations.view(torch.uint8).numpy().reshape(stop - start, self._row_bytes)
        write_at(self._fd, data.data, self._offsets["activations"] + start * self._row_bytes)
        self._sum(data, start)
        for name, values in columns.items():
            self.columns[name][start:stop] = values
        self.n_written = stop

    def _sum(self, data: NDArray[np.uint8], start: int) -> None:
        # the first block may have begun in an earlier call, and the last one may go on in a later
        head = min(-start % CRC_ROWS, len(data))
        if head:
            block = start // CRC_ROWS
            self.crc32c[block] = _native.crc32c(data[:head], int(self.crc32c[block]))
        if head < len(data):
            sums = _native.crc32c_blocks(data[head:], CRC_ROWS * self._row_bytes)
            first = (start + head) // CRC_ROWS
            self.crc32c[first : first + len(sums)] = sums

    def finish(self) -> None:
        for name, values in self.columns.items():
            write_at(self._fd, values.data, self._offsets[name])
        write_at(self._fd, self.crc32c.data, self._offsets["crc32c"])
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _column(name: str, values: NDArray[Any], n: int) -> NDArray[Any]:
    """A side column in its stored type; a value that does not fit is refused, not wrapped."""
    values = np.asarray(values)
    kind = COLUMNS[name]
    if values.shape != (n,) or values.dtype.kind not in "iub":
        raise ValueError(f"{name} must be ({n},) integers, got {values.shape} {values.dtype}")
    limits = np.iinfo(kind)
    if n and (int(values.min()) < limits.min or int(values.max()) > limits.max):
        raise ValueError(f"{name} reach from {values.min()} to {values.max()}, which does not fit {kind}")
    return values.astype(kind)
