"""How much of the demo's planted truth is recovered, and what two nulls say; prints a table over seeds.

    python -P bench/demo_seeds.py --seeds 5 -o DIR

Null 1: (base, it) against (base, it fine-tuned with another seed), through the whole comparison.
Null 2: base against base trained further on its own corpus in another order.
Neither should confirm a category.
"""

import argparse
import time
from pathlib import Path

from fastdiff import rundir
from fastdiff.comparison.compare import compare
from fastdiff.config import CompareConfig
from fastdiff.demo.demo import pair_config, run_demo
from fastdiff.demo.models import continue_base, make_it
from fastdiff.pipeline import label_pair
from fastdiff.progress import Progress
from fastdiff.results.verdict import read


def confirmed(directory: Path, name: str) -> list[str]:
    """Categories that one comparison of a directory confirms as gained or lost."""
    comparisons = read(directory / "compare" / "verdict.json").comparisons
    return [row.category for c in comparisons if c.name == name for row in c.rows if row.verdict == "confirmed"]


def measure(seed: int, out: Path, *, small: bool) -> dict[str, float]:
    """One seed: the demo and both nulls."""
    started = time.monotonic()
    run_demo(out, seed, small=small)
    seconds = time.monotonic() - started
    truth = rundir.read_json(out / "compare" / "truth.json")
    print(f"seed {seed}: {truth['sentence']}", flush=True)

    base, texts = out / "models" / "base", out / "models" / "corpus" / "texts.jsonl"
    other = make_it(out / "models" / "it-other-seed", base, seed + 1000)
    label_pair(pair_config(base, other, texts, seed, small=small), out / "it2", out / "acts-it2", Progress("off"))
    compare([out / "it", out / "it2"], out / "null-1", CompareConfig())
    null_1 = confirmed(out / "null-1", "it2 against it")
    print(f"seed {seed}: null 1 confirms {null_1 or 'nothing'}", flush=True)

    further = continue_base(out / "models" / "base-continued", base, seed + 2000)
    null = out / "null-2"
    label_pair(pair_config(base, further, texts, seed, small=small), null, out / "acts-null-2", Progress("off"))
    compare([null], null, CompareConfig())
    null_2 = confirmed(null, "base→tuned")
    print(f"seed {seed}: null 2 confirms {null_2 or 'nothing'}", flush=True)
    return {**truth["counts"], "null 1": len(null_1), "null 2": len(null_2), "demo seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    rows = {seed: measure(seed, arguments.out / str(seed), small=arguments.small) for seed in seeds}
    names = list(next(iter(rows.values())))
    print("seed  " + "  ".join(names))
    for seed, row in rows.items():
        print(f"{seed:4}  " + "  ".join(f"{row[name]:{len(name)}.0f}" for name in names))
    total = {name: sum(row[name] for row in rows.values()) for name in names}
    print("all   " + "  ".join(f"{total[name]:{len(name)}.0f}" for name in names))
    if total["recovered"] < total["planted"] or total["false"] or total["null 1"] or total["null 2"]:
        raise SystemExit("below target: every planted change confirmed, nothing else, and both nulls silent")


if __name__ == "__main__":
    main()
