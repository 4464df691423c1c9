"""Shuffled batches whose order is a pure function of (seed, epoch, position).

The stream of rows has no end: position p is index p mod n of epoch p div n, and the epoch's permutation of
[0, n) (csrc/permutation.hpp, "order v1") says which row that is. Batch s takes positions [s·B, s·B + B), so a
batch may begin in one epoch and end in the next, every row comes exactly once per epoch, and training resumes
at any step without reading what came before.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import InputError, OptionError
from fastdiff.store.reader import ActivationStore

# batches read before they are asked for: one being used, one ready, one being read
_AHEAD = 2


class Shuffler:
    """Batches of rows in a seeded order.

    Args:
        store: Where the rows come from.
        batch_size: B, rows per batch.
        seed: In [0, 2^64). Equal seeds give equal orders on every machine.
        n_rows: n, rows that take part: [0, n_rows) of the store.
        n_threads: Threads that read one batch. They do not change the order.
        rows: (n,) numbers of the rows that take part instead; n_rows is their count.

    Attributes:
        wait_seconds: Time `stream` made its consumer wait.

    Raises:
        OptionError: The batch size, the seed or the number of threads cannot work.
        InputError: No rows take part.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        seed: int,
        n_rows: int,
        n_threads: int = 2,
        rows: NDArray[np.int64] | None = None,
    ):
        if batch_size < 1:
            raise OptionError(f"batch size {batch_size}: it must be at least 1")
        if not 0 <= seed < 2**64:
            raise OptionError(f"seed {seed}: it must be from 0 to 2^64 - 1")
        if n_threads < 1:
            raise OptionError(f"{n_threads} threads: there must be at least 1")
        if rows is not None and len(rows) != n_rows:
            raise ValueError(f"{len(rows)} rows given, but n_rows={n_rows}")
        if n_rows < 1:
            raise InputError(f"{store.path}: no rows to train on; extract more text or hold out less")
        if rows is None and n_rows > store.n_rows:
            raise ValueError(f"{n_rows=}, but the store has {store.n_rows}")
        self._store, self._rows = store, rows
        self._batch_size, self._seed, self._n_rows = batch_size, seed, n_rows
        self._n_threads = n_threads
        self.wait_seconds = 0.0

    def row_numbers(self, step: int) -> NDArray[np.int64]:
        """The row numbers of batch `step`: (B,)."""
        position, end = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while position < end:
            epoch, start = divmod(position, self._n_rows)
            count = min(end - position, self._n_rows - start)
            parts.append(_native.permute(self._n_rows, self._seed, epoch, start, count))
            position += count
        indices = np.concatenate(parts)
        return indices if self._rows is None else self._rows[indices]

    def batch(self, step: int) -> Tensor:
        """Batch `step`: [B, M, D] in the stored type.

        Raises:
            InputError: The store cannot be read.
        """
        return self._store.rows(self.row_numbers(step), n_threads=self._n_threads)

    def stream(self, start: int, stop: int) -> Iterator[Tensor]:
        """Batches start, …, stop - 1, read ahead by a thread that ends with the iterator.

        Raises:
            InputError: The store cannot be read.
        """
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastdiff-shuffler")
        try:
            ahead: deque[Future[Tensor]] = deque()
            upcoming = iter(range(start, stop))
            for step in islice(upcoming, _AHEAD):
                ahead.append(pool.submit(self.batch, step))
            while ahead:
                began = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - began
                following = next(upcoming, None)
                if following is not None:
                    ahead.append(pool.submit(self.batch, following))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
