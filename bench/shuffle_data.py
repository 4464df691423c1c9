"""The data that the shuffle benchmark reads: rows that say which row they are, as a store and as a chunked copy.

A row is one of 512 rows of random bfloat16 with its number written into its first and its last four values,
7 bits each, as numbers in [1, 2): no row is NaN, and a row put together from two is seen.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.rundir import write_json
from fastdiff.store.format import bfloat16_type, shard_name
from fastdiff.store.writer import StoreWriter

N_MODELS, D_MODEL = 2, 2304
ROW_VALUES = N_MODELS * D_MODEL
ROW_BYTES = 2 * ROW_VALUES
BATCH = 2048
CHUNK_ROWS = 512

_ONE = 0x3F80  # bfloat16 1.0; its 7 mantissa bits are free
_SHIFTS = np.array([0, 7, 14, 21], np.int64)
_MARKER = "made.json"
_VERSION = 1


@dataclass(frozen=True)
class Data:
    """Where the data lie.

    Attributes:
        store: Directory of the store, one contiguous shard.
        contiguous: That shard.
        chunked: Bare HDF5 file with the same rows, 512 to a chunk.
        n_rows: A multiple of the batch.
    """

    store: Path
    contiguous: Path
    chunked: Path
    n_rows: int


def base_rows() -> NDArray[np.uint16]:
    """The 512 random rows as bits: (512, M·D)."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(CHUNK_ROWS, ROW_VALUES, generator=random).to(torch.bfloat16)
    return values.view(torch.uint16).numpy()


def stamp(rows: NDArray[np.uint16], numbers: NDArray[np.int64]) -> None:
    """Write the row numbers (n,) into rows (n, M·D)."""
    digits = (_ONE | ((numbers[:, None] >> _SHIFTS) & 0x7F)).astype(np.uint16)
    rows[:, :4] = digits
    rows[:, -4:] = digits


def read_stamps(rows: NDArray[np.uint16]) -> NDArray[np.int64]:
    """The row numbers (n,) that rows (n, M·D) carry.

    Raises:
        ValueError: The two ends of a row differ, or carry no number.
    """
    head, tail = rows[:, :4].astype(np.int64), rows[:, -4:].astype(np.int64)
    bad = np.flatnonzero(((head != tail) | (head >> 7 != _ONE >> 7)).any(axis=1))
    if len(bad):
        raise ValueError(f"place {bad[0]} of a batch holds no whole row: {head[bad[0]]} and {tail[bad[0]]}")
    return ((head & 0x7F) << _SHIFTS).sum(axis=1)


def make(folder: Path, gb: float) -> Data:
    """Make the data, or find them as an earlier call made them.

    Args:
        folder: Where; made if missing.
        gb: Size of the rows in 1e9 bytes; the data take twice that.
    """
    n_rows = max(1, round(gb * 1e9 / ROW_BYTES / BATCH)) * BATCH
    data = Data(folder / "contiguous", folder / "contiguous" / shard_name(0), folder / "chunked.h5", n_rows)
    marker = folder / _MARKER
    facts = {"version": _VERSION, **{k: str(v) for k, v in asdict(data).items()}}
    if marker.exists() and json.loads(marker.read_text()) == facts:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    data.chunked.unlink(missing_ok=True)
    _write_contiguous(data)
    _write_chunked(data)
    write_json(marker, facts)
    return data


def _blocks(n_rows: int, size: int) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    base = np.tile(base_rows(), (size // CHUNK_ROWS, 1))
    for start in range(0, n_rows, size):
        rows = base[: min(size, n_rows - start)]
        stamp(rows, np.arange(start, start + len(rows)))
        yield start, rows


def _write_contiguous(data: Data) -> None:
    meta = {"models": [{"name": "base"}, {"name": "tuned"}]}
    with StoreWriter(
        data.store,
        n_rows=data.n_rows,
        n_models=N_MODELS,
        d_model=D_MODEL,
        dtype="bfloat16",
        shard_rows=data.n_rows,
        meta=meta,
    ) as writer:
        for start, rows in _blocks(data.n_rows, BATCH):
            number = np.arange(start, start + len(rows))
            writer.append(
                torch.from_numpy(rows).view(torch.bfloat16).view(-1, N_MODELS, D_MODEL),
                token_ids=number * 0,
                sequence_ids=number // 600,
                positions=number % 600,
                roles=number * 0,
                sources=number * 0,
            )


def _write_chunked(data: Data) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((CHUNK_ROWS, N_MODELS, D_MODEL))
    with h5py.File(data.chunked, "w", libver="v110") as file:
        space = h5py.h5s.create_simple((data.n_rows, N_MODELS, D_MODEL))
        made = h5py.h5d.create(file.id, b"activations", bfloat16_type(), space, layout)
        for start, rows in _blocks(data.n_rows, CHUNK_ROWS):
            made.write_direct_chunk((start, 0, 0), rows.tobytes())
