"""What the documents promise is there."""

import re
import tomllib
from pathlib import Path

import click
import pytest

from fastdiff.cli import cli
from fastdiff.results.verdict import MEANINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_is_in_the_readme(name):
    assert f"fastdiff {name}" in README


def test_the_readme_names_no_command_or_option_that_is_not_there():
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.findall(r"fastdiff (\w+)([^&#]*)", line):
                name, arguments = command
                assert name in cli.commands, name
                parameters = cli.commands[name].get_params(click.Context(cli.commands[name]))
                known = {option for p in parameters for option in p.opts + p.secondary_opts}
                assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", arguments)) <= known, line


def test_the_readme_explains_every_word_of_a_verdict():
    table = README.split("| verdict | what it says |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| ([a-z ]+) \|", table, flags=re.MULTILINE)) == set(MEANINGS)


def test_every_kernel_has_the_reference_test_and_benchmark_that_the_table_names():
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Kernels")[1].split("## Rules")[0]
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", section, flags=re.MULTILINE)
    references = (ROOT / "kernels" / "reference.py").read_text(encoding="utf-8")
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    for file, reference, benchmark in rows:
        assert (ROOT / "kernels" / f"{file}.py").exists(), file
        assert (ROOT / "tests" / "kernels" / f"test_{file}.py").exists(), file
        assert f"def {reference}(" in references, reference
        assert f"def bench_{benchmark}(" in benchmarks, benchmark
    jitted = {p.stem for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text(encoding="utf-8")}
    parts = {"batchtopk_kernels", "radix"}  # of other files, and tested with them
    assert jitted - parts <= {file for file, _, _ in rows}


def test_set_up_is_two_commands_that_ci_finds():
    commands = re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.*?)\n```", README)
    assert [name for name, _ in commands] == ["first", "second"]
    assert commands[0][1].endswith("fastdiff demo") and "-c constraints.txt" in commands[0][1]
    assert commands[1][1].endswith("pytest")


def test_constraints_satisfy_the_ranges_and_name_every_dependency():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name, _, bound = requirement.partition(";")[0].strip().partition(">=")
        if name.startswith("fastdiff["):
            continue
        assert name in pins, f"{name} is not pinned"
        if bound:
            assert tuple(map(int, pins[name].split(".")[:2])) >= tuple(map(int, bound.split(".")[:2])), name
