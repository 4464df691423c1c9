"""The annotation stage: analysis → `<run>/annotate/labels.jsonl`, one JSON object per labelled latent.

The latents that one model alone has in the run's other seeds get a category too, in `<run>/annotate/seeds.csv`.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fastdiff import rundir
from fastdiff.annotation.baseline import NO_CATEGORY, Activity, annotate_baseline
from fastdiff.config import AnnotateConfig
from fastdiff.errors import InputError
from fastdiff.progress import SILENT, Progress
from fastdiff.results.analysis import read_analysis_summary, read_latents, source_categories, top_tokens
from fastdiff.results.labels import LABELS, UNINTERPRETABLE, Label, write_labels
from fastdiff.results.seeds import SEED_LABELS, SIDES, SeedLabel, read_seed_latents, write_seed_labels


def annotate(run: Path, config: AnnotateConfig, progress: Progress = SILENT) -> Path:
    """Label the latents of a run.

    Args:
        run: A run directory that `analyze` has finished.
        config: Who labels.
        progress: Where to report.

    Returns:
        `<run>/annotate`.

    Raises:
        InputError: The analysis is missing or changed.
        LockedError: Another process writes to the run.
    """
    analysis, target = run / "analysis", run / "annotate"
    settings = config.model_dump()
    with rundir.locked(run) as lock:
        inputs = dict(rundir.require_done(analysis, f"fastdiff analyze {run}")["outputs"])
        stage = lock.stage(target, "annotate", settings, inputs, [LABELS, SEED_LABELS])
        if stage.up_to_date():
            progress.say(f"annotate: {target} is up to date")
            return target
        with stage:
            labels = _baseline(run, config)
            write_labels(run, labels)
            write_seed_labels(run, _other_seeds(run, config))
        unclear = sum(label.category == UNINTERPRETABLE for label in labels)
        progress.say(f"annotate: {len(labels)} latents labelled, {unclear} of them as of {NO_CATEGORY}")
    return target


def _baseline(run: Path, config: AnnotateConfig) -> list[Label]:
    summary, analysis = read_analysis_summary(run), run / "analysis"
    categories, member = source_categories(summary)
    latents = read_latents(run)
    return annotate_baseline(
        _activity(analysis, np.array(summary["documents_by_source"])).merged(member),
        categories,
        latents.numbers("count").astype(np.int64),
        top_tokens(run, latents),
        min_count=config.min_count,
        min_lift=config.min_lift,
        # a row of the verdict shows them, so they are labelled however rare
        shown=summary.get("by_nats", []),
    )


def _other_seeds(run: Path, config: AnnotateConfig) -> list[SeedLabel]:
    """The same of the other seeds' latents that one model alone has."""
    summary, found = read_analysis_summary(run), read_seed_latents(run)
    categories, member = source_categories(summary)
    activity = Activity(
        documents=np.array(summary["documents_by_source"]),
        fired=found.documents_by_source,
        means=found.mean_by_source,
        squares=found.squares_by_source,
        peaks=found.peaks_by_source,
    )
    labels = annotate_baseline(
        activity.merged(member),
        categories,
        found.count,
        [[] for _ in found.latent],
        min_count=config.min_count,
        min_lift=config.min_lift,
    )
    category = {label.latent: label.category for label in labels}
    rows = zip(found.seed.tolist(), found.latent.tolist(), found.side.tolist(), found.concept.tolist(), strict=True)
    return [
        SeedLabel(seed, latent, SIDES[side], concept, category.get(i, ""))
        for i, (seed, latent, side, concept) in enumerate(rows)
    ]


def _activity(analysis: Path, documents: NDArray[np.int64]) -> Activity:
    """Where the latents are active, by source.

    Raises:
        InputError: The analysis is of a version that counted only documents with any firing.
    """
    fired = load_file(analysis / "firing.safetensors")
    for name in ("mean_by_source", "squares_by_source", "peaks_by_source"):
        if name not in fired:
            raise InputError(
                f"{analysis / 'firing.safetensors'}: has no {name}; run `fastdiff analyze {analysis.parent}` again"
            )
    return Activity(
        documents=documents,
        fired=fired["documents_by_source"],
        means=fired["mean_by_source"],
        squares=fired["squares_by_source"],
        peaks=fired["peaks_by_source"],
    )
