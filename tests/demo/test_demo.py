"""Holding a verdict against the planted truth."""

import json

import pytest

from fastdiff import rundir
from fastdiff.demo.demo import hold_against_truth
from fastdiff.errors import InputError

TRUTH = {
    "it": {"code": "lost", "facts": "gained", "maths": "unchanged"},
    "simpo": {"code": "gained", "facts": "gained", "maths": "lost"},
}
# what follows from it for simpo against it: code gained, facts unchanged, maths lost
ALL_RIGHT = {
    "it": {"code": "lost", "facts": "gained", "maths": None},
    "simpo": {"code": "gained", "facts": "gained", "maths": "lost"},
    "simpo against it": {"code": "gained", "facts": None, "maths": "lost"},
}


def write_verdict(folder, claims):
    """A verdict file in which a category is confirmed with a change, or does not change where that is None."""

    def row(category, change):
        found = {"category": category, "change": change or "none", "verdict": "confirmed" if change else "no change"}
        return {**found, "B": {"mean": 0.5, "low": 0.4, "high": 0.6, "p": 0.01, "q": 0.02}}

    comparisons = [
        {
            **{"name": name, "kind": "difference" if " " in name else "pair", "runs": [name], "state": "checked"},
            **{"base": "base", "tuned": name, "rows": [row(*item) for item in rows.items()]},
        }
        for name, rows in claims.items()
    ]
    file = {"schema": 1, "tau": 0.05, "alpha": 0.05, "confidence": 0.95, "comparisons": comparisons}
    rundir.write_json(folder / "compare" / "verdict.json", file)


def test_what_is_right_in_every_cell_misses_nothing(tmp_path):
    write_verdict(tmp_path, ALL_RIGHT)
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["counts"] == {"planted": 7, "recovered": 7, "unplanted": 2, "false": 0}
    assert truth["sentence"] == (
        "7 of 7 planted changes confirmed with the right sign, 0 false claims in 2 cells where nothing was planted"
    )
    json.dumps(truth, allow_nan=False)


def test_the_other_sign_and_silence_are_misses_and_a_claim_without_a_plant_is_false(tmp_path):
    claims = {name: dict(rows) for name, rows in ALL_RIGHT.items()}
    claims["it"] |= {"code": "gained", "facts": None, "maths": "gained"}
    claims["simpo against it"]["facts"] = "lost"
    write_verdict(tmp_path, claims)
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["counts"] == {"planted": 7, "recovered": 5, "unplanted": 2, "false": 2}
    assert truth["sentence"].endswith("; wrong: code (it), facts (it), maths (it), facts (simpo against it)")


def test_a_category_without_a_row_is_missed(tmp_path):
    claims = {name: dict(rows) for name, rows in ALL_RIGHT.items()}
    del claims["simpo"]["facts"]
    write_verdict(tmp_path, claims)
    truth = hold_against_truth(tmp_path, TRUTH)
    facts = next(c for c in truth["pairs"][1]["changes"] if c["category"] == "facts")
    assert truth["counts"]["recovered"] == 6 and facts["verdict"] is None and not facts["recovered"]


def test_a_suggestive_row_is_no_claim(tmp_path):
    write_verdict(tmp_path, ALL_RIGHT)
    path = tmp_path / "compare" / "verdict.json"
    file = json.loads(path.read_text())
    file["comparisons"][0]["rows"][0] |= {"verdict": "suggestive", "reason": "by a mean shift"}
    path.write_text(json.dumps(file))
    assert hold_against_truth(tmp_path, TRUTH)["counts"]["recovered"] == 6


def test_without_a_verdict_it_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"verdict\.json"):
        hold_against_truth(tmp_path, TRUTH)
