"""`fastdiff benchmark` from end to end at a tiny size, and what it says limits a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.benchmark import benchmark as benchmark_module
from fastdiff.benchmark.benchmark import benchmark_command, run_benchmark, what_limits
from fastdiff.benchmark.shapes import SHAPES
from fastdiff.errors import FastdiffError
from fastdiff.progress import SILENT

pytestmark = pytest.mark.slow

FASTDIFF = Path(sys.executable).parent / "fastdiff"
TINY = ["--batch-size", "256", "--d-model", "24", "--dict-size", "512", "--k", "8", "--samples", "2"]


@pytest.fixture(scope="module")
def found():
    return run_benchmark(SHAPES["tiny"], torch.device("cpu"), SILENT, n=2)


def test_every_step_is_measured(found):
    rows = [(row["clip"], row["dead"]) for row in found.steps]
    assert rows == [("exact", 0.0), ("previous", 0.0), ("exact", 0.3)]
    for row in found.steps:
        assert row["ms"] > 0 and row["of_floor"] > 0
        assert row["tokens_per_s"] == pytest.approx(256e3 / row["ms"])
    assert [row["repeats"] for row in found.steps] == [True, None, None]


def test_sizes_of_ones_own_may_leave_no_room_for_rows_of_different_lengths():
    sizes = {"batch_size": 64, "d_model": 8, "dict_size": 64, "k": 64}
    found = benchmark_command("C", sizes, "cpu", 0, precision="auto", moments="float32", n=1, progress=SILENT)
    assert found.spread.row_std < 0.6
    assert found.verdict.startswith("What limits the step: ")


def test_the_parts_are_all_of_the_step(found):
    assert sum(row["share"] for row in found.parts) == pytest.approx(1)
    assert {"encoder", "selection", "decode", "update"} <= {row["part"] for row in found.parts}
    for row in found.parts:
        if "floor_ms" in row:
            assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_the_text_has_it_all(found):
    text = found.text()
    for piece in ("tiny: B 256", "rows: std", "copy ", "encoder product in float32", "fastdiff step", "30%", "share"):
        assert piece in text
    assert text.splitlines()[-1] == found.verdict and found.verdict.startswith("What limits the step: ")


def test_the_command_prints_json():
    done = subprocess.run([FASTDIFF, "benchmark", *TINY, "--json", "-q"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["schema"] == 1 and facts["size"]["dict_size"] == 512 and len(facts["steps"]) == 3
    assert {"machine", "ceilings", "parts", "verdict", "spread"} <= set(facts)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--k", "9", "--dict-size", "8"], 2, "--k must lie in [1, --dict-size=8], got 9"),
        (["--device", "cuda:9"], 2, "cuda:9"),
        (["--moments", "bfloat16", *TINY], 2, "moments"),
    ],
)
def test_a_wrong_option_is_one_line(options, code, message):
    done = subprocess.run([FASTDIFF, "benchmark", "-q", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == code and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_options_replace_sizes(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark_module, "run_benchmark", lambda shape, *_, **options: calls.append((shape, options)))
    sizes = {"batch_size": 5, "d_model": None, "dict_size": None, "k": 3}
    options = {"precision": "float32", "moments": "float32", "n": 4}
    benchmark_command("auto", sizes, "cpu", 0, progress=SILENT, **options)
    (shape, given), c = calls[0], SHAPES["C"]
    assert (shape.n_tokens, shape.k, shape.d_model, shape.dict_size) == (5, 3, c.d_model, c.dict_size)
    assert given == options


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    with pytest.raises(FastdiffError, match=r"about 33 GB and 20 GB are free"):
        run_benchmark(SHAPES["A"], torch.device("cuda"), SILENT)


@pytest.mark.parametrize(
    ("part", "word"),
    [("encoder", "arithmetic"), ("update", "Adam"), ("decode", "gathered"), ("other", "launches")],
)
def test_the_longest_part_is_what_limits(part, word):
    parts = [{"part": part, "ms": 6.0, "share": 0.6, "of_floor": 0.8}, {"part": "order", "ms": 4.0, "share": 0.4}]
    verdict = what_limits(parts, {"of_floor": 0.75, "tokens_per_s": 1234.5})
    assert word in verdict and "60% of the time, at 80% of what" in verdict
    assert "Next: order (40%)." in verdict and verdict.endswith("1,234 tokens/s, 75% of its floor.")
