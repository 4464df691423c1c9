"""Activations that other tools have written: where their rows lie, and how to read a few of them.

    directory        an activation cache of dictionary_learning or diffing-toolkit: config.json, shard_0.memmap,
                     shard_0.meta, …; the directory above may have tokens.pt and sequence_ranges.pt
    .npy             (n, M, D), or (n, D) for one model
    .safetensors     a tensor of either shape; `file.safetensors:name` if there are several
    .h5, .hdf5       a data set of either shape; `file.h5:name` if it is not /activations

Nothing is unpickled but plain tensors (`torch.load(weights_only=True)`).
"""

import json
import os
import pickle
import struct
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdiff.errors import InputError, OptionError
from fastdiff.rundir import read_json
from fastdiff.store.format import STORE_FILE, dtype_name
from fastdiff.store.index import BITS, HDF5_ERRORS, memory_type, open_data_set, open_hdf5
from fastdiff.store.written import check_written

# columns that mean the same in every file; roles and sources are indices into a list that is not in it
PLAIN_COLUMNS = ("token_ids", "sequence_ids", "positions")

_SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# what NumPy raises for a header that it cannot parse
_NOT_NPY = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)

# what the restricted unpickler raises: at damaged bytes it fails in whatever way they ask for
_NOT_A_TENSOR = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip


class Rows(Protocol):
    """Rows of activations in a file."""

    @property
    def n_rows(self) -> int:
        """How many."""
        ...

    @property
    def n_models(self) -> int:
        """M of them."""
        ...

    @property
    def d_model(self) -> int:
        """D of them."""
        ...

    @property
    def dtype(self) -> str:
        """Type of their values, as torch calls it."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): [stop - start, M, D] in their own type."""
        ...


@dataclass(frozen=True)
class RawRows:
    """Rows that lie back to back in a file."""

    path: Path
    offset: int
    n_rows: int
    n_models: int
    d_model: int
    dtype: str
    big_endian: bool = False

    def __post_init__(self) -> None:
        wanted = self.offset + self.n_rows * self.n_models * self.d_model * self._kind.itemsize
        found = self.path.stat().st_size
        if found < wanted:
            raise InputError(f"{self.path}: {found} bytes, but its rows need {wanted}; it is truncated, copy it again")

    @property
    def _kind(self) -> np.dtype[Any]:
        size = getattr(torch, self.dtype).itemsize
        return BITS.get(size, np.dtype(np.uint64)).newbyteorder(">" if self.big_endian else "<")

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        values = self.n_models * self.d_model
        try:
            bits = np.fromfile(
                self.path,
                self._kind,
                (stop - start) * values,
                offset=self.offset + start * values * self._kind.itemsize,
            )
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error
        if len(bits) != (stop - start) * values:
            raise InputError(f"{self.path}: became shorter while it was read; copy it again")
        little = bits.astype(self._kind.newbyteorder("="), copy=False)
        return torch.from_numpy(little).view(getattr(torch, self.dtype)).view(stop - start, self.n_models, self.d_model)


@dataclass(frozen=True)
class Hdf5DataSet:
    """Rows of a data set."""

    path: Path
    name: str
    n_rows: int
    n_models: int
    d_model: int
    dtype: str

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        with open_hdf5(self.path) as file:
            try:
                data_set = open_data_set(self.path, file, self.name).id
                kind = data_set.get_type()
                shape = (stop - start, *data_set.shape[1:])
                space = data_set.get_space()
                space.select_hyperslab((start,) + (0,) * (len(shape) - 1), shape)
                bits = np.empty(shape, BITS.get(kind.get_size(), np.dtype(np.uint64)))
                data_set.read(h5py.h5s.create_simple(shape), space, bits, mtype=memory_type(kind))
            except HDF5_ERRORS as error:
                raise InputError(f"{self.path}: /{self.name} cannot be read ({error}); copy it again") from error
        return torch.from_numpy(bits).view(getattr(torch, self.dtype)).view(stop - start, self.n_models, self.d_model)


@dataclass(frozen=True)
class Source:
    """Rows of one model, or of all.

    Attributes:
        text: How the user named it.
        name: What to call the model if it is not said.
        files: Everything that was read, for its hash.
        parts: Its rows, one part after the other.
        columns: Side columns it has, (n,) each.
    """

    text: str
    name: str
    files: Sequence[Path]
    parts: Sequence[Rows]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.n_rows for part in self.parts)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): [stop - start, M, D]."""
        found, first = [], 0
        for part in self.parts:
            begin, end = max(start, first), min(stop, first + part.n_rows)
            if begin < end:
                found.append(part.read(begin - first, end - first))
            first += part.n_rows
        return found[0] if len(found) == 1 else torch.cat(found)


def open_source(text: str, *, name: str | None = None, bits: str | None = None) -> Source:
    """Find the rows that an argument of `fastdiff import` means.

    Args:
        text: Path, or path:name of a tensor or data set.
        name: Tensor or data set to take where the argument does not say.
        bits: "bfloat16" if values of 2 bytes that have no float type are its bits.

    Raises:
        InputError: The file is missing or not what its name says.
        OptionError: The argument does not say what to take.
    """
    path = Path(text)
    if not path.exists() and ":" in text:
        head, _, tail = text.rpartition(":")
        path, name = Path(head), tail or name
        if path.is_dir() or path.suffix == ".npy":
            raise OptionError(f"{text}: {path} holds one array, so :{tail} names nothing; leave it out")
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    try:
        if path.is_dir():
            return _open_cache(text, path)
        if path.suffix == ".npy":
            return Source(text, path.stem, [path], [_open_npy(path, bits)])
        if path.suffix == ".safetensors":
            return _open_safetensors(text, path, name)
        if path.suffix in (".h5", ".hdf5"):
            return _open_hdf5(text, path, name or "activations", bits)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise OptionError(f"{path}: not a cache directory, .npy, .safetensors or .h5; convert it to one of them")


def read_integers(path: Path, n_rows: int) -> NDArray[np.int64]:
    """A side column from a .npy or .pt file: (n_rows,).

    Raises:
        InputError: It is not that.
    """
    if path.suffix == ".pt":
        values = _load_tensor(path)
    else:
        try:
            values = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except (OSError, EOFError, *_NOT_NPY) as error:
            raise InputError(f"{path}: not a .npy file ({_cause(error)})") from error
    if not isinstance(values, np.ndarray) or values.shape != (n_rows,) or values.dtype.kind not in "iu":
        what = f"{values.shape} {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise InputError(f"{path}: is {what}, expected ({n_rows},) integers, one per row")
    return values.astype(np.int64)


def _open_cache(text: str, path: Path) -> Source:
    if (path / STORE_FILE).exists():
        raise OptionError(f"{path}: is already a store; train on it as it is")
    if not (path / "config.json").exists():
        inner = sorted(config.parent.name for config in path.glob("*/config.json"))
        if len(inner) != 1:
            found = f"caches {', '.join(inner)} in it" if inner else "no config.json in it"
            raise OptionError(f"{path}: {found}; name one directory with shard_0.memmap")
        path = path / inner[0]
    config = read_json(path / "config.json", schema=None)
    if not isinstance(config, dict) or not isinstance(config.get("shard_count"), int):
        raise InputError(f"{path / 'config.json'}: no shard_count; it is not an activation cache")
    parts: list[Rows] = []
    files = [path / "config.json"]
    for i in range(config["shard_count"]):
        parts.append(_open_memmap(path / f"shard_{i}.memmap", path / f"shard_{i}.meta"))
        files += [path / f"shard_{i}.meta", path / f"shard_{i}.memmap"]
    n_rows = sum(part.n_rows for part in parts)
    if not parts or config.get("total_size", n_rows) != n_rows:
        raise InputError(f"{path}: {n_rows} rows, but config.json says {config.get('total_size')}; copy it again")
    if config.get("shuffle_shards"):
        # its own writer stores no tokens then: two caches were shuffled differently
        raise InputError(
            f"{path}: its rows were shuffled within each shard, so models cannot be paired; collect it again"
        )
    columns: dict[str, NDArray[Any]] = {}
    # older caches have them beside the shards
    tokens = next((place / "tokens.pt" for place in (path.parent, path) if (place / "tokens.pt").exists()), None)
    if config.get("store_tokens") and tokens is not None:
        columns["token_ids"] = read_integers(tokens, n_rows)
        files.append(tokens)
    ranges = path.parent / "sequence_ranges.pt"
    if config.get("store_sequence_ranges") and ranges.exists():
        columns["sequence_ids"] = _sequence_ids(ranges, n_rows)
        files.append(ranges)
    return Source(text, path.parent.name or path.name, files, parts, columns)


def _open_memmap(path: Path, meta_path: Path) -> RawRows:
    meta = read_json(meta_path, schema=None)
    shape = meta.get("shape") if isinstance(meta, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"{meta_path}: shape is {shape}, expected [rows, d_model]; copy it again")
    # absent in old caches
    told = str(meta.get("dtype", "torch.float32"))
    dtype = told.removeprefix("torch.") if told.startswith("torch.") else _numpy_name(meta_path, told)
    if dtype not in ("bfloat16", "float16", "float32", "float64"):
        raise InputError(f"{meta_path}: dtype is {told}, expected a float type")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return RawRows(path, 0, shape[0], 1, shape[1], dtype, big_endian=told.startswith(">"))


def _numpy_name(path: Path, told: str) -> str:
    try:
        return np.dtype(told).name
    except (TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: dtype is {told}, expected a float type") from error


def _load_tensor(path: Path) -> NDArray[Any]:
    """A tensor that `torch.save` wrote; no other object is made."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(loaded, Tensor):
            return loaded.numpy()
        found = type(loaded).__name__
    except _NOT_A_TENSOR as error:
        found = _cause(error)
    raise InputError(f"{path}: not a plain tensor ({found}); write it as .npy")


def _cause(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())[:200]


def _sequence_ids(path: Path, n_rows: int) -> NDArray[np.int64]:
    """The sequence of each row, from the first row of each and the number of rows."""
    starts = _load_tensor(path)
    fits = starts.ndim == 1 and starts.dtype.kind == "i" and len(starts) > 1 and starts[0] == 0 and starts[-1] == n_rows
    if not fits or bool((np.diff(starts) < 0).any()):
        raise InputError(f"{path}: not the first rows of sequences, ascending from 0 to {n_rows}; collect it again")
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _sides(path: Path, shape: Sequence[int], what: str) -> tuple[int, int, int]:
    """(n, M, D) of an array of either shape."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(
            f"{path}: {what} has shape {tuple(shape)}, expected (rows, models, d_model) or (rows, d_model)"
        )
    return int(shape[0]), int(shape[1]) if len(shape) == 3 else 1, int(shape[-1])


def _float_name(path: Path, kind: np.dtype[Any], bits: str | None, what: str) -> str:
    if kind.kind == "f" and kind.itemsize in (2, 4, 8):
        return kind.newbyteorder("=").name
    if kind.itemsize == 2 and kind.kind in "iuV":
        if bits is not None:
            return bits
        raise OptionError(f"{path}: {what} is {kind}; if these are bfloat16 bits, say --bits bfloat16")
    raise InputError(f"{path}: {what} is {kind}, expected bfloat16, float16, float32 or float64")


def _open_npy(path: Path, bits: str | None) -> RawRows:
    with path.open("rb") as f:
        try:
            version = np.lib.format.read_magic(f)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, kind = read_header(f)
        except _NOT_NPY as error:
            raise InputError(f"{path}: not a .npy file ({_cause(error)})") from error
        offset = f.tell()
    if kind.hasobject:
        raise InputError(f"{path}: holds Python objects, which are never unpickled; write it as float32")
    if fortran:
        raise InputError(f"{path}: is in Fortran order; save np.ascontiguousarray of it")
    dtype = _float_name(path, kind, bits, "the array")
    return RawRows(path, offset, *_sides(path, shape, "the array"), dtype, big_endian=kind.byteorder == ">")


def _open_safetensors(text: str, path: Path, name: str | None) -> Source:
    try:
        with safe_open(path, framework="np") as file:
            names = sorted(file.keys())
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    chosen = names[0] if name is None and len(names) == 1 else name
    if chosen is None or chosen not in names:
        raise OptionError(f"{path}: holds {', '.join(names[:8]) or 'nothing'}; say {path}:NAME for one of them")
    # safe_open has checked the header; its slices are memory maps, which end the process if the file shrinks
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        told = json.loads(f.read(length))[chosen]
    dtype = _SAFETENSORS.get(told["dtype"])
    if dtype is None:
        raise InputError(f"{path}: {chosen} is {told['dtype']}, expected BF16, F16, F32 or F64")
    rows = RawRows(path, 8 + length + told["data_offsets"][0], *_sides(path, told["shape"], chosen), dtype)
    return Source(text, path.stem if len(names) == 1 else chosen, [path], [rows])


def _open_hdf5(text: str, path: Path, name: str, bits: str | None) -> Source:
    with open_hdf5(path) as file:
        try:
            data_set = file.get(name)
            if not isinstance(data_set, h5py.Dataset) or data_set.shape is None:
                found = ", ".join(sorted(file)[:8]) or "nothing"
                raise OptionError(f"{path}: no data set /{name} (found: {found}); say {path}:NAME for one of them")
            sides = _sides(path, data_set.shape, f"/{name}")
            kind = data_set.id.get_type()
            dtype = dtype_name(memory_type(kind)) or _float_name(path, data_set.dtype, bits, f"/{name}")
            check_written(path, data_set)
            # their bytes are part of what is imported
            outside = _outside(path, data_set)
            columns = {}
            for column in PLAIN_COLUMNS:
                values = file.get(column)
                if isinstance(values, h5py.Dataset) and values.shape == sides[:1] and values.dtype.kind in "iu":
                    check_written(path, values)
                    outside += _outside(path, values)
                    del values
                    columns[column] = open_data_set(path, file, column)[:].astype(np.int64)
        except HDF5_ERRORS as error:
            raise InputError(f"{path}: damaged ({error}); copy it again") from error
    title = path.stem if name == "activations" else name.rpartition("/")[2]
    return Source(text, title, [path, *outside], [Hdf5DataSet(path, name, *sides, dtype)], columns)


def _outside(path: Path, data_set: h5py.Dataset) -> list[Path]:
    """External files that hold the values of a data set."""
    return [path.parent / os.fsdecode(name) for name, *_ in data_set.external or ()]
