"""The demonstration: three tiny models with planted differences, the whole road, and what of it was found.

<out>/models/         base, it (fine-tuned), simpo (preference-tuned), corpus/texts.jsonl
<out>/acts-it, acts-simpo, it/, simpo/     a store and a run for (base, it) and (base, simpo)
<out>/compare/        the triangle, and truth.json: every cell, what was planted there and what was claimed
<out>/report/         report.html
"""

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
from fastdiff.results.verdict import read as read_verdict

PAIRS = ("it", "simpo")
# crosscoders of each pair, of different seeds: a claim needs the sign of all of them
_CROSSCODERS = 3


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and how much of the planted truth it shows."""

    report: Path
    sentence: str
    n_recovered: int
    n_planted: int
    n_false: int


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
    counts = truth["counts"]
    return DemoResult(report, truth["sentence"], counts["recovered"], counts["planted"], counts["false"])


def hold_against_truth(out: Path, truth: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Every cell of the pairs and of the triangle beside its verdict.

    A planted change is recovered if it is confirmed with the right sign; a cell in which nothing was planted, if
    nothing is confirmed there. What is confirmed where nothing was planted is a false claim.

    Args:
        out: Directory of the demo, compared.
        truth: By tuned model and category "gained", "lost" or "unchanged", against base.

    Raises:
        InputError: The comparison has no verdict.
    """
    file = read_verdict(out / "compare" / "verdict.json")
    expected = {name: dict(of) for name, of in truth.items()}
    first, second = PAIRS
    level = {"gained": 1, "unchanged": 0, "lost": -1}
    word = {1: "gained", 0: "unchanged", -1: "lost"}
    expected[f"{second} against {first}"] = {
        category: word[max(-1, min(1, level[truth[second][category]] - level[truth[first][category]]))]
        for category in truth[first]
    }
    pairs: list[dict[str, Any]] = []
    for comparison in file.comparisons:
        rows = {row.category: row for row in comparison.rows}
        changes: list[dict[str, Any]] = []
        for category, wanted in sorted(expected[comparison.name].items()):
            row = rows.get(category)
            claimed = row is not None and row.verdict == "confirmed"
            right = claimed and row is not None and row.change == wanted
            changes.append(
                {
                    "category": category,
                    "expected": wanted,
                    "verdict": None if row is None else row.verdict,
                    "change": None if row is None else row.change,
                    "B": None if row is None or row.B is None else row.B.model_dump(include={"mean", "low", "high"}),
                    "recovered": right if wanted != "unchanged" else not claimed,
                }
            )
        pairs.append({"run": comparison.name, "changes": changes})
    counts = _counts(pairs)
    parts = [f"{counts['recovered']} of {counts['planted']} planted changes confirmed with the right sign"]
    parts.append(f"{counts['false']} false claims in {counts['unplanted']} cells where nothing was planted")
    wrong = [f"{c['category']} ({pair['run']})" for pair in pairs for c in pair["changes"] if not c["recovered"]]
    sentence = ", ".join(parts) + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    return {"schema": 1, "pairs": pairs, "counts": counts, "sentence": sentence}


def _counts(pairs: list[dict[str, Any]]) -> dict[str, int]:
    """Planted cells and those recovered, unplanted cells and false claims in them."""
    cells = [change for pair in pairs for change in pair["changes"]]
    planted = [cell for cell in cells if cell["expected"] != "unchanged"]
    unplanted = [cell for cell in cells if cell["expected"] == "unchanged"]
    return {
        "planted": len(planted),
        "recovered": sum(cell["recovered"] for cell in planted),
        "unplanted": len(unplanted),
        "false": sum(not cell["recovered"] for cell in unplanted),
    }
