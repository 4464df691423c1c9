import hashlib
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdiff.errors import InputError, OptionError
from fastdiff.store.documents import cut_before_holdout
from fastdiff.store.format import bfloat16_type
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def write(path: Path, n: int, shard_rows: int, *, d_model: int = 7, dtype: str = "bfloat16", **columns: Any) -> None:
    values = torch.randn(n, 2, d_model, generator=torch.Generator().manual_seed(n))
    given = {name: np.zeros(n, np.int64) for name in ("token_ids", "sequence_ids", "positions", "roles", "sources")}
    meta = {"models": ["a", "b"], "roles": ["text", "bos"]}
    with StoreWriter(
        path, n_rows=n, n_models=2, d_model=d_model, dtype=dtype, shard_rows=shard_rows, meta=meta
    ) as writer:
        writer.append(values, **(given | columns))


def by_h5py(path: Path) -> np.ndarray:
    parts = []
    for file in sorted(path.glob("*.h5")):
        with h5py.File(file) as f:
            parts.append(f["activations"][:])
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("n", "shard_rows"), [(1, 1), (7, 3), (500, 123), (1000, 1000)])
def test_rows_equal_h5py(tmp_path: Path, dtype: str, n: int, shard_rows: int) -> None:
    write(tmp_path, n, shard_rows, dtype=dtype)
    oracle = by_h5py(tmp_path)
    rng = np.random.default_rng(0)
    with ActivationStore(tmp_path) as store:
        assert (store.n_rows, store.n_models, store.d_model, store.dtype) == (n, 2, 7, DTYPES[dtype])
        for numbers in [
            np.arange(n),
            np.arange(n)[::-1],
            rng.permutation(n),
            rng.integers(0, n, 700),  # repeats
            np.array([n - 1]),
            np.array([], np.int64),
            rng.permutation(n)[: n // 2].astype(np.int32),
        ]:
            for threads in (1, 3):
                got = store.rows(numbers, n_threads=threads)
                assert got.dtype == DTYPES[dtype]
                assert np.array_equal(got.float().numpy(), oracle[numbers].astype(np.float32))
        assert torch.equal(store.slice(n // 3, n), store.rows(np.arange(n // 3, n)))


def test_wide_rows_and_many_threads(tmp_path: Path) -> None:
    # a row of 160 kB: several chunks of a few rows, each row its own read
    write(tmp_path, 40, 9, d_model=20000, dtype="float32")
    oracle = by_h5py(tmp_path)
    numbers = np.random.default_rng(1).integers(0, 40, 60)
    with ActivationStore(tmp_path) as store:
        for threads in (1, 2, 16):
            assert np.array_equal(store.rows(numbers, n_threads=threads).numpy(), oracle[numbers])


def test_row_numbers_outside_the_store_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 10, 4)
    with ActivationStore(tmp_path) as store:
        for bad in (-1, 10, 2**40, -(2**63)):
            with pytest.raises(IndexError, match=r"outside \[0, 10\)"):
                store.rows(np.array([0, bad]))


def test_columns_run_over_all_shards(tmp_path: Path) -> None:
    ids = np.arange(100) * 3
    write(tmp_path, 100, 33, token_ids=ids, sequence_ids=ids + 2**50)
    with ActivationStore(tmp_path) as store:
        tokens, sequences = store.column("token_ids"), store.column("sequence_ids")
        assert tokens is not None and tokens.dtype == np.int32 and np.array_equal(tokens, ids)
        assert sequences is not None and np.array_equal(sequences, ids + 2**50)
        with pytest.raises(ValueError, match="no column 'tokens'"):
            store.column("tokens")


@pytest.mark.parametrize("named_shards", [1, 2])
def test_minimal_store_of_another_tool_opens(tmp_path: Path, named_shards: int) -> None:
    x = np.random.default_rng(0).standard_normal((60, 2, 4)).astype(np.float32)
    for i, part in enumerate(np.split(x, named_shards)):
        with h5py.File(tmp_path / f"shard-0000{i}.h5", "w") as file:
            file["activations"] = part
    (tmp_path / "store.json").write_text('{"schema": 1, "models": [{"name": "a"}, "b"]}')
    with ActivationStore(tmp_path) as store:
        assert [model.name for model in store.meta.models] == ["a", "b"]
        assert np.array_equal(store.slice(0, 60).numpy(), x)
        assert store.column("token_ids") is None
        assert store.usable_rows() is None
        assert store.vocabulary is None
        assert store.n_train(0.1) == 54
        stats = store.stats()
        assert stats.n_rows == 60
        np.testing.assert_allclose(stats.mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.variance, x.astype(np.float64).var(axis=0).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bare_file_is_a_store_of_one_shard(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "acts.h5"
    x = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    with h5py.File(path, "w") as file:
        if dtype == "bfloat16":
            made = file.create_dataset("activations", x.shape, dtype=h5py.Datatype(bfloat16_type()))
            bits = x.view(torch.uint16).numpy()
            made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=bfloat16_type())
        else:
            file["activations"] = x.numpy()
    with ActivationStore(path) as store:
        assert torch.equal(store.slice(0, 20), x)
        assert [model.name for model in store.meta.models] == ["base", "tuned"]
        assert store.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert store.vocabulary is None
        assert store.n_train(0) == 20
        assert store.n_train(0.1) == 18


def test_file_with_a_user_block_is_read_at_the_right_place(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=1024) as file:
        file["activations"] = x
    with ActivationStore(tmp_path / "a.h5") as store:
        assert np.array_equal(store.slice(0, 9).numpy(), x)


def test_statistics_without_store_json_skip_bos(tmp_path: Path) -> None:
    roles = np.where(np.arange(200) % 5 == 0, 1, 0)
    write(tmp_path, 200, 64, roles=roles)
    with ActivationStore(tmp_path) as store:
        written = store.stats()
        usable = store.usable_rows()
    assert usable is not None and np.array_equal(usable, np.flatnonzero(roles == 0))
    told = json.loads((tmp_path / "store.json").read_text())
    del told["stats"]
    (tmp_path / "store.json").write_text(json.dumps(told))
    with ActivationStore(tmp_path) as store:
        computed = store.stats()
        assert store.stats() is computed
    assert computed.n_rows == written.n_rows == 160
    np.testing.assert_allclose(computed.mean, written.mean, rtol=1e-12)
    np.testing.assert_allclose(computed.variance, written.variance, rtol=1e-12)
    np.testing.assert_allclose(computed.mean_norm, written.mean_norm, rtol=1e-12)


def test_non_finite_values_of_another_tool_are_named(tmp_path: Path) -> None:
    x = np.zeros((50, 2, 3), np.float32)
    x[41, 1, 0] = np.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = x
    with (
        ActivationStore(tmp_path / "a.h5") as store,
        pytest.raises(InputError, match="row 41 of model tuned"),
    ):
        store.stats()


def test_a_store_of_bos_only_has_no_statistics(tmp_path: Path) -> None:
    write(tmp_path, 10, 10, roles=np.ones(10, np.int64))
    with ActivationStore(tmp_path) as store:
        assert store.usable_rows() is not None and len(store.usable_rows()) == 0
        with pytest.raises(InputError, match="every row has the role bos"):
            store.stats()


@pytest.mark.parametrize("holdout", [0.001, 0.01, 0.1, 0.37, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_n_train_never_splits_a_document(tmp_path: Path, holdout: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 50)
    ids = np.repeat(rng.permutation(10**6)[:50], lengths)  # unsorted ids, as long as they are unique
    n = len(ids)
    write(tmp_path, n, 100, sequence_ids=ids)
    with ActivationStore(tmp_path) as store:
        n_train = store.n_train(holdout)
    assert 0 < n_train < n
    assert not set(ids[:n_train]) & set(ids[n_train:])
    held = len(set(ids[n_train:]))
    assert held == min(max(1, round(holdout * 50)), 49)


def test_n_train_of_interleaved_and_single_documents() -> None:
    assert cut_before_holdout(np.array([1, 1, 2, 1, 2, 3, 3, 4]), 0.25) == 7
    assert cut_before_holdout(np.array([1, 1, 2, 1, 2, 3, 3, 4]), 0.5) == 5
    assert cut_before_holdout(np.array([1, 2, 1, 2]), 0.5) == 4
    assert cut_before_holdout(np.array([5, 5, 5]), 0.01) == 3
    assert cut_before_holdout(np.array([5]), 0.01) == 1


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_impossible_holdout_is_refused(tmp_path: Path, holdout: float) -> None:
    write(tmp_path, 4, 4)
    with ActivationStore(tmp_path) as store, pytest.raises(OptionError, match="at least 0 and less than 1"):
        store.n_train(holdout)


def test_vocabulary_is_checked_against_its_hash(tmp_path: Path) -> None:
    write(tmp_path, 4, 4)
    text = json.dumps(["<s>", "é", "\n"])
    (tmp_path / "vocabulary.json").write_text(text)
    with ActivationStore(tmp_path) as store:
        assert store.vocabulary == ["<s>", "é", "\n"]
    told = json.loads((tmp_path / "store.json").read_text())
    told["vocabulary_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "store.json").write_text(json.dumps(told))
    with ActivationStore(tmp_path) as store:
        assert store.vocabulary == ["<s>", "é", "\n"]
    (tmp_path / "vocabulary.json").write_text('["<s>"]')
    with ActivationStore(tmp_path) as store, pytest.raises(InputError, match=r"vocabulary\.json: changed"):
        _ = store.vocabulary


def test_closing_closes_the_files(tmp_path: Path) -> None:
    write(tmp_path, 10, 2)

    def open_files() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return sum(str(tmp_path) in os.readlink(link) for link in links if os.path.islink(link))  # noqa: PTH114, PTH115

    store = ActivationStore(tmp_path)
    assert open_files() == 5
    store.close()
    store.close()
    assert open_files() == 0
    with pytest.raises(ValueError, match="closed"):
        store.slice(0, 1)
    store = ActivationStore(tmp_path)
    del store
    assert open_files() == 0
