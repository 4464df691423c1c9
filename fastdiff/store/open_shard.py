"""The shard being filled: rows go to the file in pieces of about 1 MB, past the page cache, from two threads.

Rows are summed and copied into page-aligned buffers, each a fixed slice of the shard. Once full, a buffer is written
with O_DIRECT by a thread while the next one fills: buffered writes cost three times the CPU (0.64 against 0.2 s per
GB), are slower where two cores do everything (1.05 against 2.2 GB/s), and push other files out of memory. Where the
file system has no O_DIRECT, and for what is left behind the last whole page, they are used all the same.
"""

import errno
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import _native
from fastdiff.errors import InputError
from fastdiff.store.format import ALIGNMENT, COLUMNS, CRC_ROWS, NORM_TYPE, NORMS, crc_blocks, write_at

# writes of 4 MB were no faster
_BUFFER_BYTES = 1 << 20
# one thread was slower by half, and three were no faster
_THREADS = 2
_BUFFERS = 4


class Staging:
    """Buffers of equal size, and the threads that write them.

    Args:
        row_bytes: Bytes of a row.
        n_rows: Rows of the largest shard.
    """

    def __init__(self, row_bytes: int, n_rows: int):
        # a buffer begins at a page of the file and at a block of the checksums
        unit = lcm(CRC_ROWS, ALIGNMENT // gcd(row_bytes, ALIGNMENT))
        wanted = min(max(1, _BUFFER_BYTES // (unit * row_bytes)), -(-n_rows // unit))
        self.n_rows = wanted * unit
        self._row_bytes = row_bytes
        self._n_made = 0
        self._free: deque[NDArray[np.uint8]] = deque()
        self._pending: deque[tuple[Future[None], NDArray[np.uint8]]] = deque()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastdiff-writer")

    def take(self) -> NDArray[np.uint8]:
        """A buffer [rows, bytes] to fill; waits for one.

        Raises:
            OSError: An earlier buffer could not be written.
        """
        if not self._free and self._n_made < _BUFFERS:
            self._n_made += 1
            memory = mmap.mmap(-1, self.n_rows * self._row_bytes)
            return np.frombuffer(memory, np.uint8).reshape(self.n_rows, self._row_bytes)
        while not self._free:
            self._wait()
        return self._free.popleft()

    def give(self, buffer: NDArray[np.uint8], write: Callable[[], None]) -> None:
        """Run `write` in a thread; afterwards the buffer is free."""
        self._pending.append((self._threads.submit(write), buffer))

    def put_back(self, buffer: NDArray[np.uint8]) -> None:
        """Give a buffer back whose rows have been written."""
        self._free.append(buffer)

    def drain(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: A buffer could not be written.
        """
        while self._pending:
            self._wait()

    def close(self) -> None:
        """Wait for the threads, whatever became of their work."""
        self._threads.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        future, buffer = self._pending[0]
        future.result()
        self._pending.popleft()
        self._free.append(buffer)


class OpenShard:
    """A shard that takes rows.

    Args:
        path: A file of `create_shard`.
        offsets: Where its data sets begin.
        n_rows: Rows it will hold.
        row_bytes: Bytes of a row of `/activations`.
        staging: Buffers to use.
        n_models: M, the width of `norms`.
    """

    def __init__(
        self, path: Path, offsets: Mapping[str, int], n_rows: int, row_bytes: int, staging: Staging, n_models: int = 1
    ):
        self.n_rows, self.n_written = n_rows, 0
        self.columns: dict[str, NDArray[Any]] = {
            name: np.zeros(n_rows, kind) for name, kind in COLUMNS.items() if name in offsets
        }
        if NORMS in offsets:
            self.columns[NORMS] = np.zeros((n_rows, n_models), NORM_TYPE)
        self.crc32c = np.zeros(crc_blocks(n_rows), np.uint32)
        self._path, self._offsets, self._row_bytes, self._staging = path, offsets, row_bytes, staging
        self._buffer: NDArray[np.uint8] | None = None
        # rows handed to the file, and rows whose columns and checksums are on the disk as well
        self._n_given = self._n_synced = 0
        fds: list[int] = []
        self._close = weakref.finalize(self, _close_all, fds)
        fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._fd, self._direct = fds[0], -1
        if offsets["activations"] % ALIGNMENT == 0:
            try:
                fds.append(os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC))
                self._direct = fds[1]
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system has no O_DIRECT
                    raise

    def write(self, rows: NDArray[np.uint8], columns: Mapping[str, NDArray[Any]]) -> None:
        """Take rows.

        Args:
            rows: [n, bytes of a row].
            columns: The n values of each side column, in their stored types; `norms` is [n, M].

        Raises:
            OSError: An earlier row could not be written.
        """
        for name, values in columns.items():
            self.columns[name][self.n_written : self.n_written + len(rows)] = values
        while len(rows):
            if self._buffer is None:
                self._buffer = self._staging.take()
            within = self.n_written % len(self._buffer)
            part = rows[: len(self._buffer) - within]
            _native.stage_rows(part, self._buffer[within:], self.crc32c, self.n_written, CRC_ROWS)
            self.n_written += len(part)
            rows = rows[len(part) :]
            if self.n_written % len(self._buffer) == 0:
                self._staging.give(self._buffer, self._job(self._buffer))
                self._buffer = None

    def sync(self) -> None:
        """Put every row, its columns and checksums on the disk.

        Raises:
            OSError: That failed.
        """
        if self._buffer is not None and self._n_given < self.n_written:
            self._job(self._buffer)()
        self._staging.drain()
        for name, values in self.columns.items():
            self._write_part(name, values, self._n_synced, self.n_written)
        self._write_part("crc32c", self.crc32c, self._n_synced // CRC_ROWS, crc_blocks(self.n_written))
        os.fdatasync(self._fd)
        self._n_synced = self.n_written

    def sums(self) -> dict[str, int]:
        """CRC-32C of what `sync` has written of the side columns, and of `/crc32c` but for a block that is not full.

        The sum of that block is replaced in the file before the journal acknowledges more rows.
        """
        parts = {name: values[: self._n_synced] for name, values in self.columns.items()}
        parts["crc32c"] = self.crc32c[: self._n_synced // CRC_ROWS]
        return {name: _native.crc32c(values) for name, values in parts.items()}

    def last_sum(self) -> int:
        """CRC-32C of the rows of the block that is not full, 0 if there are none."""
        return int(self.crc32c[self._n_synced // CRC_ROWS]) if self._n_synced % CRC_ROWS else 0

    def read_back(self, n_rows: int, last_sum: int | None = None) -> None:
        """Take the columns and checksums of the first `n_rows` rows, which an earlier writer has put here.

        Args:
            n_rows: Rows that are here.
            last_sum: What `last_sum` was then; None for a shard that was finished.

        Raises:
            InputError: They cannot be read.
        """
        for name, values in self.columns.items():
            self._read(values[:n_rows].data, self._offsets[name])
        self._read(self.crc32c[: crc_blocks(n_rows)].data, self._offsets["crc32c"])
        if last_sum is not None and n_rows % CRC_ROWS:
            self.crc32c[n_rows // CRC_ROWS] = last_sum
        self.n_written = self._n_given = self._n_synced = n_rows

    def check(self, start: int) -> None:
        """Hold the rows from `start` on against their checksums.

        Raises:
            InputError: Rows are not what was written.
        """
        step = self._staging.n_rows
        for first in range(start // CRC_ROWS * CRC_ROWS, self.n_written, step):
            rows = self.read_rows(first, min(self.n_written, first + step))
            found = _native.crc32c_blocks(rows, CRC_ROWS * self._row_bytes)
            wanted = self.crc32c[first // CRC_ROWS :][: len(found)]
            if not np.array_equal(found, wanted):
                row = first + int(np.flatnonzero(found != wanted)[0]) * CRC_ROWS
                raise InputError(
                    f"{self._path}: rows {row} to {min(self.n_written, row + CRC_ROWS) - 1} are not what was written; "
                    "check the disk, then start again with --overwrite"
                )

    def refill(self) -> None:
        """Take up the rows of the buffer that was not full.

        Raises:
            InputError: They are not what was written. They are checked because they will be written again.
        """
        first = self.n_written // self._staging.n_rows * self._staging.n_rows
        if first < self.n_written < self.n_rows:
            self.check(first)
            self._buffer = self._staging.take()
            self._buffer[: self.n_written - first] = self.read_rows(first, self.n_written)

    def close(self) -> None:
        """Close the file. No thread may be writing it any more."""
        if self._buffer is not None:
            self._staging.put_back(self._buffer)
            self._buffer = None
        self._close()

    def _job(self, buffer: NDArray[np.uint8]) -> Callable[[], None]:
        """What puts the rows of a buffer into the file."""
        first = (self.n_written - 1) // len(buffer) * len(buffer)
        job = partial(self._put, buffer[: self.n_written - first], first, max(0, self._n_given - first))
        self._n_given = self.n_written
        return job

    def _put(self, rows: NDArray[np.uint8], first: int, n_before: int) -> None:
        """Write rows from number `first` on, of which the file has `n_before` already."""
        data, offset = rows.data.cast("B"), self._offsets["activations"] + first * self._row_bytes
        start = n_before * self._row_bytes // ALIGNMENT * ALIGNMENT
        stop = len(data) // ALIGNMENT * ALIGNMENT
        if self._direct >= 0 and start < stop:
            try:
                start += os.pwrite(self._direct, data[start:stop], offset + start)
            except OSError as error:
                if error.errno != errno.EINVAL:  # it wants another alignment
                    raise
                self._direct = -1
        write_at(self._fd, data[start:], offset + start)

    def _write_part(self, name: str, values: NDArray[Any], start: int, stop: int) -> None:
        # rows are also put here between two commits, to be read back; and a view of no rows of `norms` has no bytes
        if start == stop:
            return
        # a row of `norms` has several values
        write_at(self._fd, values[start:stop].data, self._offsets[name] + start * values.strides[0])

    def read_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop), which `sync` has put into the file: [rows, bytes of a row].

        Raises:
            InputError: They cannot be read.
        """
        rows = np.empty((stop - start, self._row_bytes), np.uint8)
        self._read(rows.data, self._offsets["activations"] + start * self._row_bytes)
        return rows

    def _read(self, to: memoryview, offset: int) -> None:
        view, done = to.cast("B"), 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{self._path}: cannot be read ({error.strerror}); check the disk") from error
            if n == 0:
                raise InputError(f"{self._path}: truncated at byte {offset + done}; start again with --overwrite")
            done += n


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
