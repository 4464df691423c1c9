"""Shuffled batches whose order is a pure function of (seed, position): what a trainer reads from a store.

The stream of rows has no end. Batch s takes its positions [s·B, s·B + B), so a batch may begin in one epoch and end
in the next, every row comes exactly once per epoch, and training resumes at any step without reading what came before.
Which row stands at a position is said in csrc/order.hpp, for both modes:

    block   whole blocks of b rows, in random order, mixed row by row in a pool of P rows. Reads are long, so a disk
            gives what it gives to sequential reading. The rows of a block meet in a batch more often than by chance:
            the variance of a batch mean is 1 + ρ·B·(b - 1)/P of that of a perfect shuffle, where ρ is the share of
            variance that neighbouring rows have in common. A store that fits the pool is shuffled exactly.
    exact   every row on its own: a perfect shuffle, at the price of one read per row.

Block mode is the default. On a cold disk it reads several times as fast as exact mode (see bench/bench_shuffle.py);
take exact mode for stores that lie in the page cache, or where the last percent of shuffle quality matters.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.memory import memory_available, memory_limit
from fastdiff.store.quality import block_excess
from fastdiff.store.reader import ActivationStore
from fastdiff.store.row_streams import Hdf5Windows, PooledRows, RowStream, to_cuda

Mode = Literal["block", "exact"]

# the pool is sized so that at this ρ a batch mean varies at most a tenth more than after a perfect shuffle
DESIGN_RHO = 0.2
_DESIGN_EXCESS = 0.1

# one window is being used while the next one is being read; in exact mode windows are batches
_BLOCK_SLOTS = 2
_EXACT_SLOTS = 4

_MEMORY_SHARE = 0.25

# reads under way: a disk wants many at once, and threads that wait cost nothing
_THREADS = 16


def default_memory() -> int:
    """Bytes a pool takes at most where nothing else is said: a quarter of what the process may use."""
    return int(_MEMORY_SHARE * memory_limit())


class Shuffler:
    """Batches of rows in a seeded order.

    Args:
        store: Where the rows come from.
        batch_size: B, rows per batch.
        seed: In [0, 2^64). Equal seeds give equal orders on every machine.
        n_rows: n, rows that take part: [0, n_rows) of the store; all of them by default.
        rows: (n,) numbers of the rows that take part instead.
        mode: block or exact.
        block_rows: b, rows of a block; a checksum covers 32.
        pool_rows: P, part of the order. By default as many as keep the excess variance at ρ = 0.2 below 10 %, as far
            as `memory_bytes` allows.
        memory_bytes: The most memory the pool takes, 2·P rows; by default a quarter of what the process may use.
        n_threads: Threads that read; 0 for 16. They do not change the order.
        rank: Which of the parts of each epoch to give, …
        world_size: … of how many. The parts are disjoint and cover the epoch.
        direct: Read past the page cache (O_DIRECT); by default if the store neither lies in it nor fits it.
        check_finite: Refuse rows that hold NaN or infinity.
        check_crc: Check the rows against the store's checksums. All 32 rows of a checksum are read for one: nothing
            more in block mode with blocks of 32 and shards of a multiple of 32 rows, 32 times as much in exact mode.

    Attributes:
        n_rows: n.
        pool_rows: P as it was chosen; with it, `block_rows` and the seed the order is the same everywhere.
        pool_bytes: Memory of the pool, held while a stream is open; each thread takes 0.3 MB more.
        direct: Whether streams read past the page cache.
        wait_seconds: Time `stream` made its consumer wait.

    Raises:
        OptionError: An option cannot work, or not with the others.
        InputError: No rows take part.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        seed: int,
        n_rows: int | None = None,
        rows: NDArray[np.int64] | None = None,
        mode: Mode = "block",
        block_rows: int = 32,
        pool_rows: int | None = None,
        memory_bytes: int | None = None,
        n_threads: int = 0,
        rank: int = 0,
        world_size: int = 1,
        direct: bool | None = None,
        check_finite: bool = False,
        check_crc: bool = False,
    ):
        n_rows = (store.n_rows if rows is None else len(rows)) if n_rows is None else n_rows
        if batch_size < 1:
            raise OptionError(f"batch size {batch_size}: it must be at least 1")
        if not 0 <= seed < 2**64:
            raise OptionError(f"seed {seed}: it must be from 0 to 2^64 - 1")
        if n_threads < 0:
            raise OptionError(f"{n_threads} threads: there must be at least 1, or 0 for the default")
        if block_rows < 1:
            raise OptionError(f"blocks of {block_rows} rows: there must be at least 1")
        if not 0 <= rank < world_size:
            raise OptionError(f"rank {rank} of {world_size}: it must be from 0 to {world_size - 1}")
        if rows is not None and len(rows) != n_rows:
            raise ValueError(f"{len(rows)} rows given, but n_rows={n_rows}")
        if n_rows < 1:
            raise InputError(f"{store.path}: no rows to train on; extract more text or hold out less")
        if rows is None and n_rows > store.n_rows:
            raise ValueError(f"{n_rows=}, but the store has {store.n_rows}")
        self._store, self._rows, self.n_rows = store, rows, n_rows
        self.batch_size = batch_size
        self.mode: Mode = "exact" if block_rows == 1 else mode
        self._block_rows = 1 if mode == "exact" else block_rows
        self._row_bytes = store.n_models * store.d_model * store.dtype.itemsize
        self.pool_rows = self._pool_rows(pool_rows, memory_bytes, world_size)
        self._order = _native.BlockOrder(n_rows, seed, self._block_rows, self.pool_rows, rank, world_size)
        if self._order.rows_in_epoch(0) == 0:
            raise InputError(f"{store.path}: {n_rows} rows are too few for {world_size} ranks; use fewer")
        # with windows smaller than a batch, one batch that is held could keep the next from coming: then all are copies
        self._views = self.mode == "exact" or self._order.smallest_window >= batch_size
        self._crc = store.crc32c() if check_crc else None
        if check_crc and self._crc is None:
            raise OptionError(f"{store.path}: has no checksums to check; `fastdiff import` it, or do not check reads")
        if check_crc and store.slow:
            raise OptionError(f"{store.slow}: cannot be checked while it is read; run `fastdiff verify` instead")
        self._finite = check_finite
        self.direct = False if store.slow else self._choose_direct(direct)
        self._n_threads = n_threads or _THREADS
        self.wait_seconds = 0.0

    @property
    def pool_bytes(self) -> int:
        """Memory of the pool while a stream is open."""
        rows = self.batch_size if self.mode == "exact" else self._order.largest_window
        return self._n_slots * rows * self._row_bytes

    @property
    def _n_slots(self) -> int:
        return _EXACT_SLOTS if self.mode == "exact" else _BLOCK_SLOTS

    def excess_variance(self, rho: float = DESIGN_RHO) -> float:
        """By how much the variance of a batch mean exceeds that of a perfect shuffle, as a share of it.

        See `block_excess`; P is the mean size of a window.

        Args:
            rho: Share of the variance between documents.
        """
        windows = self._order.n_windows
        if windows <= 1:
            return 0.0
        return block_excess(rho, self.batch_size, self._block_rows, self._order.rows_in_epoch(0) / windows)

    def describe(self) -> str:
        """How the rows are shuffled and read, in a line."""
        how = "through HDF5" if self._store.slow else "past the page cache" if self.direct else "through the page cache"
        gigabytes = f"{self.pool_bytes / 1e9:.2g} GB"
        if self.mode == "exact":
            return f"exact order, {gigabytes} of batches ahead, {how}"
        if self._order.n_windows <= 1:
            return f"exact order, all rows in a pool of {gigabytes}, {how}"
        return (
            f"blocks of {self._block_rows} rows in a pool of {self._order.largest_window:,} ({gigabytes}), {how}; "
            f"a batch mean varies {self.excess_variance():.1%} more than after a perfect shuffle (rho {DESIGN_RHO})"
        )

    def row_numbers(self, step: int) -> NDArray[np.int64]:
        """The row numbers of batch `step`: (B,)."""
        return self._numbers(step * self.batch_size, self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Batch `step`: [B, M, D] in the stored type, in memory of its own.

        Raises:
            InputError: The store cannot be read.
        """
        with self._explained():
            return self._finite_rows(self.row_numbers(step))

    def stream(self, start: int, stop: int, device: torch.device | None = None) -> Generator[Tensor]:
        """Batches start, …, stop - 1 as [B, M, D] in the stored type, read ahead by threads that end with the iterator.

        A batch is a view of the pool. It stays as it is while it is held, and while it is held its part of the pool is
        not filled again: copy what is kept for longer than a few batches. On a CUDA device batches are copies, made
        from a pinned pool while the one before is used.

        Raises:
            InputError: The store cannot be read, or a check failed.
            ResourceError: There is no memory for the pool.
            RuntimeError: More batches are held than the pool has room for.
        """
        if stop <= start:
            return
        with self._opened(start, stop) as source:
            batches = self._batches(source, stop - start)
            if device is not None and device.type == "cuda":
                with source.pinned():
                    yield from to_cuda(batches, device)
            else:
                yield from batches

    @contextmanager
    def _opened(self, start: int, stop: int) -> Iterator[RowStream]:
        position, count = start * self.batch_size, (stop - start) * self.batch_size
        free = memory_available()
        if self.pool_bytes > free:  # the kernel would end the process without a word
            raise ResourceError(
                f"the shuffle's pool takes {self.pool_bytes / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free; "
                "lower --pool-gb"
            )
        with self._explained():
            source: RowStream = self._hdf5(position, count) if self._store.slow else self._pooled(position, count)
        try:
            yield source
        finally:
            source.stop()

    def _pooled(self, position: int, count: int) -> PooledRows:
        return PooledRows(
            self._store,
            self._order,
            table=self._rows,
            start=position,
            count=count,
            batch_rows=self.batch_size,
            n_slots=self._n_slots,
            n_threads=self._n_threads,
            direct=self.direct,
            check_finite=self._finite,
            crc=self._crc,
        )

    def _hdf5(self, position: int, count: int) -> Hdf5Windows:
        def window(at: int) -> int:
            return self.batch_size if self.mode == "exact" else self._order.left_in_window(at)

        def read(at: int, n: int) -> Tensor:
            return self._finite_rows(self._numbers(at, n))

        return Hdf5Windows(read, window, position, count)

    def _batches(self, source: RowStream, n: int) -> Generator[Tensor]:
        for _ in range(n):
            began = time.perf_counter()
            with self._explained():
                batch = self._next(source)
            self.wait_seconds += time.perf_counter() - began
            yield batch
            del batch

    def _next(self, source: RowStream) -> Tensor:
        first = source.take(self.batch_size)
        if len(first) == self.batch_size and self._views:
            return first
        # a batch that ends one window and begins another has no single place in the pool
        # NumPy's memory: what torch.empty frees, glibc 2.36 often does not use again (+30 MB in 120 batches of 2 MB)
        memory = np.empty(self.batch_size * self._row_bytes, np.uint8)
        batch = torch.from_numpy(memory).view(first.dtype).view(-1, *first.shape[1:])
        filled = 0
        while True:
            batch[filled : filled + len(first)] = first
            filled += len(first)
            if filled == self.batch_size:
                return batch
            del first  # the next window may need its place
            first = source.take(self.batch_size - filled)

    def _finite_rows(self, numbers: NDArray[np.int64]) -> Tensor:
        rows = self._store.rows(numbers, crc=self._crc)
        if self._finite:
            name = str(rows.dtype).removeprefix("torch.")
            bad = _native.first_nonfinite_row(rows.flatten(1).view(torch.uint8).numpy(), name)
            if bad >= 0:
                raise _native.NonFiniteRow("", int(numbers[bad]))
        return rows

    def _numbers(self, position: int, count: int) -> NDArray[np.int64]:
        indices = self._order.rows(position, count)
        return indices if self._rows is None else self._rows[indices]

    def _pool_rows(self, wanted: int | None, memory_bytes: int | None, world_size: int) -> int:
        if self.mode == "exact":
            return 1
        block = self._block_rows
        limit = default_memory() if memory_bytes is None else memory_bytes
        fitting = limit // (_BLOCK_SLOTS * self._row_bytes) // block * block
        if fitting < block:
            least = _BLOCK_SLOTS * block * self._row_bytes
            raise OptionError(f"{limit:,} bytes of memory for the shuffle: two blocks need {least:,}; raise --pool-gb")
        if wanted is not None:
            if wanted < block:
                raise OptionError(f"a pool of {wanted} rows is less than a block of {block}; make it larger")
            if memory_bytes is not None and wanted > fitting:
                raise OptionError(
                    f"a pool of {wanted:,} rows needs more than {memory_bytes:,} bytes of memory; raise --pool-gb"
                )
            return wanted
        # the epoch is cut into windows of equal size, none smaller than the law asks for
        needed = max(block, math.ceil(DESIGN_RHO * self.batch_size * (block - 1) / _DESIGN_EXCESS))
        blocks = -(-self.n_rows // (block * world_size))
        windows = max(1, blocks * block // needed)
        return min(fitting, -(-blocks // windows) * block)

    def _choose_direct(self, wanted: bool | None) -> bool:
        places = self._store.extents
        why_not = _native.why_not_direct(places.fds, places.offsets, places.first_rows, self._row_bytes)
        if wanted:
            if why_not is not None:
                raise OptionError(f"{self._store.path}: cannot be read past the page cache: {why_not}")
            return True
        if wanted is not None or why_not is not None:
            return False
        # a store that fits the page cache is read from the disk once, through it, and from memory ever after
        if self._store.n_rows * self._row_bytes + self.pool_bytes <= memory_available():
            return False
        return _native.cached_share(places.fds, places.offsets, places.first_rows, self._row_bytes) < 0.9

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise ResourceError(
                f"no memory for a shuffle pool of {self.pool_bytes / 1e9:.3g} GB; lower --pool-gb"
            ) from error
        except (_native.ReadError, _native.CorruptRows, _native.NonFiniteRow) as error:
            raise self._store.explained(error) from error
