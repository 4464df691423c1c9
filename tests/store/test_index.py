"""Every layout HDF5 offers gives the rows that h5py reads, from the file or through HDF5, and says which."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.store import index
from fastdiff.store.format import bfloat16_type
from fastdiff.store.index import index_shard
from fastdiff.store.reader import ActivationStore

N, M, D = 70, 2, 6
ORDERS = [
    np.arange(N),
    np.arange(N)[::-1],
    np.random.default_rng(0).permutation(N),
    np.random.default_rng(1).integers(0, N, 300),
    np.array([N - 1, 0, N - 1]),
    np.array([], np.int64),
]


def bits(dtype: str) -> np.ndarray:
    """Any bits, those of NaN, infinity and subnormal numbers too."""
    kind = np.uint32 if dtype == "float32" else np.uint16
    return np.random.default_rng(2).integers(0, np.iinfo(kind).max, (N, M, D), kind, endpoint=True)


def file_type(dtype: str, big: bool = False) -> Any:
    if dtype in ("uint16", "int16"):
        kind = h5py.h5t.py_create(np.dtype(dtype))
    elif dtype == "opaque":
        kind = h5py.h5t.create(h5py.h5t.OPAQUE, 2)
    else:
        kind = {"float16": h5py.h5t.IEEE_F16LE, "float32": h5py.h5t.IEEE_F32LE}.get(dtype) or bfloat16_type()
    kind = kind.copy()
    if big:
        kind.set_order(h5py.h5t.ORDER_BE)
    return kind


def make(
    path: Path, dtype: str, *, big: bool = False, early: bool = False, libver: str = "earliest", **how: Any
) -> None:
    """A file whose `/activations` has the bits of `bits`, stored as `how` says."""
    values = bits(dtype)
    with h5py.File(path, "w", libver=libver) as file:
        kind = file_type(dtype, big)
        if early:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk(how["chunks"])
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            made = h5py.h5d.create(file.id, b"activations", kind, h5py.h5s.create_simple(values.shape), plist)
        else:
            made = file.create_dataset("activations", values.shape, h5py.Datatype(kind), **how).id
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, values.byteswap() if big else values, mtype=kind)


def same(store: ActivationStore, wanted: np.ndarray) -> None:
    for rows in ORDERS:
        got = store.rows(rows).view(torch.uint8).numpy().view(wanted.dtype)
        assert np.array_equal(got, wanted[rows])


LAYOUTS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"chunks": (16, M, D)}, None),
    ({"chunks": (1, M, D)}, None),
    ({"chunks": (N, M, D)}, None),
    ({"chunks": (500, M, D), "maxshape": (None, M, D)}, None),
    ({"chunks": (16, M, D), "maxshape": (None, M, D), "libver": "latest"}, None),  # an extensible array
    ({"chunks": (16, M, D), "maxshape": (None, None, D), "libver": "latest"}, None),  # a B-tree, version 2
    ({"chunks": (16, M, D), "libver": "latest"}, None),  # a fixed array
    ({"chunks": (N, M, D), "libver": "latest"}, None),  # one chunk
    ({"chunks": (16, M, D), "libver": "latest", "early": True}, None),  # no index at all
    ({"chunks": (16, M, D), "compression": "gzip"}, "gzip-compressed"),
    ({"chunks": (N, M, D), "compression": "gzip", "libver": "latest"}, "gzip-compressed"),
    ({"chunks": (16, M, D), "compression": "lzf", "shuffle": True}, "shuffled, lzf-compressed"),
    ({"chunks": (16, M, D), "fletcher32": True}, "checksummed by fletcher32"),
    ({"chunks": (16, 1, D)}, "chunks split rows"),
    ({"chunks": (16, 1, 4), "compression": "gzip"}, "gzip-compressed, chunks split rows"),
    ({"big": True}, "big-endian"),
    ({"big": True, "chunks": (16, M, D)}, "big-endian"),
    ({"big": True, "chunks": (5, M, 5), "compression": "gzip"}, "gzip-compressed, chunks split rows, big-endian"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("how", "slow"), LAYOUTS)
def test_all_layouts_give_the_same_bits(tmp_path: Path, how: dict[str, Any], slow: str | None, dtype: str) -> None:
    make(tmp_path / "a.h5", dtype, **how)
    with ActivationStore(tmp_path / "a.h5") as store:
        assert store.slow == (slow and f"a.h5: {slow}")
        assert str(store.dtype) == f"torch.{dtype}"
        same(store, bits(dtype))
        if slow is None:
            assert store.extents.first_rows[-1] == N
        else:
            with pytest.raises(ValueError, match=slow):
                _ = store.extents


def test_compact_virtual_and_external_rows_are_read_through_hdf5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = bits("float32").view(np.float32)
    with h5py.File(tmp_path / "compact.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(x.shape)
        h5py.h5d.create(file.id, b"activations", h5py.h5t.IEEE_F32LE, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, x)
    (tmp_path / "rows.raw").write_bytes(b"ahead" + x.tobytes())
    with h5py.File(tmp_path / "in an external file.h5", "w") as file:
        file.create_dataset("activations", x.shape, np.float32, external=[("rows.raw", 5, x.nbytes)])
    for i, part in enumerate(np.split(x, 2)):
        with h5py.File(tmp_path / f"part{i}.h5", "w") as file:
            file.create_dataset("acts", data=part, compression="gzip")
    layout = h5py.VirtualLayout(x.shape, np.float32)
    for i in range(2):
        layout[N // 2 * i : N // 2 * (i + 1)] = h5py.VirtualSource(f"part{i}.h5", "acts", (N // 2, M, D))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("activations", layout)
    monkeypatch.chdir("/")  # names in the files are beside the files
    for name in ("compact", "virtual", "in an external file"):
        with ActivationStore(tmp_path / f"{name}.h5") as store:
            assert store.slow == f"{name}.h5: {name}"
            same(store, x.view(np.uint32))


def test_chunks_that_follow_one_another_are_one_extent(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", "float32", chunks=(16, M, D), early=True, libver="latest")
    found = index_shard(tmp_path / "a.h5")
    assert found.extent_rows.tolist() == [N]
    make(tmp_path / "b.h5", "float32", chunks=(16, M, D))
    with h5py.File(tmp_path / "b.h5") as file:
        infos: list[Any] = []
        file["activations"].id.chunk_iter(infos.append)
    found = index_shard(tmp_path / "b.h5")
    assert found.extent_rows.sum() == N
    for info in infos:
        row = info.chunk_offset[0]
        extent = int(np.searchsorted(np.cumsum(found.extent_rows), row, side="right"))
        skipped = row - int(found.extent_rows[:extent].sum())
        assert found.offsets[extent] + skipped * found.row_bytes == info.byte_offset


def test_extents_are_in_row_order() -> None:
    # a chunk per row of the table: its first index on each axis, and its byte
    chunks = np.array([[16, 0, 0, 900], [0, 0, 0, 100], [8, 0, 0, 180], [24, 0, 0, 500]])
    offsets, rows = index._extents(chunks, n_rows=27, chunk_rows=8, row_bytes=10)
    assert offsets.tolist() == [100, 900, 500]
    assert rows.tolist() == [16, 8, 3]


def test_two_chunks_in_one_place(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", "float32", chunks=(35, M, D))
    with h5py.File(tmp_path / "a.h5") as file:
        first, second = (file["activations"].id.get_chunk_info(i).byte_offset for i in range(2))
    data = (tmp_path / "a.h5").read_bytes()
    assert data.count(second.to_bytes(8, "little")) == 1
    (tmp_path / "a.h5").write_bytes(data.replace(second.to_bytes(8, "little"), first.to_bytes(8, "little")))
    with pytest.raises(InputError, match=r"damaged or truncated, /activations does not fit its \d+ bytes"):
        ActivationStore(tmp_path / "a.h5")


def test_extents_run_over_all_shards(tmp_path: Path) -> None:
    x = bits("float32").view(np.float32)
    for i, how in enumerate([{}, {"chunks": (8, M, D)}, {}]):
        with h5py.File(tmp_path / f"shard-0000{i}.h5", "w") as file:
            data_set = file.create_dataset("activations", x.shape, np.float32, **how)
            # in another order than that of the file
            for start in reversed(range(0, N, 8)):
                data_set[start : start + 8] = x[start : start + 8]
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    with ActivationStore(tmp_path) as store:
        found = store.extents
        assert len(found.offsets) == 1 + 9 + 1
        assert found.files.tolist() == [0] + [1] * 9 + [2]
        assert found.first_rows.tolist() == [0, *range(N, 2 * N, 8), 2 * N, 3 * N]
        assert len(set(found.fds.tolist())) == 3
        rows = np.random.default_rng(0).permutation(3 * N)
        wanted = np.concatenate([x, x, x])[rows]
        assert np.array_equal(store.rows(rows).view(torch.int32).numpy(), wanted.view(np.int32))
        assert store.explain() == [
            "shard-00000.h5: positioned reads",
            "shard-00001.h5: positioned reads, 9 extents",
            "shard-00002.h5: positioned reads",
        ]


def test_a_slow_shard_makes_the_store_slow(tmp_path: Path) -> None:
    x = bits("float32").view(np.float32)
    for i, how in enumerate([{}, {"compression": "gzip"}]):
        with h5py.File(tmp_path / f"shard-0000{i}.h5", "w") as file:
            file.create_dataset("activations", data=x, **how)
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    with ActivationStore(tmp_path) as store:
        assert store.slow is not None and store.slow.startswith("shard-00001.h5: gzip")
        rows = np.random.default_rng(0).integers(0, 2 * N, 100)
        wanted = np.concatenate([x, x])[rows].view(np.int32)
        assert np.array_equal(store.rows(rows).view(torch.int32).numpy(), wanted)
        first, second = store.explain()
        assert first.startswith("shard-00000.h5: through HDF5, because of shard-00001.h5")
        assert second.startswith("shard-00001.h5: through HDF5 (gzip") and "h5repack -l CONTI" in second


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("how", [{}, {"chunks": (7, M, D)}, {"compression": "gzip"}])
@pytest.mark.parametrize("kind", ["uint16", "int16", "opaque"])
def test_two_bytes_are_bfloat16_if_store_json_says_so(tmp_path: Path, kind: str, how: Any, big: bool) -> None:
    if kind == "opaque" and big:
        return
    make(tmp_path / "shard-00000.h5", kind, big=big, **how)
    with pytest.raises(InputError, match='these are bfloat16 bits, say "dtype": "bfloat16"'):
        ActivationStore(tmp_path / "shard-00000.h5")
    told = tmp_path / "store.json"
    told.write_text('{"schema": 1, "models": ["a", "b"], "dtype": "float16"}')
    with pytest.raises(InputError, match='say "dtype": "bfloat16"'):
        ActivationStore(tmp_path)
    told.write_text('{"schema": 1, "models": ["a", "b"], "dtype": "bfloat16"}')
    with ActivationStore(tmp_path) as store:
        assert store.dtype == torch.bfloat16
        same(store, bits("bfloat16"))


def test_ml_dtypes_void_is_bfloat16_if_store_json_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "shard-00000.h5", "w") as file:
        file["activations"] = bits("bfloat16").view("V2")
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"], "dtype": "bfloat16"}')
    with ActivationStore(tmp_path) as store:
        same(store, bits("bfloat16"))


def rows_elsewhere(monkeypatch: pytest.MonkeyPatch, by: int) -> None:
    true_check = index._check

    def shifted(*given: Any) -> Any:
        found = true_check(*given)
        found.offsets[:] += by
        return found

    monkeypatch.setattr(index, "_check", shifted)


@pytest.mark.parametrize("how", [{}, {"chunks": (16, M, D)}])
@pytest.mark.parametrize("by", [-4, 4, 10**6])
def test_rows_that_are_not_where_hdf5_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: int, how: dict[str, Any]
) -> None:
    # HDF5 releases differ in whether an offset counts the user block
    make(tmp_path / "a.h5", "float32", **how)
    rows_elsewhere(monkeypatch, by)
    with pytest.raises(InputError, match=r"row 0 is not where HDF5 says /activations is; `h5repack -l CONTI"):
        ActivationStore(tmp_path / "a.h5")


@pytest.mark.parametrize("how", [{}, {"chunks": (16, M, D)}, {"chunks": (16, M, D), "compression": "gzip"}])
def test_checksums_are_those_of_the_files(tmp_path: Path, how: dict[str, Any]) -> None:
    sums = np.arange(math.ceil(N / 32), dtype=np.uint32) + 2**31
    make(tmp_path / "a.h5", "float32", **how)
    with ActivationStore(tmp_path / "a.h5") as store:
        assert store.crc32c() is None
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["crc32c"] = sums
    with ActivationStore(tmp_path / "a.h5") as store:
        assert [found.tolist() for found in store.crc32c() or []] == [sums.tolist()]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["crc32c"]
        file["crc32c"] = sums[:-1]
    with pytest.raises(InputError, match=r"/crc32c is \(2,\) uint32, expected \(3,\) integers"):
        ActivationStore(tmp_path / "a.h5")


def test_one_shard_without_checksums_is_a_store_without(tmp_path: Path) -> None:
    for i in range(2):
        make(tmp_path / f"shard-0000{i}.h5", "float32")
    with h5py.File(tmp_path / "shard-00001.h5", "r+") as file:
        file["crc32c"] = np.zeros(3, np.uint32)
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    with ActivationStore(tmp_path) as store:
        assert store.crc32c() is None


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.h5", "float32", compression="lzf", chunks=(16, M, D))
    lacks: Callable[[int], bool] = lambda number: number != h5py.h5z.FILTER_LZF  # noqa: E731
    monkeypatch.setattr(h5py.h5z, "filter_avail", lacks)
    with pytest.raises(InputError, match="is lzf-compressed, which this HDF5 cannot undo; write it again with `h5re"):
        ActivationStore(tmp_path / "a.h5")


def test_a_chunked_shard_truncated_while_open_is_named(tmp_path: Path) -> None:
    for i in range(3):
        make(tmp_path / f"shard-0000{i}.h5", "float32", chunks=(8, M, D))
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    with ActivationStore(tmp_path) as store:
        with (tmp_path / "shard-00001.h5").open("r+b") as file:
            file.truncate(3000)
        assert len(store.slice(0, N)) == N
        with pytest.raises(InputError, match=r"shard-00001\.h5: truncated, \d+ of \d+ bytes left at byte"):
            store.slice(N, 2 * N)
