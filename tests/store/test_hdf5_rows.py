"""Rows through HDF5: every chunk is read once per call, from any thread and after a fork."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.train import train
from fastdiff.errors import InputError
from fastdiff.store import hdf5_rows
from fastdiff.store.reader import ActivationStore

X = np.random.default_rng(0).standard_normal((3000, 2, 8)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("activations", data=X, chunks=(512, 2, 8), compression="gzip")
    return tmp_path / "a.h5"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    reads: list[tuple[int, int]] = []
    read_bits = hdf5_rows.read_bits

    def counting(data_set: h5py.Dataset, start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return read_bits(data_set, start, stop)

    monkeypatch.setattr(hdf5_rows, "read_bits", counting)
    return reads


def test_each_chunk_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    # the shuffler's order: blocks of 32 rows in any order
    blocks = np.random.default_rng(1).permutation(3000 // 32)[:60]
    rows = (blocks[:, None] * 32 + np.arange(32)).ravel()
    with ActivationStore(path) as store:
        assert np.array_equal(store.rows(rows).numpy(), X[rows])
        assert len(reads) <= 6
        reads.clear()
        assert np.array_equal(store.slice(100, 2900).numpy(), X[100:2900])
        assert reads == [(100, 2900)]


def test_rows_far_apart_are_not_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = X.astype(">f4")
    reads = count_reads(monkeypatch)
    with ActivationStore(tmp_path / "a.h5") as store:
        rows = np.array([2999, 0, 5, 1500, 1501, 5])
        assert np.array_equal(store.rows(rows).numpy(), X[rows])
    assert reads == [(0, 6), (1500, 1502), (2999, 3000)]


def test_large_reads_come_in_slabs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_rows, "_SLAB_BYTES", 100 * 64)
    reads = count_reads(monkeypatch)
    rows = np.random.default_rng(2).permutation(np.r_[np.arange(3000), np.arange(500)])
    with ActivationStore(path) as store:
        assert np.array_equal(store.rows(rows).numpy(), X[rows])
    assert len(reads) == 30 and max(stop - start for start, stop in reads) == 100


def test_threads_get_their_own_rows(path: Path) -> None:
    with ActivationStore(path) as store, ThreadPoolExecutor(4) as pool:
        wanted = [np.random.default_rng(i).integers(0, 3000, 400) for i in range(24)]
        for rows, got in zip(wanted, pool.map(store.rows, wanted), strict=True):
            assert np.array_equal(got.numpy(), X[rows])


def test_fork_while_another_thread_reads(path: Path) -> None:
    stop = threading.Event()
    context = multiprocessing.get_context("fork")

    with ActivationStore(path) as store:

        def read_on() -> None:
            while not stop.is_set():
                store.rows(np.arange(0, 3000, 3))

        def child(connection: object) -> None:
            connection.send_bytes(store.slice(7, 900).numpy().tobytes())  # type: ignore[attr-defined]

        thread = threading.Thread(target=read_on)
        thread.start()
        try:
            for _ in range(5):
                mine, theirs = context.Pipe()
                process = context.Process(target=child, args=(theirs,))
                process.start()
                assert mine.poll(20), "the child hangs"
                assert mine.recv_bytes() == X[7:900].tobytes()
                process.join(20)
                assert process.exitcode == 0
        finally:
            stop.set()
            thread.join()


def test_row_numbers_outside_are_refused(path: Path) -> None:
    with ActivationStore(path) as store:
        for bad in (-1, 3000, 2**40):
            with pytest.raises(IndexError, match=r"outside \[0, 3000\)"):
                store.rows(np.array([0, bad]))


def test_damaged_chunk_is_an_input_error(path: Path) -> None:
    with h5py.File(path) as file:
        info = file["activations"].id.get_chunk_info(3)
    data = bytearray(path.read_bytes())
    data[info.byte_offset + 50 : info.byte_offset + 90] = bytes(40)
    path.write_bytes(data)
    with ActivationStore(path) as store:
        assert torch.equal(store.slice(0, 1536), torch.from_numpy(X[:1536]))
        with pytest.raises(InputError, match=r"a\.h5: cannot be read \(.*\); copy or extract it again"):
            store.slice(1600, 1601)


def test_closed_store_is_closed(path: Path) -> None:
    store = ActivationStore(path)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.slice(0, 1)
    with h5py.File(path, "r+"):  # HDF5 refuses to write a file that it still has open for reading
        pass


def test_training_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    weights = []
    for name, how in {"a": {}, "b": {"chunks": (16, 2, 8)}, "c": {"chunks": (64, 1, 8), "compression": "gzip"}}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("activations", data=X[:400], **how)
        config = TrainConfig(dict_size=16, k=2, steps=5, batch_size=32, device="cpu")
        weights.append((train(tmp_path / f"{name}.h5", tmp_path / name, config) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
