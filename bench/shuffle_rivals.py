"""The contestants of the shuffle benchmark that read rows in this process: fastdiff and its rivals.

Every rival is the fastest form of its idea that was found: bits are never converted, batches are written into memory
that is there already, and orders are drawn before they are needed.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from h5py._hl.selections import select
from measure import faulted
from numpy.typing import NDArray
from shuffle_contestant import (
    Batch,
    ChunkPool,
    Contestant,
    Epoch,
    Session,
    data_offset,
    draw,
    fillings_of,
    pool_rows_for,
    windowed,
)
from shuffle_data import BATCH, CHUNK_ROWS, D_MODEL, N_MODELS, ROW_BYTES, ROW_VALUES, Data

from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler


def fastdiff(name: str, file: str = "contiguous", **options: Any) -> Contestant:
    """Fastdiff's shuffler; the options are those of `Shuffler`."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        path = data.store if file == "contiguous" else data.chunked
        with ActivationStore(path) as store:
            shuffler = Shuffler(store, batch_size=BATCH, seed=0, n_rows=data.n_rows, **options)
            whole = data.n_rows // BATCH
            epoch = _continued(shuffler, whole)
            if shuffler.mode == "exact":
                yield Session(epoch, skip=4, ask=lambda n: n + 8)
                return
            made = windowed(epoch, whole / -(-data.n_rows // shuffler.pool_rows))
            yield replace(made, note=shuffler.describe())

    return Contestant(name, session, file, buffered=options.get("direct") is not True)


def _continued(shuffler: Shuffler, whole: int) -> Epoch:
    return lambda epoch, n: shuffler.stream(epoch * whole, epoch * whole + n)


def _path(data: Data, file: str) -> Path:
    return data.contiguous if file == "contiguous" else data.chunked


def h5py_fancy(file: str) -> Contestant:
    """`dset[sorted rows]`, as h5py does it, but reading bits: with conversion to float32 it is half as fast or less."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        with h5py.File(_path(data, file)) as opened:
            dset = opened["activations"]
            kind = dset.id.get_type()
            out = np.ones((BATCH, N_MODELS, D_MODEL), np.uint16)
            memory = h5py.h5s.create_simple(out.shape)

            def batches(sets: NDArray[np.int64]) -> Iterator[Batch]:
                for rows in sets:
                    dset.id.read(memory, select(dset.shape, (rows,), dset).id, out, mtype=kind)
                    yield out

            yield Session(lambda number, n: batches(np.sort(draw(data.n_rows, number)[: n * BATCH].reshape(-1, BATCH))))

    return Contestant(f"h5py fancy, {file}", session, file, sampled=True)


def h5py_slices() -> Contestant:
    """The usual good h5py code: slices of a chunk (of bits) into a numpy pool, `pool[rows]` out of it."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        pool = np.full((pool_rows_for(data), N_MODELS, D_MODEL), 1, np.uint16)
        with h5py.File(data.chunked) as opened:
            dset = opened["activations"]
            space, kind = dset.id.get_space(), dset.id.get_type()
            memory = h5py.h5s.create_simple((CHUNK_ROWS, N_MODELS, D_MODEL))

            def epoch(number: int, n_batches: int) -> Iterator[Batch]:
                chunks = draw(data.n_rows // CHUNK_ROWS, number)[: n_batches * BATCH // CHUNK_ROWS]
                for i, filling in enumerate(fillings_of(chunks, len(pool))):
                    for place, chunk in enumerate(filling.tolist()):
                        space.select_hyperslab((chunk * CHUNK_ROWS, 0, 0), (CHUNK_ROWS, N_MODELS, D_MODEL))
                        dset.id.read(memory, space, pool[place * CHUNK_ROWS : (place + 1) * CHUNK_ROWS], mtype=kind)
                    for rows in draw(len(filling) * CHUNK_ROWS, number * 1000 + i).reshape(-1, BATCH):
                        yield pool[rows]

            yield Session(epoch)

    return Contestant("h5py slices + pool[rows]", session, "chunked")


def h5py_pool(read_ahead: bool) -> Contestant:
    """The best h5py code: raw chunks, no memory is new; optionally a thread fills a second pool meanwhile."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        pool_rows = pool_rows_for(data)
        pools = ChunkPool(data.chunked, pool_rows, 1 + read_ahead)
        out = np.full((BATCH, ROW_VALUES), 1, np.uint16)

        def epoch(number: int, n_batches: int) -> Iterator[Batch]:
            chunks = draw(data.n_rows // CHUNK_ROWS, number)[: n_batches * BATCH // CHUNK_ROWS]
            fillings = fillings_of(chunks, pool_rows)
            with ThreadPoolExecutor(1) as reader:
                ahead = reader.submit(pools.fill, 0, fillings[0]) if read_ahead else None
                for i, filling in enumerate(fillings):
                    pool = pools.fill(i, filling) if ahead is None else ahead.result()
                    if read_ahead and i + 1 < len(fillings):
                        ahead = reader.submit(pools.fill, i + 1, fillings[i + 1])
                    for rows in draw(len(pool), number * 1000 + i).reshape(-1, BATCH):
                        yield np.take(pool, rows, axis=0, out=out, mode="clip")

        with pools.file:
            yield windowed(epoch, pool_rows / BATCH, data.n_rows / BATCH) if read_ahead else Session(epoch)

    return Contestant("h5py raw chunks + pool" + ", reader thread" * read_ahead, session, "chunked")


def memmap_gather(how: str) -> Contestant:
    """Random rows out of a memory map, by numpy fancy indexing or by torch.index_select with all threads."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        # copy on write: torch wants writable memory
        rows = np.memmap(data.contiguous, np.uint16, "c", data_offset(data.contiguous), (data.n_rows, ROW_VALUES))
        out = np.full((BATCH, ROW_VALUES), 1, np.uint16)
        values, target = (torch.from_numpy(x.view(np.int64)) for x in (rows, out))

        def batches(sets: NDArray[np.int64]) -> Iterator[Batch]:
            for wanted in sets:
                if how == "numpy":
                    yield rows[wanted]
                else:
                    torch.index_select(values, 0, torch.from_numpy(wanted), out=target)
                    yield out

        yield Session(lambda number, n: batches(draw(data.n_rows, number)[: n * BATCH].reshape(-1, BATCH)))

    return Contestant({"numpy": "memmap fancy", "torch": "index_select on memmap"}[how], session, sampled=True)


def pure_python(direct: bool, block_rows: int = 32) -> Contestant:
    """Fastdiff's algorithm without C++: blocks are scattered into a pool by os.preadv in threads."""
    n_threads = 16 if direct else 2

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        base, pool_rows = data_offset(data.contiguous), pool_rows_for(data)
        n_blocks = pool_rows // block_rows
        memory = faulted(2 * pool_rows * ROW_BYTES)
        places = [memoryview(memory)[i * ROW_BYTES : (i + 1) * ROW_BYTES] for i in range(2 * pool_rows)]
        pool = np.frombuffer(memory, np.uint16).reshape(2, pool_rows, ROW_VALUES)
        fd = os.open(data.contiguous, os.O_RDONLY | (os.O_DIRECT if direct else 0))

        def read(block: int, to: list[memoryview]) -> None:
            got = os.preadv(fd, to, base + block * block_rows * ROW_BYTES)
            if got != len(to) * ROW_BYTES:
                raise OSError(f"block {block}: {got} bytes")

        def fill(threads: ThreadPoolExecutor, window: int, blocks: list[int], number: int) -> list[Any]:
            order = draw(len(blocks) * block_rows, number * 1000 + window) + window % 2 * pool_rows
            targets = order.reshape(-1, block_rows).tolist()
            pairs = zip(blocks, targets, strict=True)
            return [threads.submit(read, block, [places[i] for i in target]) for block, target in pairs]

        def epoch(number: int, n_batches: int) -> Iterator[Batch]:
            blocks = draw(data.n_rows // block_rows, number)[: n_batches * BATCH // block_rows].tolist()
            windows = [blocks[i : i + n_blocks] for i in range(0, len(blocks), n_blocks)]
            with ThreadPoolExecutor(n_threads) as threads:
                coming = fill(threads, 0, windows[0], number)
                for i, window in enumerate(windows):
                    following = fill(threads, i + 1, windows[i + 1], number) if i + 1 < len(windows) else []
                    for done in coming:
                        done.result()
                    coming = following
                    yield from pool[i % 2][: len(window) * block_rows].reshape(-1, BATCH, ROW_VALUES)

        try:
            yield windowed(epoch, pool_rows / BATCH, data.n_rows / BATCH)
        finally:
            os.close(fd)

    return Contestant("pure Python preadv", session, buffered=not direct)
