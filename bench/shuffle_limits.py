"""Limits in the shuffle benchmark: what the machine does when there is nothing to shuffle."""

import mmap
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from shuffle_contestant import Batch, Contestant, Session, data_offset
from shuffle_data import BATCH, ROW_BYTES, Data

_PIECE = 1 << 20
_COPY_BYTES = 1 << 28


def memcpy(n_threads: int) -> Contestant:
    """Limit: copying memory to memory that is there already."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        n_bytes = min(_COPY_BYTES, data.n_rows * ROW_BYTES)
        source, target = (np.full(n_bytes, i, np.uint8) for i in (1, 2))
        parts = list(zip(np.split(target, n_threads), np.split(source, n_threads), strict=True))

        def epoch(_: int, n_batches: int) -> Iterator[Batch]:
            with ThreadPoolExecutor(n_threads) as threads:
                for _ in range(-(-n_batches * BATCH * ROW_BYTES // n_bytes)):
                    list(threads.map(lambda part: np.copyto(*part), parts))
                    yield n_bytes

        yield Session(epoch)

    return Contestant(
        f"limit: memcpy, {n_threads} thread{'s' * (n_threads > 1)}", session, "", buffered=False, is_limit=True
    )


def sequential_direct(n_threads: int = 4) -> Contestant:
    """Limit: reading the rows in file order past the page cache, 1 MB at a time in 4 threads."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        base = data_offset(data.contiguous)
        fd = os.open(data.contiguous, os.O_RDONLY | os.O_DIRECT)
        buffers = [mmap.mmap(-1, _PIECE) for _ in range(n_threads)]

        def epoch(_: int, n_batches: int) -> Iterator[Batch]:
            n_bytes = n_batches * BATCH * ROW_BYTES
            pieces = iter(range(base, base + n_bytes, _PIECE))
            done: queue.SimpleQueue[int | OSError] = queue.SimpleQueue()
            stopped = threading.Event()

            def read(buffer: mmap.mmap) -> None:
                for piece in pieces:  # next() on a range iterator is atomic
                    if stopped.is_set():
                        return
                    wanted = min(_PIECE, base + n_bytes - piece)
                    try:
                        done.put(os.preadv(fd, [memoryview(buffer)[:wanted]], piece))
                    except OSError as error:
                        done.put(error)

            threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
            for thread in threads:
                thread.start()
            try:
                for _ in range(0, n_bytes, _PIECE):
                    got = done.get()
                    if isinstance(got, OSError):
                        raise got
                    yield got
            finally:
                stopped.set()
                for thread in threads:
                    thread.join()

        try:
            yield Session(epoch)
        finally:
            os.close(fd)

    return Contestant("limit: sequential O_DIRECT", session, buffered=False, is_limit=True)
