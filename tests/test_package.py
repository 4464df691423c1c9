"""The sdist and the wheel hold what they must, and work without this checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.package, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
SOURCES = ("fastdiff", "kernels", "csrc", "tests", "bench")
RESULTS = shutil.ignore_patterns("__pycache__", "results")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*_cache")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    ran = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def build_wheel(source: Path, into: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run(sys.executable, "-P", "-m", "pip", "wheel", *options, "-w", into, source, cwd=into.parent)
    (wheel,) = into.glob("fastdiff-*.whl")
    return wheel


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without anything a build or a test run left in it."""
    target = tmp_path_factory.mktemp("package") / "tree"
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=RESULTS if name == "bench" else IGNORED)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # setuptools leaves build/ in the source, which the sdist test must not see
    source = tmp_path_factory.mktemp("for-wheel") / "tree"
    shutil.copytree(copy, source)
    return build_wheel(source, source.parent / "dist")


@pytest.fixture(scope="module")
def sdist(copy: Path) -> Path:
    into = copy.parent / "sdist"
    into.mkdir()
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-P", "-c", script, into, cwd=copy)
    (archive,) = into.glob("fastdiff-*.tar.gz")
    return archive


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def tree(top: Path, *suffixes: str) -> set[str]:
    return {
        file.relative_to(top).as_posix()
        for file in top.rglob("*")
        if file.is_file() and file.suffix in suffixes and "__pycache__" not in file.parts
    }


def test_wheel_holds_every_module_and_data_file_and_nothing_else(copy: Path, wheel: Path) -> None:
    found = names_in(wheel)
    expected = {
        f"fastdiff/{name}" for name in tree(copy / "fastdiff", ".py", ".pyi", ".typed", ".j2", ".css", ".js", ".yaml")
    }
    expected |= {f"fastdiff/kernels/{name}" for name in tree(copy / "kernels", ".py")}
    assert {"fastdiff/py.typed", "fastdiff/_native.pyi", "fastdiff/kernels/__init__.py"} <= expected
    (native,) = (name for name in found if name.startswith("fastdiff/_native.") and name.endswith(".so"))
    info = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    assert found - info == expected | {native}
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_sdist_holds_headers_tests_and_constraints(copy: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {f"csrc/{name}" for name in tree(copy / "csrc", ".hpp", ".cpp")}
    expected |= {f"tests/{name}" for name in tree(copy / "tests", ".py")}
    expected |= {f"kernels/{name}" for name in tree(copy / "kernels", ".py")}
    expected |= {"constraints.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md"}
    assert "csrc/row_reader.hpp" in expected
    assert expected - found == set()
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


def test_unpacked_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import fastdiff.kernels, fastdiff._native as n; print(fastdiff.kernels.__file__, n.__file__)"
    # the path comes before the finder of an editable install
    printed = run(sys.executable, "-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert [str(tmp_path / "site") in file for file in printed.split()] == [True, True]


def test_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names_in(build_wheel(source, tmp_path / "dist")) == names_in(wheel)
