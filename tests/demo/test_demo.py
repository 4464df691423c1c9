"""Holding a comparison against the planted truth."""

import csv
import json

from fastdiff.comparison.compare import COLUMNS
from fastdiff.demo.demo import hold_against_truth

TRUTH = {
    "it": {"code": "lost", "facts": "gained", "maths": "unchanged"},
    "simpo": {"code": "gained", "facts": "gained", "maths": "lost"},
}


def write_categories(folder, rows):
    (folder / "compare").mkdir()
    with (folder / "compare" / "categories.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, restval="")
        writer.writeheader()
        for comparison, category, points in rows:
            interval = {"points_low": points - 5, "points_high": points + 5, "q": 0.01} if points != "" else {}
            writer.writerow({"comparison": comparison, "category": category, "delta_points": points, **interval})


def test_recovered_means_the_right_direction(tmp_path):
    rows = [
        ("it", "code", -10), ("it", "facts", -3), ("it", "maths", 50),
        ("simpo", "code", 2), ("simpo", "facts", 0), ("simpo", "maths", ""), ("gained", "code", 9),
    ]  # fmt: skip
    write_categories(tmp_path, rows)
    truth = hold_against_truth(tmp_path, TRUTH)
    found = {(p["run"], c["category"]): c["recovered"] for p in truth["pairs"] for c in p["changes"]}
    assert found == {
        ("it", "code"): True,
        ("it", "facts"): False,
        ("simpo", "code"): True,
        ("simpo", "facts"): False,
        ("simpo", "maths"): False,
    }
    assert truth["sentence"].startswith("2 of 5 planted changes recovered; missed: facts (it), ")
    json.dumps(truth, allow_nan=False)


def test_a_category_that_is_not_in_the_table_is_missed(tmp_path):
    write_categories(tmp_path, [("it", "code", -10), ("it", "facts", 4), ("simpo", "code", 2), ("simpo", "maths", -1)])
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["sentence"] == "4 of 5 planted changes recovered; missed: facts (simpo)"
    facts = truth["pairs"][1]["changes"][1]
    assert facts["category"] == "facts" and facts["observed_points"] is None and not facts["recovered"]


def test_all_recovered_misses_nothing(tmp_path):
    rows = [("it", "code", -1), ("it", "facts", 1), ("simpo", "code", 1), ("simpo", "facts", 1), ("simpo", "maths", -1)]
    write_categories(tmp_path, rows)
    assert hold_against_truth(tmp_path, TRUTH)["sentence"] == "5 of 5 planted changes recovered"
