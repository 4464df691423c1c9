"""How much of the demo's planted truth is recovered, and what two nulls say, over seeds of the whole.

    python -P bench/demo_seeds.py --seeds 5 -o WORK --results bench/results/demo-seeds

Each seed makes its own models, text and crosscoders by `fastdiff demo`, in a process of its own on one thread, whose
CPU time and memory are taken. Two nulls walk the same road, and neither should confirm a category:

    null 1    `instruct` against `instruct` fine-tuned with another seed: both against base, and then against each other
    null 2    base against base trained further on its own corpus in another order

What is measured already is kept in WORK/SEED/measured.json, so seeds may be run apart, also at once:
`--first 3 --seeds 2`. After a change of fastdiff itself take another WORK.

Fails where an aim is missed: each of the 14 changes of the pairs and the 6 of the triangle confirmed with its sign,
nothing confirmed where nothing was planted or in a null, no unplanned change of the models, the median latent in half
of all documents, 240 CPU seconds (four minutes on two cores, were nothing done at once), 3 GB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# read when torch loads OpenMP; threads that spin take the other core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from real_pairs import Page, write
from real_tables import table
from safetensors.numpy import load_file

from fastdiff import rundir
from fastdiff.comparison.compare import compare
from fastdiff.config import CompareConfig
from fastdiff.demo.demo import PAIRS, pair_config
from fastdiff.demo.models import continue_base, make_it
from fastdiff.pipeline import label_pair
from fastdiff.results.analysis import read_analysis_summary
from fastdiff.results.statistics import TRUTH_SCHEMA
from fastdiff.results.verdict import read

MAX_CPU_SECONDS = 240
MAX_GB = 3.0
MIN_SPREAD = 0.5

# kinds of cells in which a claim is false whatever its sign
_UNPLANTED = ("unchanged", "lacking")

Result = dict[str, Any]


def demo(out: Path, seed: int, *, small: bool) -> Result:
    """Run the demo as a user does; CPU seconds, wall seconds and the most memory its process had."""
    kept = out.with_name("cost.json")
    if kept.exists():
        cost: Result = json.loads(kept.read_text(encoding="utf-8"))
        return cost
    if out.exists():
        raise SystemExit(f"{out}: was cut off, and going on would not cost what the whole does; remove it")
    out.mkdir(parents=True)
    command = [str(Path(sys.executable).with_name("fastdiff")), "demo", "--seed", str(seed), "-o", str(out), "--quiet"]
    started = time.monotonic()
    with (out.parent / "demo.txt").open("w", encoding="utf-8") as text:
        process = subprocess.Popen([*command, *(["--small"] if small else [])], stdout=text)
        # of this child alone, where RUSAGE_CHILDREN is of all
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"seed {seed}: {' '.join(command)} failed with {process.returncode}")
    cost = {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": time.monotonic() - started,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
    }
    write(kept, cost)
    return cost


def spread(run: Path) -> float:
    """Median over the latents that fire of the share of all documents in which one does."""
    documents = load_file(run / "analysis" / "firing.safetensors")["documents_by_source"].sum(axis=1)
    total = sum(read_analysis_summary(run)["documents_by_source"])
    return float(np.median(documents[documents > 0])) / total


def confirmed(out: Path, among: list[str]) -> list[str]:
    """What comparisons of a directory claim, as "category (comparison)"."""
    found = read(out / "compare" / "verdict.json").comparisons
    if missing := set(among) - {comparison.name for comparison in found if comparison.state == "checked"}:
        raise SystemExit(f"{out}: {', '.join(sorted(missing))} was not checked, so its silence says nothing")
    return [
        f"{row.category} ({comparison.name})"
        for comparison in found
        if comparison.name in among
        for row in comparison.rows
        if row.verdict == "confirmed"
    ]


def measure(seed: int, work: Path, *, small: bool) -> Result:
    """One seed: the demo and both nulls."""
    path = work / "measured.json"
    if path.exists():
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found
    out = work / "demo"
    cost = demo(out, seed, small=small)
    truth = rundir.read_json(out / "compare" / "truth.json", TRUTH_SCHEMA)
    cells = [{"comparison": pair["run"], **change} for pair in truth["pairs"] for change in pair["changes"]]
    print(f"seed {seed}: {truth['sentence']}", flush=True)

    base, texts = out / "models" / "base", out / "models" / "corpus" / "texts.jsonl"
    nulls = work / "nulls"
    other = make_it(nulls / "it-other-seed", base, seed + 1000)
    label_pair(pair_config(base, other, texts, seed, small=small), nulls / "other", nulls / "acts-other")
    compare([out / "instruct", nulls / "other"], nulls / "null-1", CompareConfig(), names=["instruct", "other"])
    null_1 = confirmed(nulls / "null-1", ["other against instruct"])
    print(f"seed {seed}: null 1 confirms {null_1 or 'nothing'}", flush=True)

    further = continue_base(nulls / "base-continued", base, seed + 2000)
    label_pair(pair_config(base, further, texts, seed, small=small), nulls / "null-2", nulls / "acts-null-2")
    compare([nulls / "null-2"], nulls / "null-2", CompareConfig())
    null_2 = confirmed(
        nulls / "null-2", [c.name for c in read(nulls / "null-2" / "compare" / "verdict.json").comparisons]
    )
    print(f"seed {seed}: null 2 confirms {null_2 or 'nothing'}", flush=True)

    measured = {
        "seed": seed,
        "small": small,
        **cost,
        "sentence": truth["sentence"],
        "cells": cells,
        "null_1": null_1,
        "null_2": null_2,
        "spread": {name: spread(out / name) for name in PAIRS},
    }
    write(path, measured)
    return measured


def planted(result: Result, *, pairs: bool) -> tuple[int, int]:
    """Changes recovered and planted, of the pairs or of the triangle."""
    cells = [c for c in result["cells"] if c["kind"] == "planted" and (c["comparison"] in PAIRS) == pairs]
    return sum(c["recovered"] for c in cells), len(cells)


def named(result: Result, kinds: tuple[str, ...], *, wrong: bool) -> list[str]:
    """Cells of some kinds, all or those judged wrongly, as "category (comparison)"."""
    cells = [c for c in result["cells"] if c["kind"] in kinds and not (wrong and c["recovered"])]
    return [f"{c['category']} ({c['comparison']})" for c in cells]


def problems(result: Result) -> list[str]:
    """Aims that one seed misses."""
    found = []
    for pairs, wanted in ((True, 14), (False, 6)):
        recovered, total = planted(result, pairs=pairs)
        if (recovered, total) != (wanted, wanted):
            found.append(f"{recovered} of {total} {'pair changes' if pairs else 'triangle cells'}, wanted {wanted}")
    for what, cells in (
        ("not recovered", named(result, ("planted",), wrong=True)),
        ("false claim", named(result, (*_UNPLANTED, "drifted"), wrong=True)),
        ("changed unplanned", named(result, ("drifted",), wrong=False)),
        ("null 1 confirms", result["null_1"]),
        ("null 2 confirms", result["null_2"]),
    ):
        found += [f"{what}: {', '.join(cells)}"] if cells else []
    if result["small"]:
        return found
    if (least := min(result["spread"].values())) < MIN_SPREAD:
        found.append(f"the median latent fires in {least:.0%} of the documents")
    if result["cpu_seconds"] > MAX_CPU_SECONDS:
        found.append(f"{result['cpu_seconds']:.0f} CPU s")
    if result["peak_gb"] > MAX_GB:
        found.append(f"{result['peak_gb']:.1f} GB")
    return found


def seeds_table(results: list[Result]) -> str:
    """One line per seed."""
    head = ["seed", "pair changes", "triangle cells", "false claims in unplanted cells"]
    head += ["changed unplanned, and of these confirmed", "null 1", "null 2"]
    head += ["median latent fires in, it and simpo", "CPU s", "wall s", "peak GB"]
    lines = []
    for result in results:
        false, cells = (len(named(result, _UNPLANTED, wrong=wrong)) for wrong in (True, False))
        drifted = [c for c in result["cells"] if c["kind"] == "drifted"]
        lines.append(
            [
                str(result["seed"]),
                *("{} of {}".format(*planted(result, pairs=pairs)) for pairs in (True, False)),
                f"{false} of {cells}",
                f"{len(drifted)}, {sum(c['verdict'] == 'confirmed' for c in drifted)}",
                *(str(len(result[null])) for null in ("null_1", "null_2")),
                ", ".join(f"{result['spread'][name]:.0%}" for name in PAIRS),
                f"{result['cpu_seconds']:.0f}",
                f"{result['wall_seconds']:.0f}",
                f"{result['peak_gb']:.2f}",
            ]
        )
    return table(head, lines)


def cells_table(results: list[Result]) -> str:
    """Every cell over the seeds: what was planted, B on the models alone, and the words that were said."""
    lines = []
    for place, cell in enumerate(results[0]["cells"]):
        over = [result["cells"][place] for result in results]
        true_B = [c["true_B"] for c in over]
        said = [c["verdict"] if c["change"] == "none" else f"{c['change']}, {c['verdict']}" for c in over]
        words = ", ".join(f"{said.count(word)} × {word}" for word in sorted(set(said), key=said.count, reverse=True))
        expected = cell["expected"] if cell["kind"] == "planted" else "nothing"
        measured_B = f"{statistics.median(true_B):+.3f} ({min(true_B):+.3f} to {max(true_B):+.3f})"
        kinds = ", ".join(sorted({c["kind"] for c in over}))
        lines.append([cell["comparison"], cell["category"], expected, kinds, measured_B, words])
    return table(["comparison", "category", "planted", "kind", "B on the models alone", "verdicts"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="the small demo, whose spread and cost are no aims")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="also write PATH.md and PATH.json")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    results = [measure(seed, arguments.out / str(seed), small=arguments.small) for seed in seeds]
    missed = [f"seed {result['seed']}: {problem}" for result in results for problem in problems(result)]
    counts = "Null 1: `instruct` with two seeds; null 2: base and base trained further; categories confirmed. "
    counts += "CPU and wall seconds and memory of `fastdiff demo` in a process of its own, one thread. "
    counts += "B on the models alone: median and range over the seeds, in nats per token of the answers. "
    counts += "Unchanged: |B| < 0.05; lacking: no model beats chance, so B is of nothing; drifted: neither, so the "
    counts += "models did change there though nothing was planted."
    parts = [counts, "## Seeds", seeds_table(results), "## Cells", cells_table(results)]
    command = ["python", "-P", "bench/demo_seeds.py", *sys.argv[1:]]
    Page("The demo over seeds: planted truth and nulls", parts, missed, results).publish(arguments.results, command)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
