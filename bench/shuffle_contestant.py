"""What a contestant of the shuffle benchmark is, and what several of them need."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from shuffle_data import BATCH, CHUNK_ROWS, ROW_VALUES, Data
from torch import Tensor

# rows in the pool of the rivals that have one: 64 chunks, 302 MB; less for data that are only to try the script
POOL_ROWS = 32768

Batch = Tensor | NDArray[np.uint16] | int  # an int is a number of bytes that a limit has moved
Epoch = Callable[[int, int], Iterator[Batch]]  # (epoch, number of batches) -> its first batches


@dataclass(frozen=True)
class Session:
    """An opened contestant.

    Attributes:
        epoch: Gives batches.
        skip: Batches before the clock is started: pools are made and the first is filled, or processes start.
        count: How many batches are timed when n are wanted, …
        ask: … and for how many the epoch is asked.
        note: What to say about it.
    """

    epoch: Epoch
    skip: int = 0
    count: Callable[[int], int] = int
    ask: Callable[[int], int] = int
    note: str = ""


@dataclass(frozen=True)
class Contestant:
    """One way to get rows.

    Attributes:
        name: In the table.
        session: Opens it.
        file: Which copy of the rows it reads: contiguous, chunked, or "" for none.
        sampled: So slow, and so even, that a part of the epoch tells its rate. A pool that fills and drains is not
            even: such a contestant is timed to the end.
        buffered: It reads through the page cache.
        is_limit: It moves bytes but makes no batches.
    """

    name: str
    session: Callable[[Data], AbstractContextManager[Session]]
    file: str = "contiguous"
    sampled: bool = False
    buffered: bool = True
    is_limit: bool = False


def bits(batch: Tensor | NDArray[np.uint16]) -> NDArray[np.uint16]:
    """A batch as (n, M·D) bits."""
    if isinstance(batch, Tensor):
        batch = batch.view(torch.uint16).numpy()
    return batch.reshape(len(batch), ROW_VALUES)


def windowed(epoch: Epoch, window: float, most: float = math.inf) -> Session:
    """A session of a contestant that reads windows of so many batches, the next one while one is delivered.

    The clock runs from the first batch of a window to the first batch of another: as much is read as counts, and while
    it stops the next window is being read, as it is while it starts. `most` is how many batches an epoch has for
    contestants that do not go on with the next epoch.
    """

    def windows(n: int) -> int:
        return int(max(1, min(round(n / window), most / window - 2)))

    return Session(epoch, 1, lambda n: int(windows(n) * window), lambda n: int((windows(n) + 2) * window))


def draw(n: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([epoch, n]).permutation(n)


def pool_rows_for(data: Data) -> int:
    return min(POOL_ROWS, max(1, data.n_rows // (4 * BATCH)) * BATCH)


def data_offset(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["activations"].id.get_offset())


class ChunkPool:
    """Whole random chunks, read raw into a numpy pool."""

    def __init__(self, path: Path, pool_rows: int, n_pools: int):
        self.file = h5py.File(path)
        self._dset = self.file["activations"]
        self._pools = [np.full((pool_rows, ROW_VALUES), 1, np.uint16) for _ in range(n_pools)]

    def fill(self, index: int, chunks: NDArray[np.int64]) -> NDArray[np.uint16]:
        pool = self._pools[index % len(self._pools)][: len(chunks) * CHUNK_ROWS]
        for target, chunk in zip(pool.reshape(len(chunks), -1), chunks.tolist(), strict=True):
            self._dset.id.read_direct_chunk((chunk * CHUNK_ROWS, 0, 0), out=target.view(np.uint8))
        return pool


def fillings_of(chunks: NDArray[np.int64], pool_rows: int) -> list[NDArray[np.int64]]:
    step = pool_rows // CHUNK_ROWS
    return [chunks[start : start + step] for start in range(0, len(chunks), step)]
