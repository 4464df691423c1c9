"""From the files of `fastdiff attribute` to `compare/verdict.json`: one comparison per run, and one between two runs.

A run whose models could not be run again, or on which `fastdiff attribute` has not been run, is "not checked": its rows
say at most to which model the latents lean, never gained or lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdiff import rundir
from fastdiff.comparison.verdict import (
    MIN_DOCUMENTS,
    CategoryEvidence,
    decide,
    evidence,
    paired,
    sentences,
    tau_from_null,
)
from fastdiff.config import CompareConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.results.attribution import DIRECTORY, Attribution, Summary, read_attribution
from fastdiff.results.verdict import SCHEMA, Comparison, TauFrom, Verdict, VerdictFile

# nats per token by which one model's cross entropy of a text may differ between two runs, which may round otherwise
_SAME_BASE = 0.02


@dataclass(frozen=True)
class RunEvidence:
    """What `fastdiff attribute` found of one run.

    Attributes:
        name: What the run is called.
        base: Name of its base model.
        tuned: Name of its tuned model.
        summary: The stage's summary; None if the stage has not run.
        categories: Evidence by category; empty if not checked.
        activations: Rows with what the activations alone say; empty for a null run.
        reason: Why it is not checked; None if it is.
        remedy: What to do about that.
    """

    name: str
    base: str
    tuned: str
    summary: Summary | None
    categories: list[CategoryEvidence]
    activations: list[Verdict]
    reason: str | None
    remedy: str | None


def attribution_inputs(run: Path) -> dict[str, str]:
    """Hashes of the attribution's files by name; empty if `fastdiff attribute` has not been run.

    Raises:
        InputError: One of them is gone or changed, or they are of other crosscoders than the run has now.
    """
    directory = run / DIRECTORY
    if not (directory / rundir.DONE).exists():
        return {}
    done = rundir.require_done(directory, f"fastdiff attribute {run}")
    for name, sha256 in done["inputs"].items():
        trained = run / "crosscoder" / name
        if not (trained / rundir.DONE).exists():
            continue
        outputs = rundir.read_mark(trained, f"fastdiff train STORE -o {run}")["outputs"]
        if outputs.get("model.safetensors") != sha256:
            raise InputError(f"{directory}: of another crosscoder {name}; run `fastdiff attribute {run}` again")
    return {f"{DIRECTORY}/{name}": sha256 for name, sha256 in done["outputs"].items()}


def run_evidence(run: Path, *, name: str, base: str, tuned: str, activations: Sequence[Verdict] = ()) -> RunEvidence:
    """Read what `fastdiff attribute` found of a run.

    Args:
        run: The run directory.
        name: What to call it.
        base: Name of its base model.
        tuned: Name of its tuned model.
        activations: Rows with lean and norm ratio of each category.

    Raises:
        InputError: A file of it is damaged.
    """
    if not (run / DIRECTORY / rundir.DONE).exists():
        why, cure = "the models have not been run again, so nothing is known of behaviour", f"fastdiff attribute {run}"
        return RunEvidence(name, base, tuned, None, [], list(activations), why, cure)
    found = read_attribution(run / DIRECTORY)
    summary = found.summary
    if summary.state == "not checked":
        return RunEvidence(name, base, tuned, summary, [], list(activations), summary.reason, summary.remedy)
    categories = _categories(found, {row.category: row for row in activations})
    return RunEvidence(name, base, tuned, summary, categories, list(activations), None, None)


def _categories(found: Attribution, activations: Mapping[str, Verdict]) -> list[CategoryEvidence]:
    """Evidence of every category of an attribution that was checked."""
    table, nats, summary = found.documents, found.nats, found.summary
    assert table is not None and nats is not None, "a checked attribution has tables"
    traced_category = table.category[table.has_nats]
    categories = []
    for code, name in enumerate(summary.categories):
        mine = table.category == code
        traced = mine & table.has_nats
        own = nats[:, traced_category == code]
        categories.append(
            evidence(
                name,
                table.ce[mine],
                table.layer[traced],
                table.latents[:, traced],
                table.offset[:, traced],
                summary.unigram_entropy[name],
                table.text[mine],
                table.text[traced],
                norm_ratio=None if (row := activations.get(name)) is None else row.norm_ratio,
                lean=None if row is None else row.lean,
                seeds=summary.seeds,
                latent_nats=own.mean(axis=1, dtype=np.float64) if own.shape[1] else None,
            )
        )
    return categories


def verdict_file(runs: Sequence[RunEvidence], config: CompareConfig, null: RunEvidence | None) -> VerdictFile:
    """Decide every comparison: each run's own, and the second run against the first where there are two.

    Args:
        runs: One run or two with a common base.
        config: `tau`, `alpha` and `confidence`.
        null: An A/A run, whose models differ by nothing that counts; it raises τ to what it shows.

    Raises:
        InputError: The null run is not checked, or shows nothing.
        OptionError: The null run has another base model, layer or hook, or scores other tokens; or two runs have no
            scored document in common, or score different tokens.
    """
    tau, tau_from = config.tau, None
    if null is not None:
        if null.reason is not None:
            raise InputError(f"--null {config.null_run}: not checked ({null.reason}); {null.remedy}")
        for run in runs:
            if why := _unlike(run, null):
                raise OptionError(f"--null {config.null_run}: {why} than {run.name}; give a run of the same kind")
        tau, largest = tau_from_null(null.categories, config.tau)
        if largest is None:
            raise InputError(
                f"--null {config.null_run}: no category that either model masters has {MIN_DOCUMENTS} documents, so it "
                f"shows nothing; run `fastdiff attribute {config.null_run}` with more --documents, or on other text"
            )
        if largest == 0:
            raise InputError(
                f"--null {config.null_run}: its two models behave exactly alike, so it bounds nothing; "
                "give a pair of which one was trained further on its own data"
            )
        tau_from = TauFrom(run=null.name, largest=largest)
    comparisons = [
        _decided(
            run.categories, run, config, tau, name="base→tuned" if len(runs) == 1 else run.name, kind="pair", runs=[run]
        )
        for run in runs
    ]
    if len(runs) == 2:
        comparisons.append(_difference(runs[0], runs[1], config, tau))
    return VerdictFile.model_validate(
        {
            "schema": SCHEMA,
            "tau": tau,
            "tau_from": tau_from,
            "alpha": config.alpha,
            "confidence": config.confidence,
            "comparisons": comparisons,
        }
    )


def _unlike(run: RunEvidence, null: RunEvidence) -> str | None:
    """In what a null run differs from one that it is to be held against; None if in nothing, as far as is known."""
    if run.summary is None or null.summary is None or run.reason is not None:
        return None
    other = {"layer": "reads another layer", "hook": "reads another hook", "scored": "scores other tokens"}
    for name, words in other.items():
        if getattr(run.summary, name) != getattr(null.summary, name):
            return words
    # the same base model predicts the same text alike
    of_run, of_null = (
        {int(text): ce for item in one.categories for text, ce in zip(item.text, item.base_ce, strict=True)}
        for one in (run, null)
    )
    differences = [abs(ce - of_run[text]) for text, ce in of_null.items() if text in of_run]
    return "has another base model" if differences and np.median(differences) > _SAME_BASE else None


def _difference(first: RunEvidence, second: RunEvidence, config: CompareConfig, tau: float) -> Comparison:
    """The second run against the first, on the documents that both scored."""
    unchecked = next((run for run in (first, second) if run.reason is not None), None)
    of = RunEvidence(
        name=f"{second.name} against {first.name}",
        base=first.tuned,
        tuned=second.tuned,
        summary=second.summary,
        categories=[],
        activations=[],
        reason=None if unchecked is None else f"{unchecked.name}: {unchecked.reason}",
        remedy=None if unchecked is None else unchecked.remedy,
    )
    rows: list[CategoryEvidence] = []
    if unchecked is None:
        assert first.summary is not None and second.summary is not None, "checked runs have a summary"
        if first.summary.scored != second.summary.scored:
            raise OptionError(
                f"{first.name} scores {first.summary.scored} and {second.name} {second.summary.scored}; "
                "extract both over one text"
            )
        rows = paired(first.categories, second.categories)
        if not any(len(row.behaviour) for row in rows):
            raise OptionError(
                f"{first.name} and {second.name}: no scored document is in both; extract both over one text"
            )
    decided = _decided(rows, of, config, tau, name=of.name, kind="difference", runs=[first, second])
    alone = sorted({row.category for row in first.categories} ^ {row.category for row in second.categories})
    if unchecked is not None or not alone:
        return decided
    # no row of its own says so
    said = f"In one run only, so not compared: {', '.join(alone)}."
    last = " ".join([*decided.sentences[-1:], said])
    return decided.model_copy(update={"sentences": [*decided.sentences[:-1], last]})


def _decided(
    rows: Sequence[CategoryEvidence],
    of: RunEvidence,
    config: CompareConfig,
    tau: float,
    *,
    name: str,
    kind: str,
    runs: Sequence[RunEvidence],
) -> Comparison:
    said = []
    if of.reason is None:
        verdicts = decide(rows, tau=tau, alpha=config.alpha, confidence=config.confidence)
        subject = of.tuned if kind == "pair" else name
        said = sentences(verdicts, tuned=subject, tau=tau)
    else:
        verdicts = of.activations
        said = [f"Not checked, so nothing can be called gained or lost: {of.reason}."]
        if leaning := [f"{row.category} to {row.lean}" for row in verdicts if row.lean is not None]:
            said.append(f"By activations alone, which say nothing of behaviour, latents lean: {', '.join(leaning)}.")
    return Comparison.model_validate(
        {
            "name": name,
            "kind": kind,
            "runs": [run.name for run in runs],
            "base": of.base,
            "tuned": of.tuned,
            "state": "checked" if of.reason is None else "not checked",
            "reason": of.reason,
            "remedy": of.remedy,
            "scored": of.summary.scored if of.summary else None,
            "branch": of.summary.branch if of.summary else None,
            "seeds": of.summary.seeds if of.summary else [],
            "sentences": said,
            "rows": [verdict.model_dump() for verdict in verdicts],
        }
    )
