"""Where a shuffler's rows come from: the threads of csrc/prefetcher.cpp, or HDF5; and how they reach a GPU."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import ResourceError
from fastdiff.store.reader import ActivationStore


class RowStream(Protocol):
    """Rows in order, from some position of the endless stream on."""

    def take(self, n: int) -> Tensor:
        """The next rows: [at most n, M, D]; fewer where a window or the stream ends."""
        ...

    def pinned(self) -> AbstractContextManager[None]:
        """Inside the block a GPU can copy the rows by itself."""
        ...

    def stop(self) -> None:
        """End what reads ahead."""
        ...


class PooledRows:
    """Positioned reads by threads; the tensors are views of their pool."""

    def __init__(
        self,
        store: ActivationStore,
        order: _native.BlockOrder,
        *,
        table: NDArray[np.int64] | None,
        start: int,
        count: int,
        batch_rows: int,
        n_slots: int,
        n_threads: int,
        direct: bool,
        check_finite: bool,
        crc: list[NDArray[np.uint32]] | None,
    ):
        self._shape, self._dtype = (-1, store.n_models, store.d_model), store.dtype
        self._row_bytes = store.n_models * store.d_model * store.dtype.itemsize
        places = store.extents
        self._stream = _native.Stream(
            places.fds,
            places.offsets,
            places.first_rows,
            row_bytes=self._row_bytes,
            order=order,
            table=table,
            start=start,
            count=count,
            batch_rows=batch_rows,
            n_slots=n_slots,
            n_threads=n_threads,
            direct=direct,
            finite=str(store.dtype).removeprefix("torch.") if check_finite else None,
            crc=None if crc is None else (crc, store.first_rows),
        )

    def take(self, n: int) -> Tensor:
        """See `RowStream`."""
        rows = self._stream.take(n, self._row_bytes)
        # the tensor keeps the batch, the batch keeps its place in the pool
        return torch.frombuffer(rows, dtype=self._dtype).view(self._shape)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """See `RowStream`.

        Raises:
            ResourceError: The memory cannot be pinned.
        """
        # not torch's pinned memory, which comes in powers of two: a pool of 4.7 GB would take 8
        address, n_bytes = self._stream.pool
        runtime = torch.cuda.cudart()
        error = int(runtime.cudaHostRegister(address, n_bytes, 0))
        if error:
            raise ResourceError(f"cannot pin {n_bytes / 1e9:.3g} GB of memory (CUDA error {error}); lower --pool-gb")
        try:
            yield
        finally:
            torch.cuda.synchronize()
            runtime.cudaHostUnregister(address)

    def stop(self) -> None:
        """See `RowStream`."""
        self._stream.stop()


class Hdf5Windows:
    """Rows through HDF5, a window at a time, by one thread that is a window ahead.

    Args:
        read: Rows at [position, position + n) of the stream.
        window: Rows from a position to the end of its window.
        position: Where the stream begins.
        count: Rows of it.
    """

    def __init__(self, read: Callable[[int, int], Tensor], window: Callable[[int], int], position: int, count: int):
        self._read, self._window = read, window
        self._position, self._end = position, position + count
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastdiff-hdf5")
        self._left = torch.empty(0)
        self._coming = self._thread.submit(self._next)

    def _next(self) -> Tensor:
        begin = self._position
        self._position = min(self._end, begin + self._window(begin))
        return self._read(begin, self._position - begin)

    def take(self, n: int) -> Tensor:
        """See `RowStream`."""
        if len(self._left) == 0:
            self._left = self._coming.result()
            if self._position < self._end:
                self._coming = self._thread.submit(self._next)
        taken, self._left = self._left[:n], self._left[n:]
        return taken

    def pinned(self) -> AbstractContextManager[None]:
        """See `RowStream`. A window is new memory every time, and reading it is what takes long."""
        return nullcontext()

    def stop(self) -> None:
        """See `RowStream`."""
        self._thread.shutdown(cancel_futures=True)


def to_cuda(batches: Iterable[Tensor], device: torch.device) -> Generator[Tensor]:
    """Each batch on the device, copied while the one before it is used.

    Args:
        batches: [B, M, D] each, in pinned memory.
        device: A CUDA device.
    """
    copies = torch.cuda.Stream(device)
    ahead: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            there = batch.to(device, non_blocking=True)
            done = copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = (there, batch, done)
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(there: Tensor, batch: Tensor, done: torch.cuda.Event) -> Tensor:
    """The copy, once it is made; until then `batch`, which it is made from, must be held."""
    done.synchronize()
    there.record_stream(torch.cuda.current_stream(there.device))
    return there
