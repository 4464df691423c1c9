"""Rivals in the shuffle benchmark: torch DataLoaders with two worker processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from shuffle_contestant import Batch, ChunkPool, Contestant, Session, data_offset, draw, fillings_of, pool_rows_for
from shuffle_data import BATCH, CHUNK_ROWS, D_MODEL, N_MODELS, ROW_BYTES, ROW_VALUES, Data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

WORKERS = 2


class _H5Rows(Dataset[Tensor]):
    """One row per item out of HDF5; every worker opens the file itself."""

    def __init__(self, path: Path, n_rows: int):
        self._path, self._n_rows = path, n_rows
        self._dset: h5py.Dataset | None = None

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> Tensor:
        if self._dset is None:
            self._dset = h5py.File(self._path)["activations"]
            self._space, self._kind = self._dset.id.get_space(), self._dset.id.get_type()
            self._memory = h5py.h5s.create_simple((1, N_MODELS, D_MODEL))
        out = np.empty((1, N_MODELS, D_MODEL), np.uint16)
        self._space.select_hyperslab((row, 0, 0), (1, N_MODELS, D_MODEL))
        self._dset.id.read(self._memory, self._space, out, mtype=self._kind)
        return torch.from_numpy(out[0])


class _MemmapRows(Dataset[Tensor]):
    """One row per item out of a memory map."""

    def __init__(self, path: Path, offset: int, n_rows: int):
        self._map = np.memmap(path, np.uint16, "c", offset, (n_rows, ROW_VALUES))

    def __len__(self) -> int:
        return len(self._map)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self._map[row])


class _PoolBatches(IterableDataset[Tensor]):
    """`ChunkPool` in each worker, over the worker's share of the chunks; items are whole batches."""

    def __init__(self, path: Path, chunks: NDArray[np.int64], pool_rows: int):
        self._path, self._chunks, self._pool_rows = path, chunks, pool_rows

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        assert info is not None
        mine = self._chunks.reshape(-1, BATCH // CHUNK_ROWS)[info.id :: info.num_workers].ravel()
        pools = ChunkPool(self._path, self._pool_rows, 1)
        with pools.file:
            for chunks in fillings_of(mine, self._pool_rows):
                pool = pools.fill(0, chunks)
                for rows in draw(len(pool), int(chunks[0])).reshape(-1, BATCH):
                    # straight into shared memory, as torch's own collate does
                    shared = torch.UntypedStorage._new_shared(BATCH * ROW_BYTES)
                    batch = torch.empty(0, dtype=torch.int16).set_(shared).view(BATCH, ROW_VALUES)
                    np.take(pool.view(np.int16), rows, axis=0, out=batch.numpy(), mode="clip")
                    yield batch


def _rows_by_loader(name: str, file: str, rows: Callable[[Data], Dataset[Tensor]]) -> Contestant:
    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        def epoch(number: int, n_batches: int) -> Iterator[Batch]:
            order = draw(data.n_rows, number)[: n_batches * BATCH].tolist()
            yield from DataLoader(rows(data), BATCH, sampler=order, num_workers=WORKERS)

        yield Session(epoch, WORKERS, lambda n: n - WORKERS)

    return Contestant(name, session, file, sampled=True)


def loader_h5py_rows() -> Contestant:
    """The usual torch Dataset over HDF5."""
    return _rows_by_loader("DataLoader 2, h5py rows", "chunked", lambda data: _H5Rows(data.chunked, data.n_rows))


def loader_memmap_rows() -> Contestant:
    """The usual torch Dataset over a memory map."""
    return _rows_by_loader(
        "DataLoader 2, memmap rows",
        "contiguous",
        lambda data: _MemmapRows(data.contiguous, data_offset(data.contiguous), data.n_rows),
    )


def loader_pool() -> Contestant:
    """The best DataLoader: chunk pools in the workers, whole batches through shared memory."""

    @contextmanager
    def session(data: Data) -> Iterator[Session]:
        def epoch(number: int, n_batches: int) -> Iterator[Batch]:
            chunks = draw(data.n_rows // CHUNK_ROWS, number)[: n_batches * BATCH // CHUNK_ROWS]
            source = _PoolBatches(data.chunked, chunks, pool_rows_for(data))
            yield from DataLoader(source, batch_size=None, num_workers=WORKERS)

        yield Session(epoch, WORKERS, lambda n: n - WORKERS)

    return Contestant("DataLoader 2, chunk pools", session, "chunked")
