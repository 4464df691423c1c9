import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff import _native
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.store import shuffler as shuffler_module
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
from fastdiff.store.writer import StoreWriter


def write(path: Path, n: int, *, shard_rows: int, dtype: str = "float32", d_model: int = 6) -> None:
    values = torch.randn(n, 2, d_model, generator=torch.Generator().manual_seed(1))
    zeros = np.zeros(n, np.int64)
    with StoreWriter(
        path,
        n_rows=n,
        n_models=2,
        d_model=d_model,
        dtype=dtype,
        shard_rows=shard_rows,
        meta={"models": ["a", "b"]},
    ) as writer:
        writer.append(values, token_ids=zeros, sequence_ids=zeros, positions=zeros, roles=zeros, sources=zeros)


def by_h5py(path: Path) -> np.ndarray:
    parts = []
    for file in sorted(path.glob("*.h5")):
        with h5py.File(file) as f:
            parts.append(f["activations"][:].astype(np.float32))
    return np.concatenate(parts)


def oracle_rows(n: int, seed: int, mode: str, pool_rows: int, position: int, count: int) -> np.ndarray:
    """Row numbers by the order alone, which tests/store/test_order.py holds to its specification."""
    block = 1 if mode == "exact" else 32
    return _native.BlockOrder(n, seed, block, pool_rows).rows(position, count)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("mode", "pool_rows"), [("exact", 1), ("block", 64), ("block", 160), ("block", 5000)])
@pytest.mark.parametrize(
    ("dtype", "n", "shard_rows", "d_model"),
    [("float32", 101, 17, 5), ("float16", 1009, 333, 6), ("bfloat16", 517, 517, 33), ("bfloat16", 5, 2, 1)],
)
def test_batches_equal_the_oracle(
    tmp_path: Path, dtype: str, n: int, shard_rows: int, d_model: int, mode: str, pool_rows: int, n_threads: int
) -> None:
    write(tmp_path, n, shard_rows=shard_rows, dtype=dtype, d_model=d_model)
    expected = by_h5py(tmp_path)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=30, seed=3, mode=mode, pool_rows=pool_rows, n_threads=n_threads)
        rows = oracle_rows(n, 3, mode, pool_rows, 0, 40 * 30).reshape(40, 30)
        for step, batch in enumerate(shuffler.stream(0, 40)):
            assert np.array_equal(shuffler.row_numbers(step), rows[step])
            assert np.array_equal(batch.float().numpy(), expected[rows[step]])
            assert batch.dtype == store.dtype
            del batch


@pytest.mark.parametrize("mode", ["exact", "block"])
@pytest.mark.parametrize(("n", "batch_size"), [(100, 7), (100, 100), (64, 64), (13, 50), (1, 4), (1000, 999)])
def test_every_row_comes_once_per_epoch_also_when_batches_straddle_epochs(
    tmp_path: Path, n: int, batch_size: int, mode: str
) -> None:
    write(tmp_path, n, shard_rows=40, d_model=1)
    expected = by_h5py(tmp_path)
    n_steps = -(-3 * n // batch_size)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=batch_size, seed=0, mode=mode, pool_rows=None if mode == "exact" else 64)
        batches = torch.cat([batch.clone() for batch in shuffler.stream(0, n_steps)])[: 3 * n].numpy()
    epochs = batches.reshape(3, n, 2)
    order = np.argsort(expected[:, 0, 0])
    for epoch in epochs:
        assert np.array_equal(epoch[np.argsort(epoch[:, 0])], expected[order][:, :, 0])
    if n >= 13:
        assert not np.array_equal(epochs[0], epochs[1])


def test_order_depends_on_seed_and_position_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", 300, shard_rows=300)
    write(tmp_path / "many", 300, shard_rows=11, dtype="bfloat16")
    with ActivationStore(tmp_path / "one") as one, ActivationStore(tmp_path / "many") as many:
        for options in ({"mode": "exact"}, {"pool_rows": 96}):
            a = Shuffler(one, batch_size=30, seed=9, n_rows=250, n_threads=1, **options)
            b = Shuffler(many, batch_size=50, seed=9, n_rows=250, n_threads=3, **options)
            flat_a = np.concatenate([a.row_numbers(step) for step in reversed(range(25))][::-1])
            flat_b = np.concatenate([b.row_numbers(step) for step in range(15)])
            assert np.array_equal(flat_a, flat_b)
            assert flat_a.max() < 250
            other = Shuffler(one, batch_size=30, seed=10, n_rows=250, **options)
            assert not np.array_equal(a.row_numbers(0), other.row_numbers(0))


@pytest.mark.parametrize("mode", ["exact", "block"])
def test_resuming_at_any_step_gives_the_tail(tmp_path: Path, mode: str) -> None:
    write(tmp_path, 290, shard_rows=131, dtype="bfloat16")
    pool_rows = None if mode == "exact" else 96
    with ActivationStore(tmp_path) as store:

        def shuffler() -> Shuffler:
            return Shuffler(store, batch_size=48, seed=2, mode=mode, pool_rows=pool_rows)

        whole = [batch.clone() for batch in shuffler().stream(0, 16)]
        for at in range(17):
            tail = [batch.clone() for batch in shuffler().stream(at, 16)]
            assert len(tail) == 16 - at
            assert all(torch.equal(x, y) for x, y in zip(whole[at:], tail, strict=True))
        assert all(torch.equal(x, shuffler().batch(step)) for step, x in enumerate(whole))


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("mode", ["exact", "block"])
def test_ranks_read_disjoint_parts_that_cover_the_epoch(tmp_path: Path, world_size: int, mode: str) -> None:
    n = 1025
    write(tmp_path, n, shard_rows=300, d_model=1)
    expected = by_h5py(tmp_path)[:, 0, 0]
    seen = []
    with ActivationStore(tmp_path) as store:
        for rank in range(world_size):
            shuffler = Shuffler(
                store, batch_size=1, seed=4, mode=mode, pool_rows=None if mode == "exact" else 64,
                rank=rank, world_size=world_size,
            )  # fmt: skip
            count = shuffler._order.rows_in_epoch(0)
            seen += [float(batch[0, 0, 0]) for batch in shuffler.stream(0, count)]
    assert np.array_equal(np.sort(seen), np.sort(expected))


@pytest.mark.parametrize("mode", ["exact", "block"])
def test_given_rows_are_the_ones_that_come(tmp_path: Path, mode: str) -> None:
    write(tmp_path, 200, shard_rows=64)
    usable = np.flatnonzero(np.arange(200) % 3)
    backwards = usable[::-1].copy()
    with ActivationStore(tmp_path) as store:
        for rows in (usable, backwards):
            shuffler = Shuffler(store, batch_size=len(rows), seed=0, rows=rows, mode=mode)
            assert np.array_equal(np.sort(shuffler.row_numbers(0)), usable)
            for step, batch in enumerate(shuffler.stream(0, 3)):
                assert np.array_equal(batch.numpy(), by_h5py(tmp_path)[shuffler.row_numbers(step)])


def test_a_batch_stays_as_it_was_given_while_it_is_held(tmp_path: Path) -> None:
    write(tmp_path, 256, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=8, seed=0, pool_rows=64)
        stream = shuffler.stream(0, 1000)
        kept = [next(stream) for _ in range(16)]  # the whole ring: two windows of 64 rows
        assert all(torch.equal(batch, shuffler.batch(step)) for step, batch in enumerate(kept))
        # only what is let go is filled again
        del kept[:8]
        kept += [next(stream) for _ in range(8)]
        time.sleep(0.05)
        assert all(torch.equal(batch, shuffler.batch(step + 8)) for step, batch in enumerate(kept))
        stream.close()
        assert all(torch.equal(batch, shuffler.batch(step + 8)) for step, batch in enumerate(kept))


@pytest.mark.slow
def test_holding_more_than_the_pool_is_an_error_not_a_wait_for_ever(tmp_path: Path) -> None:
    write(tmp_path, 256, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="batches of an earlier window are still held"):
            list(Shuffler(store, batch_size=8, seed=0, pool_rows=64).stream(0, 1000))
        assert time.monotonic() - began < 30


def test_batches_are_views_of_the_pool(tmp_path: Path) -> None:
    write(tmp_path, 256, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        stream = Shuffler(store, batch_size=16, seed=0, pool_rows=64).stream(0, 8)
        places = [batch.data_ptr() for batch in stream]
    assert np.array_equal(np.diff(places)[:3], [16 * 2 * 6 * 4] * 3)


def n_threads(expected: int | None = None) -> int:
    """Threads of this process; the kernel may show one that Python has joined for a moment longer."""
    for _ in range(200):
        found = len(list(Path("/proc/self/task").iterdir()))
        if expected is None or found == expected:
            break
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_leaving_the_stream_early_ends_its_threads(tmp_path: Path, compression: str | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("activations", data=np.ones((64, 2, 6), np.float32), compression=compression)
    before = n_threads()
    with ActivationStore(tmp_path / "a.h5") as store:
        stream = Shuffler(store, batch_size=8, seed=0).stream(0, 1000)
        next(stream)
        assert n_threads() > before
        stream.close()
        assert n_threads(before) == before
        assert list(Shuffler(store, batch_size=8, seed=0).stream(5, 5)) == []
        stream = Shuffler(store, batch_size=8, seed=0).stream(0, 1000)
        next(stream)
        del stream
        assert n_threads(before) == before


def test_the_store_may_be_closed_while_a_stream_is_open(tmp_path: Path) -> None:
    write(tmp_path, 64, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        stream = Shuffler(store, batch_size=8, seed=0, pool_rows=32).stream(0, 100)
        first = next(stream).clone()
    rest = [batch.clone() for batch in stream]
    assert len(rest) == 99
    assert first.shape == rest[0].shape


@pytest.mark.slow
def test_a_forked_child_is_told_to_make_its_own(tmp_path: Path) -> None:
    write(tmp_path, 64, shard_rows=64)
    script = """
import os, sys
from pathlib import Path
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
store = ActivationStore(Path(sys.argv[1]))
stream = Shuffler(store, batch_size=8, seed=0).stream(0, 100)
next(stream)
if os.fork() == 0:
    try:
        next(stream)
    except RuntimeError as error:
        os._exit(7 if "forked" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
stream.close()
"""
    subprocess.run([sys.executable, "-P", "-c", script, tmp_path], check=True, timeout=60)


@pytest.mark.slow
def test_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    write(tmp_path, 256, shard_rows=64)
    script = """
import os, signal, sys, threading
from pathlib import Path
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    # holding all batches leaves nothing to come: it waits for 5 s before it says so
    list(Shuffler(ActivationStore(Path(sys.argv[1])), batch_size=8, seed=0, pool_rows=64).stream(0, 1000))
except KeyboardInterrupt:
    sys.exit(7)
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script, tmp_path], timeout=60, check=False)
    assert ran.returncode == 7


def test_waiting_is_counted_and_reading_goes_on_meanwhile(tmp_path: Path) -> None:
    write(tmp_path, 64, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=8, seed=0)
        for batch in shuffler.stream(0, 24):
            time.sleep(0.01)
            del batch
        # only the first window is waited for when using a batch takes longer than reading it
        assert 0 < shuffler.wait_seconds < 0.12


def test_the_pool_is_what_was_asked_for_and_follows_the_law(tmp_path: Path) -> None:
    n = 40_000
    write(tmp_path, n, shard_rows=n, d_model=1)  # 8 bytes a row
    with ActivationStore(tmp_path) as store:
        small = Shuffler(store, batch_size=64, seed=0)
        # 0.2 · 64 · 31 / 0.1 = 3968 rows; 10 windows of 4000 or a block more
        assert 3968 <= small.pool_rows <= 4032
        assert small.excess_variance() == pytest.approx(0.2 * 64 * 31 / (n / 10))
        assert small.excess_variance() <= 0.1
        assert small.pool_bytes <= 2 * small.pool_rows * 8
        assert "10 windows" not in small.describe()
        assert "9.9% more" in small.describe()
        whole = Shuffler(store, batch_size=1024, seed=0)
        assert whole.excess_variance() == 0
        assert "all rows in a pool" in whole.describe()
        assert Shuffler(store, batch_size=64, seed=0, mode="exact").excess_variance() == 0
        bounded = Shuffler(store, batch_size=64, seed=0, memory_bytes=20_000)
        assert bounded.pool_bytes <= 20_000
        assert bounded.pool_rows == 20_000 // 16 // 32 * 32
        assert bounded.excess_variance() > 0.1
        assert f"{bounded.excess_variance():.1%} more" in bounded.describe()
        with pytest.raises(OptionError, match="two blocks need 512"):
            Shuffler(store, batch_size=64, seed=0, memory_bytes=500)
        with pytest.raises(OptionError, match="needs more than 20,000 bytes"):
            Shuffler(store, batch_size=64, seed=0, pool_rows=10_000, memory_bytes=20_000)
        # a part of the data asks for no smaller a pool
        half = Shuffler(store, batch_size=64, seed=0, rank=1, world_size=2)
        assert half.excess_variance() <= 0.1


@pytest.mark.slow
def test_memory_is_the_pool_and_flat(tmp_path: Path) -> None:
    n = 20_000
    write(tmp_path, n, shard_rows=n, d_model=512)  # 82 MB
    script = """
import sys
from pathlib import Path
import torch
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler

torch.set_num_threads(1)
def peak():
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])

with ActivationStore(Path(sys.argv[1])) as store:
    shuffler = Shuffler(store, batch_size=512, seed=0, pool_rows=2048)
    before, seen = peak(), []
    for step, batch in enumerate(shuffler.stream(0, 150)):
        del batch
        seen.append(peak())
    pool = shuffler.pool_bytes // 1024
    assert pool == 2 * 2016 * 4, pool
    # 16 threads with 288 kB each, and a batch between two windows, take some; an epoch is 80,000 kB
    assert seen[-1] - before < pool + 25000, (before, seen[-1], pool)
    assert seen[-1] - seen[40] < 5000, (seen[40], seen[-1])
"""
    subprocess.run([sys.executable, "-P", "-c", script, tmp_path], check=True, timeout=60)


def spoil(path: Path, row: int, value: bytes, d_model: int, itemsize: int) -> None:
    with h5py.File(path) as f:
        offset = f["activations"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(offset + row * 2 * d_model * itemsize)
        raw.write(value)


@pytest.mark.parametrize("mode", ["exact", "block"])
def test_a_flipped_bit_is_found_when_reads_are_checked(tmp_path: Path, mode: str) -> None:
    write(tmp_path, 300, shard_rows=110, dtype="bfloat16")
    with ActivationStore(tmp_path) as store:
        clean = [b.clone() for b in Shuffler(store, batch_size=20, seed=0, mode=mode, check_crc=True).stream(0, 15)]
        assert np.array_equal(
            np.concatenate([b.float().numpy() for b in clean]),
            by_h5py(tmp_path)[_native.BlockOrder(300, 0, 1, 1).rows(0, 300)],
        )
    spoil(tmp_path / "shard-00001.h5", 40, b"\x01\x3c", 6, 2)
    with ActivationStore(tmp_path) as store:
        with pytest.raises(InputError, match=r"shard-00001.h5: rows 142 to 173 .*CRC-32C"):
            for batch in Shuffler(store, batch_size=20, seed=0, mode=mode, check_crc=True).stream(0, 15):
                del batch
        with pytest.raises(InputError, match="CRC-32C"):
            rows = np.array([145], np.int64)
            next(Shuffler(store, batch_size=1, seed=0, rows=rows, mode=mode, check_crc=True).stream(0, 1))
        shuffler = Shuffler(store, batch_size=300, seed=0, mode=mode, check_crc=True)
        with pytest.raises(InputError, match="CRC-32C"):
            shuffler.batch(0)
        for batch in Shuffler(store, batch_size=20, seed=0, mode=mode).stream(0, 15):
            del batch  # unchecked, it goes unnoticed: the check is what finds it


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("mode", ["exact", "block"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_are_not_finite_are_named(tmp_path: Path, mode: str, dtype: str, compression: str | None) -> None:
    values = np.ones((300, 2, 6), dtype)
    values[[77, 250], 1, 3] = np.nan, np.inf
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("activations", data=values, compression=compression)
    with ActivationStore(tmp_path / "a.h5") as store:
        shuffler = Shuffler(store, batch_size=20, seed=0, mode=mode, check_finite=True)
        with pytest.raises(InputError, match=r"row (77|250) .*NaN or infinity"):
            for batch in shuffler.stream(0, 15):
                del batch
        fine = Shuffler(store, batch_size=20, seed=0, mode=mode, n_rows=77, check_finite=True)
        assert len([None for _ in fine.stream(0, 4)]) == 4
        step = next(s for s in range(15) if 77 in shuffler.row_numbers(s))
        with pytest.raises(InputError, match=r"row (77|250) .*NaN or infinity"):
            shuffler.batch(step)


def test_every_bit_pattern_is_judged_as_torch_does() -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        rows = patterns.view(dtype).view(-1, 1)
        bad = [_native.first_nonfinite_row(row.view(torch.uint8).numpy()[None], name) == 0 for row in rows[::7]]
        assert bad == (~torch.isfinite(rows[::7, 0])).tolist()
    wide = torch.tensor([1.0, 3e38, -0.0, float("inf"), float("nan"), -float("inf")]).view(-1, 1)
    assert _native.first_nonfinite_row(wide.view(torch.uint8).numpy(), "float32") == 3
    assert _native.first_nonfinite_row(wide[:3].view(torch.uint8).numpy(), "float32") == -1


def test_stores_read_through_hdf5_give_the_same_batches(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((500, 2, 8)).astype(np.float32)
    for name, options in (("plain", {}), ("chunked", {"chunks": (60, 2, 8)}), ("gzip", {"compression": "gzip"})):
        with h5py.File(tmp_path / f"{name}.h5", "w") as f:
            f.create_dataset("activations", data=values, **options)
    for mode, pool_rows in (("exact", None), ("block", 128)):
        batches = {}
        for name in ("plain", "chunked", "gzip"):
            with ActivationStore(tmp_path / f"{name}.h5") as store:
                assert (store.slow is None) == (name != "gzip")
                shuffler = Shuffler(store, batch_size=48, seed=1, mode=mode, pool_rows=pool_rows)
                batches[name] = torch.stack([batch.clone() for batch in shuffler.stream(3, 30)])
        assert torch.equal(batches["plain"], batches["chunked"])
        assert torch.equal(batches["plain"], batches["gzip"])


def test_reading_past_the_page_cache_gives_the_same(tmp_path: Path) -> None:
    write(tmp_path / "fits", 700, shard_rows=256, dtype="bfloat16", d_model=128)  # rows of 512 bytes
    write(tmp_path / "odd", 100, shard_rows=100, dtype="bfloat16", d_model=100)
    with ActivationStore(tmp_path / "fits") as store:
        places = store.extents
        if _native.why_not_direct(places.fds, places.offsets, places.first_rows, 512) is None:
            for mode, crc in (("exact", False), ("block", False), ("block", True), ("exact", True)):
                options = {"mode": mode, "pool_rows": None if mode == "exact" else 128, "check_crc": crc}
                a = Shuffler(store, batch_size=50, seed=0, direct=True, **options)
                b = Shuffler(store, batch_size=50, seed=0, direct=False, **options)
                assert a.direct and not b.direct
                for x, y in zip(a.stream(0, 30), b.stream(0, 30), strict=True):
                    assert torch.equal(x, y)
                    del x, y
    with ActivationStore(tmp_path / "odd") as store:
        with pytest.raises(OptionError, match="a row has 400 bytes, not a multiple of 512"):
            Shuffler(store, batch_size=50, seed=0, direct=True)
        assert Shuffler(store, batch_size=50, seed=0).direct is False


def test_a_store_that_memory_cannot_hold_is_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 8192, shard_rows=8192, dtype="bfloat16", d_model=128)  # 1024 pages
    with ActivationStore(tmp_path) as store:
        places = store.extents
        if _native.why_not_direct(places.fds, places.offsets, places.first_rows, 512) is not None:
            return
        assert Shuffler(store, batch_size=50, seed=0).direct is False
        monkeypatch.setattr(shuffler_module, "memory_available", lambda: 1000)
        fd = os.open(tmp_path / "shard-00000.h5", os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        share = _native.cached_share(places.fds, places.offsets, places.first_rows, 512)
        assert share < 0.9
        assert Shuffler(store, batch_size=50, seed=0).direct is True
        store.slice(0, 8192)  # now it is cached, so memory holds it after all
        assert _native.cached_share(places.fds, places.offsets, places.first_rows, 512) == 1.0
        assert Shuffler(store, batch_size=50, seed=0).direct is False


@pytest.mark.parametrize("mode", ["exact", "block"])
def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path, mode: str) -> None:
    write(tmp_path, 5000, shard_rows=2500, d_model=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=50, seed=0, mode=mode, pool_rows=None if mode == "exact" else 512)
        stream = shuffler.stream(0, 1000)
        next(stream)
        os.truncate(tmp_path / "shard-00001.h5", 100_000)
        with pytest.raises(InputError, match=r"shard-00001.h5: truncated"):
            for batch in stream:
                del batch


def test_checked_reads_of_any_width_read_no_row_twice(tmp_path: Path) -> None:
    write(tmp_path, 4096, shard_rows=4096, d_model=1001)  # 36 rows fit the buffer, not a multiple of 32

    def read(check_crc: bool) -> int:
        with ActivationStore(tmp_path) as store:
            shuffler = Shuffler(store, batch_size=64, seed=0, pool_rows=4096, check_crc=check_crc, direct=False)
            stream = shuffler.stream(0, 64)
            before = bytes_read()
            for batch in stream:
                del batch
            return bytes_read() - before

    assert read(True) < 1.1 * read(False)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def test_a_pool_that_is_larger_than_what_is_free_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 64, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=8, seed=0)
        monkeypatch.setattr(shuffler_module, "memory_available", lambda: shuffler.pool_bytes - 1)
        with pytest.raises(ResourceError, match="are free; lower --pool-gb"):
            next(shuffler.stream(0, 4))


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 10, shard_rows=10)
    with h5py.File(tmp_path / "bare.h5", "w") as f:
        f.create_dataset("activations", data=np.ones((10, 2, 6), np.float32))
    with ActivationStore(tmp_path) as store:
        for options, message in (
            ({"batch_size": 0}, "batch size 0"),
            ({"seed": -1}, "seed -1"),
            ({"n_threads": -1}, "-1 threads"),
            ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
            ({"block_rows": 0}, "blocks of 0 rows"),
            ({"pool_rows": 31}, "a pool of 31 rows is less than a block of 32"),
        ):
            with pytest.raises(OptionError, match=message):
                Shuffler(store, **({"batch_size": 1, "seed": 0} | options))
        with pytest.raises(InputError, match="no rows to train on"):
            Shuffler(store, batch_size=1, seed=0, n_rows=0)
        with pytest.raises(InputError, match="10 rows are too few for 7 ranks"):
            Shuffler(store, batch_size=1, seed=0, rank=6, world_size=7)
        with pytest.raises(ValueError, match="the store has 10"):
            Shuffler(store, batch_size=1, seed=0, n_rows=11)
    with ActivationStore(tmp_path / "bare.h5") as store, pytest.raises(OptionError, match="no checksums to check"):
        Shuffler(store, batch_size=1, seed=0, check_crc=True)


@pytest.mark.slow
def test_a_pool_that_memory_cannot_hold_is_said(tmp_path: Path) -> None:
    write(tmp_path, 4000, shard_rows=4000, d_model=2000)
    script = """
import resource, sys
from pathlib import Path
from fastdiff.errors import ResourceError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
with ActivationStore(Path(sys.argv[1])) as store:
    shuffler = Shuffler(store, batch_size=64, seed=0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, -1))
    try:
        next(shuffler.stream(0, 10))
    except ResourceError as error:
        assert "no memory for a shuffle pool of 0.128 GB" in str(error), error
        sys.exit(7)
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script, tmp_path], check=False, timeout=60)
    assert ran.returncode == 7


SHORT_READS = r"""
#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

/* Every third call is interrupted; the others read 1 to 11 bytes of the first piece. */
static ssize_t stingy(int fd, const struct iovec *pieces, off_t offset) {
    static __thread unsigned calls;
    size_t most = ++calls % 11 + 1;
    if (calls % 3 == 0) { errno = EINTR; return -1; }
    return pread(fd, pieces[0].iov_base, pieces[0].iov_len < most ? pieces[0].iov_len : most, offset);
}
ssize_t preadv(int fd, const struct iovec *p, int n, off_t o) { (void)n; return stingy(fd, p, o); }
ssize_t preadv64(int fd, const struct iovec *p, int n, off_t o) { (void)n; return stingy(fd, p, o); }
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_short_and_interrupted_reads_are_continued(tmp_path: Path) -> None:
    (tmp_path / "stingy.c").write_text(SHORT_READS)
    library = tmp_path / "stingy.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "stingy.c"], check=True)
    write(tmp_path / "s", 120, shard_rows=50)
    np.save(tmp_path / "expected.npy", by_h5py(tmp_path / "s"))
    script = """
import sys
from pathlib import Path
import numpy as np
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
expected = np.load(Path(sys.argv[1]) / "expected.npy")
rows = np.r_[np.arange(120), np.random.default_rng(0).integers(0, 120, 300)]
with ActivationStore(Path(sys.argv[1]) / "s") as store:
    for threads in (1, 3):
        assert np.array_equal(store.rows(rows, n_threads=threads).numpy(), expected[rows])
    shuffler = Shuffler(store, batch_size=16, seed=0, pool_rows=64, check_crc=True)
    for step, batch in enumerate(shuffler.stream(0, 20)):
        assert np.array_equal(batch.numpy(), expected[shuffler.row_numbers(step)])
"""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script, tmp_path],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
