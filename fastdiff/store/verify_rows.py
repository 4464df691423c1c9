"""Whether the rows of a shard are those its checksums were made of, and finite; a few megabytes at a time."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff import _native
from fastdiff.errors import InputError
from fastdiff.store.format import CRC_ROWS, TORCH_DTYPES, Stats
from fastdiff.store.hdf5_rows import Hdf5Rows
from fastdiff.store.index import BITS, ShardIndex
from fastdiff.store.left_out import BOS, USED, norms_of
from fastdiff.store.statistics import RunningStats

# what one thread reads at a time; a block of 32 rows at least
_PIECE_BYTES = 8 << 20
# norms of another version may be added up in another order
_NORM_TOLERANCE = 1e-6
# ranges of rows that are named one by one
_NAMED = 20

Read = Callable[[int, int, NDArray[np.uint8]], None]


@dataclass
class RowFindings:
    """What is wrong with the rows of a shard.

    Attributes:
        corrupt: [first row, end) of blocks that do not have their checksum, neighbours joined.
        unreadable: [first row, end, why].
        n_nonfinite: Rows that hold NaN or infinity.
        first_nonfinite: The first of them.
        n_wrong_norms: Rows whose `/norms` are not their norms.
        first_wrong_norm: The first of them.
    """

    corrupt: list[tuple[int, int]] = field(default_factory=list)
    unreadable: list[tuple[int, int, str]] = field(default_factory=list)
    n_nonfinite: int = 0
    first_nonfinite: int = -1
    n_wrong_norms: int = 0
    first_wrong_norm: int = -1

    def problems(self) -> Iterator[str]:
        """One line each, without the file's name."""
        for first, end, why in self.unreadable[:_NAMED]:
            yield f"rows {first} to {end - 1} cannot be read ({why}); copy or extract it again"
        for first, end in self.corrupt[:_NAMED]:
            yield f"rows {first} to {end - 1} are not what was written (CRC-32C); copy or extract it again"
        for name, ranges in (("cannot be read", self.unreadable[_NAMED:]), ("are corrupt", self.corrupt[_NAMED:])):
            if ranges:
                n_rows = sum(found[1] - found[0] for found in ranges)
                yield f"{n_rows} more rows in {len(ranges)} places {name}; copy or extract it again"
        if self.n_nonfinite:
            yield (
                f"{self.n_nonfinite} rows hold NaN or infinity, the first is row {self.first_nonfinite}; "
                "extract it again, or leave them out"
            )
        if self.n_wrong_norms:
            yield (
                f"/norms of {self.n_wrong_norms} rows are not those of /activations, the first is row "
                f"{self.first_wrong_norm}; extract it again"
            )

    def _take(self, first: int, end: int, piece: "_Piece") -> None:
        if piece.why is not None:
            self.unreadable.append((first, end, piece.why))
        for block in piece.bad_blocks:
            start, stop = first + int(block) * CRC_ROWS, min(end, first + (int(block) + 1) * CRC_ROWS)
            if self.corrupt and self.corrupt[-1][1] == start:
                start = self.corrupt.pop()[0]
            self.corrupt.append((start, stop))
        if piece.n_nonfinite and not self.n_nonfinite:
            self.first_nonfinite = first + piece.first_nonfinite
        self.n_nonfinite += piece.n_nonfinite
        if len(piece.wrong_norms) and not self.n_wrong_norms:
            self.first_wrong_norm = first + int(piece.wrong_norms[0])
        self.n_wrong_norms += len(piece.wrong_norms)


class Moments:
    """Statistics of rows, from those of their parts.

    Attributes:
        left_out: Those of the rows that are left out of use though they are not BOS.
    """

    left_out: "Moments"

    def __init__(self, n_models: int, d_model: int, *, parted: bool = True):
        if parted:
            self.left_out = Moments(n_models, d_model, parted=False)
        self._n = 0
        self._mean = np.zeros((n_models, d_model))
        self._m2 = np.zeros(n_models)
        self._norms = np.zeros(n_models)

    def add(self, part: Stats) -> None:
        """Count the rows of a part in."""
        n = self._n + part.n_rows
        apart = np.array(part.mean) - self._mean
        self._mean += apart * (part.n_rows / n)
        self._m2 += np.array(part.variance) * part.n_rows + (apart**2).sum(axis=1) * (self._n * part.n_rows / n)
        self._norms += np.array(part.mean_norm) * part.n_rows
        self._n = n

    def variance_share(self) -> NDArray[np.float64]:
        """Share of the rows that are left out of Σ‖x − mean‖² over both parts, (M,)."""
        n, other = self._n + self.left_out._n, self.left_out
        if not other._n:
            return np.zeros(len(self._m2))
        mean = self._mean + (other._mean - self._mean) * (other._n / n)
        there, apart = (part._m2 + part._n * ((part._mean - mean) ** 2).sum(axis=1) for part in (self, other))
        return np.divide(apart, there + apart, out=np.zeros_like(apart), where=there + apart > 0)

    def differences(self, told: Stats) -> list[str]:
        """Names of the statistics that are not those of the rows, to 1e-9 of the value or of its spread."""
        if not self._n:
            return []
        variance = self._m2 / self._n
        spread = np.sqrt(variance / self._mean.shape[1])[:, None]
        # where all rows are nearly equal, the variance is what rounding leaves of the squares
        rounding = 1e-15 * (self._mean**2).sum(axis=1)
        fits = {
            "mean": np.abs(np.array(told.mean) - self._mean) <= 1e-9 * (np.abs(self._mean) + spread),
            "variance": np.abs(np.array(told.variance) - variance) <= 1e-9 * variance + rounding,
            "mean_norm": np.abs(np.array(told.mean_norm) * self._n - self._norms) <= 1e-9 * self._norms,
        }
        return [name for name, fit in fits.items() if not fit.all()]


@dataclass(frozen=True)
class _Piece:
    bad_blocks: NDArray[np.int64]
    n_nonfinite: int
    first_nonfinite: int
    why: str | None = None
    stats: Stats | None = None
    left_out: Stats | None = None
    wrong_norms: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def check_rows(
    shard: ShardIndex,
    sums: NDArray[np.uint32] | None,
    n_threads: int,
    advance: Callable[[int], object],
    codes: NDArray[np.uint8] | None = None,
    moments: Moments | None = None,
    norms: NDArray[np.float32] | None = None,
) -> RowFindings:
    """Read all rows of a shard once.

    Args:
        shard: Which.
        sums: (⌈n/32⌉,) its `/crc32c`, or None.
        n_threads: Threads that read and sum; HDF5 reads with one, whatever is asked.
        advance: Called with the number of rows that have been checked since the last call.
        codes: (n,) why each row is left out of use (`left_out.py`), or None for no statistics.
        moments: Where the statistics are added, of pieces that are finite.
        norms: (n, M) its `/norms`, or None.
    """
    block_bytes = CRC_ROWS * shard.row_bytes
    step = CRC_ROWS * max(1, _PIECE_BYTES // block_bytes)
    found = RowFindings()
    with _reader(shard) as read, ThreadPoolExecutor(n_threads) as pool:

        def check(first: int) -> _Piece:
            return _check_piece(shard, sums, read, first, min(first + step, shard.n_rows), codes, norms)

        starts = range(0, shard.n_rows, step)
        # a few at a time: all pieces of a large shard at once would be a large list
        for begin in range(0, len(starts), 64):
            some = starts[begin : begin + 64]
            for first, piece in zip(some, pool.map(check, some), strict=True):
                end = min(first + step, shard.n_rows)
                found._take(first, end, piece)
                if moments is not None and piece.stats is not None:
                    moments.add(piece.stats)
                if moments is not None and piece.left_out is not None:
                    moments.left_out.add(piece.left_out)
                advance(end - first)
    return found


def _check_piece(
    shard: ShardIndex,
    sums: NDArray[np.uint32] | None,
    read: Read,
    first: int,
    end: int,
    codes: NDArray[np.uint8] | None,
    norms: NDArray[np.float32] | None,
) -> _Piece:
    data = np.empty((end - first, shard.row_bytes), np.uint8)
    none = np.empty(0, np.int64)
    try:
        read(first, end, data)
    except InputError as error:
        return _Piece(none, 0, -1, str(error).removeprefix(f"{shard.path}: "))
    except _native.ReadError as error:
        code = error.args[5]
        return _Piece(none, 0, -1, os.strerror(code) if code else "the file ends there")
    bad = none
    if sums is not None:
        block = first // CRC_ROWS
        got = _native.crc32c_blocks(data, CRC_ROWS * shard.row_bytes)
        bad = np.flatnonzero(got != sums[block : block + len(got)])
    wrong = none
    # norms of damaged rows cannot fit, so they are no second problem
    if norms is not None and not len(bad):
        wrong = _wrong_norms(shard, data, norms[first:end])
    row = _native.first_nonfinite_row(data, shard.dtype)
    if row < 0:
        stats = left_out = None
        if codes is not None:
            piece = codes[first:end]
            stats = _statistics(shard, data, np.asarray(piece == USED))
            left_out = _statistics(shard, data, np.asarray((piece != USED) & (piece != BOS)))
        return _Piece(bad, 0, -1, stats=stats, left_out=left_out, wrong_norms=wrong)
    values = torch.from_numpy(data[row:]).view(TORCH_DTYPES[shard.dtype])
    return _Piece(bad, int((~torch.isfinite(values)).any(dim=1).sum()), row, wrong_norms=wrong)


def _wrong_norms(shard: ShardIndex, data: NDArray[np.uint8], told: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows whose norms are not what they should be; of values that are not finite, none."""
    rows = torch.from_numpy(data).view(TORCH_DTYPES[shard.dtype]).view(-1, shard.n_models, shard.d_model)
    norms = norms_of(rows).astype(np.float64)
    with np.errstate(invalid="ignore"):
        fits = np.abs(told - norms) <= _NORM_TOLERANCE * norms
    return np.flatnonzero((~fits & np.isfinite(norms)).any(axis=1))


def _statistics(shard: ShardIndex, data: NDArray[np.uint8], usable: NDArray[np.bool_]) -> Stats | None:
    running = RunningStats(shard.n_models, shard.d_model)
    counted = data if usable.all() else data[usable]
    if len(counted):
        running.add(torch.from_numpy(counted).view(TORCH_DTYPES[shard.dtype]).view(-1, shard.n_models, shard.d_model))
    return running.result()


@contextmanager
def _reader(shard: ShardIndex) -> Iterator[Read]:
    """Something that reads rows [first, end) of a shard to (end - first, row bytes)."""
    first_rows = np.concatenate([[0], np.cumsum(shard.extent_rows)])
    if shard.slow is not None:
        hdf5 = Hdf5Rows([shard.path], np.array([0, shard.n_rows]))

        def by_hdf5(first: int, end: int, out: NDArray[np.uint8]) -> None:
            bits: NDArray[Any] = out.view(BITS[TORCH_DTYPES[shard.dtype].itemsize])
            hdf5.read(np.arange(first, end), bits.reshape(end - first, shard.n_models, shard.d_model))

        try:
            yield by_hdf5
        finally:
            hdf5.close()
        return
    fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    fds = np.full(len(shard.offsets), fd, np.int64)

    def by_position(first: int, end: int, out: NDArray[np.uint8]) -> None:
        _native.gather_rows(fds, shard.offsets, first_rows, np.arange(first, end), out)

    try:
        yield by_position
    finally:
        os.close(fd)
