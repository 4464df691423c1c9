"""Holding a verdict against the planted truth."""

import json

import pytest
from click.testing import CliRunner

from fastdiff import rundir
from fastdiff.cli import cli
from fastdiff.demo import demo
from fastdiff.demo.demo import DemoResult, hold_against_truth, pair_config
from fastdiff.demo.models import HAS
from fastdiff.demo.truth import Cell, cells
from fastdiff.errors import InputError

GAINED, LOST = Cell("gained", "planted", 0.5), Cell("lost", "planted", -0.5)
SAME, LACKING = Cell("unchanged", "unchanged", 0.01), Cell("unchanged", "lacking", -9.0)
TRUTH = {
    "instruct": {"code": LOST, "facts": GAINED, "maths": SAME},
    "simpo": {"code": GAINED, "facts": GAINED, "maths": LOST},
    "simpo against instruct": {"code": GAINED, "facts": LACKING, "maths": LOST},
}
ALL_RIGHT = {
    "instruct": {"code": "lost", "facts": "gained", "maths": None},
    "simpo": {"code": "gained", "facts": "gained", "maths": "lost"},
    "simpo against instruct": {"code": "gained", "facts": None, "maths": "lost"},
}


def write_verdict(folder, claims, state="checked"):
    """A verdict file in which a category is confirmed with a change, or does not change where that is None."""

    def row(category, change):
        found = {"category": category, "change": change or "none", "verdict": "confirmed" if change else "no change"}
        return {**found, "B": {"mean": 0.5, "low": 0.4, "high": 0.6, "p": 0.01, "q": 0.02}}

    comparisons = [
        {
            **{"name": name, "kind": "difference" if " " in name else "pair", "state": state},
            "runs": name.split(" against "),
            **{"base": "base", "tuned": name, "rows": [row(*item) for item in rows.items()]},
        }
        for name, rows in claims.items()
    ]
    file = {"schema": 1, "tau": 0.05, "alpha": 0.05, "confidence": 0.95, "comparisons": comparisons}
    rundir.write_json(folder / "compare" / "verdict.json", file)


def test_what_is_right_in_every_cell_misses_nothing(tmp_path):
    write_verdict(tmp_path, ALL_RIGHT)
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["counts"] == {"planted": 7, "recovered": 7, "unplanted": 2, "false": 0, "drifted": 0}
    assert truth["sentence"] == (
        "7 of 7 planted changes confirmed with the right sign, 0 false claims in 2 cells where nothing was planted"
    )
    json.dumps(truth, allow_nan=False)


def test_the_other_sign_and_silence_are_misses_and_a_claim_without_a_plant_is_false(tmp_path):
    claims = {name: dict(rows) for name, rows in ALL_RIGHT.items()}
    claims["instruct"] |= {"code": "gained", "facts": None, "maths": "gained"}
    claims["simpo against instruct"]["facts"] = "lost"
    write_verdict(tmp_path, claims)
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["counts"] == {"planted": 7, "recovered": 5, "unplanted": 2, "false": 2, "drifted": 0}
    assert truth["sentence"].endswith(
        "; wrong: code (instruct), facts (instruct), maths (instruct), facts (simpo against instruct)"
    )


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


def test_a_change_that_training_brought_about_is_named_and_false_only_with_the_other_sign(tmp_path):
    truth = {name: dict(of) for name, of in TRUTH.items()}
    truth["instruct"]["maths"] = Cell("unchanged", "drifted", -0.2)
    for claim, false in ((None, 0), ("lost", 0), ("gained", 1)):
        write_verdict(tmp_path, {**ALL_RIGHT, "instruct": {**ALL_RIGHT["instruct"], "maths": claim}})
        found = hold_against_truth(tmp_path, truth)
        assert found["counts"] == {"planted": 7, "recovered": 7, "unplanted": 2, "false": false, "drifted": 1}
        assert found["sentence"].endswith("; changed though nothing was planted: maths (instruct)")


def test_without_attribution_nothing_is_scored_as_missed(tmp_path):
    silent = {name: dict.fromkeys(of) for name, of in ALL_RIGHT.items()}
    write_verdict(tmp_path, silent, state="not checked")
    truth = hold_against_truth(tmp_path, TRUTH)
    assert truth["counts"]["recovered"] == 0
    assert truth["sentence"] == "7 planted changes not checked; run `fastdiff demo` without --no-attribute"


def test_what_is_true_is_measured_where_nothing_was_planted():
    first, second = dict.fromkeys(HAS, 0.1), dict.fromkeys(HAS, 0.1)
    plan = dict.fromkeys(HAS, "unchanged")
    plan["code"] = "lost"
    second["code"] = 0.2
    second["mathematics"] = 0.14
    second["multilingual"] = 0.16
    # chance is log 14 = 2.639
    first["summarisation"], second["summarisation"] = 9.0, 2.6
    first["safety refusal"], second["safety refusal"] = 9.0, 2.58
    found = cells(plan, first, second, 0.05)
    kinds = {category: cell.kind for category, cell in found.items() if cell.kind != "unchanged"}
    assert kinds == {
        "code": "planted",
        "multilingual": "drifted",
        "summarisation": "lacking",
        "safety refusal": "drifted",
    }
    assert [round(found[name].B, 6) for name in ("code", "mathematics")] == [-0.1, -0.04]


@pytest.mark.parametrize(("option", "wanted"), [([], True), (["--no-attribute"], False)])
def test_the_option_reaches_the_configuration_of_both_pairs(tmp_path, monkeypatch, option, wanted):
    seen = []

    def run_demo(out, seed, progress, *, small, attribute):
        config = pair_config(
            out / "base", out / "instruct", out / "texts.jsonl", seed, small=small, attribute=attribute
        )
        seen.append(config.attribute.enabled)
        write_verdict(out, ALL_RIGHT)
        runs = [{"name": name, "path": f"../{name}", "base": "base", "tuned": name} for name in ("instruct", "simpo")]
        facts = {"kind": "triangulated", "alpha": 0.05, "confidence": 0.95, "runs": runs, "comparisons": []}
        rundir.write_json(out / "compare" / "statistics.json", {"schema": 3, **facts, "verdict": [], "method": ""})
        return DemoResult(out / "report.html", "as planned", 7, 7, 0)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    found = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path), *option])
    assert found.exit_code == 0, found.output
    assert seen == [wanted] and "planted truth: as planned" in found.output
