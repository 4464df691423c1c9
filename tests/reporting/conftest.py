"""Made-up run directories, as the stages before the report would leave them."""

import csv
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from attributions import write_nats

from fastdiff import rundir
from fastdiff.results.analysis import LATENT_COLUMNS

CATEGORIES = ("code", "factual", "instruction following", "multilingual", "refusal", "self-reference")

# what a browser must show and never obey; no file ends up with a lone surrogate in raw UTF-8
HOSTILE = (
    "<script>window.__pwned=1</script>",
    "</script><script>window.__pwned=2</script>",
    "<!--<script>window.__pwned=3",
    "]]><img src=x onerror=window.__pwned=4>",
    '<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/meta">',
    '"><svg onload=window.__pwned=5>',
    "' onmouseover='window.__pwned=6",
    "<iframe src=http://127.0.0.1:9/frame></iframe>",
    "<link rel=stylesheet href=http://127.0.0.1:9/css>",
    "<style>body{display:none}</style>",
    "<base href=http://127.0.0.1:9/>",
    "javascript:window.__pwned=7",
    "{{7*7}}",
    "{% for x in y %}",
    "${window.__pwned=8}",
    "`${1}`",
    "__proto__",
    "constructor",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "ab\u202ecd\u2066ef",
    "line\u2028para\u2029end",
    "nul\x00esc\x1b[2Jdel\x7f",
    "c1\x85\x9b",
    "zero\u200bwidth\ufeff",
    "\ud800lone",
    "tag\U000e0041",
    "Z" + "\u0300" * 60,
    "שלום",
    "соdе",
    "line\nbreak",
    "x" * 5000,
)

TOKENS = (
    *(
        " the",
        " a",
        " of",
        " to",
        " and",
        " in",
        ".",
        " is",
        " it",
        " that",
        " for",
        "\n",
        " you",
        " not",
        "(",
    ),
    *(" def", " return", " model", " cannot", " help", " sorry", " le", " est", " und", " ist", " I", " am"),
)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as f:
        columns = LATENT_COLUMNS if path.name == "latents.csv" else rows[0]
        writer = csv.DictWriter(f, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)


def top_tokens(latent: int, texts: tuple[str, ...]) -> list[str]:
    return [texts[(latent + j) % len(texts)] for j in range(4)]


def latent_rows(rng: np.random.Generator, n: int, cards: int, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of `cards` latents half are tuned's and half base's, the rest shared; every 97th never fires."""
    rows = []
    for i in range(n):
        side = 0.95 if i < cards // 2 else 0.06 if i < cards else 0.5
        delta = float(np.clip(rng.normal(side, 0.03 if i < cards else 0.1), 0, 1))
        alone, silent = i < cards, i % 97 == 96
        nu_error, nu_reconstruction = rng.normal(0.05 if alone else 0.9, 0.05, 2).tolist()
        specific = ("tuned" if delta > 0.5 else "base") if alone and abs(nu_error) < 0.2 and not silent else ""
        count = 0 if silent else int(10 ** rng.uniform(1, 4.5))
        edges = {"base_only": delta < 0.1, "tuned_only": delta > 0.9, "shared": 0.4 <= delta <= 0.6}
        numbers = {
            "delta_norm": delta,
            "cosine": rng.uniform(-1, 1),
            "nu_error": None if silent else nu_error,
            "nu_reconstruction": None if silent else nu_reconstruction,
            "nu_activation": None if silent else nu_error,
            "norm_base": 1 - delta,
            "norm_tuned": delta,
            "frequency": count / 1e6,
        }
        rows.append(
            {
                "latent": i,
                "class": next((name for name, hit in edges.items() if hit), "other"),
                **{name: "" if value is None else f"{value:.6g}" for name, value in numbers.items()},
                "count": count,
                "max_activation": f"{rng.gamma(4, 2):.6g}",
                "label": "",
                "category": "",
                "specific": specific,
                "beta_error_base": "-0.5",
                "mean_activation": "1.5",
                "top_tokens": json.dumps(top_tokens(i, texts)),
                "stability": "" if silent else "0.5",
            }
        )
    return rows


def write_analysis(
    run: Path,
    rng: np.random.Generator,
    models: list[str],
    texts: tuple[str, ...],
    sizes: tuple[int, int, int, int],
) -> None:
    """`analysis/`; sizes are latents, cards, examples per card, tokens per example."""
    directory = run / "analysis"
    directory.mkdir(parents=True)
    rows = latent_rows(rng, sizes[0], sizes[1], texts)
    specific = [row["specific"] for row in rows]
    classes = [row["class"] for row in rows]
    counts, edges = np.histogram([float(row["delta_norm"]) for row in rows], 40, (0, 1))
    quality = {"fve": [0.873, 0.781], "fve_pooled": 0.83, "l0_mean": 98.7, "silent_fraction": 0.041}
    summary = {
        "schema": 1,
        "n_tokens": 1_000_000,
        "dict_size": len(rows),
        "k": 100,
        "models": [
            {"name": name, "layer": 13, "hook": "resid_post", "revision": None, "dtype": "bfloat16"} for name in models
        ],
        "classes": {name: classes.count(name) for name in ("tuned_only", "base_only", "shared", "other")},
        "specific": {side: specific.count(side) for side in ("base", "tuned")},
        "never_fired": sum(row["count"] == 0 for row in rows),
        "quality": {**quality, "rows": "held out", "n_rows": 10_000},
        "delta_norm_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "sources": [{"dataset": "corpus", "category": category} for category in CATEGORIES],
        "thresholds": {"nu_error_max": 0.2, "nu_reconstruction_max": 0.5},
        "stability": {"seeds": [1, 2], "observed": 390, "stable": 200, "exclusive": 60, "exclusive_stable": 45},
        "columns": {},
    }
    write_csv(directory / "latents.csv", rows)
    rundir.write_json(directory / "summary.json", summary)
    write_examples(directory / "examples.sqlite", rng, specific, texts, sizes)
    outputs = ["latents.csv", "summary.json", "examples.sqlite"]
    rundir.finish(directory, "analyze", {"train_seed": 0}, {"store": "0" * 64, "model": "1" * 64}, outputs)


def write_examples(
    path: Path,
    rng: np.random.Generator,
    specific: list[str],
    texts: tuple[str, ...],
    sizes: tuple[int, int, int, int],
) -> None:
    _, cards, n, t = sizes
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE examples(latent INTEGER, rank INTEGER, sequence_id INTEGER, row INTEGER, position"
        " INTEGER, dataset TEXT, category TEXT, activation REAL, peak INTEGER, tokens TEXT, activations TEXT)"
    )
    connection.execute("CREATE TABLE latents(latent INTEGER PRIMARY KEY, why TEXT)")
    for latent in range(cards):
        connection.execute("INSERT INTO latents VALUES (?, ?)", (latent, specific[latent] or "shared"))
        for rank in range(n):
            # every text turns up, in turn
            tokens = [texts[(latent * n * t + rank * t + i) % len(texts)] for i in range(t)]
            values = np.where(rng.random(t) < 0.12, rng.gamma(2, 1, t), 0)
            peak = int(rng.integers(t))
            values[peak] = values.max() + 1
            place = (latent, rank, 100 + rank, 5, 24, "corpus", CATEGORIES[latent % 6])
            seen = (float(values[peak]), peak, json.dumps(tokens), json.dumps(values.round(5).tolist()))
            connection.execute("INSERT INTO examples VALUES (?,?,?,?,?,?,?,?,?,?,?)", (*place, *seen))
    connection.commit()
    connection.close()


def outputs_of(stage: Path) -> dict[str, str]:
    return json.loads((stage / "DONE.json").read_text())["outputs"]


def finish_compare(directory: Path) -> None:
    """Mark the comparison as one of the runs as they are."""
    inputs = {}
    for run in json.loads((directory / "compare" / "statistics.json").read_text())["runs"]:
        for stage in ("analysis", "annotate", "attribution"):
            if not (directory / run["path"] / stage).exists():
                continue
            outputs = outputs_of(directory / run["path"] / stage)
            inputs |= {f"{run['name']}/{stage}/{file}": sha for file, sha in outputs.items()}
    outputs = ["categories.csv", "statistics.json", "verdict.json"]
    rundir.finish(directory / "compare", "compare", {"alpha": 0.05}, inputs, outputs)


def settle(run: Path, stage: str) -> None:
    """Mark a stage of a pair as finished after its files were edited, and what follows as made from it."""
    if stage == "analysis":
        done = json.loads((run / "analysis" / "DONE.json").read_text())
        rundir.finish(run / "analysis", done["stage"], done["config"], done["inputs"], list(done["outputs"]))
    if stage in ("analysis", "annotate"):
        rundir.finish(run / "annotate", "annotate", {}, outputs_of(run / "analysis"), ["labels.jsonl"])
    finish_compare(run)


def write_labels(
    run: Path, n: int, texts: tuple[str, ...], categories: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    """Every 11th latent has no label, every 13th is uninterpretable."""
    lines = []
    for i in range(n):
        category = "uninterpretable" if i % 13 == 12 else categories[i % len(categories)]
        tops = top_tokens(i, texts)
        label = labels[i % len(labels)] if labels else f"{category}: {','.join(tops)}"
        if i % 11 != 10:
            facts = {"latent": i, "label": label, "category": category, "confidence": 0.93}
            lines.append(json.dumps({**facts, "annotator": "baseline-1", "top_tokens": tops}) + "\n")
    rundir.write_text(run / "annotate" / "labels.jsonl", "".join(lines))
    rundir.finish(run / "annotate", "annotate", {}, outputs_of(run / "analysis"), ["labels.jsonl"])


def write_logs(run: Path, rng: np.random.Generator, models: list[str]) -> None:
    with (run / "events.jsonl").open("w") as f:
        for step in range(0, 2001, 50):
            fall = float(np.exp(-step / 300))
            event = {"stage": "train", "step": step, "loss": 12 + 40 * fall + rng.normal() / 5}
            event |= {"fve": [0.87 - 0.8 * fall, 0.79 - 0.7 * fall], "l0": 99.5 - 40 * fall, "dead": 0.05}
            f.write(json.dumps({"time": rng.random(), **event}) + "\n")
    train = {"dict_size": 2048, "k": 100, "steps": 2000, "activation": "batchtopk"}
    settings = {"extract": {"base": models[0], "tuned": models[1]}, "train": train}
    (run / "fastdiff.yaml").write_text(yaml.safe_dump(settings))
    facts = {
        "finished": "2026-01-01T00:00:00Z",
        "command": ["/x/bin/fastdiff", "train", "acts/", "-o", "run/"],
    }
    stages = {"train": {**facts, "versions": {"python": "3.11.7", "torch": "2.13.0"}}}
    (run / "manifest.json").write_text(json.dumps({"schema": 1, "stages": stages}))


def verdict_of(runs: list[dict[str, str]], categories: tuple[str, ...], sentences: list[str]) -> dict[str, Any]:
    """A verdict of each run and, of two, of the second against the first; the first category is confirmed."""

    def row(i: int, category: str) -> dict[str, Any]:
        b = (0.8, -0.3, 0.01)[i % 3]
        tested = {"mean": b, "low": b - 0.1, "high": b + 0.1, "p": 0.001, "q": 0.002}
        change = ("gained", "lost", "none")[i % 3]
        word = ("confirmed", "suggestive", "no change")[i % 3]
        return {
            **{"category": category, "change": change, "verdict": word, "documents": 200, "documents_nats": 40},
            **{"ce_base": 2.0, "ce_tuned": 2.0 - b, "unigram_entropy": 5.0, "B": tested, "L": tested, "V": tested},
            **{"signs": "+++" if b > 0 else "---", "reason": "by a mean shift" if word == "suggestive" else None},
            "top_latents": [{"seed": 0, "latent": i, "nats": b / 4}],
        }

    def comparison(kind: str, of: list[dict[str, str]]) -> dict[str, Any]:
        name = of[0]["name"] if kind == "pair" else f"{of[1]['name']} against {of[0]['name']}"
        models = {"base": of[0]["base"], "tuned": of[-1]["tuned"], "scored": "answers", "seeds": [0, 1, 2]}
        rows = [row(i, category) for i, category in enumerate(categories)]
        names = [run["name"] for run in of]
        return {
            **{"name": name, "kind": kind, "runs": names, "state": "checked", "sentences": sentences[:3]},
            **{"rows": rows, **models},
        }

    comparisons = [comparison("pair", [run]) for run in runs]
    comparisons += [comparison("difference", runs)] if len(runs) == 2 else []
    return {"schema": 1, "tau": 0.05, "alpha": 0.05, "confidence": 0.95, "comparisons": comparisons}


def write_compare(
    directory: Path,
    kind: str,
    runs: list[dict[str, str]],
    names: list[str],
    categories: tuple[str, ...],
    verdict: list[str],
) -> None:
    compare = directory / "compare"
    compare.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        for i, category in enumerate(categories):
            a, b = 24, (3, 16, 22, 24, 31, 58)[i % 6]
            points = (b - a) / 2
            clear = abs(points) > 4.5
            sides = {"comparison": name, "category": category, "side_a": "base", "side_b": "tuned"}
            counts = {
                "count_a": a,
                "total_a": 200,
                "share_a": a / 200,
                "count_b": b,
                "total_b": 200,
                "share_b": b / 200,
            }
            percent = {"delta_percent": f"{100 * (b - a) / a:.4f}", "percent_low": "", "percent_high": ""}
            shift = {"delta_points": points, "points_low": points - 4.5, "points_high": points + 4.5}
            p = {"p": 0.0004 if clear else 0.31, "q": 0.0008 if clear else 0.62}
            p |= {"q_concepts": p["q"], "detectable_ratio": 2.5}
            mass = {"mass_a": 0.11, "mass_b": 0.11 + points / 100, "significant": int(clear)}
            pooled = {"pooled_count_a": 3 * a, "pooled_total_a": 600, "pooled_count_b": 3 * b, "pooled_total_b": 600}
            pooled |= {"pooled_p": p["p"] / 3, "pooled_q": p["q"] / 3, "signs": "++-" if points > 0 else "---"}
            rows.append({**sides, **counts, **percent, **shift, **p, **mass, **pooled})
    write_csv(compare / "categories.csv", rows)
    sides = {"side_a": "specific to base (lost)", "side_b": "specific to tuned (gained)"}
    totals = {
        "total_a": 200,
        "total_b": 200,
        "unlabelled_a": 3,
        "unlabelled_b": 4,
        "deff_a": 1.2,
        "deff_b": 1.0,
        "seeds": [0, 1, 2],
        "phi_a": 1.02,
        "phi_b": None,
        "n_categories": len(categories),
    }
    words = {"explanation": "Latents that only base has, against latents that only tuned has."}
    statistics = {
        "schema": 3,
        "kind": kind,
        "alpha": 0.05,
        "confidence": 0.95,
        "runs": runs,
        "comparisons": [
            {
                "name": name,
                "runs": [
                    run["name"] for run in runs if "→" not in name or kind == "pair" or name.endswith(run["name"])
                ],
            }
            | {**sides, **totals, **words}
            for name in names
        ],
        "verdict": verdict,
        "method": "Shares per category; Newcombe intervals; Fisher's exact test; Benjamini-Hochberg.",
    }
    rundir.write_json(compare / "statistics.json", statistics)
    rundir.write_json(compare / "verdict.json", verdict_of(runs, categories, verdict))
    finish_compare(directory)


def row_nats(categories: tuple[str, ...], sizes: tuple[int, int, int, int]) -> np.ndarray:
    """Nats of each latent by category: five stand out, in the direction of the category's change (see verdict_of)."""
    n, cards = sizes[:2]
    nats = np.full((len(categories), n), 1e-5)
    for i in range(len(categories)):
        for k in range(5):
            nats[i, (i + k * (cards // 5)) % cards] = (0.05 - 0.01 * k) * (1, -1, 1)[i % 3]
    return nats


def fill_run(
    run: Path,
    seed: int = 0,
    models: tuple[str, str] = ("tiny/base", "tiny/it"),
    texts: tuple[str, ...] = TOKENS,
    categories: tuple[str, ...] = CATEGORIES,
    labels: tuple[str, ...] = (),
    sizes: tuple[int, int, int, int] = (400, 60, 5, 25),
) -> None:
    """Everything before `compare`."""
    rng = np.random.default_rng(seed)
    write_analysis(run, rng, list(models), texts, sizes)
    write_labels(run, sizes[0], texts, categories, labels)
    write_nats(run, row_nats(categories, sizes)[None], range(len(categories)), categories, model="1" * 64)
    write_logs(run, rng, list(models))


def pair(run: Path, verdict: tuple[str, ...] = ("Tuning added self-reference.",), **options: Any) -> Path:
    """A run of one pair of models, ready for its report."""
    fill_run(run, **options)
    base, tuned = options.get("models", ("tiny/base", "tiny/it"))
    names = [{"name": "it", "path": ".", "base": base, "tuned": tuned}]
    write_compare(run, "pair", names, ["base→tuned"], options.get("categories", CATEGORIES), list(verdict))
    return run


def triangulated(root: Path, **options: Any) -> Path:
    """Two runs and the directory that compares them, with a planted truth."""
    directory = root / "both"
    for seed, name in enumerate(("it", "simpo")):
        fill_run(root / name, seed=seed, models=("tiny/base", f"tiny/{name}"), **options)
    runs = [
        {"name": name, "path": f"../{name}", "base": "tiny/base", "tuned": f"tiny/{name}"} for name in ("it", "simpo")
    ]
    names = ["base→it", "base→simpo", "gained", "lost"]
    write_compare(directory, "triangulated", runs, names, CATEGORIES, ["simpo gains self-reference."])
    lost = {"category": "code", "expected": "lost", "B": {"mean": -0.6, "low": -0.7, "high": -0.5}}
    gained = {"category": "refusal", "expected": "gained", "B": {"mean": 0.03, "low": -0.01, "high": 0.07}}
    changes = [
        {**lost, "verdict": "confirmed", "change": "lost", "recovered": True},
        {**gained, "verdict": "no change", "change": "none", "recovered": False},
    ]
    pairs = [{"run": name, "changes": changes} for name in ("it", "simpo")]
    truth = {"schema": 1, "pairs": pairs, "sentence": "2 of 4 planted changes recovered."}
    rundir.write_json(directory / "compare" / "truth.json", truth)
    return directory


@pytest.fixture(scope="session", name="settle")
def settle_stage() -> Callable[[Path, str], None]:
    return settle


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Path]:
    return pair


@pytest.fixture(scope="session")
def make_triangulated() -> Callable[..., Path]:
    return triangulated


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    return HOSTILE


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose every name, token, label and category is hostile."""
    names = tuple(text for text in HOSTILE if "\ud800" not in text)
    return pair(
        tmp_path_factory.mktemp("hostile") / "run",
        models=("evil/<script>window.__pwned=1</script>", "x\u202e</title><script>window.__pwned=9</script>"),
        verdict=names,
        texts=HOSTILE,
        labels=HOSTILE,
        categories=names,
        sizes=(400, 80, 3, 25),
    )
