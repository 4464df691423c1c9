"""The lanes: what an option lets through, and that `-m` chooses among that instead of replacing it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_plain(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.long
def test_long(): pass
@pytest.mark.sanitizer
def test_sanitizer(): pass
@pytest.mark.slow
@pytest.mark.browser
def test_slow_browser(): pass
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of five tests under the project's own conftest.py and configuration."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests" / "support").mkdir(parents=True)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (folder / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "tests" / "test_five.py").write_text(SUITE)
    # conftest.py opens torch, which takes two seconds and which collecting these does not need
    (folder / "tests" / "support" / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n"
    )
    return folder


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], {"plain", "slow", "slow_browser"}),
        (["--fast"], {"plain"}),
        (["--long"], {"plain", "slow", "slow_browser", "long"}),
        (["--sanitizer"], {"plain", "slow", "slow_browser", "sanitizer"}),
        # leaving one thing out does not switch others on
        (["-m", "not browser"], {"plain", "slow"}),
        (["-m", "long"], set()),
        (["--long", "-m", "long"], {"long"}),
        (["--fast", "-m", "not browser"], {"plain"}),
    ],
)
def test_an_option_lets_a_lane_through(suite, options, wanted):
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if wanted else 5), done.stdout + done.stderr
    found = {line.split("::test_")[1] for line in done.stdout.splitlines() if "::test_" in line}
    assert found == wanted
