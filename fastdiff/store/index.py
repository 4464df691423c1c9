"""Where the rows of a shard lie: opened once with HDF5, checked, and closed again.

Rows that lie back to back are an extent: a contiguous data set is one, a chunked one without filters has one
per chunk, or fewer where chunks are neighbours in the file. After this, row i of an extent is read at
`offset + i · row_bytes`, without HDF5; a few rows are read both ways and compared. Every other layout is
readable too, through HDF5, and `slow` says why. Rows that are not in the file are refused: HDF5 reads zeros there.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError
from fastdiff.store.format import COLUMNS, NORM_TYPE, NORMS, TORCH_DTYPES, DtypeName, crc_blocks, dtype_name
from fastdiff.store.written import check_written

REPACK = "`h5repack -l CONTI -f NONE old.h5 new.h5`"
BITS: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}

# chunks of one band of rows stay decompressed between reads, up to this size
_CACHE_BYTES = 1 << 30

# what h5py raises for what HDF5 finds wrong with a file
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)

_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip-compressed",
    h5py.h5z.FILTER_LZF: "lzf-compressed",
    h5py.h5z.FILTER_SZIP: "szip-compressed",
    h5py.h5z.FILTER_SHUFFLE: "shuffled",
    h5py.h5z.FILTER_FLETCHER32: "checksummed by fletcher32",
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The rows of one file.

    Attributes:
        path: The file.
        n_rows: Its rows, n.
        n_models: M.
        d_model: D.
        dtype: What its values are.
        columns: Side columns it has, `norms` among them.
        offsets: (E,) byte offset of each extent, in row order; empty if `slow`.
        extent_rows: (E,) rows in each extent.
        slow: Why rows must be read through HDF5, or None.
        has_crc: It has `/crc32c`.
    """

    path: Path
    n_rows: int
    n_models: int
    d_model: int
    dtype: DtypeName
    columns: tuple[str, ...]
    offsets: NDArray[np.int64]
    extent_rows: NDArray[np.int64]
    slow: str | None
    has_crc: bool

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
    except HDF5_ERRORS as error:
        cause = str(error)
        if "truncated file" in cause:
            raise InputError(
                f"{path}: truncated, {path.stat().st_size} bytes are left; copy or extract it again"
            ) from error
        raise InputError(f"{path}: cannot be opened as HDF5 ({cause})") from error


def index_shard(path: Path, told: DtypeName | None = None) -> ShardIndex:
    """Find and check the rows of a shard.

    Args:
        path: The file.
        told: The dtype that `store.json` names. Values of another type of 2 bytes are bfloat16 only if it says so.

    Raises:
        InputError: The file is no shard that can be read; the message says why and what helps.
    """
    with open_hdf5(path) as file:
        try:
            data_set = open_activations(path, file)
            index = _check(path, file, data_set, told)
            _probe(index, data_set)
        except (*HDF5_ERRORS, MemoryError) as error:  # memory: of a few rows, so their size is wrong
            raise InputError(f"{path}: damaged ({error}); copy or extract it again") from error
    return index


def open_activations(path: Path, file: h5py.File) -> h5py.Dataset:
    """The data set `/activations`, as `open_data_set` opens it.

    Raises:
        InputError: There is none.
    """
    return open_data_set(path, file, "activations")


def open_data_set(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A data set that finds external files beside `path`, and whose chunk cache holds one band of rows.

    The data set must not be open already: HDF5 would keep the properties of the first opening.

    Raises:
        InputError: There is none.
    """
    return h5py.Dataset(h5py.h5d.open(file.id, name.encode(), _access(path, file, name)))


def _access(path: Path, file: h5py.File, name: str) -> h5py.h5p.PropDAID:
    # what this opens is closed when it returns, else the next opening would not take the properties
    data_set = file.get(name)
    if not isinstance(data_set, h5py.Dataset):
        found = ", ".join(sorted(file)) or "nothing"
        raise InputError(f"{path}: no data set /{name} (found: {found}); extract it again or name it so")
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    if data_set.external:
        # else the file is looked for where the process happens to be
        access.set_efile_prefix(b"${ORIGIN}")
    if data_set.chunks is not None and len(data_set.chunks) == 3:
        splits = math.prod(-(-size // step) for size, step in zip(data_set.shape[1:], data_set.chunks[1:], strict=True))
        band = splits * math.prod(data_set.chunks) * data_set.id.get_type().get_size()
        # 10 slots per chunk, as HDF5's manual advises
        access.set_chunk_cache(min(max(521, 10 * splits), 1 << 20), min(band, _CACHE_BYTES), 1.0)
    return access


def memory_type(file_type: h5py.h5t.TypeID) -> h5py.h5t.TypeID:
    """The type to read as, so that HDF5 converts nothing but the byte order."""
    if not _is_big_endian(file_type):
        return file_type
    little = file_type.copy()
    little.set_order(h5py.h5t.ORDER_LE)
    return little


def read_bits(data_set: h5py.Dataset, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) by HDF5, as bits: (stop - start, M, D)."""
    space = data_set.id.get_space()
    shape = (stop - start, *data_set.shape[1:])
    space.select_hyperslab((start, 0, 0), shape)
    kind = data_set.id.get_type()
    bits: NDArray[Any] = np.empty(shape, BITS[kind.get_size()])
    data_set.id.read(h5py.h5s.create_simple(shape), space, bits, mtype=memory_type(kind))
    return bits


def _check(path: Path, file: h5py.File, data_set: h5py.Dataset, told: DtypeName | None) -> ShardIndex:
    shape = data_set.shape
    if shape is None or len(shape) != 3:
        raise InputError(f"{path}: /activations has shape {shape}, write it again as (rows, models, d_model)")
    n_rows, n_models, d_model = (int(size) for size in shape)
    if 0 in shape:
        raise InputError(f"{path}: /activations has shape {shape}: there is nothing in it; extract it again")
    dtype = _dtype(path, data_set, told)
    slow = _slow(path, data_set)
    chunks = check_written(path, data_set)
    offsets = extent_rows = np.empty(0, np.int64)
    if slow is None:
        row_bytes = n_models * d_model * TORCH_DTYPES[dtype].itemsize
        if chunks is None:
            offsets, extent_rows = np.array([data_set.id.get_offset()], np.int64), np.array([n_rows], np.int64)
        else:
            offsets, extent_rows = _extents(chunks, n_rows, data_set.chunks[0], row_bytes)
        _check_room(path, offsets, extent_rows, row_bytes)
    columns = tuple(name for name in COLUMNS if _has_integers(path, file, name, n_rows))
    if _has_norms(path, file, n_rows, n_models):
        columns += (NORMS,)
    has_crc = _has_integers(path, file, "crc32c", crc_blocks(n_rows))
    return ShardIndex(path, n_rows, n_models, d_model, dtype, columns, offsets, extent_rows, slow, has_crc)


def _dtype(path: Path, data_set: h5py.Dataset, told: DtypeName | None) -> DtypeName:
    kind = data_set.id.get_type()
    dtype = dtype_name(memory_type(kind))
    if dtype is not None:
        return dtype
    cure = "write it again as bfloat16, float16 or float32"
    if isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeOpaqueID) and kind.get_size() == 2:
        if told == "bfloat16":
            return "bfloat16"
        cure = f'if these are bfloat16 bits, say "dtype": "bfloat16" in a store.json beside the file, else {cure}'
    raise InputError(f"{path}: /activations is {data_set.dtype}; {cure}")


def _slow(path: Path, data_set: h5py.Dataset) -> str | None:
    """Why rows cannot be read by position, or None."""
    plist = data_set.id.get_create_plist()
    layout = plist.get_layout()
    reasons = []
    if layout == h5py.h5d.CHUNKED:
        for i in range(plist.get_nfilters()):
            number = plist.get_filter(i)[0]
            name = _FILTERS.get(number, f"filtered by HDF5 filter {number}")
            if not h5py.h5z.filter_avail(number):
                raise InputError(
                    f"{path}: /activations is {name}, which this HDF5 cannot undo; write it again with {REPACK} "
                    "on a machine that can"
                )
            reasons.append(name)
        if data_set.chunks[1:] != data_set.shape[1:]:
            reasons.append("chunks split rows")
    elif layout != h5py.h5d.CONTIGUOUS:
        reasons.append("compact" if layout == h5py.h5d.COMPACT else "virtual")
    elif plist.get_external_count():
        reasons.append("in an external file")
    if _is_big_endian(data_set.id.get_type()):
        reasons.append("big-endian")
    return ", ".join(reasons) or None


def _is_big_endian(kind: h5py.h5t.TypeID) -> bool:
    numeric = isinstance(kind, h5py.h5t.TypeFloatID | h5py.h5t.TypeIntegerID)
    return numeric and kind.get_order() == h5py.h5t.ORDER_BE


def _extents(
    chunks: NDArray[np.int64], n_rows: int, chunk_rows: int, row_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and rows of the extents; chunks that follow one another in the file are one."""
    offsets = chunks[np.argsort(chunks[:, 0]), -1]
    rows = np.full(len(offsets), chunk_rows, np.int64)
    rows[-1] = n_rows - chunk_rows * (len(offsets) - 1)
    begins = np.flatnonzero(np.r_[True, offsets[1:] != offsets[:-1] + rows[:-1] * row_bytes])
    return offsets[begins], np.add.reduceat(rows, begins)


def _check_room(path: Path, offsets: NDArray[np.int64], extent_rows: NDArray[np.int64], row_bytes: int) -> None:
    """The extents lie inside the file and apart from each other."""
    size = path.stat().st_size
    order = np.argsort(offsets)
    starts, rows = offsets[order], extent_rows[order]
    # a damaged file may promise more rows than 63 bits of bytes can hold
    most_rows = (np.append(starts[1:], size) - starts) // row_bytes
    if starts[0] < 0 or bool((most_rows < rows).any()):
        raise InputError(
            f"{path}: damaged or truncated, /activations does not fit its {size} bytes; copy or extract it again"
        )


def _has_integers(path: Path, file: h5py.File, name: str, length: int) -> bool:
    """True if there is a data set `name`, of `length` integers that were all written."""
    column = file.get(name)
    if column is None:
        return False
    if not isinstance(column, h5py.Dataset) or column.shape != (length,) or column.dtype.kind not in "iu":
        what = f"{column.shape} {column.dtype}" if isinstance(column, h5py.Dataset) else "no data set"
        raise InputError(f"{path}: /{name} is {what}, expected ({length},) integers; extract it again")
    check_written(path, column)
    return True


def _has_norms(path: Path, file: h5py.File, n_rows: int, n_models: int) -> bool:
    """True if there is the column `norms`, all written; another tool may call something else so."""
    column = file.get(NORMS)
    if not isinstance(column, h5py.Dataset) or column.shape != (n_rows, n_models) or column.dtype != NORM_TYPE:
        return False
    check_written(path, column)
    return True


def _probe(index: ShardIndex, data_set: h5py.Dataset) -> None:
    """Compare the first, the last and one row in between, read by HDF5 and read at their offsets."""
    first_rows = np.cumsum([0, *index.extent_rows])
    with index.path.open("rb") as f:
        for row in sorted({0, index.n_rows // 2, index.n_rows - 1}):
            by_hdf5 = read_bits(data_set, row, row + 1)
            if index.slow is not None:
                continue
            extent = int(np.searchsorted(first_rows, row, side="right")) - 1
            offset = int(index.offsets[extent]) + (row - int(first_rows[extent])) * index.row_bytes
            if os.pread(f.fileno(), index.row_bytes, offset) != by_hdf5.tobytes():
                raise InputError(
                    f"{index.path}: row {row} is not where HDF5 says /activations is; {REPACK} puts it in order"
                )
