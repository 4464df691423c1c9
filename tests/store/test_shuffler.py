import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff import _native
from fastdiff.errors import InputError, OptionError
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


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "n", "shard_rows", "d_model"),
    [("float32", 101, 17, 5), ("float16", 1009, 333, 6), ("bfloat16", 517, 517, 33), ("bfloat16", 5, 2, 1)],
)
def test_batches_equal_the_oracle(
    tmp_path: Path, dtype: str, n: int, shard_rows: int, d_model: int, n_threads: int
) -> None:
    write(tmp_path, n, shard_rows=shard_rows, dtype=dtype, d_model=d_model)
    oracle = by_h5py(tmp_path)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=32, seed=3, n_rows=n, n_threads=n_threads)
        for step, batch in enumerate(shuffler.stream(0, 40)):
            positions = np.arange(step * 32, step * 32 + 32)
            rows = [int(_native.permute(n, 3, int(p) // n, int(p) % n, 1)[0]) for p in positions]
            assert np.array_equal(shuffler.row_numbers(step), rows)
            assert np.array_equal(batch.float().numpy(), oracle[rows])
            assert batch.dtype == store.dtype


@pytest.mark.parametrize(("n", "batch_size"), [(100, 7), (100, 100), (64, 64), (13, 50), (1, 4), (1000, 999)])
def test_every_row_comes_once_per_epoch_also_when_batches_straddle_epochs(
    tmp_path: Path, n: int, batch_size: int
) -> None:
    write(tmp_path, n, shard_rows=40)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=batch_size, seed=0, n_rows=n)
        n_steps = -(-3 * n // batch_size)
        stream = np.concatenate([shuffler.row_numbers(step) for step in range(n_steps)])[: 3 * n]
    epochs = stream.reshape(3, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))
    if n >= 13:
        assert not np.array_equal(epochs[0], epochs[1])


def test_order_depends_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", 300, shard_rows=300)
    write(tmp_path / "many", 300, shard_rows=11, dtype="bfloat16")
    with ActivationStore(tmp_path / "one") as one, ActivationStore(tmp_path / "many") as many:
        a = Shuffler(one, batch_size=30, seed=9, n_rows=250, n_threads=1)
        b = Shuffler(many, batch_size=50, seed=9, n_rows=250, n_threads=3)
        flat_a = np.concatenate([a.row_numbers(step) for step in reversed(range(25))][::-1])
        flat_b = np.concatenate([b.row_numbers(step) for step in range(15)])
        assert np.array_equal(flat_a, flat_b)
        assert flat_a.max() < 250
        other = Shuffler(one, batch_size=30, seed=10, n_rows=250)
        assert not np.array_equal(a.row_numbers(0), other.row_numbers(0))


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_resuming_at_any_step_gives_the_tail(tmp_path: Path, at: int) -> None:
    write(tmp_path, 90, shard_rows=31, dtype="bfloat16")
    with ActivationStore(tmp_path) as store:
        whole = list(Shuffler(store, batch_size=16, seed=2, n_rows=90).stream(0, 12))
        tail = list(Shuffler(store, batch_size=16, seed=2, n_rows=90).stream(at, 12))
        assert len(tail) == 12 - at
        assert all(torch.equal(x, y) for x, y in zip(whole[at:], tail, strict=True))
        direct = Shuffler(store, batch_size=16, seed=2, n_rows=90)
        assert all(torch.equal(x, direct.batch(step)) for step, x in enumerate(whole))


def test_given_rows_are_the_ones_that_come(tmp_path: Path) -> None:
    write(tmp_path, 200, shard_rows=64)
    usable = np.flatnonzero(np.arange(200) % 3)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=len(usable), seed=0, n_rows=len(usable), rows=usable)
        assert np.array_equal(np.sort(shuffler.row_numbers(0)), usable)
        assert np.array_equal(shuffler.batch(1).numpy(), by_h5py(tmp_path)[shuffler.row_numbers(1)])


def test_a_batch_stays_as_it_was_given(tmp_path: Path) -> None:
    write(tmp_path, 64, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=8, seed=0, n_rows=64)
        kept = list(shuffler.stream(0, 8))
        assert all(torch.equal(batch, shuffler.batch(step)) for step, batch in enumerate(kept))


def test_leaving_the_stream_early_ends_its_thread(tmp_path: Path) -> None:
    write(tmp_path, 64, shard_rows=64)
    before = threading.active_count()
    with ActivationStore(tmp_path) as store:
        stream = Shuffler(store, batch_size=8, seed=0, n_rows=64).stream(0, 1000)
        next(stream)
        assert threading.active_count() == before + 1
        stream.close()
        assert threading.active_count() == before
        assert list(Shuffler(store, batch_size=8, seed=0, n_rows=64).stream(5, 5)) == []
        assert threading.active_count() == before


def test_waiting_is_counted_and_reading_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 64, shard_rows=64)
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=8, seed=0, n_rows=64)
        read = shuffler.batch

        def slowly(step: int) -> torch.Tensor:
            time.sleep(0.05)
            return read(step)

        monkeypatch.setattr(shuffler, "batch", slowly)
        for _ in shuffler.stream(0, 4):
            pass
        assert 0.19 < shuffler.wait_seconds < 1.0
        waited = shuffler.wait_seconds
        for _ in shuffler.stream(0, 4):
            time.sleep(0.1)
        # only the first batch is waited for when using one takes longer than reading one
        assert shuffler.wait_seconds - waited < 0.15


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 10, shard_rows=10)
    with ActivationStore(tmp_path) as store:
        with pytest.raises(OptionError, match="batch size 0"):
            Shuffler(store, batch_size=0, seed=0, n_rows=10)
        with pytest.raises(OptionError, match="seed -1"):
            Shuffler(store, batch_size=1, seed=-1, n_rows=10)
        with pytest.raises(OptionError, match="0 threads"):
            Shuffler(store, batch_size=1, seed=0, n_rows=10, n_threads=0)
        with pytest.raises(InputError, match="no rows to train on"):
            Shuffler(store, batch_size=1, seed=0, n_rows=0)
        with pytest.raises(ValueError, match="the store has 10"):
            Shuffler(store, batch_size=1, seed=0, n_rows=11)


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
expected = np.load(Path(sys.argv[1]) / "expected.npy")
rows = np.r_[np.arange(120), np.random.default_rng(0).integers(0, 120, 300)]
with ActivationStore(Path(sys.argv[1]) / "s") as store:
    for threads in (1, 3):
        assert np.array_equal(store.rows(rows, n_threads=threads).numpy(), expected[rows])
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
