"""Which rows are measured, and in what groups."""

import numpy as np
import torch

from fastdiff.crosscoder.rows import evaluation_rows, spread_rows
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter


def test_rows_are_spread_evenly():
    rows = np.arange(100, 400)
    assert spread_rows(rows, 5000).tolist() == rows.tolist()
    assert spread_rows(rows, 4).tolist() == [100, 199, 299, 399]
    assert spread_rows(7, 3).tolist() == [0, 3, 6]
    assert spread_rows(rows[:0], 4).tolist() == [] and spread_rows(0, 4).tolist() == []
    assert len(np.unique(spread_rows(123_457, 50_000))) == 50_000


def test_held_out_rows_without_bos_in_their_groups(tmp_path):
    n = 200
    i = np.arange(n)
    meta = {
        "models": [{"name": "b"}, {"name": "t"}],
        "roles": ["bos", "text"],
        "sources": [{"dataset": "d", "category": "a"}, {"dataset": "d"}],
    }
    with StoreWriter(tmp_path / "s", n_rows=n, n_models=2, d_model=3, dtype="float32", shard_rows=n, meta=meta) as w:
        columns = {"token_ids": i, "sequence_ids": i // 10, "positions": i % 10, "roles": (i % 10 > 0) * 1}
        w.append(torch.randn(n, 2, 3), **columns, sources=i // 10 % 2)
    with ActivationStore(tmp_path / "s") as store:
        rows = evaluation_rows(store, 0.2)
        assert rows.name == "held-out"
        assert rows.numbers.tolist() == [r for r in range(160, 200) if r % 10]
        codes, names = rows.groups["source"]
        assert names == ["0 a", "1 d"] and codes.tolist() == (rows.numbers // 10 % 2).tolist()
        assert rows.groups["role"][1] == ["bos", "text"]
        everything = evaluation_rows(store, 0.0, most=60)
        assert everything.name == "training" and len(everything.numbers) == 60
