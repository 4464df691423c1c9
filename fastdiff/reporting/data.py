"""Reads what the stages before the report have written, and checks it.

A directory of kind `pair` is one run; one of kind `triangulated` holds only `compare/` and names its runs.
Formats are those of the stages that write them; a file that does not fit is refused by name.
"""

import json
import math
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import numpy as np
import yaml
from pydantic import BaseModel, Field, TypeAdapter

from fastdiff import rundir
from fastdiff.errors import InputError
from fastdiff.reporting.schema import (
    Card,
    Example,
    Findings,
    Point,
    Run,
    Summary,
    Truth,
)
from fastdiff.results.analysis import SUMMARY, read_analysis_summary, read_latents, top_tokens
from fastdiff.results.attribution import DIRECTORY as ATTRIBUTION
from fastdiff.results.labels import read_labels, require_labelled
from fastdiff.results.nats import read_latent_nats
from fastdiff.results.statistics import (
    CATEGORIES,
    CATEGORY_NUMBERS,
    CATEGORY_TEXT,
    TRUTH_SCHEMA,
    ComparedRun,
    read_statistics,
)
from fastdiff.results.table import Table, read_table
from fastdiff.results.validation import validated
from fastdiff.results.verdict import read as read_verdict

T = TypeVar("T", bound=BaseModel)

# a curve is drawn with at most this many points
_CURVE_POINTS = 300

_TOKENS = TypeAdapter(list[str])
_ACTIVATIONS = TypeAdapter(list[Annotated[float, Field(allow_inf_nan=False)]])


def read_findings(directory: Path) -> Findings:
    """Read a run, or the directory that `compare A B` made.

    Raises:
        InputError: A stage has not run (the message names the command), or a file of it does not fit.
    """
    compare = directory / "compare"
    if not (compare / rundir.DONE).exists() and (directory / "crosscoder").exists():
        require_labelled(directory)
    stages = {"compare": rundir.require_done(compare, f"fastdiff compare {directory}")}
    if "verdict.json" not in stages["compare"]["outputs"]:
        # of a version that decided by counts of latents alone
        raise InputError(f"{compare}: has no verdict.json; run the same `fastdiff compare` again")
    statistics = read_statistics(compare)
    table = read_table(compare / CATEGORIES, (*CATEGORY_TEXT, *CATEGORY_NUMBERS))
    runs = [_read_run(directory / name.path, name) for name in statistics.runs]
    compared = {
        f"{run.name}/{stage}/{file}": sha
        for run in runs
        for stage in ("analysis", "annotate")
        for file, sha in run.stages[stage]["outputs"].items()
    }
    compared |= {
        f"{run.name}/attribution/{file}": sha
        for run in runs
        if "attribution" in run.stages
        for file, sha in run.stages["attribution"]["outputs"].items()
    }
    read = {name: sha for name, sha in stages["compare"]["inputs"].items() if not name.startswith("--null/")}
    if read != compared:
        raise InputError(f"{compare}: compares an older analysis; run the same `fastdiff compare` again")
    truth_path = compare / "truth.json"
    return Findings(
        path=directory,
        statistics=statistics,
        verdict=read_verdict(compare / "verdict.json"),
        category_table=table,
        categories=_category_rows(compare / CATEGORIES, table),
        truth=_parsed(Truth, truth_path, TRUTH_SCHEMA, "fastdiff demo") if truth_path.exists() else None,
        runs=runs,
        stages=stages,
        commands=_read_manifest(directory)[0],
    )


def _read_run(path: Path, name: ComparedRun) -> Run:
    stages = require_labelled(path)
    seed = stages["analysis"]["config"].get("train_seed", 0)
    attributed = path / ATTRIBUTION
    if (attributed / rundir.DONE).exists():
        stages = {"attribution": rundir.read_mark(attributed, f"fastdiff attribute {path}"), **stages}
    trained = path / "crosscoder" / f"seed-{seed}"
    if (trained / rundir.DONE).exists():
        stages = {"crosscoder": rundir.read_mark(trained, f"fastdiff train STORE -o {path}"), **stages}
        if stages["analysis"]["inputs"].get("model") != stages["crosscoder"]["outputs"].get("model.safetensors"):
            raise InputError(f"{path / 'analysis'}: of another crosscoder; run `fastdiff analyze {path}` again")
    commands, versions = _read_manifest(path)
    latents = read_latents(path)
    cards = _read_cards(path / "analysis" / "examples.sqlite")
    unknown = [card.latent for card in cards if not 0 <= card.latent < len(latents.rows)]
    if unknown:
        raise InputError(f"{path / 'analysis' / 'examples.sqlite'}: latent {unknown[0]} is not in latents.csv")
    nats, _ = read_latent_nats(path, seed, stages["analysis"]["inputs"].get("model", ""))
    if nats is not None and nats.nats.shape[1] != len(latents.rows):
        raise InputError(
            f"{path / ATTRIBUTION}: not of the latents in latents.csv; run `fastdiff attribute {path}` again"
        )
    return Run(
        name=name.name,
        path=path,
        base=name.base,
        tuned=name.tuned,
        summary=_validated(Summary, read_analysis_summary(path), path / "analysis" / SUMMARY),
        latents=latents,
        labels=read_labels(path),
        cards=cards,
        seed=seed,
        nats=nats,
        top_tokens=top_tokens(path, latents),
        curves=_read_curves(path / "events.jsonl", seed),
        settings=_read_settings(path / "fastdiff.yaml"),
        stages=stages,
        commands=commands,
        versions=versions,
    )


def _parsed(model: type[T], path: Path, schema: int, command: str) -> T:
    return _validated(model, rundir.read_json(path, schema, command), path)


def _validated(model: type[T], value: Any, where: object) -> T:
    return validated(model, value, where, "run the stage that wrote it again")


def _category_rows(path: Path, table: Table) -> list[dict[str, Any]]:
    """One dict per row: text, and numbers where they are finite."""
    rows = []
    for line, row in enumerate(table.rows, start=2):
        values: dict[str, Any] = dict(zip(table.columns, row, strict=True))
        for name in CATEGORY_NUMBERS:
            try:
                number = float(values[name]) if values[name] else math.nan
            except ValueError as error:
                raise InputError(f"{path}: line {line}, column {name}: {error}") from error
            values[name] = number if math.isfinite(number) else None
        rows.append(values)
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                yield i, json.loads(line)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON lines ({error})") from error


def _read_cards(path: Path) -> list[Card]:
    """Cards by latent; the order within one is by rank."""
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        try:
            why = dict(connection.execute("SELECT latent, why FROM latents ORDER BY latent"))
            rows = connection.execute(
                "SELECT latent, sequence_id, position, dataset, category, activation, peak, tokens,"
                " activations FROM examples ORDER BY latent, rank"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"{path}: not readable ({error}); run `fastdiff analyze` again") from error
    cards = {latent: Card(latent, reason, []) for latent, reason in why.items()}
    for latent, *fields in rows:
        if latent in cards:
            cards[latent].examples.append(_example(path, latent, fields))
    return list(cards.values())


def _example(path: Path, latent: int, fields: list[Any]) -> Example:
    sequence_id, position, dataset, category, activation, peak, tokens, activations = fields
    try:
        shown = _TOKENS.validate_python(json.loads(tokens))
        values = _ACTIVATIONS.validate_python(json.loads(activations))
        if len(shown) != len(values) or not 0 <= peak < len(shown):
            raise ValueError(f"{len(shown)} tokens, {len(values)} activations, peak {peak}")
    except (TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: an example of latent {latent} does not fit ({first})") from error
    return Example(
        int(sequence_id), int(position), dataset or "", category or "", float(activation), peak, shown, values
    )


def _read_curves(path: Path, seed: int) -> list[Point]:
    """Training's lines: the last one of each step (a resumed run repeats some), thinned evenly."""
    if not path.exists():
        return []
    points: dict[int, Point] = {}
    for i, event in _json_lines(path):
        if not isinstance(event, dict) or event.get("stage") != "train" or "step" not in event:
            continue
        if event.get("seed", seed) == seed:
            point = _validated(Point, event, f"{path}: line {i}")
            points[point.step] = point
    steps = sorted(points)
    if len(steps) > _CURVE_POINTS:
        picked = np.linspace(0, len(steps) - 1, _CURVE_POINTS).round().astype(int)
        steps = [steps[i] for i in picked]
    return [points[step] for step in steps]


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: one section per stage expected, found {type(settings).__name__}")
    return {stage: values for stage, values in settings.items() if stage != "report"}


def _read_manifest(path: Path) -> tuple[list[str], dict[str, str]]:
    """Commands in the order of the stages, each once, and versions. Times of day stay behind.

    What was called from Python has no command.
    """
    manifest = path / "manifest.json"
    if not manifest.exists():
        return [], {}
    commands: list[str] = []
    versions: dict[str, str] = {}
    for stage, facts in rundir.read_json(manifest, rundir.MANIFEST_SCHEMA)["stages"].items():
        if stage == "report":
            continue
        program, *arguments = facts["command"]
        command = shlex.join([Path(program).name, *arguments])
        if Path(program).name == "fastdiff" and command not in commands:
            commands.append(command)
        versions.update(facts["versions"])
    return commands, versions
