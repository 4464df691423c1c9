"""The activation store, schema version 1: what its files hold, and how an empty shard is made.

A store is a directory with `store.json` and one or more shards, `shard-00000.h5`, `shard-00001.h5`, …
A shard is a plain HDF5 file. Row i of all its data sets is the same token; rows are in document order, and
the shards follow one another in the order `store.json` lists them (without a list: by file name).

    /activations   (n, M, D) bfloat16, float16 or float32: what each of the M models computed at that token
    /token_ids     (n,) int32
    /sequence_ids  (n,) int64: the document, unique over the whole store
    /positions     (n,) int32: the position in the sequence
    /roles         (n,) uint8: index into the roles of store.json
    /sources       (n,) uint16: index into the sources of store.json
    /norms         (n, M) float32: L2 norm of each model's part of the row, of the values as they are stored
    /crc32c        (⌈n/32⌉,) uint32: CRC-32C of the bytes of rows 32j … 32j+31 of /activations

Only `/activations` is required; a side column is there in every shard or in none. A data set `/norms` of another
shape or type is not this column. All numbers are little
endian. Model 0 is `base`, model 1 is `tuned`. bfloat16 is the HDF5 float type of 2 bytes with 1 sign, 8
exponent and 7 mantissa bits and bias 127: HDF5 reads it as float32, exactly. HDF5 must not write it from
float32: its rounding is away from zero at ties, and slow.

All data sets are contiguous, uncompressed and allocated when the file is made; those of 4096 bytes or more
begin at a multiple of 4096. Rows can therefore be read and written at `offset + row · M · D · itemsize`
without the HDF5 library. This is what is written; stores of other tools may have other layouts (`index.py`).
No file holds the time of day, so equal contents are equal bytes.

`store.json`, written last, is one JSON object; a directory without it is not a store. Required are
`schema` (1) and `models` (one object with a `name`, or just the name, per model). Optional:

    dtype              type of /activations
    shards             [{"file", "n_rows", "sha256"}]
    roles, sources     ["bos", "text", …], [{"dataset", "category"}]
    tokenizer          facts about the tokenizer and chat template
    datasets           facts about the data sets, with their fingerprints
    left_out           which rows are left out of use, although they are here (`left_out.py`): max_norm, the rule;
                       median [M] of the norms over the first 50,000 rows that are not BOS; rows, how many rows
                       other than BOS it leaves out; position_0, how many of them as first positions;
                       variance_share [M], of the squared distance of all rows but BOS from their mean
    stats              float64 statistics over the stored values of the rows in use:
                       n_rows, mean [M][D], variance [M] (summed over D, divided by n), mean_norm [M]
    vocabulary_sha256  sha256 of `vocabulary.json`, a JSON list: index token id, value display string
    command, versions, config   how the store was made

With `max_norm` 0, only rows whose role is "bos" are left out of use. What the writer is not told is 0.

Stores without `left_out` (of versions before it, of other tools, bare files) are held against the default rule when
they are opened for use: 3 times the median, or 6 where `hook` of the first model is mlp_out or attn_out. Their norms
are measured, in one pass over the rows, if they have no `/norms`. Their `stats`, which are over all rows whose role is
not "bos", are computed again if that leaves out a row. `"left_out": {"max_norm": 0}` in store.json keeps all rows.

A shard's sha256 is over the bytes of `/crc32c`, then of `/token_ids`, `/sequence_ids`, `/positions`,
`/roles`, `/sources` and `/norms`, as far as they exist, then of the JSON object
{"dtype", "n_rows", "n_models", "d_model", "schema"} with sorted keys and no spaces.
"""

import errno
import hashlib
import io
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fastdiff.errors import InputError
from fastdiff.rundir import canonical_json

SCHEMA = 1
STORE_FILE = "store.json"
VOCABULARY_FILE = "vocabulary.json"
CRC_ROWS = 32
ALIGNMENT = 4096

# more than HDF5 needs beside the values (7 kB measured)
_METADATA_BYTES = 1 << 16

DtypeName = Literal["bfloat16", "float16", "float32"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

# rows other than BOS over which the median norm is taken
ROWS_OF_MEDIAN = 50_000

# those a writer is given, in the order a shard's hash takes them
COLUMNS: dict[str, np.dtype[Any]] = {
    "token_ids": np.dtype("<i4"),
    "sequence_ids": np.dtype("<i8"),
    "positions": np.dtype("<i4"),
    "roles": np.dtype("u1"),
    "sources": np.dtype("<u2"),
}
# what the writer adds, in the same order behind them; it has a value per model
NORMS, NORM_TYPE = "norms", np.dtype("<f4")


class _Facts(BaseModel):
    """Other tools may add facts of their own."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


class ModelInfo(_Facts):
    """One of the M models."""

    name: str
    revision: str | None = None
    dtype: str | None = None
    layer: int | None = None
    hook: str | None = None
    d_model: int | None = None
    n_layers: int | None = None
    weights_sha256: str | None = None


class SourceInfo(_Facts):
    """A data set, or the part of it with one category label."""

    dataset: str
    category: str | None = None


class ShardInfo(_Facts):
    """One file of the store."""

    file: str
    n_rows: int
    sha256: str | None = None

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        if Path(value).name != value:
            raise ValueError("a shard is named by a plain file name")
        return value


class LeftOut(_Facts):
    """Which rows are left out of use."""

    max_norm: float = Field(ge=0, allow_inf_nan=False)
    median: list[float] | None = None
    rows: int | None = None
    position_0: int | None = None
    variance_share: list[float] | None = None

    @property
    def is_recorded(self) -> bool:
        """A writer has counted; a rule that was put into store.json by hand has no counts."""
        return None not in (self.rows, self.position_0, self.variance_share)


class Stats(_Facts):
    """Float64 statistics of the stored values over the rows in use."""

    n_rows: int
    mean: list[list[float]]
    variance: list[float]
    mean_norm: list[float]


class StoreMeta(_Facts):
    """`store.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    models: list[ModelInfo] = Field(min_length=1)
    dtype: DtypeName | None = None
    shards: list[ShardInfo] | None = None
    roles: list[str] | None = None
    sources: list[SourceInfo] | None = None
    tokenizer: dict[str, Any] | None = None
    datasets: list[dict[str, Any]] | None = None
    left_out: LeftOut | None = None
    stats: Stats | None = None
    vocabulary_sha256: str | None = None
    command: list[str] | None = None
    versions: dict[str, Any] | None = None
    config: dict[str, Any] | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    def to_json(self) -> dict[str, Any]:
        """The object to write; what is absent is left out."""
        return self.model_dump(by_alias=True, exclude_none=True)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.h5"


def bfloat16_type() -> h5py.h5t.TypeFloatID:
    """The HDF5 type of little-endian bfloat16, equal to HDF5 2.0's H5T_FLOAT_BFLOAT16LE."""
    made = h5py.h5t.IEEE_F16LE.copy()
    made.set_fields(15, 7, 8, 0, 7)
    made.set_ebias(127)
    return made


def hdf5_type(dtype: str) -> h5py.h5t.TypeFloatID:
    """The HDF5 type of `/activations` in a store of this dtype."""
    if dtype == "bfloat16":
        return bfloat16_type()
    return {"float16": h5py.h5t.IEEE_F16LE, "float32": h5py.h5t.IEEE_F32LE}[dtype]


def dtype_name(file_type: h5py.h5t.TypeID) -> DtypeName | None:
    """Which of the three types a data set has, or None."""
    names: tuple[DtypeName, ...] = ("bfloat16", "float16", "float32")
    return next((name for name in names if file_type == hdf5_type(name)), None)


def crc_blocks(n_rows: int) -> int:
    """Length of `/crc32c`."""
    return -(-n_rows // CRC_ROWS)


def create_shard(
    path: Path,
    *,
    n_rows: int,
    n_models: int,
    d_model: int,
    dtype: DtypeName,
    columns: Collection[str] = tuple(COLUMNS),
) -> dict[str, int]:
    """Make a shard with all its space reserved and no values in it.

    HDF5 works on a sparse file in memory, and what it wrote is copied: on a full disk the library itself
    crashes the process (HDF5 2.0: segmentation fault in the flush after ENOSPC).

    Args:
        path: The file to make; one that exists is replaced.
        n_rows: Rows of the shard, n.
        n_models: M.
        d_model: D.
        dtype: Type of `/activations`.
        columns: Side columns that it has, `norms` among them.

    Returns:
        The byte offset in the file at which each data set begins.

    Raises:
        OSError: The disk, or a limit on file sizes, has no room.
    """
    layout = _lay_out(n_rows, n_models, d_model, dtype, columns)
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        # first, so that a full disk is found before anything is written
        os.posix_fallocate(target, 0, layout.n_bytes)
        for start, data in layout.metadata:
            write_at(target, data, start)
        # rows of the shards before this one are acknowledged while nothing syncs it
        os.fsync(target)
    finally:
        os.close(target)
    return layout.offsets


def find_shard(
    path: Path,
    *,
    n_rows: int,
    n_models: int,
    d_model: int,
    dtype: DtypeName,
    columns: Collection[str] = tuple(COLUMNS),
) -> dict[str, int]:
    """The data sets of a shard that `create_shard` made, whatever has been written in them since.

    Args:
        path: The file.
        n_rows: Rows of the shard, n.
        n_models: M.
        d_model: D.
        dtype: Type of `/activations`.
        columns: Side columns that it has, `norms` among them.

    Returns:
        The byte offset in the file at which each data set begins.

    Raises:
        InputError: It is missing, has another size, or its metadata are not what `create_shard` writes.
        OSError: A limit on file sizes has no room for it.
    """
    layout = _lay_out(n_rows, n_models, d_model, dtype, columns)
    try:
        with path.open("rb") as f:
            n_bytes = os.fstat(f.fileno()).st_size
            if n_bytes != layout.n_bytes:
                raise InputError(f"{path}: {n_bytes} bytes, not {layout.n_bytes}; start again with --overwrite")
            for start, data in layout.metadata:
                if os.pread(f.fileno(), len(data), start) != data:
                    last = start + len(data) - 1
                    raise InputError(f"{path}: damaged in bytes {start} to {last}; start again with --overwrite")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); start again with --overwrite") from error
    return layout.offsets


class _Layout(NamedTuple):
    """Everything in an empty shard: where data sets begin, what stands between them, and the size of the file."""

    offsets: dict[str, int]
    metadata: list[tuple[int, bytes]]
    n_bytes: int


_Shapes = dict[str, tuple[int, ...]]
_Types = dict[str, h5py.h5t.TypeID]


def _lay_out(n_rows: int, n_models: int, d_model: int, dtype: DtypeName, columns: Collection[str]) -> _Layout:
    shapes: _Shapes = {"activations": (n_rows, n_models, d_model)}
    types: _Types = {"activations": hdf5_type(dtype)}
    for name, kind in COLUMNS.items():
        if name in columns:
            shapes[name], types[name] = (n_rows,), h5py.h5t.py_create(kind)
    if NORMS in columns:
        shapes[NORMS], types[NORMS] = (n_rows, n_models), h5py.h5t.IEEE_F32LE
    shapes["crc32c"], types["crc32c"] = (crc_blocks(n_rows),), h5py.h5t.STD_U32LE
    sizes = {name: math.prod(shapes[name]) * types[name].get_size() for name in shapes}
    with os.fdopen(os.memfd_create("fastdiff-shard", os.MFD_CLOEXEC), "w+b", buffering=0) as memory:
        # a limit on file sizes holds for the file in memory too, and HDF5 must not be the one to find it
        os.truncate(memory.fileno(), sum(sizes.values()) + len(sizes) * ALIGNMENT + _METADATA_BYTES)
        os.truncate(memory.fileno(), 0)
        offsets = _create_data_sets(memory, shapes, types)
        n_bytes = os.fstat(memory.fileno()).st_size
        data_sets = sorted((offsets[name], offsets[name] + size) for name, size in sizes.items())
        between = zip([0, *(end for _, end in data_sets)], [*(start for start, _ in data_sets), n_bytes], strict=True)
        metadata = [part for start, end in between for part in _extents(memory.fileno(), start, end)]
    return _Layout(offsets, metadata, n_bytes)


def _create_data_sets(to: io.FileIO, shapes: _Shapes, types: _Types) -> dict[str, int]:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # a fixed lower bound: what "earliest" writes differs between HDF5 releases
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_LATEST)
    access.set_alignment(ALIGNMENT, ALIGNMENT)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, to)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    file = h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    try:
        offsets = {}
        for name, shape in shapes.items():
            space = h5py.h5s.create_simple(shape)
            data_set = h5py.h5d.create(file, name.encode(), types[name], space, layout)
            offsets[name] = int(data_set.get_offset())
        return offsets
    finally:
        file.close()


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """What is not a hole between two positions."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        if start < stop:
            yield start, os.pread(fd, stop - start, start)
        start = stop


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a byte offset, however little each call takes."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def shard_sha256(
    crc32c: NDArray[np.uint32],
    columns: Mapping[str, NDArray[Any]],
    *,
    n_rows: int,
    n_models: int,
    d_model: int,
    dtype: str,
) -> str:
    """A shard's hash as the module's docstring defines it."""
    digest = hashlib.sha256(np.ascontiguousarray(crc32c, "<u4").data)
    for name, kind in (*COLUMNS.items(), (NORMS, NORM_TYPE)):
        if name in columns:
            digest.update(np.ascontiguousarray(columns[name], kind).data)
    facts = {"schema": SCHEMA, "n_rows": n_rows, "n_models": n_models, "d_model": d_model, "dtype": dtype}
    digest.update(canonical_json(facts).encode())
    return digest.hexdigest()
