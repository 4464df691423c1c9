"""What the sections of the page say, as plain dictionaries for the template and for report.json."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from fastdiff.reporting import charts
from fastdiff.reporting.rows import RowLatent, row_href, row_latents
from fastdiff.reporting.rows import facts as row_facts
from fastdiff.reporting.schema import Behaviour, Findings, Run
from fastdiff.reporting.text import SENTENCE, csv_cell, fixed, number, short_name, visible
from fastdiff.results.analysis import LATENT_TEXT
from fastdiff.results.labels import UNINTERPRETABLE
from fastdiff.results.statistics import CATEGORY_TEXT
from fastdiff.results.trust import Trusted, compared
from fastdiff.results.verdict import Tested, Verdict, words

# below these counts of specific latents say little
_SPECIFIC_LEAST = 30
_UNCATEGORIZED_MOST = 0.5
_STABLE_LEAST = 0.5

_MARKS = {"gained": "▲", "lost": "▼"}


def title(findings: Findings) -> str:
    """The pair, or all pairs, in short names: base → instruct, simpo."""
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
    precisions = list(dict.fromkeys(str(model["dtype"]) for model in run.summary.models if model.get("dtype")))
    hooks = dict.fromkeys(str(model["hook"]) for model in run.summary.models if model.get("hook") is not None)
    return [
        ("Base model", run.base),
        ("Tuned model", run.tuned),
        ("Layer", ", ".join(layers) or "–"),
        ("Hook", ", ".join(hooks) or "–"),
        ("Tokens analysed", f"{run.summary.n_tokens:,}"),
        ("Dictionary size", f"{run.summary.dict_size:,} latents"),
        *([("Precision of the models", _precision(precisions))] if precisions else []),
        *([("Active per token in training, k", f"{run.summary.k:,}")] if run.summary.k is not None else []),
    ]


def _precision(names: list[str]) -> str:
    """What the models ran in. Against float32 bfloat16 makes 0.032 % on SmolLM2-135M, 0.016 % on a small Gemma 2."""
    floor = ", whose rounding alone makes 0.02 to 0.03 % of the variance" if "bfloat16" in names else ""
    return " and ".join(names) + floor


def trusted(findings: Findings) -> list[Trusted]:
    """The checks of every comparison.

    Raises:
        InputError: A file that they read is damaged.
    """
    return compared({run.name: run.path for run in findings.runs}, findings.verdict, by_name=True)


def measures(run: Run) -> list[tuple[str, str]]:
    """How well the crosscoder reconstructs, and how its latents behave; how good that is, `results.trust` says."""
    quality, specific = run.summary.quality, run.summary.specific
    found = [
        (f"Variance explained, {side}", number(quality.fve[i] if i < len(quality.fve) else None))
        for i, side in enumerate(("base", "tuned"))
    ]
    found += [
        (f"Silent on rows {quality.rows}", _percent(quality.silent_fraction)),
        ("Active per token on this text, L0", number(quality.l0_mean)),
        ("Fired nowhere in this text", f"{run.summary.never_fired:,} of {run.summary.dict_size:,} latents"),
        *((f"Specific to {side}", f"{specific.get(side, 0):,}") for side in ("base", "tuned")),
    ]
    unlabelled, uninterpretable, total = _uncategorized(run)
    share = _percent((unlabelled + uninterpretable) / total if total else 0.0)
    value = f"{share} of {total:,}: {unlabelled:,} without a label, {uninterpretable:,} in which no one stands out"
    found.append(("Specific without a category", value))
    if (seeds := run.summary.stability) is not None:
        for of, some, all_ in (
            ("Latents of one model", seeds.exclusive_stable, seeds.exclusive),
            ("All latents", seeds.stable, seeds.observed),
        ):
            found.append((f"{of} that other seeds have too", f"{some:,} of {all_:,}" if all_ else "there are none"))
    return found


def count_notes(run: Run) -> list[str]:
    """What speaks against reading much into the counts of specific latents."""
    notes = []
    for side in ("base", "tuned"):
        if (n := run.summary.specific.get(side, 0)) < _SPECIFIC_LEAST:
            few = f"Only {n:,} latents are specific to {side}; shares of so few are coarse."
            notes.append(few if n else f"No latent is specific to {side}, so there are no shares to compare.")
    unlabelled, uninterpretable, total = _uncategorized(run)
    share = (unlabelled + uninterpretable) / total if total else 0.0
    if share > _UNCATEGORIZED_MOST:
        notes.append(f"{_percent(share)} of the specific latents have no category.")
    if (seeds := run.summary.stability) is not None and seeds.exclusive:
        share = seeds.exclusive_stable / seeds.exclusive
        if share < _STABLE_LEAST:
            notes.append(f"Only {_percent(share)} of the latents of one model come back with other seeds.")
    return notes


def verdict_tables(findings: Findings) -> list[dict[str, Any]]:
    """One table per comparison of `verdict.json`, all on one axis: changes first, the largest gain at the top."""
    file = findings.verdict
    limit = scale([row for c in file.comparisons for row in c.rows])
    latents = [row_latents(findings, i) for i in range(len(findings.runs))]
    tables = []
    for comparison in file.comparisons:
        run = next((i for i, run in enumerate(findings.runs) if [run.name] == comparison.runs), None)
        shown = latents if run is None else latents[run : run + 1]
        rows = sorted(comparison.rows, key=lambda row: (row.change == "none", -_mean(row.B), row.category))
        tables.append(
            {
                "comparison": comparison,
                "run": run,
                "axis": charts.forest_axis(limit, "nats per scored token"),
                "rows": [
                    {
                        **_verdict_row(row, limit),
                        "href": row_href(findings, row.category, run),
                        "latents": [latent for of in shown for latent in of.get(row.category, [])],
                    }
                    for row in rows
                ],
                "held": _held(comparison.rows),
                "note": _note(findings, run, [one for of in shown for row in of.values() for one in row]),
            }
        )
    return tables


def scale(rows: list[Verdict]) -> float:
    """Nats to which the axes reach. What neither model has stands on the edge, or it would squeeze all other rows."""
    shown = [row for row in rows if row.verdict != "neither has it"] or rows
    estimates = [of for row in shown for of in (row.B, row.V) if of is not None]
    return charts.nats_limit(v for of in estimates for v in (of.mean, of.low, of.high))


def _held(rows: list[Verdict]) -> str:
    """How much of the confirmed changes the layer and the latents hold; empty where nothing is confirmed."""
    means = [
        (row.B.mean, row.L.mean, row.V.mean) for row in rows if row.verdict == "confirmed" and row.B and row.L and row.V
    ]
    layer = [part / whole for whole, part, _ in means if whole and part]
    latents = [part / whole for _, whole, part in means if whole and part]
    if not layer or not latents:
        return ""
    return (
        f"Of the confirmed changes {_span(layer)} comes about up to this layer (later layers may add to it or take "
        f"from it), and {_span(latents)} of that runs through the latents. The rest is in what the crosscoder does not "
        "reconstruct, and no latent stands for it."
    )


def _span(shares: list[float]) -> str:
    low, high = (f"{100 * share:.0f} %" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _note(findings: Findings, run: int | None, latents: list[RowLatent]) -> str:
    """Which crosscoder a table's latents are of, and what to do where they have no contexts."""
    runs = findings.runs if run is None else [findings.runs[run]]
    seeds = ", ".join(dict.fromkeys(str(of.seed) for of in runs))
    said = f"The latents are those of crosscoder seed {seeds}, which was analysed." if latents else ""
    without = sorted({one.run for one in latents if not one.has_card})
    for i in without:
        path = findings.runs[i].path
        said += f" Some have no contexts, since the nats are newer: run fastdiff analyze {path} again."
    return said


def latents_of_rows(findings: Findings) -> list[dict[str, list[int]]]:
    """Of each run the latents of each category's row, most nats first, as the page's script takes them."""
    runs = range(len(findings.runs))
    return [{name: [one.latent for one in row] for name, row in row_latents(findings, i).items()} for i in runs]


def _mean(of: Tested | None) -> float:
    return 0.0 if of is None or of.mean is None else of.mean


def _verdict_row(row: Verdict, limit: float) -> dict[str, Any]:
    def plot(of: Tested | None) -> Any:
        if of is None:
            return charts.forest(None, None, None, limit, False, unit="nats")
        clear = of.low is not None and of.high is not None and (of.low > 0 or of.high < 0)
        return charts.forest(of.mean, of.low, of.high, limit, clear, unit="nats")

    return {
        "row": row,
        "words": " ".join(filter(None, (_MARKS.get(row.change), words(row)))),
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
                "run": next((i for i, run in enumerate(findings.runs) if [run.name] == comparison.runs), None),
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
        "trust": [{**of.model_dump(), "state": of.state} for of in trusted(findings)],
        "row_latents": row_facts(findings),
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
                "count_notes": count_notes(run),
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
