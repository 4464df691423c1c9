"""The training stage: store → crosscoder, resumable at every checkpoint, skipped when already done."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import run as rundir
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.checkpoint import (
    CONFIG,
    MODEL,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_crosscoder,
)
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.metrics import Quality, evaluate
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.device import resolve_device
from fastdiff.errors import InputError, OptionError
from fastdiff.kernels.step import Figures
from fastdiff.progress import SILENT, Progress
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler

# more held-out rows than this change no digit that is shown
_EVALUATION_ROWS = 200_000
# scores of all latents held at a time there: 1 GB each of a few
_EVALUATION_SCORES = 2**28


def directory_of(run: Path, seed: int) -> Path:
    """Where a run keeps the crosscoder of one seed."""
    return run / "crosscoder" / f"seed-{seed}"


def train(
    store_path: Path,
    run: Path,
    config: TrainConfig,
    progress: Progress = SILENT,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> Path:
    """Train a crosscoder on a store, into `run/crosscoder/seed-<seed>/`.

    Args:
        store_path: A store directory or a bare .h5.
        run: Run directory.
        config: How.
        progress: Where to report.
        resume: Continue from the newest checkpoint of the same configuration; else start anew.
        overwrite: Replace a crosscoder of another configuration.

    Returns:
        The crosscoder's directory.

    Raises:
        OptionError: The options do not fit the store, or the directory holds another configuration.
        InputError: The store is bad or holds NaN or infinity.
        FastdiffError: The loss is not finite.
        LockedError: Another process writes to the run.
    """
    target = directory_of(run, config.seed)
    with ActivationStore(store_path) as store, rundir.locked(run), _threads(config.threads):
        inputs, settings = {"store": store.sha256()}, config.model_dump()
        if rundir.is_done(target, "train", settings, inputs):
            progress.say(f"train: {target} is up to date")
            return target
        _refuse_other(target, settings, inputs, overwrite)
        rows = _training_rows(store, config)
        rundir.begin(target)
        crosscoder = Crosscoder(
            config.dict_size, store.n_models, store.d_model, activation=config.activation, k=config.k
        )
        crosscoder.to(resolve_device(config.device))
        trainer = make_trainer(crosscoder, config)
        loaded = load_checkpoint(target / "checkpoints", crosscoder) if resume and not overwrite else None
        shuffler = _shuffler(store, config, rows, None if loaded is None else loaded[1]["pool_rows"])
        progress.say(f"train: {shuffler.describe()}")
        if loaded is None:
            shutil.rmtree(target / "checkpoints", ignore_errors=True)
            _start(crosscoder, store, shuffler, config)
        else:
            tensors, state = loaded
            trainer.load_state(tensors, state["step"])
            # the order of a sum depends on the number of threads, and so do the last bits of the weights
            torch.set_num_threads(state["threads"])
            progress.say(f"train: continuing from step {state['step']}")
        # only now: what could not even start must not stand in the way of the next try
        rundir.write_json(target / "started.json", {"schema": 1, "config": settings, "inputs": inputs})
        events = rundir.Events(run)
        events.write("shuffle", **_shuffle_facts(shuffler))
        _loop(trainer, shuffler, target, events, progress)
        # its buffers and moments are most of the memory, and the evaluation needs some
        del trainer
        rows_name = "held-out" if store.n_train(config.holdout) < store.n_rows else "training"
        quality = evaluate(crosscoder, _evaluation_batches(store, config))
        events.write("evaluate", step=config.steps, rows=rows_name, **asdict(quality))
        _report(quality, rows_name, progress)
        facts = {
            "models": [model.model_dump() for model in store.meta.models],
            "train": settings,
            "store_sha256": inputs["store"],
            "n_train": shuffler.n_rows,
            "pool_rows": shuffler.pool_rows,
            "steps": config.steps,
        }
        save_crosscoder(target, crosscoder, facts)
        rundir.record(run, "train", settings, store=str(store_path.resolve()), threads=torch.get_num_threads())
        rundir.finish(target, "train", settings, inputs, [MODEL, CONFIG])
    return target


def _refuse_other(target: Path, settings: dict[str, Any], inputs: dict[str, str], overwrite: bool) -> None:
    """Another configuration's results are replaced only when that was asked for."""
    path = target / "started.json"
    started = path.exists() and ((target / rundir.DONE).exists() or has_checkpoint(target / "checkpoints"))
    if overwrite or not started:
        return
    before = rundir.read_json(path)
    if before["inputs"] != inputs:
        raise OptionError(f"{target}: was trained on another store; choose another -o, or --overwrite")
    for name, value in settings.items():
        if before["config"].get(name) != value:
            option = "--" + name.replace("_", "-")
            raise OptionError(
                f"{target}: was trained with {option} {before['config'].get(name)}, not {value}; "
                f"choose another -o, or --overwrite"
            )


def _training_rows(store: ActivationStore, config: TrainConfig) -> int | NDArray[np.int64]:
    """Rows to train on, not held out and not BOS: how many from the first on, or their numbers."""
    n_train = store.n_train(config.holdout)
    usable = store.usable_rows()
    rows = n_train if usable is None else usable[usable < n_train]
    n_rows = rows if isinstance(rows, int) else len(rows)
    if n_rows < config.batch_size:
        raise OptionError(
            f"{store.path}: {n_rows} training rows are fewer than --batch-size {config.batch_size}; lower it"
        )
    # also without normalisation: statistics of NaN or infinity are refused
    if min(store.stats().variance) <= 0:
        raise InputError(f"{store.path}: the activations of one model never vary; nothing can be learned")
    return rows


def _shuffler(
    store: ActivationStore, config: TrainConfig, rows: int | NDArray[np.int64], pool_rows: int | None
) -> Shuffler:
    """The order of the training rows; `pool_rows` is part of it, so a resumed run brings its own."""
    return Shuffler(
        store,
        batch_size=config.batch_size,
        seed=config.data_seed,
        n_rows=rows if isinstance(rows, int) else None,
        rows=None if isinstance(rows, int) else rows,
        mode=config.shuffle,
        pool_rows=pool_rows,
        memory_bytes=max(1, round(config.pool_gb * 1e9)) if config.pool_gb else None,
        check_finite=True,
        check_crc=config.check_reads,
    )


def _shuffle_facts(shuffler: Shuffler) -> dict[str, Any]:
    return {
        "mode": shuffler.mode,
        "rows": shuffler.n_rows,
        "pool_rows": shuffler.pool_rows,
        "pool_bytes": shuffler.pool_bytes,
        "excess_variance": shuffler.excess_variance(),
        "direct": shuffler.direct,
    }


def _start(crosscoder: Crosscoder, store: ActivationStore, shuffler: Shuffler, config: TrainConfig) -> None:
    """Input scaling from the store, weights from the seed and the first batch."""
    if config.normalize == "rms":
        stats = store.stats()
        crosscoder.input_mean.copy_(torch.tensor(stats.mean))
        crosscoder.input_scale.copy_((store.d_model / torch.tensor(stats.variance)).sqrt())
    first = shuffler.batch(0)
    crosscoder.initialize(crosscoder.normalize(first), init=config.init, seed=config.seed)


def _loop(
    trainer: Trainer | FusedTrainer, shuffler: Shuffler, target: Path, events: rundir.Events, progress: Progress
) -> None:
    """Step to the end, with a log line and a checkpoint now and then."""
    config = trainer.config
    started = time.monotonic()
    device = trainer.crosscoder.b_enc.device
    with progress.task("train", config.steps, "steps", start=trainer.step_number) as task:
        for batch in shuffler.stream(trainer.step_number, config.steps, device):
            k = trainer.k
            trainer.step(batch)
            step = trainer.step_number
            note = ""
            if step % config.log_every == 0 or step == config.steps:
                figures = trainer.window()
                line = _log_line(figures, config, k)
                tokens_per_second = round(figures.n_tokens / (time.monotonic() - started))
                share_waited = round(shuffler.wait_seconds / max(time.monotonic() - started, 1e-9), 4)
                events.write("train", step=step, **line, tokens_per_second=tokens_per_second, loader_wait=share_waited)
                fve = " ".join(f"{v:.3f}" for v in line["fve"])
                note = f"loss {line['loss']:.3f}  fve {fve}  l0 {line['l0']:.1f}  dead {line['dead']:.1%}"
                started = time.monotonic()
                shuffler.wait_seconds = 0.0
            task.advance(1, note)
            if step % config.checkpoint_every == 0 and step < config.steps:
                state = {
                    "threads": torch.get_num_threads(),
                    "pool_rows": shuffler.pool_rows,
                    "config": config.model_dump(),
                }
                save_checkpoint(target / "checkpoints", step, trainer.crosscoder, trainer.state(), state)


def _log_line(figures: Figures, config: TrainConfig, k: int) -> dict[str, Any]:
    return {
        "loss": figures.loss / figures.n_steps,
        "fve": (1 - figures.squared_error / figures.spread).tolist(),
        "l0": figures.n_active / figures.n_tokens,
        "dead": figures.n_dead / config.dict_size,
        "k": k,
    }


def _evaluation_batches(store: ActivationStore, config: TrainConfig) -> Iterator[Tensor]:
    """Held-out rows, or the first training rows when none are held out."""
    start = store.n_train(config.holdout)
    rows = np.arange(start, store.n_rows) if start < store.n_rows else np.arange(store.n_rows)
    usable = store.usable_rows()
    if usable is not None:
        rows = np.intersect1d(rows, usable)
    rows = rows[:_EVALUATION_ROWS].astype(np.int64)
    crc = store.crc32c() if config.check_reads else None
    step = max(1, min(config.batch_size, _EVALUATION_SCORES // config.dict_size))
    for begin in range(0, len(rows), step):
        yield store.rows(rows[begin : begin + step], crc=crc)


def _report(quality: Quality, rows_name: str, progress: Progress) -> None:
    fve = ", ".join(f"{v:.3f}" for v in quality.fve)
    progress.say(
        f"train: fve {fve} on {quality.n_rows:,} {rows_name} rows, l0 {quality.l0_mean:.1f}, "
        f"{quality.dead_fraction:.1%} of latents silent there"
    )


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Use n CPU threads inside the block; 0 leaves torch's choice."""
    before = torch.get_num_threads()
    if n:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
