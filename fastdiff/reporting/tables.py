"""What the sections of the page say, as plain dictionaries for the template and for report.json."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from fastdiff.reporting import charts
from fastdiff.reporting.data import CATEGORY_TEXT, LATENT_TEXT
from fastdiff.reporting.schema import Behaviour, Findings, Run
from fastdiff.reporting.text import SENTENCE, csv_cell, fixed, number, short_name, visible
from fastdiff.results.verdict import Tested, Verdict

# below these a reader should not take the comparison at its word
_FVE_LEAST = 0.8
_DEAD_MOST = 0.3
_SPECIFIC_LEAST = 30
_UNCATEGORIZED_MOST = 0.5
_STABLE_LEAST = 0.5

UNINTERPRETABLE = "uninterpretable"
_MARKS = {"gained": "▲", "lost": "▼"}


def title(findings: Findings) -> str:
    """The pair, or all pairs, in short names: base → it, simpo."""
    models = [name for run in findings.runs for name in (run.base, run.tuned)]
    tuned = [short_name(run.tuned, models) for run in findings.runs]
    if len(set(tuned)) < len(tuned):
        tuned = [run.name for run in findings.runs]
    pairs: dict[str, list[str]] = {}
    for run, name in zip(findings.runs, tuned, strict=True):
        pairs.setdefault(short_name(run.base, models), []).append(visible(name))
    return "; ".join(f"{visible(base)} → {', '.join(names)}" for base, names in pairs.items())


def facts(run: Run) -> list[tuple[str, str]]:
    """What was compared: models, place, amount of text, size of the dictionary."""
    layers = dict.fromkeys(str(model["layer"]) for model in run.summary.models if model.get("layer") is not None)
    hooks = dict.fromkeys(str(model["hook"]) for model in run.summary.models if model.get("hook") is not None)
    return [
        ("Base model", run.base),
        ("Tuned model", run.tuned),
        ("Layer", ", ".join(layers) or "–"),
        ("Hook", ", ".join(hooks) or "–"),
        ("Tokens analysed", f"{run.summary.n_tokens:,}"),
        ("Dictionary size", f"{run.summary.dict_size:,} latents"),
        *([("Active per token, k", f"{run.summary.k:,}")] if run.summary.k is not None else []),
    ]


def trust(run: Run) -> dict[str, Any]:
    """Measures of how far the run can be trusted, and a warning for each that is poor."""
    quality, specific = run.summary.quality, run.summary.specific
    measures: list[tuple[str, str, bool]] = []
    warnings: list[str] = []

    def measure(name: str, value: str, warning: str | None) -> None:
        measures.append((name, value, warning is None))
        if warning is not None:
            warnings.append(warning)

    for i, side in enumerate(("base", "tuned")):
        fve = quality.fve[i] if i < len(quality.fve) else None
        poor = fve is None or fve < _FVE_LEAST
        words = f"The crosscoder explains {number(fve)} of the {side} model's variance, less than {_FVE_LEAST}."
        measure(f"Variance explained, {side}", number(fve), words if poor else None)
    dead = quality.dead_fraction
    measure(f"Silent on rows {quality.rows}", _percent(dead), None)
    measure("Active latents per token, L0", number(quality.l0_mean), None)
    never = run.summary.never_fired / run.summary.dict_size
    words = f"{_percent(never)} of the latents never fired on this text, more than {_percent(_DEAD_MOST)}."
    fired = f"{run.summary.never_fired:,} of {run.summary.dict_size:,}"
    measure("Never fired on this text", fired, words if never > _DEAD_MOST else None)
    for side in ("base", "tuned"):
        n = specific.get(side, 0)
        words = f"Only {n:,} latents are specific to {side}; shares of so few are coarse."
        measure(f"Specific to {side}", f"{n:,}", words if n < _SPECIFIC_LEAST else None)
    unlabelled, uninterpretable, total = _uncategorized(run)
    share = (unlabelled + uninterpretable) / total if total else 0.0
    words = f"{_percent(share)} of the specific latents have no category."
    value = f"{_percent(share)} ({unlabelled:,} unlabelled, {uninterpretable:,} uninterpretable of {total:,})"
    measure("Specific without a category", value, words if share > _UNCATEGORIZED_MOST else None)
    if (seeds := run.summary.stability) is not None:
        share = seeds.exclusive_stable / seeds.exclusive if seeds.exclusive else 1.0
        words = f"Only {_percent(share)} of the latents of one model come back with other seeds."
        value = f"{seeds.exclusive_stable:,} of {seeds.exclusive:,} (of all {seeds.stable:,} of {seeds.observed:,})"
        measure("Of one model, with other seeds too", value, words if share < _STABLE_LEAST else None)
    return {"measures": measures, "warnings": warnings}


def verdict_tables(findings: Findings) -> list[dict[str, Any]]:
    """One table per comparison of `verdict.json`, all on one axis: changes first, the largest gain at the top."""
    file = findings.verdict
    estimates = [of for c in file.comparisons for row in c.rows for of in (row.B, row.V) if of is not None]
    limit = charts.nats_limit(v for of in estimates for v in (of.mean, of.low, of.high))
    tables = []
    for comparison in file.comparisons:
        rows = sorted(comparison.rows, key=lambda row: (row.change == "none", -_mean(row.B), row.category))
        tables.append(
            {
                "comparison": comparison,
                "run": next((i for i, run in enumerate(findings.runs) if [run.name] == comparison.runs), None),
                "axis": charts.forest_axis(limit, "nats per scored token"),
                "rows": [_verdict_row(row, limit) for row in rows],
            }
        )
    return tables


def _mean(of: Tested | None) -> float:
    return 0.0 if of is None or of.mean is None else of.mean


def _verdict_row(row: Verdict, limit: float) -> dict[str, Any]:
    def plot(of: Tested | None) -> Any:
        if of is None:
            return charts.forest(None, None, None, limit, False, unit="nats")
        clear = of.low is not None and of.high is not None and (of.low > 0 or of.high < 0)
        return charts.forest(of.mean, of.low, of.high, limit, clear, unit="nats")

    words = row.verdict if row.change == "none" else f"{_MARKS[row.change]} {row.change}, {row.verdict}"
    return {
        "row": row,
        "words": words if row.reason is None else f"{words}: {row.reason}",
        "state": "clear" if row.verdict == "confirmed" else "spans" if row.change == "none" else "",
        "behaviour": plot(row.B),
        "through": plot(row.V),
    }


def category_tables(findings: Findings) -> list[dict[str, Any]]:
    """One table per comparison, the most gained category first."""
    tables = []
    for comparison in findings.statistics.comparisons:
        rows = [row for row in findings.categories if row["comparison"] == comparison.name]
        rows.sort(key=lambda row: (row["delta_points"] is None, -(row["delta_points"] or 0), row["category"]))
        limit = charts.forest_limit((row["delta_points"], row["points_low"], row["points_high"]) for row in rows)
        tables.append(
            {
                "comparison": comparison,
                "run": next((i for i, run in enumerate(findings.runs) if _is_of(comparison.name, run, findings)), None),
                "axis": charts.forest_axis(limit),
                "rows": [_category_row(row, limit) for row in rows],
                "n_significant": sum(bool(row["significant"]) for row in rows),
            }
        )
    return tables


def planted(findings: Findings) -> list[dict[str, Any]]:
    """One table per comparison: every cell with what was planted and what was found; empty without a truth."""
    pairs = findings.truth.pairs if findings.truth else []
    cells = [change.B for pair in pairs for change in pair.changes if change.B is not None]
    limit = charts.nats_limit(v for of in cells for v in (of.mean, of.low, of.high))
    tables = []
    for pair in pairs:
        rows = []
        for change in pair.changes:
            of = change.B or Behaviour()
            clear = not _spans_zero(of.low, of.high)
            rows.append((change, charts.forest(of.mean, of.low, of.high, limit, clear, unit="nats")))
        tables.append({"run": pair.run, "axis": charts.forest_axis(limit, "nats per scored token"), "rows": rows})
    return tables


def latent_lines(runs: list[Run], kind: str, only_cards: bool = False) -> Iterator[list[str]]:
    """Rows of report/latents.csv, header first: analysis/latents.csv with its labels filled in.

    Args:
        runs: All runs of the report.
        kind: For `triangulated` a first column names the run.
        only_cards: Leave out the latents that have no card.
    """
    lead = kind == "triangulated"
    # the analysis writes tokens as JSON; here they stand last, as text
    columns = [name for name in runs[0].latents.columns if name != "top_tokens"] if runs else []
    yield [*(["run"] if lead else []), *columns, "confidence", "annotator", "top_tokens"]
    for run in runs:
        cards = {card.latent for card in run.cards}
        table = [run.latents.text(name) if name in run.latents.columns else [] for name in columns]
        for latent in range(len(run.latents.rows)):
            if only_cards and latent not in cards:
                continue
            cells = {name: column[latent] if column else "" for name, column in zip(columns, table, strict=True)}
            cells |= {name: csv_cell(cells[name]) for name in LATENT_TEXT}
            confidence = annotator = ""
            if label := run.labels.get(latent):
                cells |= {"label": csv_cell(label.label), "category": csv_cell(label.category)}
                confidence = "" if label.confidence is None else f"{label.confidence:.6g}"
                annotator = csv_cell(label.annotator)
            tokens = csv_cell(" ".join(run.top_tokens[latent]))
            yield [*([csv_cell(run.name)] if lead else []), *cells.values(), confidence, annotator, tokens]


def category_lines(findings: Findings) -> Iterator[list[str]]:
    """Rows of report/categories.csv, header first: compare/categories.csv made safe for a spreadsheet."""
    table = findings.category_table
    yield table.columns
    for row in table.rows:
        yield [csv_cell(cell) if name in CATEGORY_TEXT else cell for name, cell in zip(table.columns, row, strict=True)]


def csv_text(lines: Iterator[list[str]]) -> str:
    """CSV with newline endings."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def summary(findings: Findings) -> dict[str, Any]:
    """The contents of report.json: every number of the page but the latent cards."""
    contents = {
        "schema": 1,
        "title": title(findings),
        "kind": findings.statistics.kind,
        "verdict": findings.verdict.model_dump(by_alias=True, exclude={"schema_"}),
        "specific_latents": findings.statistics.verdict,
        "alpha": findings.statistics.alpha,
        "confidence": findings.statistics.confidence,
        "runs": [
            {
                "name": run.name,
                "base": run.base,
                "tuned": run.tuned,
                "n_tokens": run.summary.n_tokens,
                "dict_size": run.summary.dict_size,
                "classes": run.summary.classes,
                "specific": run.summary.specific,
                "never_fired": run.summary.never_fired,
                "quality": run.summary.quality.model_dump(),
                "thresholds": run.summary.thresholds.model_dump(),
                "stability": run.summary.stability.model_dump() if run.summary.stability else None,
                "delta_norm_histogram": run.summary.delta_norm_histogram.model_dump(),
                "cards": len(run.cards),
                "warnings": trust(run)["warnings"],
            }
            for run in findings.runs
        ],
        "categories": findings.categories,
        "truth": findings.truth.model_dump() if findings.truth else None,
    }
    return _shown(contents)


def _shown(value: Any) -> Any:
    """The same value with all text visible."""
    if isinstance(value, str):
        return visible(value, SENTENCE)
    if isinstance(value, dict):
        return {_shown(name): _shown(item) for name, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{fixed(100 * share, 0 if share in (0, 1) else 1)} %"


def _uncategorized(run: Run) -> tuple[int, int, int]:
    """Specific latents: without a label, uninterpretable, all."""
    specific = [i for i, side in enumerate(run.latents.text("specific")) if side]
    labels = [run.labels.get(i) for i in specific]
    uninterpretable = sum(label is not None and label.category == UNINTERPRETABLE for label in labels)
    return sum(label is None for label in labels), uninterpretable, len(specific)


def _is_of(comparison: str, run: Run, findings: Findings) -> bool:
    """True if a comparison is that within one run, not between two."""
    names = {run.name, f"{run.base}→{run.tuned}", f"base→{run.name}"}
    return len(findings.runs) == 1 or comparison in names


def _spans_zero(low: float | None, high: float | None) -> bool:
    return low is None or high is None or low <= 0 <= high


def _category_row(row: dict[str, Any], limit: float) -> dict[str, Any]:
    low, high = row["points_low"], row["points_high"]
    clear = bool(row["significant"])
    interval = "–" if low is None or high is None else f"{fixed(low, 1, True)} to {fixed(high, 1, True)}"
    mass = None
    if row["mass_a"] is not None and row["mass_b"] is not None:
        mass = 100 * (row["mass_b"] - row["mass_a"])
    return {
        **row,
        "forest": charts.forest(row["delta_points"], low, high, limit, clear),
        "interval": interval,
        "mass_points": mass,
        "state": "clear" if clear else "spans" if _spans_zero(low, high) else "",
    }
