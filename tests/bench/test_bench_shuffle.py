"""The shuffle benchmark runs, and does not time rows that are wrong. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "bench_shuffle.py"


def run(folder, *options):
    command = [sys.executable, "-P", str(SCRIPT), "--small", "--gb", "0.06", "--seconds", "0.01", "--only", "warm"]
    command += ["--dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A first run: its folder, its output, its JSON."""
    folder = tmp_path_factory.mktemp("bench")
    done = run(folder, "--out", str(folder / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, json.loads((folder / "out.json").read_text())


def test_every_contestant_is_checked_and_timed(small):
    _, printed, result = small
    names = [row["contestant"] for row in result["rows"]]
    assert len(names) == len(set(names)) == 18
    for name in names:
        assert any(line.startswith(f"{name} ") for line in printed.splitlines())
        assert name.startswith("limit") or f"checked: {name}, " in printed
    # fastdiff shows a whole epoch; what is slow is sampled
    whole = [line for line in printed.splitlines() if line.startswith("checked: fastdiff")]
    assert len(whole) == 5 and all("6,144 rows" in line for line in whole)


def test_the_results_have_ratios_and_targets_but_no_verdict_on_a_small_run(small):
    _, printed, result = small
    rows = {row["contestant"]: row for row in result["rows"]}
    assert result["judged"] is False and result["missed"] == []
    assert rows["h5py fancy, chunked"]["target"] == 200
    for row in result["rows"]:
        assert row["rows_per_second"] > 0 and row["cpu_seconds_per_gb"] >= 0
        if row["contestant"] not in ("fastdiff, contiguous", "fastdiff, chunked"):
            assert row["ratio"] > 0 and len(row["ratios"]) == len(row["runs"]) == 1
    assert "not judged" in printed and result["device"]["n_cpus"] >= 1 and "torch" in result["versions"]


@pytest.mark.parametrize(("value", "what"), [(0, "holds no whole row"), (2000, "not its values")])
def test_a_wrong_row_is_found_before_anything_is_timed(small, value, what):
    folder = small[0]
    shard = folder / "contiguous" / "shard-00000.h5"
    with h5py.File(shard) as file:
        offset = file["activations"].id.get_offset() + 5000 * 9216 + 2 * value
    before = shard.read_bytes()[offset : offset + 2]
    try:
        overwrite(shard, offset, bytes([before[0] ^ 1, before[1]]))
        done = run(folder)
    finally:
        overwrite(shard, offset, before)
    assert done.returncode == 1
    assert done.stderr.startswith("WRONG ROWS: fastdiff, contiguous: batch ") and what in done.stderr
    assert "GB/s" not in done.stdout


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
