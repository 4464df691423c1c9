"""The step benchmark and bench/gpu.sh run, check before they time, and judge what they measured."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.benchmark.ceilings import Ceilings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "bench_train.py"
RATES = {"A": Ceilings(copy=4.3e12, cache=6.5e12, gather=4e12, gemm=790e12, precision="bfloat16")}


def run(*options, timeout=240):
    return subprocess.run(
        [sys.executable, "-P", SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def bench():
    """bench_train as a module; its folder stays importable for the others there."""
    path, before = str(SCRIPT.parent), list(sys.path)
    sys.path.insert(0, path)
    try:
        spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before


def test_on_a_cpu_contestants_take_turns(tmp_path):
    done = run("--config", "tiny", "--rounds", 2, "--threads", 1, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["check"] < 1e-4 and "checked: six steps" in done.stdout
    rows = {row["name"]: row for row in facts["rows"]}
    assert set(rows) - {"sparsify"} == {
        "fastdiff", "fastdiff, bf16 encoder", "dense fp32, as published", "dense fp32, fewest passes",
        "fastdiff TopK, MSE",
    }  # fmt: skip
    dense, ours = rows["dense fp32, as published"], rows["fastdiff"]
    assert dense["ratio"] == pytest.approx(dense["ms"] / ours["ms"])
    assert dense["cpu_ratio"] == pytest.approx(dense["cpu_ms"] / ours["cpu_ms"])
    assert dense["ratio_bf16_encoder"] == pytest.approx(dense["ms"] / rows["fastdiff, bf16 encoder"]["ms"])
    assert facts["spread"]["tiny"]["row_std"] >= 0.6 and facts["complete"] and facts["missed"] == []


def test_a_wrong_step_is_found_before_anything_is_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "fused_steps", lambda data, config: bench.DenseTrainer(data.crosscoder, config))
    with pytest.raises(SystemExit, match="WRONG STEP: after 6 steps a weight differs"):
        bench.check(torch.device("cpu"))


def row(name, ms, clip="exact", side="dense", group="batchtopk", **more):
    return {"shape": "A", "name": name, "clip": clip, "side": side, "group": group, "ms": ms, **more}


def test_ratios_compare_the_same_mathematics(bench):
    rows = [
        row("fastdiff", 40.0, side="fastdiff", dead=0.0),
        row("fastdiff", 70.0, side="fastdiff", dead=0.3),
        row("fastdiff", 35.0, "previous", side="fastdiff", dead=0.0),
        row("fastdiff TopK, MSE", 30.0, "none", side="fastdiff", group="topk"),
        row("dense fp32 high", 240.0, dead=0.0),
        row("sparsify", 60.0, "none", side="sparsify", group="topk"),
    ]
    bench.add_ratios(rows, RATES)
    assert rows[4]["ratio"] == pytest.approx(6) and rows[4]["ratio_previous"] == pytest.approx(240 / 35)
    assert rows[5]["ratio"] == pytest.approx(2) and "ratio_previous" not in rows[5]
    assert rows[0]["of_floor"] == pytest.approx(32.9 / 40, rel=0.01)
    # AuxK's products are in the floor of the row with dead latents
    assert rows[1]["of_floor"] * 70 == pytest.approx(rows[0]["of_floor"] * 40 + 4 * 17.05 * 0.3, rel=0.01)
    assert "ratio" not in rows[0]


def test_missed_targets_are_named(bench):
    rows = [
        row("dense fp32 high", 1.0, ratio=4.9),
        row("dense fp32 highest", 1.0, ratio=26.0),
        {"shape": "A", "name": "sparsify", "side": "sparsify", "clip": "none", "note": "not run: out of time"},
    ]
    lines = bench.missed(rows)
    assert len(lines) == 2
    assert "wanted 5 times as fast as dense fp32 high, got 4.90" in lines[0]
    assert "sparsify has no ratio (not run: out of time)" in lines[1]


def test_bars_of_the_own_rows_are_held(bench):
    fine = {"shape": "A", "name": "fastdiff", "side": "fastdiff", "clip": "exact", "ms": 40.0, "tokens_per_s": 2e5}
    fine |= {"of_floor": 0.81, "peak_gb": 28.0, "repeats": True}
    assert bench.missed([fine, fine | {"dead": 0.3, "tokens_per_s": 1e5, "of_floor": 0.5, "peak_gb": 31.0}]) == []
    slow = bench.missed([fine | {"tokens_per_s": 1.9e5, "of_floor": 0.79, "peak_gb": 30.0, "repeats": False}])
    assert [line.split(": ", 1)[1] for line in slow] == [
        "fastdiff, clip exact: other bits from the same start",
        "fastdiff, clip exact: wanted 195,000 tokens/s, got 190,000",
        "fastdiff, clip exact: wanted 80% of the floor, got 79%",
        "fastdiff, clip exact: wanted at most 29 GB, got 30.0",
    ]
    assert len(bench.missed([fine | {"clip": "previous"}])) == 1  # 220,000


def test_the_cpu_target_counts_the_bf16_encoder(bench):
    slow = row("dense fp32, as published", 1.0, ratio=4.6, ratio_bf16_encoder=5.0) | {"shape": "C"}
    assert bench.missed([slow]) == [
        "C: wanted 6.0 times as fast as dense fp32, as published with the bf16 encoder, got 5.00"
    ]
    assert bench.missed([slow | {"ratio_bf16_encoder": 6.1}]) == []


def test_reconstruction_is_compared_after_training(tmp_path):
    done = run("--config", "tiny", "--fve", "--steps", 3, "--threads", 1, "--out", tmp_path / "fve.json")
    rows = {r["name"]: r for r in json.loads((tmp_path / "fve.json").read_text())["rows"]}
    assert set(rows) == {"dense fp32", "dense fp32, other order of sums", "fastdiff fp32", "fastdiff bf16"}
    assert abs(rows["fastdiff fp32"]["difference"]) < 1e-4
    wrong = [name for name, r in rows.items() if name.startswith("fastdiff") and abs(r["difference"]) > 0.0005]
    assert done.returncode == bool(wrong) and all(f"missed: {name}" in done.stderr for name in wrong)


def gpu_sh(*arguments, timeout=400):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.slow
def test_gpu_sh_runs_dry_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "results"
    done = gpu_sh("--dry-run", "tests", "kernels", "steps A", "--out", out)
    log = (out / "gpu-log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    assert sorted(file.name for file in out.iterdir()) == [
        "gpu-kernels.json", "gpu-log.txt", "gpu-machine.json", "gpu-table.txt", "gpu-tests.txt", "gpu-train-A.json"
    ]  # fmt: skip
    facts = json.loads((out / "gpu-machine.json").read_text())
    assert {"torch", "triton", "device"} <= set(facts["machine"]) and re.match("[0-9a-f]{7}|unknown", facts["commit"])
    kernels = json.loads((out / "gpu-kernels.json").read_text())
    assert kernels["complete"] and all(r["repeats"] for r in kernels["rows"] if "repeats" in r)
    train = json.loads((out / "gpu-train-A.json").read_text())
    assert train["rows"][0]["name"] == "fastdiff" and train["rows"][0]["repeats"] is True
    table = (out / "gpu-table.txt").read_text()
    assert "decode_loss" in table and "fastdiff" in table and table in done.stdout
    passed = re.search(r"(\d+) passed", (out / "gpu-tests.txt").read_text())
    assert passed and int(passed[1]) > 1
    # as if it had been killed: one operation and one contestant are missing, everything else is kept as it is
    kernels["rows"][0]["ms"] = train["rows"][0]["ms"] = 1234.5
    missing = kernels["done"].pop()
    kernels["rows"] = [r for r in kernels["rows"] if not r["name"].startswith(missing.split()[-1])]
    (out / "gpu-kernels.json").write_text(json.dumps(kernels | {"complete": False}))
    (out / "gpu-train-A.json").write_text(json.dumps(train | {"rows": train["rows"][:1], "complete": False}))
    done = gpu_sh("--dry-run", "tests", "kernels", "steps A", "--out", out)
    assert done.returncode == 0, done.stdout + (out / "gpu-log.txt").read_text()[-2000:]
    again = json.loads((out / "gpu-kernels.json").read_text())
    assert again["rows"][0]["ms"] == 1234.5 and again["done"][-1] == missing and again["complete"]
    rows = json.loads((out / "gpu-train-A.json").read_text())["rows"]
    assert rows[0]["ms"] == 1234.5 and [r["name"] for r in rows] == [r["name"] for r in train["rows"]]
    assert f"{passed[1]} deselected" in (out / "gpu-tests.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["steps"], ["--dry-run", "step A"]])
def test_gpu_sh_names_its_parts(arguments):
    done = gpu_sh(*arguments)
    assert done.returncode == 2 and "'steps A'" in done.stderr and done.stderr.count("\n") == 1
