"""The whole road for one pair of models: extract → train → attribute → analyze → annotate → compare → report."""

from pathlib import Path

from fastdiff import rundir
from fastdiff.analysis.analyze import analyze
from fastdiff.annotation.annotate import annotate
from fastdiff.attribution.attribute import attribute
from fastdiff.comparison.compare import compare
from fastdiff.config import RunConfig
from fastdiff.crosscoder.train import train
from fastdiff.extraction.harvest import extract
from fastdiff.progress import SILENT, Progress
from fastdiff.reporting.builder import build_report
from fastdiff.tracking import check_trackers


def label_pair(
    config: RunConfig,
    run: Path,
    store: Path,
    progress: Progress = SILENT,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """From text to labelled latents; stages that are done already are skipped by hash.

    Args:
        config: All stages.
        run: Run directory.
        store: Where the activations go.
        progress: Where to report.
        resume: Continue what was cut off; else start it anew.
        overwrite: Replace results of another configuration.

    Raises:
        FastdiffError: What the stages raise.
    """
    # not hours later, when the activations are there
    check_trackers(config.train.track)
    extract(config.extract, store, progress, resume=resume, overwrite=overwrite)
    train(store, run, config.train, progress, resume=resume, overwrite=overwrite)
    if config.attribute.enabled:
        attribute(run, config.attribute, progress, store_path=store)
    # the crosscoder that is analysed is the one just trained, or the first of several
    seed = (config.train.seeds or (config.train.seed,))[0]
    analyze(run, config.analyze.model_copy(update={"train_seed": seed}), progress)
    annotate(run, config.annotate, progress)


def run_pipeline(
    config: RunConfig, run: Path, progress: Progress = SILENT, *, resume: bool = True, overwrite: bool = False
) -> Path:
    """All stages; the store is `<run>/acts`.

    Returns:
        The report.
    """
    label_pair(config, run, run / "acts", progress, resume=resume, overwrite=overwrite)
    compare([run], run, config.compare, progress)
    # the store is a directory of its own; so the run's file is one that `fastdiff run -c` takes
    with rundir.locked(run):
        rundir.write_section(run, "extract", config.extract.model_dump())
    return build_report(run, progress)
