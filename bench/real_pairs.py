"""Does the verdict say what happened to real models? Pairs with a known change, beside the truth.

    python -P bench/real_pairs.py DIR --out WORK --results bench/results/real-pairs

DIR holds `models/NAME` (safetensors), `data/held.jsonl` (text, category) and `pairs.txt`, a pair a line:
`job.sh|NAME|m/BASE|m/TUNED|LAYER|how it was tuned`. The job names the settings (`JOBS` below: tiny models, or ones of
100 million parameters). Each pair goes through extract, train (all seeds), attribute, analyze, annotate and compare on
one thread; then its verdict is held against cross entropies that plain transformers measures on the same text (see
`real_truth.py`, which also has the rule). What is done with the same options is not done again: WORK/acts/PAIR,
WORK/runs/RECIPE/PAIR, WORK/truth, WORK/records/RECIPE. After a change of fastdiff itself begin with `--again`, or with
another WORK.

    --recipes [NAME ...]        how much of the change the latents hold (V/L) by training options, instead of verdicts;
                                --planted adds their recall on planted rare directions
    --shuffle-categories N      how often V, as a contrast with the other categories, claims anything where the
                                categories are shuffled over the documents; only reads what is there
    --patch [PAIR:CATEGORY ...] whether the latents with most nats carry the change (see `real_patch.py`)

Fails where an aim is missed: 24 of 26 clear cells confirmed and none with the opposite sign, nothing confirmed where
nothing changed or in a null pair, parts that add up within 3 %; nats that lead in all patched cells; claims in at most
3 of 60 shuffles.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# read when torch loads OpenMP; threads that spin take the other core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

import real_truth
import torch
from measure import device, versions
from real_patch import facts, patch, patch_missed, patch_table
from real_tables import (
    figure,
    figures_table,
    largest_gap,
    mean,
    missed,
    pair_table,
    read_attribution,
    share,
    shuffled_claims,
    table,
    tally,
    tally_lines,
)

from fastdiff.rundir import finite

Options = dict[str, int | float | str]
STAGES = ("extract", "train", "attribute", "analyze", "annotate", "compare")
NULLS = "N1,N2"
SHUFFLED = "P1,P4,N2"
CELLS = (
    "P1:man_de", "P1:stories", "P1:json", "P1:python", "P2:man_de", "P4:man_de", "P4:python", "P4:json", "P5:json"
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Settings of a kind of model.

    Attributes:
        extract: Options of `fastdiff extract`.
        train: Options of `fastdiff train`, the baseline of all recipes.
        attribute: Options of `fastdiff attribute`.
        truth: Documents per category whose cross entropy is measured for the truth; None: all.
    """

    extract: Options
    train: Options
    attribute: Options
    truth: int | None


JOBS = {
    "job.sh": Job(
        {"ctx_len": 160, "max_tokens": 140_000, "batch_size": 64, "dtype": "float32", "device": "cpu"},
        {"dict_size": 512, "k": 12, "steps": 500, "batch_size": 1024, "lr": 1e-3, "decay_steps": 200},
        {},
        None,
    ),
    "job_sm.sh": Job(
        {"ctx_len": 64, "max_tokens": 50_000, "batch_size": 16, "device": "cpu"},
        {"dict_size": 1024, "k": 20, "steps": 1000, "batch_size": 512, "lr": 1e-3, "decay_steps": 400},
        {"minutes": 0, "behaviour_documents": 40},
        40,
    ),
}
ALWAYS: Options = {"threads": 1, "holdout": 0.05, "device": "cpu"}


@dataclass(frozen=True)
class Recipe:
    """Training options relative to a job's: factors, and what they are set to."""

    lr: float = 1
    dict_size: float = 1
    steps: float = 1  # of all steps and of those over which the rate falls
    delta_coef: float = 0

    def options(self, job: Job) -> Options:
        """What `fastdiff train` is given."""
        factors = {"lr": self.lr, "dict_size": self.dict_size, "steps": self.steps, "decay_steps": self.steps}
        options = job.train | {
            name: type(job.train[name])(float(job.train[name]) * factor) for name, factor in factors.items()
        }
        return options | ({"delta_coef": self.delta_coef} if self.delta_coef else {})


RECIPES = {
    "baseline": Recipe(),
    "lr3-F4": Recipe(lr=3, dict_size=4),
    "lr3-F4-delta1": Recipe(lr=3, dict_size=4, delta_coef=1),
    "lr3-F4-delta2": Recipe(lr=3, dict_size=4, delta_coef=2),
    "lr3-F4-delta3": Recipe(lr=3, dict_size=4, delta_coef=3),
    "lr3-F4-steps4": Recipe(lr=3, dict_size=4, steps=4),
    "lr3-F4-delta2-steps4": Recipe(lr=3, dict_size=4, delta_coef=2, steps=4),
}


@dataclass(frozen=True)
class Pair:
    """A line of pairs.txt."""

    name: str
    job: Job
    base: Path
    tuned: Path
    layer: int
    text: Path

    @property
    def missing(self) -> list[str]:
        """Its models that are not there."""
        return [str(model) for model in (self.base, self.tuned) if not (model / "config.json").is_file()]


def read_pairs(directory: Path) -> dict[str, Pair]:
    """The pairs of a directory.

    Raises:
        SystemExit: A line has other fields, or names a job that is not known.
    """
    found = {}
    for line in (directory / "pairs.txt").read_text(encoding="utf-8").splitlines():
        fields = line.split("|")
        if len(fields) != 6 or fields[0] not in JOBS:
            raise SystemExit(f"{directory}/pairs.txt: expected job|NAME|m/BASE|m/TUNED|LAYER|how, got {line!r}")
        job, name, base, tuned, layer, _ = fields
        models = [directory / "models" / Path(model).name for model in (base, tuned)]
        found[name] = Pair(name, JOBS[job], *models, int(layer), directory / "data" / "held.jsonl")
    return found


@dataclass(frozen=True)
class Bench:
    """Where everything goes and how it is run.

    Attributes:
        work: Directory of stores, runs and records.
        seeds: Of the crosscoders.
        train: Options that replace a recipe's.
        attribute: Options of `fastdiff attribute`.
        again: Whether records are made anew. Stages still skip what they find up to date.
    """

    work: Path
    seeds: tuple[int, ...]
    train: Options
    attribute: Options
    again: bool

    def store(self, pair: Pair) -> Path:
        """Of a pair."""
        return self.work / "acts" / pair.name

    def run(self, pair: Pair, recipe: str) -> Path:
        """Of a pair by a recipe."""
        return self.work / "runs" / recipe / pair.name

    def record(self, pair: Pair, recipe: str) -> Path:
        """Of its results."""
        return self.work / "records" / recipe / f"{pair.name}.json"


def stage_commands(pair: Pair, recipe: str, bench: Bench) -> dict[str, list[str]]:
    """Arguments of fastdiff for every stage."""
    store, run = str(bench.store(pair)), str(bench.run(pair, recipe))
    train = RECIPES[recipe].options(pair.job) | ALWAYS | bench.train
    text = ["--dataset", str(pair.text), "--category-field", "category"]
    models = ["--base", str(pair.base), "--tuned", str(pair.tuned), "--layer", str(pair.layer)]
    seeds = ",".join(map(str, bench.seeds))
    return {
        "extract": ["extract", *models, *text, *settings(pair.job.extract), "-o", store],
        "train": ["train", store, "--seeds", seeds, *settings(train), "-o", run],
        "attribute": ["attribute", run, *settings({"device": "cpu"} | pair.job.attribute | bench.attribute)],
        "analyze": ["analyze", run, *settings({"train_seed": bench.seeds[0], "device": "cpu"})],
        "annotate": ["annotate", run],
        "compare": ["compare", run],
    }


def settings(options: Options) -> list[str]:
    """As --set key=value."""
    return [part for name, value in options.items() for part in ("--set", f"{name}={value}")]


def run_stage(arguments: list[str]) -> dict[str, Any]:
    """Run one stage as a process of its own.

    Returns:
        Its arguments, the CPU seconds of it and its children, and seconds of wall time.

    Raises:
        SystemExit: It failed; its last line says why.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-P", "-c", "from fastdiff.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise SystemExit(f"fastdiff {' '.join(arguments[:2])}: exit {done.returncode}: {last}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # what was done before cost only the look
    skipped = "is up to date" in done.stderr or "made with the same options; skipped" in done.stderr
    cost = None if skipped else {"cpu": cpu, "seconds": time.monotonic() - began}
    return {"arguments": arguments, "cost": cost, **made_with()}


def result_of(pair: Pair, recipe: str, until: str, bench: Bench) -> dict[str, Any]:
    """Take a pair through the stages and measure it. Stages that are recorded with the same arguments are not run.

    Returns:
        The record: stages with their cost, FVE by seed, shares, gap; with all stages also truth and rows.

    Raises:
        SystemExit: A stage failed.
    """
    path = bench.record(pair, recipe)
    record = {} if bench.again or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
    known, ran = record.get("stages", {}), False
    record = {"schema": 1, "pair": pair.name, "recipe": recipe, "stages": {}}
    for name, arguments in list(stage_commands(pair, recipe, bench).items())[: STAGES.index(until) + 1]:
        ran = ran or name not in known or known[name]["arguments"] != arguments
        if ran:
            print(f"{pair.name}, {recipe}: {name}", file=sys.stderr, flush=True)
        record["stages"][name] = run_stage(arguments) if ran else known[name]
        write(path, record)
    run = bench.run(pair, recipe)
    if "train" in record["stages"]:
        record["fve"] = held_out_fve(run, bench.seeds)
    if "attribute" in record["stages"]:
        of = read_attribution(run)
        record |= {
            "share": share(of),
            "latents_share": share(of, latents_alone=True),
            "held_out_share": share(of.only_held_out()),
            "documents": len(of.layer),
            "gap": largest_gap(of),
        }
    if "compare" in record["stages"]:
        record |= {"truth": truth_of(pair, bench), "rows": verdict_rows(run)}
    write(path, record)
    return dict(finite(record))


def held_out_fve(run: Path, seeds: tuple[int, ...]) -> list[float]:
    """Variance that each seed explains of the rows it did not train on, of both models together."""
    found = {}
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("stage") == "evaluate" and event["rows"] == "held-out":
            found[event["seed"]] = event["fve_pooled"]
    return [found[seed] for seed in seeds]


def verdict_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's own comparison.

    Raises:
        SystemExit: It says that it was not checked.
    """
    verdict = json.loads((run / "compare" / "verdict.json").read_text(encoding="utf-8"))
    (pair,) = (one for one in verdict["comparisons"] if one["kind"] == "pair")
    if pair["state"] != "checked":
        raise SystemExit(f"{run}: the verdict is {pair['state']}: {pair['reason']}")
    return list(pair["rows"])


def truth_of(pair: Pair, bench: Bench) -> list[dict[str, Any]]:
    """The truth about a pair, measured once."""
    path = bench.work / "truth" / f"{pair.name}.json"
    of = {
        "models": [str(pair.base), str(pair.tuned)],
        "text": str(pair.text),
        "ctx_len": pair.job.extract["ctx_len"],
        "documents": pair.job.truth,
    }
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found is None or found["of"] != of:
        documents = real_truth.read_documents(pair.text)
        cells = real_truth.measure(pair.base, pair.tuned, documents, int(pair.job.extract["ctx_len"]), pair.job.truth)
        found = {"of": of, "cells": [asdict(cell) for cell in cells]}
        write(path, found)
    return list(found["cells"])


def write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def made_with() -> dict[str, str]:
    """Day and commit, with a plus where the checkout differs from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(changed),
    }


def machine() -> dict[str, Any]:
    """Where this runs and with what."""
    packages = versions("fastdiff", "torch", "transformers", "numpy", "scipy")
    return {**device(), "versions": packages, "threads": torch.get_num_threads()}


def verdicts(pairs: list[Pair], recipe: str, nulls: set[str], bench: Bench) -> "Page":
    """Every pair's verdict beside the truth, and the tally."""
    results, failed = collect(pairs, [recipe], "compare", bench)
    parts = []
    for result in results:
        parts += [f"## {result['pair']}", pair_table(result)]
    found = tally(results, nulls)
    parts += ["## All pairs", figures_table(results), "\n".join(tally_lines(found))]
    return Page("Real pairs: verdicts beside the truth", parts, failed + missed(found, results), results)


def recipes(pairs: list[Pair], names: list[str], planted: bool, bench: Bench) -> "Page":
    """How much of the change the latents hold, by training options."""
    results, failed = collect(pairs, names, "attribute", bench)
    lines = []
    for name in names:
        of = [result for result in results if result["recipe"] == name]
        for result in of:
            lines.append(recipe_line(name, result["pair"], [result]))
        if len(of) > 1:
            lines.append(recipe_line(name, "mean", of))
    head = ["recipe", "pair", "FVE", "V/L", "latents/L", "V/L held out", "train, CPU s"]
    parts = [table(head, lines)]
    rare = rare_recall(names, bench) if planted else []
    if rare:
        rates = list(rare[0]["recall"])
        lines = [
            [one["recipe"], figure(one["fve"], ".4f"), *(figure(one["recall"][rate], ".2f") for rate in rates),
             figure(one["precision"], ".2f"), figure(one["cpu"], ".0f")]
            for one in rare
        ]  # fmt: skip
        parts += [
            "Planted rare directions (bench/quality.py's mixed data, recall by ν, mean over seeds):",
            table(["recipe", "FVE", *(f"recall at {rate}" for rate in rates), "precision", "CPU s"], lines),
        ]
    return Page("Real pairs: what training holds", parts, failed, [*results, *rare])


def recipe_line(name: str, pair: str, results: list[dict[str, Any]]) -> list[str]:
    """Means over pairs, of which there may be one."""
    fields = [
        figure(mean([mean(result["fve"]) for result in results]), ".3f"),
        *(
            figure(mean([result[key] for result in results]), ".2f")
            for key in ("share", "latents_share", "held_out_share")
        ),
    ]
    costs = [result["stages"]["train"]["cost"] for result in results]
    cpu = None if None in costs else mean([cost["cpu"] for cost in costs])
    return [name, pair, *fields, figure(cpu, ".0f")]


def rare_recall(names: list[str], bench: Bench) -> list[dict[str, Any]]:
    """Recall of a recipe's options on planted activations, whose own baseline has a larger learning rate already.

    The data set is that of the first table of bench/quality.py. The dictionary grows as in the recipe, steps and delta
    loss too; the learning rate stays, since it was chosen as the largest that trains well.
    """
    import quality

    found = []
    for name in names:
        recipe = RECIPES[name]
        steps = round(quality.STEPS * recipe.steps)
        quality.ROWS[name] = {"dict_size": round(quality.F * recipe.dict_size), "delta_coef": recipe.delta_coef}
        began = time.process_time()
        results = [quality.fit(quality.Case(quality.MIXED, name, seed, steps), None) for seed in bench.seeds]
        recall = {rate: mean([result.recall["ν"][rate] for result in results]) for rate in results[0].recall["ν"]}
        found.append(
            {
                "recipe": name,
                "planted": True,
                "seeds": list(bench.seeds),
                "fve": mean([result.fve for result in results]),
                "recall": recall,
                "precision": min(result.precision["ν"] for result in results),
                "cpu": time.process_time() - began,
                **made_with(),
            }
        )
    return found


def shuffles(pairs: list[Pair], recipe: str, times: int, bench: Bench) -> "Page":
    """Claims where there is nothing to claim."""
    counts = {pair.name: shuffled_claims(read_attribution(bench.run(pair, recipe)), times) for pair in pairs}
    claims, runs = sum(counts.values()), times * len(counts)
    lines = [[name, str(times), str(count)] for name, count in counts.items()]
    text = f"{claims} of {runs} shuffles claim anything."
    problems = [f"{text} (at most 3 of 60)"] if claims > runs * 3 / 60 else []
    results = [{"pair": name, "shuffles": times, "claims": count} for name, count in counts.items()]
    return Page(
        "Real pairs: categories shuffled over documents",
        [table(["pair", "shuffles", "with claims"], lines), text],
        problems,
        results,
    )


def patches(pairs: dict[str, Pair], cells: list[str], recipe: str, count: int, bench: Bench) -> "Page":
    """Patch the latents of the given cells, PAIR:CATEGORY."""
    wanted: dict[str, list[str]] = {}
    for cell in cells:
        name, _, category = cell.partition(":")
        if name not in pairs:
            raise SystemExit(f"--patch {cell}: no pair {name}; there are {', '.join(pairs)}")
        wanted.setdefault(name, []).append(category)
    found = []
    for name, categories in wanted.items():
        pair, run = pairs[name], bench.run(pairs[name], recipe)
        of = read_attribution(run)
        if unknown := set(categories) - set(of.categories):
            raise SystemExit(f"--patch: {name} has no category {', '.join(unknown)}; it has {', '.join(of.categories)}")
        models = (pair.base, pair.tuned)
        found += patch(name, run, bench.store(pair), models, pair.layer, of, categories, count)
    parts = [f"{count} latents of the first seed, effects in nats per token.", patch_table(found)]
    return Page("Real pairs: patched latents", parts, patch_missed(found), facts(found))


def collect(pairs: list[Pair], names: list[str], until: str, bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    """Results of all pairs and recipes; one that fails leaves the others alone.

    Returns:
        Records, and what failed.
    """
    results, failed = [], []
    for name in names:
        for pair in pairs:
            try:
                results.append(result_of(pair, name, until, bench))
            except SystemExit as stop:
                failed.append(f"{pair.name}, {name}: {stop}")
                print(failed[-1], file=sys.stderr, flush=True)
    return results, failed


@dataclass(frozen=True)
class Page:
    """What is printed and kept: a title, Markdown, aims that were missed, and the figures behind it."""

    title: str
    parts: list[str]
    problems: list[str]
    results: list[dict[str, Any]]

    def publish(self, path: Path | None, command: list[str]) -> None:
        """Print it; with a path also PATH.md and PATH.json."""
        facts = {**made_with(), "machine": machine()}
        # a page must not say where this machine keeps its files
        command = [Path(part).name if Path(part).is_absolute() else part for part in command]
        made = f"`{' '.join(command)}`, {facts['date']}, commit {facts['commit']}. "
        made += f"{facts['machine']['cpu']}, {facts['machine']['n_cpus']} CPUs, {platform.machine()}; "
        made += ", ".join(f"{name} {number}" for name, number in facts["machine"]["versions"].items()) + "."
        missed_text = "Missed: " + ("; ".join(self.problems) or "nothing")
        text = "\n\n".join([f"# {self.title}", made, *self.parts, missed_text])
        print(text)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
            found = {"schema": 1, "command": command, **facts, "results": self.results, "missed": self.problems}
            write(path.with_suffix(".json"), found)


def given_options(texts: list[str]) -> Options:
    """Options from key=value."""
    options: Options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"{text}: expected key=value")
        options[key.replace("-", "_")] = value
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--pairs", help="Names, by comma; all whose models are there unless given.")
    parser.add_argument("--out", type=Path, default=Path("real-pairs"), metavar="WORK", help="Default: real-pairs.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", choices=list(RECIPES), default="baseline")
    parser.add_argument("--train", nargs="*", default=[], metavar="KEY=VALUE", help="Replaces options of the recipe.")
    parser.add_argument("--attribute", nargs="*", default=[], metavar="KEY=VALUE", help="Options of attribute.")
    parser.add_argument("--until", choices=STAGES, help="Stop behind this stage and print nothing.")
    parser.add_argument("--again", action="store_true", help="Run the stages again; what is up to date stays.")
    parser.add_argument("--nulls", default=NULLS, help="Pairs in which nothing was taught, by comma.")
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), metavar="NAME", help="All unless named.")
    parser.add_argument("--planted", action="store_true", help="With --recipes: recall on planted directions too.")
    parser.add_argument("--shuffle-categories", type=int, metavar="N", help=f"Shuffles of each of {SHUFFLED}.")
    parser.add_argument("--patch", nargs="*", metavar="PAIR:CATEGORY", help=f"Unless named: {' '.join(CELLS)}.")
    parser.add_argument("--latents", type=int, default=20, help="How many --patch takes.")
    parser.add_argument("--results", type=Path, help="Also write FILE.md and FILE.json.", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = read_pairs(arguments.directory.resolve())
    default = SHUFFLED if arguments.shuffle_categories else ",".join(name for name in known if not known[name].missing)
    names = (arguments.pairs or default).split(",")
    if unknown := set(names) - set(known):
        raise SystemExit(f"--pairs: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    pairs = [known[name] for name in names]
    if missing := [model for pair in pairs for model in pair.missing]:
        raise SystemExit(f"no model in {', '.join(missing)}")
    bench = Bench(
        arguments.out.resolve(), tuple(map(int, arguments.seeds.split(","))), given_options(arguments.train),
        given_options(arguments.attribute), arguments.again,
    )  # fmt: skip
    if arguments.until:
        chosen = [arguments.recipe] if arguments.recipes is None else arguments.recipes or list(RECIPES)
        _, failed = collect(pairs, chosen, arguments.until, bench)
        raise SystemExit(1 if failed else 0)
    if arguments.shuffle_categories:
        page = shuffles(pairs, arguments.recipe, arguments.shuffle_categories, bench)
    elif arguments.patch is not None:
        page = patches(known, arguments.patch or list(CELLS), arguments.recipe, arguments.latents, bench)
    elif arguments.recipes is not None:
        page = recipes(pairs, arguments.recipes or list(RECIPES), arguments.planted, bench)
    else:
        page = verdicts(pairs, arguments.recipe, set(arguments.nulls.split(",")), bench)
    page.publish(arguments.results, ["python", "-P", *sys.argv])
    if page.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
