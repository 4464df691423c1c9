"""For bench/gpu.sh: the machine and its ceilings as JSON, and one table of everything that was measured.

python -P bench/gpu_report.py machine --config A B --commit HASH --out FILE
python -P bench/gpu_report.py passed FILE     what pytest -v said has passed, as arguments that leave it out
python -P bench/gpu_report.py table DIR
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmark.ceilings import Ceilings, measure_ceilings
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.shapes import SHAPES
from fastdiff.benchmark.table import COLUMNS, format_table, write_json


def write_machine(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    precision = "bfloat16" if device.type == "cuda" else "float32"
    facts: dict[str, Any] = {"commit": options.commit, "machine": machine(device), "ceilings": {}}
    for name in options.config:
        rates = measure_ceilings(SHAPES[name], device, precision)
        facts["ceilings"][name] = vars(rates)
        print(f"{SHAPES[name]}: " + "; ".join(rates.lines()))
    write_json(options.out, **facts)


def print_table(folder: Path) -> None:
    """What is there; what is missing is said."""
    found = {}
    for path in sorted(folder.glob("gpu-*.json")):
        found[path.stem.removeprefix("gpu-")] = json.loads(path.read_text())
    for name in ("machine", "kernels"):
        if name not in found:
            print(f"gpu-{name}.json is not there: run that part of bench/gpu.sh, or see gpu-log.txt")
    measured = [name for name in found if name == "kernels" or name.startswith("train")]
    if "machine" in found:
        facts = found["machine"]
        print(", ".join(f"{key} {value}" for key, value in facts["machine"].items()) + f", commit {facts['commit']}")
        for name, rates in facts["ceilings"].items():
            print(f"{SHAPES[name]}: " + "; ".join(Ceilings(**rates).lines()))
    rows = [row for name in measured for row in found[name]["rows"]]
    if rows:
        columns = (*COLUMNS[:-1], ("ratio_previous", "with previous", "{:.2f}"), COLUMNS[-1])
        print("\n" + format_table(rows, columns) + "\n")
    for name in measured:
        if not found[name]["complete"]:
            print(f"gpu-{name}.json was cut off: run the same part again, and it goes on from there")
        for line in found[name].get("missed", []):
            print(f"missed: {line}")


def print_passed(path: Path) -> None:
    """A line `--deselect=ID` per test that has passed, with and without xdist's worker before it."""
    if path.exists():
        text = path.read_text(errors="replace")
        for before, after in re.findall(
            r"^(?:\[gw\d+\] .*?PASSED (\S.*?)|(\S.*?) PASSED)\s*(?:\[ *\d+%\])?$", text, re.M
        ):
            print(f"--deselect={before or after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("machine")
    command.add_argument("--device", default="cuda")
    command.add_argument("--config", nargs="+", choices=list(SHAPES), required=True)
    command.add_argument("--commit", default="unknown")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=write_machine)
    command = commands.add_parser("passed")
    command.add_argument("path", type=Path)
    command.set_defaults(run=lambda options: print_passed(options.path))
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=lambda options: print_table(options.folder))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
