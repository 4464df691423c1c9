"""How much of the demo's planted truth is recovered, and what two nulls say; prints a table over seeds.

    python -P bench/demo_seeds.py --seeds 5 -o DIR

Null 1: (base, it) against (base, it fine-tuned with another seed), through the whole comparison.
Null 2: base against base trained further on its own corpus in another order.
Neither should show a category with q < 0.05.
"""

import argparse
import csv
import time
from pathlib import Path

from fastdiff import rundir
from fastdiff.comparison.compare import compare
from fastdiff.config import CompareConfig
from fastdiff.demo.demo import pair_config, run_demo
from fastdiff.demo.models import continue_base, make_it
from fastdiff.pipeline import label_pair
from fastdiff.progress import Progress


def significant(directory: Path, comparisons: tuple[str, ...]) -> list[str]:
    """Categories with q < 0.05 in some comparisons of a directory."""
    with (directory / "compare" / "categories.csv").open(encoding="utf-8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["comparison"] in comparisons]
    return [f"{row['category']} ({row['comparison']})" for row in rows if row["significant"] == "1"]


def sizes(directory: Path) -> str:
    """Latents on each side of each comparison."""
    comparisons = rundir.read_json(directory / "compare" / "statistics.json")["comparisons"]
    return ", ".join(f"{c['name']} {c['total_b']}/{c['total_a']}" for c in comparisons)


def measure(seed: int, out: Path, *, small: bool) -> dict[str, float]:
    """One seed: the demo and both nulls."""
    started = time.monotonic()
    run_demo(out, seed, small=small)
    seconds = time.monotonic() - started
    truth = rundir.read_json(out / "compare" / "truth.json")
    changes = [change for pair in truth["pairs"] for change in pair["changes"]]
    sign = {"gained": 1, "lost": -1}
    clear = [c for c in changes if c["points_low"] is not None and c["points_low"] * c["points_high"] > 0]
    wrong = [c for c in changes if not c["recovered"] and c["q"] is not None and c["q"] < 0.05]
    clear = [c for c in clear if c["observed_points"] * sign[c["expected"]] > 0]
    print(f"seed {seed}: {truth['sentence']}; {sizes(out)}", flush=True)

    base, texts = out / "models" / "base", out / "models" / "corpus" / "texts.jsonl"
    other = make_it(out / "models" / "it-other-seed", base, seed + 1000)
    label_pair(pair_config(base, other, texts, seed, small=small), out / "it2", out / "acts-it2", Progress("off"))
    compare([out / "it", out / "it2"], out / "null-1", CompareConfig())
    null_1 = significant(out / "null-1", ("gained", "lost"))
    print(f"seed {seed}: null 1: {sizes(out / 'null-1')}; q < 0.05: {null_1 or 'none'}", flush=True)

    further = continue_base(out / "models" / "base-continued", base, seed + 2000)
    null = out / "null-2"
    label_pair(pair_config(base, further, texts, seed, small=small), null, out / "acts-null-2", Progress("off"))
    compare([null], null, CompareConfig())
    null_2 = significant(null, ("base→tuned",))
    print(f"seed {seed}: null 2: {sizes(null)}; q < 0.05: {null_2 or 'none'}", flush=True)
    return {
        "planted": len(changes),
        "recovered": sum(c["recovered"] for c in changes),
        "interval excludes 0": len(clear),
        "significant the wrong way": len(wrong),
        "null 1": len(null_1),
        "null 2": len(null_2),
        "demo seconds": seconds,
    }


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
    enough = total["recovered"] >= 0.8 * total["planted"] and total["interval excludes 0"] >= 0.5 * total["planted"]
    if not enough or total["significant the wrong way"] or total["null 1"] or total["null 2"]:
        raise SystemExit("below target: 80 % recovered, half of the intervals clear of 0, none wrong, nulls silent")


if __name__ == "__main__":
    main()
