"""The demonstration: three tiny models with planted differences, the whole road, and what of it was found.

<out>/models/         base, it (fine-tuned), simpo (preference-tuned), corpus/texts.jsonl
<out>/acts-it, acts-simpo, it/, simpo/     a store and a run for (base, it) and (base, simpo)
<out>/compare/        the triangle, and truth.json: each planted change and whether it was recovered
<out>/report/         report.html
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff import rundir
from fastdiff.comparison.compare import compare
from fastdiff.config import AnalyzeConfig, CompareConfig, ExtractConfig, RunConfig, TrainConfig
from fastdiff.demo.models import make_demo_models
from fastdiff.errors import OptionError
from fastdiff.pipeline import label_pair
from fastdiff.progress import SILENT, Progress
from fastdiff.reporting.builder import build_report

PAIRS = ("it", "simpo")
# crosscoders of each pair, of different seeds: a claim needs the sign of all of them
_CROSSCODERS = 3
_EXPECTED_SIGN = {"gained": 1, "lost": -1}


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and how much of the planted truth it shows."""

    report: Path
    sentence: str
    n_recovered: int
    n_planted: int


def pair_config(base: Path, tuned: Path, texts: Path, seed: int, *, small: bool) -> RunConfig:
    """The configuration of one pair of demo models."""
    return RunConfig(
        extract=ExtractConfig(
            base=str(base),
            tuned=str(tuned),
            layer="1",
            dataset=[str(texts)],
            messages_field="messages",
            category_field="category",
            ctx_len=128,
            max_tokens=100_000 if small else 250_000,
            batch_size=64,
            store_dtype="float32",
            seed=seed,
        ),
        train=TrainConfig(
            dict_size=1024,
            k=12,
            steps=400 if small else 1000,
            batch_size=1024,
            lr=1e-3,
            decay_steps=100 if small else 300,
            dead_tokens=100_000,
            # no two demo seeds share one
            seeds=tuple(range(_CROSSCODERS * seed, _CROSSCODERS * (seed + 1))),
            data_seed=seed,
        ),
        analyze=AnalyzeConfig(cards=300, context=20),
    )


def run_demo(out: Path, seed: int, progress: Progress = SILENT, *, small: bool = False) -> DemoResult:
    """Make the models, diff both pairs, and hold the result against the planted truth.

    Args:
        out: Directory of the demo; what is done there already is kept.
        seed: Of everything.
        progress: Where to report.
        small: Less text and fewer steps, for a quick look.

    Returns:
        The report and the score.

    Raises:
        OptionError: `out` holds something else.
        FastdiffError: What the stages raise.
    """
    if out.exists() and any(out.iterdir()) and not (out / "models").is_dir():
        raise OptionError(f"{out}: holds something else than a demo; choose another -o")
    models = make_demo_models(out / "models", seed, progress, small=small)
    for name, tuned in zip(PAIRS, (models.it, models.simpo), strict=True):
        config = pair_config(models.base, tuned, models.texts, seed, small=small)
        label_pair(config, out / name, out / f"acts-{name}", progress, overwrite=True)
    compare([out / name for name in PAIRS], out, CompareConfig(), progress, names=list(PAIRS))
    truth = hold_against_truth(out, models.truth)
    rundir.write_json(out / "compare" / "truth.json", truth)
    report = build_report(out, progress)
    changes = [change for pair in truth["pairs"] for change in pair["changes"]]
    return DemoResult(report, truth["sentence"], sum(c["recovered"] for c in changes), len(changes))


def hold_against_truth(out: Path, truth: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Each planted change beside what was observed; recovered means that the direction is right."""
    with (out / "compare" / "categories.csv").open(encoding="utf-8", newline="") as f:
        rows = {(row["comparison"], row["category"]): row for row in csv.DictReader(f)}
    pairs: list[dict[str, Any]] = []
    for run in PAIRS:
        changes: list[dict[str, Any]] = []
        for category, expected in sorted(truth[run].items()):
            if expected not in _EXPECTED_SIGN:
                continue
            row = rows.get((run, category))
            observed = {
                key: float(row[name]) if row and row[name] else None
                for key, name in (
                    ("observed_points", "delta_points"),
                    ("points_low", "points_low"),
                    ("points_high", "points_high"),
                    ("q", "q"),
                )
            }
            points = observed["observed_points"]
            recovered = points is not None and points * _EXPECTED_SIGN[expected] > 0
            changes.append({"category": category, "expected": expected, **observed, "recovered": recovered})
        pairs.append({"run": run, "changes": changes})
    everything = [change for pair in pairs for change in pair["changes"]]
    n = sum(change["recovered"] for change in everything)
    missed = [f"{c['category']} ({pair['run']})" for pair in pairs for c in pair["changes"] if not c["recovered"]]
    sentence = f"{n} of {len(everything)} planted changes recovered" + (
        f"; missed: {', '.join(missed)}" if missed else ""
    )
    return {"schema": rundir.SCHEMA, "pairs": pairs, "sentence": sentence}
