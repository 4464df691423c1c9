"""The table shows what was measured and nothing else."""

import json

import pytest

from fastdiff.benchmark.table import format_table, write_json


def test_columns_appear_where_a_row_has_them():
    rows = [
        {"name": "topk", "ms": 1.23456, "of_floor": 0.5, "repeats": True, "error": 1e-7},
        {"name": "torch.topk", "ms": 12345.6, "ratio": 3.14159, "repeats": False},
        {"name": "gone", "note": "out of memory"},
    ]
    assert format_table(rows).splitlines() == [
        "                ms  of floor  repeats    error  ours is faster by",
        "topk          1.23       50%      yes  1.0e-07",
        "torch.topk  12,346                 NO                        3.14",
        "gone                                                               out of memory",
    ]


def test_none_is_an_empty_cell():
    assert format_table([{"name": "a", "ms": None, "dead": 0.0}]).splitlines() == ["   dead", "a    0%"]


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "figures.json"
    write_json(path, rows=[1])
    assert json.loads(path.read_text()) == {"schema": 1, "rows": [1]}
    with pytest.raises(ValueError):
        write_json(path, rows=(cycle := []).append(cycle) or cycle)
    assert json.loads(path.read_text())["rows"] == [1]
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]
