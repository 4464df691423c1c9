"""The demonstration: three tiny models with planted differences, the whole road, and what of it was found.

<out>/models/         base, instruct (fine-tuned), simpo (preference-tuned), corpus/texts.jsonl
<out>/acts-instruct, acts-simpo, instruct/, simpo/     a store and a run for (base, instruct) and (base, simpo)
<out>/compare/        the triangle, and truth.json: every cell, what is true there and what was claimed
<out>/report/         report.html
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff import rundir
from fastdiff.comparison.compare import compare
from fastdiff.comparison.verdict import TAU
from fastdiff.config import AnalyzeConfig, AttributeConfig, CompareConfig, ExtractConfig, RunConfig, TrainConfig
from fastdiff.demo.models import DemoModels, make_demo_models
from fastdiff.demo.truth import Cell, Change, cells, measured
from fastdiff.errors import OptionError
from fastdiff.pipeline import label_pair
from fastdiff.progress import SILENT, Progress
from fastdiff.reporting.builder import build_report
from fastdiff.results.statistics import TRUTH_SCHEMA
from fastdiff.results.verdict import read as read_verdict

PAIRS = ("instruct", "simpo")
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


def pair_config(base: Path, tuned: Path, texts: Path, seed: int, *, small: bool, attribute: bool = True) -> RunConfig:
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
            dtype="float32",
            store_dtype="float32",
            seed=seed,
        ),
        train=TrainConfig(
            dict_size=512,
            k=16,
            steps=400 if small else 1000,
            batch_size=1024,
            lr=1e-3,
            decay_steps=100 if small else 300,
            dead_tokens=100_000,
            # no two demo seeds share one
            seeds=tuple(range(_CROSSCODERS * seed, _CROSSCODERS * (seed + 1))),
            data_seed=seed,
        ),
        attribute=AttributeConfig(enabled=attribute),
        analyze=AnalyzeConfig(cards=300, context=20),
    )


def run_demo(
    out: Path, seed: int, progress: Progress = SILENT, *, small: bool = False, attribute: bool = True
) -> DemoResult:
    """Make the models, diff both pairs, and hold the result against the planted truth.

    Args:
        out: Directory of the demo; what is done there already is kept.
        seed: Of everything.
        progress: Where to report.
        small: Less text and fewer steps, for a quick look.
        attribute: Whether to run the models again for behaviour and nats; without, nothing is confirmed.

    Returns:
        The report and the score.

    Raises:
        OptionError: `out` holds something else.
        FastdiffError: What the stages raise.
    """
    if out.exists() and any(out.iterdir()) and not (out / "models").is_dir():
        raise OptionError(f"{out}: holds something else than a demo; choose another -o")
    models = make_demo_models(out / "models", seed, progress, small=small)
    for name, tuned in zip(PAIRS, (models.instruct, models.simpo), strict=True):
        config = pair_config(models.base, tuned, models.texts, seed, small=small, attribute=attribute)
        label_pair(config, out / name, out / f"acts-{name}", progress, overwrite=True)
    compare([out / name for name in PAIRS], out, CompareConfig(), progress, names=list(PAIRS))
    truth = hold_against_truth(out, true_cells(models, seed))
    rundir.write_json(out / "compare" / "truth.json", truth)
    report = build_report(out, progress)
    counts = truth["counts"]
    return DemoResult(report, truth["sentence"], counts["recovered"], counts["planted"], counts["false"])


def true_cells(models: DemoModels, seed: int) -> dict[str, dict[str, Cell]]:
    """What is true of every cell of the pairs and of the triangle, by comparison and category."""
    base, instruct, simpo = (measured(model, seed) for model in (models.base, models.instruct, models.simpo))
    level = {"gained": 1, "unchanged": 0, "lost": -1}
    word: dict[int, Change] = {1: "gained", 0: "unchanged", -1: "lost"}
    of_instruct, of_simpo = (models.truth[name] for name in PAIRS)
    between = {
        category: word[max(-1, min(1, level[of_simpo[category]] - level[before]))]
        for category, before in of_instruct.items()
    }
    return {
        "instruct": cells(of_instruct, base, instruct, TAU),
        "simpo": cells(of_simpo, base, simpo, TAU),
        "simpo against instruct": cells(between, instruct, simpo, TAU),
    }


def hold_against_truth(out: Path, truth: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """Every cell of the pairs and of the triangle beside its verdict.

    A planted change is recovered if it is confirmed with the right sign. What is confirmed where nothing was planted
    is a false claim, unless the models did change there (`Cell`).

    Args:
        out: Directory of the demo, compared.
        truth: By comparison and category.

    Raises:
        InputError: The comparison has no verdict.
    """
    file = read_verdict(out / "compare" / "verdict.json")
    pairs: list[dict[str, Any]] = []
    for comparison in file.comparisons:
        rows = {row.category: row for row in comparison.rows}
        changes: list[dict[str, Any]] = []
        for category, cell in sorted(truth[comparison.name].items()):
            row = rows.get(category)
            changes.append(
                {
                    "category": category,
                    "expected": cell.expected,
                    "kind": cell.kind,
                    "true_B": cell.B,
                    "verdict": None if row is None else row.verdict,
                    "change": None if row is None else row.change,
                    "B": None if row is None or row.B is None else row.B.model_dump(include={"mean", "low", "high"}),
                    "recovered": cell.right("none", False)
                    if row is None
                    else cell.right(row.change, row.verdict == "confirmed"),
                }
            )
        pairs.append({"run": comparison.name, "state": comparison.state, "changes": changes})
    counts = _counts(pairs)
    return {"schema": TRUTH_SCHEMA, "pairs": pairs, "counts": counts, "sentence": _sentence(pairs, counts)}


def _sentence(pairs: list[dict[str, Any]], counts: dict[str, int]) -> str:
    """The score in words, with every cell that is not as it should be."""
    if all(pair["state"] == "not checked" for pair in pairs):
        # without behaviour nothing is ever gained or lost, so a score would say nothing about the method
        return f"{counts['planted']} planted changes not checked; run `fastdiff demo` without --no-attribute"
    parts = [
        f"{counts['recovered']} of {counts['planted']} planted changes confirmed with the right sign",
        f"{counts['false']} false claims in {counts['unplanted']} cells where nothing was planted",
    ]
    cells = [(f"{cell['category']} ({pair['run']})", cell) for pair in pairs for cell in pair["changes"]]
    wrong = [name for name, cell in cells if not cell["recovered"]]
    drifted = [name for name, cell in cells if cell["kind"] == "drifted"]
    return (
        ", ".join(parts)
        + (f"; wrong: {', '.join(wrong)}" if wrong else "")
        + (f"; changed though nothing was planted: {', '.join(drifted)}" if drifted else "")
    )


def _counts(pairs: list[dict[str, Any]]) -> dict[str, int]:
    """Planted cells and those recovered, unplanted cells and false claims in them, and cells that drifted."""
    cells = [change for pair in pairs for change in pair["changes"]]
    planted = [cell for cell in cells if cell["kind"] == "planted"]
    unplanted = [cell for cell in cells if cell["kind"] != "planted"]
    return {
        "planted": len(planted),
        "recovered": sum(cell["recovered"] for cell in planted),
        "unplanted": len(unplanted),
        "false": sum(not cell["recovered"] for cell in unplanted),
        "drifted": sum(cell["kind"] == "drifted" for cell in cells),
    }
