"""csrc/ without Python: its own tests and a fuzz driver, built plainly and with sanitizers (`pytest -m sanitizer`)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread")
WRAPS = ("-Wl,--wrap=preadv", "-Wl,--wrap=_Znwm")  # interrupted.cpp


@dataclass(frozen=True)
class Kind:
    """How to build, and how long to fuzz."""

    name: str
    flags: tuple[str, ...]
    fuzz_seconds: int


PLAIN = Kind("plain", ("-O2",), 2)
ADDRESS = Kind("address", ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), 20)
THREAD = Kind("thread", ("-O1", "-g1", "-fsanitize=thread"), 5)


@dataclass(frozen=True)
class Built:
    kind: Kind
    folder: Path

    def run(self, program: str, *arguments: str) -> str:
        stop = "abort_on_error=1:halt_on_error=1:print_stacktrace=1"
        options = {"ASAN_OPTIONS": stop, "UBSAN_OPTIONS": stop, "TSAN_OPTIONS": stop, "TMPDIR": str(self.folder)}
        command = [*fixed_addresses(self.kind), str(self.folder / program), *arguments]
        ran = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=400)
        assert ran.returncode == 0, f"{ran.stdout[-1000:]}{ran.stderr[-8000:]}"
        return ran.stdout


def fixed_addresses(kind: Kind) -> list[str]:
    """ThreadSanitizer of older compilers cannot start where the kernel spreads addresses widely."""
    command = ["setarch", "-R"]
    if kind is not THREAD or shutil.which(command[0]) is None:
        return []
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(kind: Kind, folder: Path) -> Built:
    command = [compiler(), *WARNINGS]

    def compiled(source: Path) -> Path:
        # the tests themselves need no optimization, and most of the time is theirs
        flags = kind.flags if source.parent == CSRC else (*kind.flags, "-O0")
        if kind is THREAD and source.name == "statistics.cpp":
            # target_clones chooses a function before ThreadSanitizer is ready; there are no threads in it
            flags = (*flags, "-fno-sanitize=thread")
        to = folder / f"{source.stem}.o"
        ran = subprocess.run(
            [*command, *flags, f"-I{CSRC}", f"-I{HERE}", "-c", str(source), "-o", str(to)],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-8000:]
        return to

    product = [source for source in sorted(CSRC.glob("*.cpp")) if source.name != "bindings.cpp"]
    tests = sorted(HERE.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip([*product, *tests], pool.map(compiled, [*product, *tests]), strict=True))
    fuzz = HERE / "fuzz_native.cpp"
    for name, leaves_out in (("native_test", [fuzz]), ("fuzz_native", [test for test in tests if test != fuzz])):
        parts = [str(made) for source, made in objects.items() if source not in leaves_out]
        subprocess.run([*command, *kind.flags, *parts, *WRAPS, "-o", str(folder / name)], check=True)
    return Built(kind, folder)


@pytest.fixture(
    scope="module",
    params=[
        PLAIN,
        pytest.param(ADDRESS, marks=pytest.mark.sanitizer),
        pytest.param(THREAD, marks=pytest.mark.sanitizer),
    ],
    ids=lambda kind: kind.name,
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(request.param, tmp_path_factory.mktemp(request.param.name))


def test_native(built: Built) -> None:
    printed = built.run("native_test").splitlines()
    assert printed[-1] == f"{len(printed) - 1} passed"
    assert len(printed) > 30


def test_fuzz(built: Built) -> None:
    assert "passed" in built.run("fuzz_native", str(built.kind.fuzz_seconds))


def test_a_failing_check_fails(built: Built) -> None:
    """A program whose failures went unseen would pass everything above."""
    with pytest.raises(AssertionError):
        built.run("native_test", "no test has this name")
