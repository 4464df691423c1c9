"""The comparison stage: what was gained and lost, in one run or between two with the same base.

<dir>/compare/verdict.json        by behaviour and nats; see `fastdiff.results.verdict`
<dir>/compare/categories.csv      by latents that only one model has, a row per comparison and category; see
`fastdiff.comparison.published`
<dir>/compare/seeds.csv           their counts in the crosscoder of each seed
<dir>/compare/statistics.json     their sides, totals, sentences and method
"""

import os
from pathlib import Path
from typing import Any

from fastdiff import rundir
from fastdiff.comparison.activations import activation_rows
from fastdiff.comparison.evidence import attribution_inputs, run_evidence, verdict_file
from fastdiff.comparison.published import write_published_view
from fastdiff.config import CompareConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.progress import SILENT, Progress
from fastdiff.results.analysis import read_analysis_summary
from fastdiff.results.labels import require_labelled
from fastdiff.results.statistics import BY_SEED, CATEGORIES, STATISTICS, STATISTICS_SCHEMA
from fastdiff.results.verdict import SCHEMA as VERDICT_SCHEMA
from fastdiff.results.verdict import write as write_verdict

OUTPUTS = [CATEGORIES, BY_SEED, STATISTICS, "verdict.json"]


def compare(
    runs: list[Path],
    out: Path,
    config: CompareConfig,
    progress: Progress = SILENT,
    *,
    names: list[str] | None = None,
) -> Path:
    """Compare one run's two models, or two runs that share a base.

    Args:
        runs: One or two run directories that `annotate` has finished.
        out: The run itself for one run; for two a directory of its own.
        config: How.
        progress: Where to report.
        names: What to call the runs; their directories' names otherwise.

    Returns:
        `<out>/compare`.

    Raises:
        InputError: A run is missing a stage, or its labels belong to another analysis.
        OptionError: More than two runs, or two with different base models; the null run is one of them; `out` is a run,
            a store or a stage of a run.
        LockedError: Another process writes to `out`.
    """
    if len(runs) not in (1, 2):
        raise OptionError(f"compare takes one run or two, got {len(runs)}")
    if config.null_run is not None and Path(config.null_run).resolve() in [run.resolve() for run in runs]:
        raise OptionError(
            f"--null {config.null_run}: is compared itself; give a run whose models differ by nothing that counts"
        )
    if len(runs) == 2:
        _check_own_directory(out)
    names = names or _names(runs)
    paths = [os.path.relpath(run.resolve(), out.resolve()) for run in runs]
    target = out / "compare"
    settings: dict[str, Any] = {**config.model_dump(), "names": names, "paths": paths}
    with rundir.locked(out) as lock:
        inputs: dict[str, str] = {}
        for name, run in zip(names, runs, strict=True):
            inputs |= {f"{name}/{file}": sha for file, sha in (_inputs(run) | attribution_inputs(run)).items()}
        if config.null_run is not None:
            of_null = _null_inputs(config.null_run)
            if of_null in [attribution_inputs(run) for run in runs]:
                raise OptionError(f"--null {config.null_run}: is a copy of a run that is compared; give another run")
            inputs |= {f"--null/{file}": sha for file, sha in of_null.items()}
        schemas = {STATISTICS: STATISTICS_SCHEMA, "verdict.json": VERDICT_SCHEMA}
        own = ("names", "paths")
        stage = lock.stage(target, "compare", settings, inputs, OUTPUTS, schemas=schemas, no_options=own)
        if stage.up_to_date():
            progress.say(f"compare: {target} is up to date")
            return target
        facts = [_facts(run) for run in runs]
        if len({fact["base_identity"] for fact in facts}) > 1:
            raise OptionError(
                f"{names[0]} and {names[1]} have different base models, layers or hooks "
                f"({facts[0]['base']}, {facts[1]['base']}); a triangle needs them in common"
            )
        null = None
        if config.null_run is not None:
            null = run_evidence(Path(config.null_run), name=config.null_run, base="", tuned="")
        verdict = verdict_file(
            [
                run_evidence(
                    run,
                    name=name,
                    base=fact["base"],
                    tuned=fact["tuned"],
                    activations=activation_rows(run, alpha=config.alpha),
                )
                for name, run, fact in zip(names, runs, facts, strict=True)
            ],
            config,
            null,
        )
        with stage:
            described = [
                {"name": name, "path": path, "base": fact["base"], "tuned": fact["tuned"]}
                for name, path, fact in zip(names, paths, facts, strict=True)
            ]
            write_published_view(target, runs, described, config)
            write_verdict(target / "verdict.json", verdict)
        for comparison in verdict.comparisons:
            for sentence in comparison.sentences:
                progress.say(f"compare: {comparison.name}: {sentence}")
    return target


def _check_own_directory(out: Path) -> None:
    """That a comparison of two runs takes the place of nothing else.

    Raises:
        OptionError: It would.
    """
    a_run = dict.fromkeys(("crosscoder", "analysis"), "a run")
    for file, what in (a_run | {"store.json": "a store", rundir.DONE: "a stage of a run"}).items():
        if (out / file).exists():
            raise OptionError(f"{out}: is {what}; choose a directory of its own for the comparison")


def _inputs(run: Path) -> dict[str, str]:
    """Hashes of what is compared, once it is sure that the labels are of this very analysis."""
    return {
        f"{name}/{file}": sha for name, done in require_labelled(run).items() for file, sha in done["outputs"].items()
    }


def _null_inputs(null: str) -> dict[str, str]:
    """Hashes of the A/A run's attribution.

    Raises:
        InputError: It has none.
    """
    run = Path(null)
    if not null or not (run / "crosscoder").is_dir():
        without = "give another, or compare without one by --set null_run=null"
        raise InputError(f"--null {null!r}: no run that `fastdiff train` made; {without}")
    found = attribution_inputs(run)
    if not found:
        raise InputError(f"--null {null}: has no attribution; run `fastdiff attribute {null}` first")
    return found


def _names(runs: list[Path]) -> list[str]:
    names = [run.resolve().name for run in runs]
    # the comparisons between two runs have these names
    names = [f"{name} (run)" if name in ("gained", "lost") else name for name in names]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def _facts(run: Path) -> dict[str, str]:
    summary = read_analysis_summary(run)
    base, tuned = summary["models"]
    names = [Path(model["name"]).name for model in (base, tuned)]
    if names[0] == names[1]:
        names = [f"{names[0]} (base)", f"{names[1]} (tuned)"]
    return {
        "base": names[0],
        "tuned": names[1],
        "base_identity": _identity(base, run),
    }


def _identity(base: dict[str, Any], run: Path) -> str:
    """Which activations of which model: runs with the same one can be compared through it."""
    weights = base.get("weights_sha256") or base.get("revision")
    if weights is None:
        # a store that does not say is only the same as itself
        weights = rundir.read_mark(run / "analysis", f"fastdiff analyze {run}")["inputs"]["store"]
    return f"{weights} {base.get('layer')} {base.get('hook')}"
