"""Where the rows of a shard lie: opened once with HDF5, checked, and closed again.

After this a row is read at `offset + row · row_bytes` of the file, without HDF5. Whatever could make that
wrong is refused here by name: chunks, filters, external files, space that was never allocated, a file that is
too short. The first and last row are read both ways and compared.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError
from fastdiff.store.format import COLUMNS, TORCH_DTYPES, DtypeName, dtype_name

_REPACK = "`h5repack -l CONTI -f NONE old.h5 new.h5` makes it so"


@dataclass(frozen=True)
class ShardIndex:
    """The rows of one file."""

    path: Path
    n_rows: int
    n_models: int
    d_model: int
    dtype: DtypeName
    offset: int
    columns: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_models * self.d_model * TORCH_DTYPES[self.dtype].itemsize


def open_hdf5(path: Path) -> h5py.File:
    """Open a file for reading, without HDF5's lock.

    Raises:
        InputError: It is missing, not HDF5, or truncated.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        cause = str(error)
        if "truncated file" in cause:
            raise InputError(
                f"{path}: truncated, {path.stat().st_size} bytes are left; copy or extract it again"
            ) from error
        raise InputError(f"{path}: cannot be opened as HDF5 ({cause})") from error


def index_shard(path: Path) -> ShardIndex:
    """Find and check the rows of a shard.

    Raises:
        InputError: The file is no shard that can be read; the message says why and what helps.
    """
    with open_hdf5(path) as file:
        try:
            data_set = file.get("activations")
            if not isinstance(data_set, h5py.Dataset):
                found = ", ".join(sorted(file)) or "nothing"
                raise InputError(f"{path}: no data set /activations (found: {found}); extract it again or name it so")
            index = _check(path, file, data_set)
            _probe(index, data_set)
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{path}: damaged ({error}); copy or extract it again") from error
    return index


def _check(path: Path, file: h5py.File, data_set: h5py.Dataset) -> ShardIndex:
    shape = data_set.shape
    if shape is None or len(shape) != 3:
        raise InputError(f"{path}: /activations has shape {shape}, write it again as (rows, models, d_model)")
    n_rows, n_models, d_model = (int(size) for size in shape)
    if 0 in shape:
        raise InputError(f"{path}: /activations has shape {shape}: there is nothing in it; extract it again")
    dtype = dtype_name(data_set.id.get_type())
    if dtype is None:
        raise InputError(
            f"{path}: /activations is {_describe(data_set)}; "
            "write it again as little-endian bfloat16, float16 or float32"
        )
    offset = _offset(path, data_set)
    return ShardIndex(path, n_rows, n_models, d_model, dtype, offset, _columns(path, file, n_rows))


def _offset(path: Path, data_set: h5py.Dataset) -> int:
    plist = data_set.id.get_create_plist()
    layout = plist.get_layout()
    if layout == h5py.h5d.CHUNKED:
        filters = plist.get_nfilters()
        how = "chunked and compressed" if filters else "chunked"
        raise InputError(f"{path}: /activations is {how}, contiguous is needed; {_REPACK}")
    if layout != h5py.h5d.CONTIGUOUS or plist.get_external_count():
        how = {h5py.h5d.COMPACT: "compact", h5py.h5d.CONTIGUOUS: "in an external file"}.get(layout, "virtual")
        raise InputError(f"{path}: /activations is {how}, contiguous is needed; {_REPACK}")
    offset = data_set.id.get_offset()
    if offset is None:
        raise InputError(
            f"{path}: rows 0 to {data_set.shape[0] - 1} of /activations were never written; extract it again"
        )
    return int(offset)


def _columns(path: Path, file: h5py.File, n_rows: int) -> tuple[str, ...]:
    found = []
    for name in COLUMNS:
        column = file.get(name)
        if column is None:
            continue
        if not isinstance(column, h5py.Dataset) or column.shape != (n_rows,) or column.dtype.kind not in "iu":
            what = f"{column.shape} {column.dtype}" if isinstance(column, h5py.Dataset) else "no data set"
            raise InputError(f"{path}: /{name} is {what}, expected ({n_rows},) integers; extract it again")
        found.append(name)
    return tuple(found)


def _describe(data_set: h5py.Dataset) -> str:
    kind = data_set.id.get_type()
    big = isinstance(kind, h5py.h5t.TypeFloatID) and kind.get_order() == h5py.h5t.ORDER_BE
    return f"big-endian {data_set.dtype.name}" if big else str(data_set.dtype)


def _probe(index: ShardIndex, data_set: h5py.Dataset) -> None:
    """Compare the first and the last row, read by HDF5 and read at the offset."""
    with index.path.open("rb") as f:
        for row in {0, index.n_rows - 1}:
            there = os.pread(f.fileno(), index.row_bytes, index.offset + row * index.row_bytes)
            if there != _raw_row(index, data_set, row).tobytes():
                raise InputError(f"{index.path}: row {row} is not where HDF5 says /activations is; {_REPACK}")


def _raw_row(index: ShardIndex, data_set: h5py.Dataset, row: int) -> NDArray[Any]:
    """One row's bits by HDF5: memory type = file type, so nothing is converted."""
    space = data_set.id.get_space()
    space.select_hyperslab((row, 0, 0), (1, index.n_models, index.d_model))
    bits = np.empty(
        (1, index.n_models, index.d_model), {2: np.uint16, 4: np.uint32}[TORCH_DTYPES[index.dtype].itemsize]
    )
    data_set.id.read(h5py.h5s.create_simple(bits.shape), space, bits, mtype=data_set.id.get_type())
    return bits
