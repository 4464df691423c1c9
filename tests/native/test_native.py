"""csrc/ without Python: its own tests and a fuzz driver, built plainly and with sanitizers (`pytest --sanitizer`)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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
ADDRESS = Kind("address", ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), 15)
THREAD = Kind("thread", ("-O1", "-g1", "-fsanitize=thread"), 4)


# what `native_test` does wrong on purpose, and what is said of it
FAULTS = {
    PLAIN: [("check", "n == 11u: 10 != 11")],
    ADDRESS: [("address", "heap-buffer-overflow"), ("undefined", "shift exponent 40 is too large")],
    THREAD: [("thread", "data race")],
}


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


def succeed(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-8000:]


def build(kind: Kind, folder: Path) -> Built:
    command = [compiler(), *WARNINGS]

    def compiled(source: Path) -> Path:
        # the tests themselves need no optimization, and most of the time is theirs
        flags = kind.flags if source.parent == CSRC else (*kind.flags, "-O0")
        to = folder / f"{source.stem}.o"
        succeed([*command, *flags, f"-I{CSRC}", f"-I{HERE}", "-c", str(source), "-o", str(to)])
        return to

    sources = [*CSRC.glob("*.cpp"), *HERE.glob("*.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [source for source in sources if source.name != "bindings.cpp"]))
    for name, others in (("native_test", "fuzz_native"), ("fuzz_native", "_test")):
        parts = [str(made) for made in objects if not made.stem.endswith(others)]
        succeed([*command, *kind.flags, *parts, *WRAPS, "-o", str(folder / name)])
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


def test_what_must_be_noticed_is_noticed(built: Built) -> None:
    """Programs whose faults went unseen would pass everything above."""
    for fault, noticed in FAULTS[built.kind]:
        with pytest.raises(AssertionError, match=noticed):
            built.run("native_test", "pool_is_zero", fault)
    with pytest.raises(AssertionError, match="0 passed"):
        built.run("native_test", "no test has this name")
