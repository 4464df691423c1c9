"""Builds the report of a run, or of a comparison between runs: one HTML file that needs nothing else.

    report/report.html      opens from disk, asks the network for nothing
    report/report.json      every number of the page but the latent cards
    report/latents.csv      analysis/latents.csv with labels and categories filled in
    report/categories.csv   the category table

All text that comes from data is untrusted. The template escapes it, text.py shows what cannot be seen, cards
are made by the script with textContent from one gzip+base64 island, and a content security policy that
allows the page's own script and style by hash is the second net.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import fastdiff
from fastdiff import rundir
from fastdiff.progress import SILENT, Progress
from fastdiff.reporting import charts, tables
from fastdiff.reporting.data import read_findings
from fastdiff.reporting.island import encode, island
from fastdiff.reporting.schema import Findings, Run
from fastdiff.reporting.text import SENTENCE, fixed, number, probability, visible
from fastdiff.results.verdict import meanings

_ASSETS = ("report.html.j2", "report.css", "report.js")
_OUTPUTS = ["report.html", "report.json", "latents.csv", "categories.csv"]

# an embedded latents.csv heavier than this (base64 characters) keeps only the latents with cards: about
# 50,000 latents fit, and the page stays below 10 MB
_EMBEDDED_TABLE = 4_000_000


def build_report(run: Path, progress: Progress = SILENT) -> Path:
    """Write the report of a directory, or leave it if it is up to date.

    Args:
        run: A run directory, or the directory that `compare A B` made.
        progress: Where to say what is written.

    Returns:
        Path of report.html.

    Raises:
        InputError: A stage has not run, or a file does not fit its format.
        LockedError: Another process is writing here.
    """
    assets = {name: resources.files("fastdiff.reporting").joinpath(name).read_text("utf-8") for name in _ASSETS}
    directory = run / "report"
    page = directory / "report.html"
    with rundir.locked(run) as lock:
        findings = read_findings(run)
        stage = lock.stage(directory, "report", {}, _inputs(findings, assets), _OUTPUTS)
        if stage.up_to_date():
            progress.say(f"report: {page} is up to date")
            return page
        with stage:
            html, files = _render(findings, assets)
            for name, text in files.items():
                rundir.write_text(directory / name, text)
            rundir.write_text(page, html)
    progress.say(f"report: {page} ({len(html) / 1e6:.1f} MB)")
    return page


def _inputs(findings: Findings, assets: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all that the page depends on: stages, logs without their times, template and version."""
    inputs = {"fastdiff": rundir.sha256_text(fastdiff.__version__)}
    inputs |= {name: rundir.sha256_text(text) for name, text in assets.items()}
    inputs["compare"] = _sha256([findings.stages, findings.commands, findings.category_table.rows])
    inputs["trust"] = _sha256([of.model_dump() for of in tables.trusted(findings)])
    inputs["truth"] = _sha256(findings.truth.model_dump() if findings.truth else None)
    for i, run in enumerate(findings.runs):
        curves = [point.model_dump() for point in run.curves]
        inputs[f"run {i}"] = _sha256([run.stages, run.commands, run.versions, run.settings, curves])
    return inputs


def _sha256(value: Any) -> str:
    return rundir.sha256_text(ascii(rundir.canonical_json(value)))


def _render(findings: Findings, assets: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The page, and the other files by name."""
    kind = findings.statistics.kind
    files = {
        "report.json": _json(tables.summary(findings)),
        "latents.csv": tables.csv_text(tables.latent_lines(findings.runs, kind)),
        "categories.csv": tables.csv_text(tables.category_lines(findings)),
    }
    embedded = {name: encode(text) for name, text in files.items()}
    whole = len(embedded["latents.csv"]) <= _EMBEDDED_TABLE
    if not whole:
        lines = tables.latent_lines(findings.runs, kind, only_cards=True)
        embedded["latents.csv"] = encode(tables.csv_text(lines))
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "paragraph": _paragraph,
        "number": number,
        "fixed": fixed,
        "probability": probability,
    }
    html = environment.from_string(assets["report.html.j2"]).render(
        css=Markup(assets["report.css"]),
        js=Markup(assets["report.js"]),
        policy=Markup(_policy(assets)),
        title=tables.title(findings),
        findings=findings,
        statistics=findings.statistics,
        runs=[_run_context(i, run) for i, run in enumerate(findings.runs)],
        trusted=tables.trusted(findings),
        verdicts=tables.verdict_tables(findings),
        meanings=meanings(findings.verdict),
        comparisons=tables.category_tables(findings),
        planted=tables.planted(findings),
        n_cards=sum(len(run.cards) for run in findings.runs),
        n_examples=sum(len(card.examples) for run in findings.runs for card in run.cards),
        island=Markup(encode(island(findings.runs, tables.latents_of_rows(findings)))),
        embedded={name: Markup(text) for name, text in embedded.items()},
        whole=whole,
        version=fastdiff.__version__,
    )
    return html, files


def _run_context(i: int, run: Run) -> dict[str, Any]:
    return {
        "run": run,
        "facts": tables.facts(run),
        "measures": tables.measures(run),
        "notes": tables.count_notes(run),
        "histogram": charts.histogram(run.summary.delta_norm_histogram),
        "scatter": charts.scatter(run, i),
        "curves": charts.curves(run.curves),
    }


def _policy(assets: Mapping[str, str]) -> str:
    """Only the page's own script and style may act, known by their hashes."""
    script, style = (
        base64.b64encode(hashlib.sha256(assets[name].encode()).digest()).decode("ascii")
        for name in ("report.js", "report.css")
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _finalize(value: Any) -> Any:
    """What every expression of the template goes through before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _paragraph(text: str) -> Markup:
    """Text that may be longer than a name."""
    return escape(visible(text, SENTENCE))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
