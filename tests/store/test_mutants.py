"""No damaged store crashes or hangs a process, and none is read wrongly without a word. See mutants.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("mutants.py")


def judge(directory: Path, count: int, seed: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", SCRIPT, directory, str(count), str(seed)], capture_output=True, text=True, check=True
    )
    told = json.loads(ended.stdout)
    assert told["bad"] == []
    assert sum(sum(counts.values()) for counts in told["counts"].values()) == count
    # damage that nothing finds would be damage that was not done
    assert all(counts["found"] > 0.3 * count / len(told["counts"]) for counts in told["counts"].values())


def test_mutants(tmp_path: Path) -> None:
    judge(tmp_path, 2000, 0)


@pytest.mark.long
def test_many_mutants(tmp_path: Path) -> None:
    judge(tmp_path, 20_000, 1)
