"""Rows of shards that cannot be read by position: through HDF5, every chunk once per call."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError
from fastdiff.store.index import HDF5_ERRORS, open_activations, open_hdf5, read_bits

# rows that are fetched together where chunks do not say: the shuffler's blocks
_GRAIN = 32
# one read returns at most this much
_SLAB_BYTES = 64 << 20


class Hdf5Rows:
    """Shards held open. h5py reads with one thread at a time, whoever asks, and is at rest while a process forks.

    Args:
        paths: The shards, in row order.
        first_rows: (S + 1,) the first row of each, and the number of all rows.

    Raises:
        InputError: A file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], first_rows: NDArray[np.int64]):
        self._paths, self._first_rows = list(paths), first_rows
        self._files = [open_hdf5(path) for path in self._paths]
        self._data_sets = [open_activations(*pair) for pair in zip(self._paths, self._files, strict=True)]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read rows.

        Args:
            rows: (n,) row numbers in [0, N), in any order, repeats allowed.
            out: (n, M, D), where their bits go.

        Raises:
            InputError: A file cannot be read.
        """
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        for shard, (begin, end) in enumerate(pairwise(np.searchsorted(ascending, self._first_rows))):
            if begin == end:
                continue
            within = ascending[begin:end] - self._first_rows[shard]
            try:
                _read_shard(self._data_sets[shard], within, order[begin:end], out)
            except HDF5_ERRORS as error:
                path = self._paths[shard]
                raise InputError(f"{path}: cannot be read ({error}); copy or extract it again") from error


def _read_shard(
    data_set: h5py.Dataset,
    rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    out: NDArray[Any],
) -> None:
    """Read ascending rows of one shard to their slots of `out`."""
    grain = _GRAIN if data_set.chunks is None else data_set.chunks[0]
    row_bytes = out.itemsize * int(np.prod(out.shape[1:]))
    most = max(1, _SLAB_BYTES // row_bytes)
    apart = (rows[1:] // grain != rows[:-1] // grain) & (rows[1:] > rows[:-1] + 1)
    groups = np.flatnonzero(np.r_[True, apart, True])
    for begin, end in pairwise(groups):
        while begin < end:
            first = int(rows[begin])
            stop = int(np.searchsorted(rows[begin:end], first + most)) + begin
            slab = read_bits(data_set, first, int(rows[stop - 1]) + 1)
            out[slots[begin:stop]] = slab[rows[begin:stop] - first]
            begin = stop
