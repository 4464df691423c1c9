"""Reads what the stages before the report have written, and checks it.

A directory of kind `pair` is one run; one of kind `triangulated` holds only `compare/` and names its runs.
Formats are those of the stages that write them; a file that does not fit is refused by name.
"""

import csv
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
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fastdiff import rundir
from fastdiff.errors import InputError
from fastdiff.reporting.schema import (
    Card,
    Example,
    Findings,
    Label,
    Point,
    Run,
    RunName,
    Statistics,
    Summary,
    Table,
    Truth,
)
from fastdiff.results.attribution import DIRECTORY as ATTRIBUTION
from fastdiff.results.verdict import read as read_verdict

T = TypeVar("T", bound=BaseModel)

# a curve is drawn with at most this many points
_CURVE_POINTS = 300

LATENT_TEXT = ("class", "label", "category", "specific")
_LATENT_NUMBERS = (
    *("latent", "delta_norm", "cosine", "nu_error", "nu_reconstruction", "nu_activation"),
    *("norm_base", "norm_tuned", "frequency", "count", "max_activation"),
)
_TOKENS = TypeAdapter(list[str])
_ACTIVATIONS = TypeAdapter(list[Annotated[float, Field(allow_inf_nan=False)]])

CATEGORY_TEXT = ("comparison", "category", "side_a", "side_b")
_CATEGORY_NUMBERS = (
    *("count_a", "total_a", "share_a", "count_b", "total_b", "share_b"),
    *("delta_percent", "percent_low", "percent_high", "delta_points", "points_low", "points_high"),
    *("p", "q", "mass_a", "mass_b", "significant"),
)


def read_findings(directory: Path) -> Findings:
    """Read a run, or the directory that `compare A B` made.

    Raises:
        InputError: A stage has not run (the message names the command), or a file of it does not fit.
    """
    compare = directory / "compare"
    if not (compare / rundir.DONE).exists() and (directory / "crosscoder").exists():
        _require_run(directory)
    stages = {"compare": rundir.require_done(compare, f"fastdiff compare {directory}")}
    if "verdict.json" not in stages["compare"]["outputs"]:
        # of a version that decided by counts of latents alone
        raise InputError(f"{compare}: has no verdict.json; run the same `fastdiff compare` again")
    statistics = _parsed(Statistics, compare / "statistics.json")
    table = _read_csv(compare / "categories.csv", (*CATEGORY_TEXT, *_CATEGORY_NUMBERS))
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
        categories=_category_rows(compare / "categories.csv", table),
        truth=_parsed(Truth, truth_path) if truth_path.exists() else None,
        runs=runs,
        stages=stages,
        commands=_read_manifest(directory)[0],
    )


def _require_run(path: Path) -> dict[str, dict[str, Any]]:
    analysis = rundir.require_done(path / "analysis", f"fastdiff analyze {path}")
    annotated = rundir.require_done(path / "annotate", f"fastdiff annotate {path}")
    if annotated["inputs"] != analysis["outputs"]:
        raise InputError(f"{path / 'annotate'}: labels another analysis; run `fastdiff annotate {path}` again")
    return {"analysis": analysis, "annotate": annotated}


def _read_run(path: Path, name: RunName) -> Run:
    stages = _require_run(path)
    seed = stages["analysis"]["config"].get("train_seed", 0)
    attributed = path / ATTRIBUTION / rundir.DONE
    if attributed.exists():
        stages = {"attribution": rundir.read_json(attributed), **stages}
    trained = path / "crosscoder" / f"seed-{seed}" / rundir.DONE
    if trained.exists():
        stages = {"crosscoder": rundir.read_json(trained), **stages}
        if stages["analysis"]["inputs"]["model"] != stages["crosscoder"]["outputs"]["model.safetensors"]:
            raise InputError(f"{path / 'analysis'}: of another crosscoder; run `fastdiff analyze {path}` again")
    commands, versions = _read_manifest(path)
    latents = _read_latents(path / "analysis" / "latents.csv")
    cards = _read_cards(path / "analysis" / "examples.sqlite")
    unknown = [card.latent for card in cards if not 0 <= card.latent < len(latents.rows)]
    if unknown:
        raise InputError(f"{path / 'analysis' / 'examples.sqlite'}: latent {unknown[0]} is not in latents.csv")
    return Run(
        name=name.name,
        path=path,
        base=name.base,
        tuned=name.tuned,
        summary=_parsed(Summary, path / "analysis" / "summary.json"),
        latents=latents,
        labels=_read_labels(path / "annotate" / "labels.jsonl"),
        cards=cards,
        top_tokens=_top_tokens(path / "analysis" / "latents.csv", latents),
        curves=_read_curves(path / "events.jsonl", seed),
        settings=_read_settings(path / "fastdiff.yaml"),
        stages=stages,
        commands=commands,
        versions=versions,
    )


def _parsed(model: type[T], path: Path) -> T:
    return _validated(model, rundir.read_json(path), path)


def _validated(model: type[T], value: Any, where: object) -> T:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {field}: {first['msg']}; run the stage that wrote it again") from error


def _read_csv(path: Path, wanted: tuple[str, ...]) -> Table:
    try:
        with path.open(encoding="utf-8", newline="") as f:
            table = list(csv.reader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV ({error})") from error
    header = table[0] if table else []
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; run the stage that wrote it again")
    for i, row in enumerate(table[1:], start=2):
        if len(row) != len(header):
            raise InputError(f"{path}: line {i} has {len(row)} cells, the header {len(header)}")
    return Table(header, table[1:])


def _read_latents(path: Path) -> Table:
    latents = _read_csv(path, (*LATENT_TEXT, *_LATENT_NUMBERS))
    # analyses of older versions have no stability
    for name in (*_LATENT_NUMBERS, *(name for name in latents.columns if name == "stability")):
        try:
            latents.numbers(name)
        except ValueError as error:
            raise InputError(f"{path}: column {name}: {error}") from error
    if latents.text("latent") != [str(i) for i in range(len(latents.rows))]:
        raise InputError(f"{path}: row i must be latent i")
    return latents


def _top_tokens(path: Path, latents: Table) -> list[list[str]]:
    """By latent; the column is JSON, and a table without it has none."""
    if "top_tokens" not in latents.columns:
        return [[] for _ in latents.rows]
    try:
        return [_TOKENS.validate_python(json.loads(cell or "[]")) for cell in latents.text("top_tokens")]
    except ValueError as error:
        raise InputError(f"{path}: column top_tokens: {str(error).splitlines()[0]}") from error


def _category_rows(path: Path, table: Table) -> list[dict[str, Any]]:
    """One dict per row: text, and numbers where they are finite."""
    rows = []
    for line, row in enumerate(table.rows, start=2):
        values: dict[str, Any] = dict(zip(table.columns, row, strict=True))
        for name in _CATEGORY_NUMBERS:
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


def _read_labels(path: Path) -> dict[int, Label]:
    labels = (_validated(Label, value, f"{path}: line {i}") for i, value in _json_lines(path))
    return {label.latent: label for label in labels}


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
    """Commands in the order of the stages, each once, and versions. Times of day stay behind."""
    manifest = path / "manifest.json"
    if not manifest.exists():
        return [], {}
    commands: list[str] = []
    versions: dict[str, str] = {}
    for stage, facts in rundir.read_json(manifest)["stages"].items():
        if stage == "report":
            continue
        program, *arguments = facts["command"]
        command = shlex.join([Path(program).name, *arguments])
        if command not in commands:
            commands.append(command)
        versions.update(facts["versions"])
    return commands, versions
