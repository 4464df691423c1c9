"""Each thing that is not a readable store is refused in one line with its path and what helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
from fastdiff.store.writer import StoreWriter

X = np.arange(60, dtype=np.float32).reshape(10, 2, 3)


def write(path: Path, n: int = 100, *, d_model: int = 16) -> None:
    zeros = np.zeros(n, np.int64)
    with StoreWriter(
        path,
        n_rows=n,
        n_models=2,
        d_model=d_model,
        dtype="bfloat16",
        shard_rows=40,
        meta={"models": ["a", "b"]},
    ) as writer:
        writer.append(
            torch.ones(n, 2, d_model),
            token_ids=zeros,
            sequence_ids=zeros,
            positions=zeros,
            roles=zeros,
            sources=zeros,
        )


def edit(path: Path, **changes: Any) -> None:
    told = json.loads((path / "store.json").read_text())
    told.update(changes)
    (path / "store.json").write_text(json.dumps(told))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        ActivationStore(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def no_activations(file: h5py.File) -> None:
    file["acts"] = X


def group_instead(file: h5py.File) -> None:
    file.create_group("activations")


def two_axes(file: h5py.File) -> None:
    file["activations"] = X[0]


def four_axes(file: h5py.File) -> None:
    file["activations"] = X[None]


def no_rows(file: h5py.File) -> None:
    file["activations"] = X[:0]


def never_written(file: h5py.File) -> None:
    file.create_dataset("activations", X.shape, np.float32)


def float64(file: h5py.File) -> None:
    file["activations"] = X.astype(np.float64)


def integers(file: h5py.File) -> None:
    file["activations"] = X.astype(np.uint16)


def short_column(file: h5py.File) -> None:
    file["activations"] = X
    file["sequence_ids"] = np.zeros(9, np.int64)


def float_column(file: h5py.File) -> None:
    file["activations"] = X
    file["token_ids"] = np.zeros(10, np.float32)


@pytest.mark.parametrize(
    ("make", "found", "cure"),
    [
        (no_activations, "no data set /activations (found: acts)", "extract it again or name it so"),
        (group_instead, "no data set /activations", "extract it again"),
        (two_axes, "shape (2, 3)", "write it again as (rows, models, d_model)"),
        (four_axes, "shape (1, 10, 2, 3)", "write it again as (rows, models, d_model)"),
        (no_rows, "there is nothing in it", "extract it again"),
        (never_written, "rows 0 to 9 of /activations were never written", "extract or write them again"),
        (float64, "is float64", "bfloat16, float16 or float32"),
        (integers, "is uint16", "bfloat16, float16 or float32"),
        (short_column, "/sequence_ids is (9,) int64, expected (10,)", "extract it again"),
        (float_column, "/token_ids is (10,) float32", "extract it again"),
    ],
)
def test_unreadable_layout(tmp_path: Path, make: Callable[[h5py.File], None], found: str, cure: str) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        make(file)
    message = refusal(path)
    assert message.startswith(str(path))
    assert found in message
    assert cure in message


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "no such store; `fastdiff extract`" in refusal(tmp_path / "nowhere")
    assert "no store.json, not a store" in refusal(tmp_path)
    (tmp_path / "text.h5").write_text("these are not activations")
    assert "cannot be opened as HDF5" in refusal(tmp_path / "text.h5")
    (tmp_path / "store.json").write_text("{")
    assert "not readable as JSON" in refusal(tmp_path)


def test_unknown_schema(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, schema=2)
    message = refusal(tmp_path)
    assert str(tmp_path / "store.json") in message
    assert "schema 2" in message and "reads 1" in message


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"models": []}, "models"),
        ({"models": [{"revision": "main"}]}, "models.0.name"),
        ({"dtype": "float8"}, "dtype"),
        ({"shards": [{"file": "../shard.h5", "n_rows": 1}]}, "shards.0.file"),
        ({"shards": []}, "without any shard"),
        ({"models": ["only one"]}, "names 1 models, /activations holds 2"),
        ({"dtype": "float32"}, "says float32, the shards are bfloat16"),
        ({"shards": [{"file": "shard-00000.h5", "n_rows": 41}]}, "40 rows, but store.json says 41"),
        ({"shards": [{"file": "shard-00009.h5", "n_rows": 40}]}, "shard-00009.h5: no such file"),
        (
            {"stats": {"n_rows": 1, "mean": [[0.0]], "variance": [0.0], "mean_norm": [0.0]}},
            "remove them there",
        ),
    ],
)
def test_store_json_that_cannot_be(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    write(tmp_path)
    edit(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert found in message


def test_shards_that_disagree(tmp_path: Path) -> None:
    for name, changed in {"width": X[:, :, :2], "type": X.astype(np.float16), "models": X[:, :1]}.items():
        path = tmp_path / name
        path.mkdir()
        (path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
        for i, x in enumerate([X, changed]):
            with h5py.File(path / f"shard-0000{i}.h5", "w") as file:
                file["activations"] = x
        message = refusal(path)
        assert "shard-00001.h5" in message and "in shard-00000.h5" in message
    path = tmp_path / "columns"
    path.mkdir()
    (path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    for i in range(2):
        with h5py.File(path / f"shard-0000{i}.h5", "w") as file:
            file["activations"] = X
            if i == 0:
                file["token_ids"] = np.arange(10)
    assert "columns is ()" in refusal(path)


@pytest.mark.parametrize("keep", [0, 10, 500, 4096, 0.5, 0.99, -1])
def test_truncated_before_opening(tmp_path: Path, keep: float) -> None:
    write(tmp_path, 2000, d_model=64)
    shard = tmp_path / "shard-00001.h5"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(int(size * keep) if 0 < keep < 1 else size - 1 if keep == -1 else int(keep))
    message = refusal(tmp_path)
    assert message.startswith(str(shard))
    assert "truncated" in message or "cannot be opened as HDF5" in message


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    write(tmp_path / "whole", 40)
    original = (tmp_path / "whole" / "shard-00000.h5").read_bytes()
    path = tmp_path / "damaged.h5"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(original)
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with ActivationStore(path) as store:
                store.slice(0, store.n_rows)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("n_threads", [1, 3])
def test_truncated_while_open(tmp_path: Path, n_threads: int) -> None:
    write(tmp_path, 2000, d_model=64)
    shard = tmp_path / "shard-00002.h5"
    with ActivationStore(tmp_path) as store:
        shuffler = Shuffler(store, batch_size=500, seed=0, n_rows=2000, n_threads=n_threads)
        with shard.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(InputError, match=rf"{shard}: truncated, \d+ of \d+ bytes left at byte \d+; copy"):
            store.rows(np.arange(2000), n_threads=n_threads)
        with pytest.raises(InputError, match="truncated"):
            list(shuffler.stream(0, 4))
        with pytest.raises(InputError, match=r"shard-00002\.h5: truncated"):
            store.column("roles")
        assert torch.equal(store.slice(0, 80), torch.ones(80, 2, 64, dtype=torch.bfloat16))


def test_store_that_vanishes_while_open_is_still_read(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with ActivationStore(tmp_path / "s") as store:
        shutil.rmtree(tmp_path / "s")
        assert store.slice(0, 100).sum() == 100 * 2 * 16
        with pytest.raises(InputError, match="no such file"):
            store.column("roles")
