"""The evaluation benchmark runs and checks before it times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "bench_evaluate.py"


def test_evaluation_is_timed_against_training(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-P", SCRIPT, "--config", "tiny", "--rounds", "2", "--threads", "1", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.read_text())
    assert facts["check"] < 1e-5 and "checked: the variance explained" in done.stdout
    rows = {row["name"]: row for row in facts["rows"]}
    fused, dense = rows.pop("training: fastdiff"), rows.pop("training: dense fp32, as published")
    assert set(rows) == {"evaluate", "evaluate, 12 sources, 3 roles", "the encoder's product"}
    for row in rows.values():
        assert row["of_fused"] == pytest.approx(row["ms"] / fused["ms"])
        assert row["cpu_of_dense"] == pytest.approx(row["cpu_ms"] / dense["cpu_ms"])


def test_a_wrong_figure_is_found_before_anything_is_timed(tmp_path):
    wrong = f"""
import runpy, sys, torch
sys.argv = ["bench_evaluate.py", "--config", "tiny", "--device", "cpu"]
import fastdiff.crosscoder.model as model
decode = model.Crosscoder.decode
model.Crosscoder.decode = lambda self, values, selection: decode(self, values * 1.01, selection)
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", wrong], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 1 and "WRONG FIGURE: the variance explained differs" in done.stderr
    assert "training" not in done.stdout
