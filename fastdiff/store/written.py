"""Whether all values of an HDF5 data set were written: where they were not, HDF5 reads zeros without a word."""

import math
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError


def check_written(path: Path, data_set: h5py.Dataset) -> NDArray[np.int64] | None:
    """Refuse a data set with values that are not there.

    Args:
        path: The file, for messages.
        data_set: A data set in it, of one axis or more, none of them empty.

    Returns:
        Of a chunked data set (chunks, axes + 1): the first index on each axis, and the byte offset in the file.

    Raises:
        InputError: Rows were never written, or lie in another file that is missing or too short.
    """
    plist = data_set.id.get_create_plist()
    layout = plist.get_layout()
    if layout == h5py.h5d.CHUNKED:
        return _check_chunks(path, data_set)
    if layout == h5py.h5d.VIRTUAL:
        _check_virtual(path, data_set, plist)
    elif plist.get_external_count():
        _check_external(path, data_set, plist)
    elif layout == h5py.h5d.CONTIGUOUS and data_set.id.get_offset() is None:
        raise _never_written(path, data_set, 0, data_set.shape[0])
    return None


def _never_written(path: Path, data_set: h5py.Dataset, start: int, stop: int) -> InputError:
    return InputError(
        f"{path}: rows {start} to {stop - 1} of {data_set.name} were never written; extract or write them again"
    )


def _check_chunks(path: Path, data_set: h5py.Dataset) -> NDArray[np.int64]:
    shape, chunk = data_set.shape, data_set.chunks
    filtered = data_set.id.get_create_plist().get_nfilters() > 0
    # chunks are stored at full size, at the end of an axis too
    full_bytes = math.prod(chunk) * data_set.id.get_type().get_size()
    file_bytes = path.stat().st_size
    found: list[tuple[int, ...]] = []
    outside: list[tuple[int, ...]] = []

    # get_chunk_info is quadratic: 21 to 54 ms each at 200,000 chunks, where this takes 0.5 s for all
    def take(info: h5py.h5d.StoreInfo) -> None:
        whole = filtered or info.size == full_bytes
        inside = info.byte_offset is not None and info.byte_offset + info.size <= file_bytes
        if whole and inside and all(0 <= at < size for at, size in zip(info.chunk_offset, shape, strict=True)):
            found.append((*info.chunk_offset, info.byte_offset))
        else:
            outside.append(info.chunk_offset)

    data_set.id.chunk_iter(take)
    if outside:
        raise InputError(
            f"{path}: damaged or truncated, the chunk of {data_set.name} at {outside[0]} is not in its "
            f"{file_bytes} bytes; copy or extract it again"
        )
    chunks = np.array(found, np.int64).reshape(len(found), len(shape) + 1)
    per_band = math.prod(-(-size // step) for size, step in zip(shape[1:], chunk[1:], strict=True))
    bands, counts = np.unique(chunks[:, 0] // chunk[0], return_counts=True)
    whole_bands = bands[counts == per_band]
    # the file may claim more bands than memory holds, so none but those found is ever listed
    gap = int(np.argmin(np.append(whole_bands, -1) == np.arange(len(whole_bands) + 1)))
    if gap * chunk[0] < shape[0]:
        stop = int(whole_bands[gap]) * chunk[0] if gap < len(whole_bands) else shape[0]
        raise _never_written(path, data_set, gap * chunk[0], stop)
    return chunks


def _check_external(path: Path, data_set: h5py.Dataset, plist: h5py.h5p.PropDCID) -> None:
    wanted = math.prod(data_set.shape) * data_set.id.get_type().get_size()
    for i in range(plist.get_external_count()):
        name, offset, size = plist.get_external(i)
        outside = path.parent / name.decode(errors="surrogateescape")
        part = min(size, wanted)
        if not outside.is_file() or outside.stat().st_size < offset + part:
            raise InputError(f"{path}: {data_set.name} lies in {outside}, which is missing or too short; copy it too")
        wanted -= part


def _check_virtual(path: Path, data_set: h5py.Dataset, plist: h5py.h5p.PropDCID) -> None:
    covered = 0
    for i in range(plist.get_virtual_count()):
        name, inside = plist.get_virtual_filename(i), plist.get_virtual_dsetname(i)
        outside = path if name == "." else path.parent / name
        with h5py.File(outside, "r", locking=False) if outside.is_file() else _missing(path, data_set, outside) as file:
            source = file.get(inside)
            if not isinstance(source, h5py.Dataset) or source.is_virtual or not _holds(source, plist, i):
                raise InputError(
                    f"{path}: {data_set.name} shows {inside} of {outside}, which is no data set of its own "
                    "or too small; copy the right file, or write the rows again"
                )
            check_written(outside, source)
        covered += plist.get_virtual_vspace(i).get_select_npoints()
    if covered != math.prod(data_set.shape):
        raise _never_written(path, data_set, 0, data_set.shape[0])


def _holds(source: h5py.Dataset, plist: h5py.h5p.PropDCID, i: int) -> bool:
    """True if a source has all the values that mapping i of a virtual data set shows."""
    shown = plist.get_virtual_srcspace(i)
    if shown.get_select_type() == h5py.h5s.SEL_ALL:  # its shape is not stored
        wanted: int = plist.get_virtual_vspace(i).get_select_npoints()
        return math.prod(source.shape) == wanted
    _, last = shown.get_select_bounds()
    return len(last) == len(source.shape) and all(at < size for at, size in zip(last, source.shape, strict=True))


def _missing(path: Path, data_set: h5py.Dataset, outside: Path) -> h5py.File:
    raise InputError(f"{path}: {data_set.name} shows rows of {outside}, which is missing; copy it too")
