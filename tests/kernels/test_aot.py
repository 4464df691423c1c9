"""Compilation without a GPU finds planted faults, and the kernels of a training step keep their budget."""

import json
import os
import subprocess
import sys

import aot
import pytest

pytestmark = pytest.mark.slow


def compile_ahead(*arguments: str) -> subprocess.CompletedProcess:
    """Compilation needs a process of its own: here @triton.jit has made interpreted functions."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-P", aot.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_kernels_of_a_training_step_keep_their_budget():
    """On sm_90, at the size of the published crosscoder; `.ci/kernels` does the rest."""
    run = compile_ahead("--arch", "90", "--case", "^A step")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """What is wrong with the planted cases, on all architectures at once."""
    run = compile_ahead("--cases", "aot_planted", "--rules-only", "--arch", "80", "86", "90", "100")
    assert run.returncode == 1, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("WRONG")]


@pytest.mark.parametrize(
    "complaint",
    [
        ("sm_90", "_centre_kernel", "spills "),
        ("sm_80", "_centre_kernel", "spills "),
        ("sm_90", "DEPTH=128", "shared memory 393216 > 232448"),
        ("sm_86", "DEPTH=128", "> 101376"),
        ("sm_90", "_add_up_kernel", "float_atomics 1"),
        ("sm_100", "_add_up_kernel", "float_atomics 1"),
        ("sm_90", "ROWS=32", "with hgmma 0, hmma 16"),
        ("sm_100", "ROWS=32", "with tcgen05 0, hmma 16"),
        ("sm_90", "case 'empty grid'", "CUDA refuses grid (0,)"),
        ("sm_90", "case 'grid too high'", "CUDA refuses grid (1, 65536)"),
        ("sm_90", "case 'waits for a value'", "cannot be called on meta tensors"),
        ("sm_90", "case 'waits for a copy'", "Cannot copy out of meta tensor"),
    ],
)
def test_planted_fault_is_found(planted, complaint):
    assert any(all(part in line for part in complaint) for line in planted), planted


def test_good_kernels_break_no_rule_and_get_a_budget(tmp_path, planted):
    """Each architecture multiplies with a unit of its own; what is not aligned has no 128-bit loads."""
    assert not any(" _copy_kernel" in line or "COLUMNS=128" in line for line in planted if " case " not in line)
    path = tmp_path / "budget.json"
    arguments = ("--cases", "aot_planted:GOOD", "--arch", "80", "90", "100", "--budget", str(path))
    run = compile_ahead(*arguments, "--write")
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = json.loads(path.read_text())["kernels"]
    by_case = {tuple(value["cases"]): value for value in kernels.values()}
    product, aligned, unaligned = by_case[("product",)], by_case[("aligned",)], by_case[("unaligned",)]
    for arch, unit in (("80", "hmma"), ("90", "hgmma"), ("100", "tcgen05")):
        assert product[arch].keys() & {"hmma", "hgmma", "tcgen05"} == {unit}
        assert aligned[arch]["loads128"] == 2
        assert "loads128" not in unaligned[arch]

    run = compile_ahead(*arguments)
    assert run.returncode == 0, run.stdout + run.stderr


def figures(**changed: int) -> dict:
    clean = dict.fromkeys(("stack", "spills", "float_atomics", "hmma", "hgmma", "tcgen05"), 0)
    return clean | {"registers": 64, "shared": 1024, "loads128": 4, "multiplies": False} | changed


@pytest.mark.parametrize(
    ("changed", "complaints"),
    [
        ({}, []),
        ({"registers": 60, "loads128": 5, "hgmma": 9}, []),
        ({"stack": 8}, ["stack 8"]),
        ({"registers": 65}, ["registers 65 > 64"]),
        ({"loads128": 3}, ["loads128 3 < 4"]),
        ({"hgmma": 7}, ["hgmma 7 < 8"]),
    ],
)
def test_budget_of_a_kernel(changed, complaints):
    allowed = aot.entry(figures(hgmma=8))
    assert allowed == {"registers": 64, "loads128": 4, "hgmma": 8}
    assert aot.over_budget(figures(**({"hgmma": 8} | changed)), allowed) == complaints


def listed(*cases: str, **archs: dict) -> dict:
    return {"cases": list(cases), **{arch.removeprefix("sm_"): value for arch, value in archs.items()}}


def test_missing_and_unlisted_kernels_are_found():
    allowed = aot.entry(figures())
    budget = {
        "kernels": {
            "kept": listed("one", sm_90=allowed),
            "gone": listed("one", sm_90=allowed),
            "of another case": listed("two", sm_90=allowed),
            "of another architecture": listed("one", sm_80=allowed),
        }
    }
    jobs = dict.fromkeys(("kept", "new"))
    measured = {"kept": figures(registers=70), "new": figures()}
    assert aot.check(90, jobs, measured, budget, {"one"}) == [
        "sm_90 new: not in the budget",
        "sm_90 gone: in the budget, but no case launches it",
        "sm_90 kept: registers 70 > 64",
    ]


def test_interpretation_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        aot.main()
