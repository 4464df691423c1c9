"""The training stage: store → crosscoders, resumable at every checkpoint, skipped when already done."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff import rundir
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.checkpoint import Checkpoints, common_step
from fastdiff.crosscoder.inputs import input_names, input_stats, n_inputs
from fastdiff.crosscoder.loop import Member, run_steps
from fastdiff.crosscoder.metrics import Quality, l0_gap
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.rows import EvaluationRows, evaluation_rows, row_batches, spread_rows
from fastdiff.crosscoder.saved import CONFIG, MODEL, SCHEMA, save_crosscoder
from fastdiff.crosscoder.structure import structure_of
from fastdiff.crosscoder.threshold import calibrated_threshold
from fastdiff.device import resolve_device
from fastdiff.errors import InputError, OptionError
from fastdiff.interrupt import stop_requests
from fastdiff.progress import SILENT, Progress
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
from fastdiff.tracking import check_trackers, open_trackers

# inference and training disagree by more than this share of L0: worth a warning
_L0_GAP = 0.05
# what a directory was begun with, so that another configuration does not continue it
_STARTED = "started.json"
_STARTED_SCHEMA = 1


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
    """Train a crosscoder on a store, into `run/crosscoder/seed-<seed>/`; what `train_seeds` does, for one seed.

    Returns:
        The crosscoder's directory; that of the first of several seeds.
    """
    return train_seeds(store_path, run, config, progress, resume=resume, overwrite=overwrite)[0]


def train_seeds(
    store_path: Path,
    run: Path,
    config: TrainConfig,
    progress: Progress = SILENT,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Train a crosscoder per seed on a store, all over one pass of the data, into `run/crosscoder/seed-<seed>/`.

    Each is bit for bit what a run of its seed alone gives. SIGTERM and SIGINT end the process after a checkpoint.

    Args:
        store_path: A store directory or a bare .h5.
        run: Run directory.
        config: How; `seeds`, or `seed` where there are none.
        progress: Where to report.
        resume: Continue from the newest checkpoint of the same configuration; else start anew.
        overwrite: Replace a crosscoder of another configuration.

    Returns:
        The crosscoders' directories, in the order of the seeds.

    Raises:
        OptionError: The options do not fit the store, or the directory holds another configuration.
        InputError: The store is bad or holds NaN or infinity.
        FastdiffError: The loss is not finite.
        LockedError: Another process writes to the run.
    """
    configs = [config.of_seed(seed) for seed in config.seeds or (config.seed,)]
    with ActivationStore(store_path) as store, rundir.locked(run) as lock, _threads(config.threads):
        inputs: dict[str, str] = {"store": store.sha256()}
        left = []
        for one in configs:
            target = directory_of(run, one.seed)
            stage = lock.stage(target, "train", one.identity(), inputs, [MODEL, CONFIG], schemas={CONFIG: SCHEMA})
            if stage.up_to_date():
                progress.say(f"train: {target} is up to date")
                continue
            _refuse_other(target, one.identity(), inputs, overwrite)
            left.append((one, stage))
        if left:
            check_trackers(config.track)
            _train(store, run, left, progress, resume=resume and not overwrite)
    return [directory_of(run, one.seed) for one in configs]


def _train(
    store: ActivationStore,
    run: Path,
    wanted: list[tuple[TrainConfig, rundir.Stage]],
    progress: Progress,
    *,
    resume: bool,
) -> None:
    """Train all of these together; each is a stage of its own."""
    configs, stages = [one for one, _ in wanted], [stage for _, stage in wanted]
    config = configs[0]
    if store.must_be_measured:
        progress.say(f"train: {store.path} has no column norms; its rows are measured")
    rows = _training_rows(store, config)
    if (left_out := store.left_out_line()) is not None:
        progress.say(f"train: {left_out}")
    device = resolve_device(config.device)
    targets = [stage.directory for stage in stages]
    # checkpoints and the best crosscoder change long before the first seed ends
    for stage in stages:
        stage.begin()
    least = 1 if len(configs) == 1 else 2  # a step that all have, while one is ahead
    with ExitStack() as stack:
        checkpoints = [
            stack.enter_context(Checkpoints(target / "checkpoints", max(one.keep_checkpoints, least)))
            for target, one in zip(targets, configs, strict=True)
        ]
        step = common_step(checkpoints) if resume else None
        members, states = [], []
        for target, one, kept in zip(targets, configs, checkpoints, strict=True):
            crosscoder = Crosscoder(
                one.dict_size,
                n_inputs(one.inputs, store.n_models),
                store.d_model,
                activation=one.activation,
                k=one.k,
                code_norm=one.code_norm,
                inputs=one.inputs,
            ).to(device)
            tensors, state = ({}, None) if step is None else kept.load(step, crosscoder)
            member = Member(one, target, crosscoder, kept, None if state is None else state["micro_batch"])
            if state is not None:
                member.trainer.load_state(tensors, state["step"])
                member.best = state["best"]
            members.append(member)
            states.append(state)
        state = states[0]
        shuffler = _shuffler(store, config, rows, None if state is None else state["pool_rows"])
        progress.say(f"train: {shuffler.describe()}")
        if state is None:
            mean, variance = input_stats(store, config.inputs)
            # also without normalisation: statistics of NaN or infinity were refused
            if float(variance.min()) <= 0:
                raise InputError(f"{store.path}: the inputs never vary; nothing can be learned")
            first = shuffler.batch(0).to(device)
        # only now: what could not even start must not stand in the way of the next try
        names = input_names(config.inputs, [model.name for model in store.meta.models])
        for member in members:
            one, target = member.config, member.target
            settings = one.model_dump(mode="json")
            opened = open_trackers(one.track, run, target.name, settings, progress, start=step or 0, models=names)
            member.trackers = stack.enter_context(opened)
        for member, stage in zip(members, stages, strict=True):
            if state is None:
                member.checkpoints.clear()
                shutil.rmtree(member.target / "best", ignore_errors=True)
                _start(member, first, mean, variance)
            started = {"schema": _STARTED_SCHEMA, "config": stage.settings, "inputs": stage.inputs}
            rundir.write_json(member.target / _STARTED, started)
        if state is not None:
            # the order of a sum depends on the number of threads, and so do the last bits of the weights
            torch.set_num_threads(state["threads"])
            progress.say(f"train: continuing from step {step}")
        events = rundir.Events(run)
        events.write("shuffle", **_shuffle_facts(shuffler))
        with stop_requests() as stop:
            run_steps(members, store, shuffler, step or 0, events, stop, progress)
            if stop.signal is not None:
                # before the first step, or between the last and here: what is on disk is whole
                stop.leave()
        for member, stage in zip(members, stages, strict=True):
            # its buffers and moments are most of the memory, and the evaluation needs some
            del member.trainer
            stage.facts.update(
                store=str(store.path.resolve()),
                threads=torch.get_num_threads(),
                seeds=[one.seed for one in configs],
            )
            with stage:
                quality = _finish(member, store, rows, events, progress)
                _save(member, store, shuffler, stage.inputs["store"], quality)


def _start(member: Member, first: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Input scaling from the statistics, weights from the seed and the first batch."""
    crosscoder, config = member.crosscoder, member.config
    if config.normalize == "rms":
        crosscoder.input_mean.copy_(mean)
        crosscoder.input_scale.copy_((mean.shape[1] / variance).sqrt())
    structure = structure_of(config, len(mean))
    crosscoder.initialize(crosscoder.normalize(first), init=config.init, seed=config.seed, structure=structure)


def _finish(
    member: Member, store: ActivationStore, rows: int | NDArray[np.int64], events: rundir.Events, progress: Progress
) -> dict[str, Any]:
    """Set the inference threshold, measure and report; what was measured."""
    crosscoder, config = member.crosscoder, member.config
    if config.activation == "batchtopk" and config.calibrate_tokens:
        followed = float(crosscoder.threshold[0])
        sample = spread_rows(rows, config.calibrate_tokens)
        found = calibrated_threshold(crosscoder, lambda: row_batches(store, sample, config.batch_size))
        crosscoder.threshold.fill_(found)
        events.write("threshold", seed=config.seed, running_mean=followed, calibrated=found, rows=len(sample))
    held_out = evaluation_rows(store, config.holdout)
    quality = held_out.measure(crosscoder, config.batch_size, check_crc=config.check_reads)
    facts = {"rows": held_out.name, "l0_gap": l0_gap(quality), **quality.facts()}
    events.write("evaluate", step=config.steps, seed=config.seed, **facts)
    member.trackers.log(config.steps, {"evaluate": facts})
    _report(quality, held_out, config, progress)
    return facts


def _save(
    member: Member, store: ActivationStore, shuffler: Shuffler, store_sha256: str, quality: dict[str, Any]
) -> None:
    facts = {
        "models": [model.model_dump() for model in store.meta.models],
        "train": member.config.identity(),
        "store_sha256": store_sha256,
        "n_train": shuffler.n_rows,
        "left_out": store.left_out_facts(),
        "quality": {name: quality[name] for name in ("rows", "n_rows", "fve", "fve_all", "never_fired")},
        "pool_rows": shuffler.pool_rows,
        "micro_batch": member.micro_batch,
        "steps": member.config.steps,
    }
    save_crosscoder(member.target, member.crosscoder, facts)


def _refuse_other(target: Path, settings: dict[str, Any], inputs: dict[str, str], overwrite: bool) -> None:
    """Another configuration's results are replaced only when that was asked for."""
    path = target / _STARTED
    started = path.exists() and ((target / rundir.DONE).exists() or Checkpoints(target / "checkpoints", 1).steps())
    if overwrite or not started:
        return
    before = rundir.read_json(path, _STARTED_SCHEMA)
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
    """Rows to train on, not held out and not left out of use: how many from the first on, or their numbers."""
    n_train = store.n_train(config.holdout)
    usable = store.usable_rows()
    rows = n_train if usable is None else usable[usable < n_train]
    n_rows = rows if isinstance(rows, int) else len(rows)
    if n_rows < config.batch_size:
        raise OptionError(
            f"{store.path}: {n_rows} training rows are fewer than --batch-size {config.batch_size}; lower it"
        )
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


def _report(quality: Quality, rows: EvaluationRows, config: TrainConfig, progress: Progress) -> None:
    fve, fve_all = (", ".join(f"{v:.3f}" for v in values) for values in (quality.fve, quality.fve_all))
    with_all = f" ({fve_all} with the {len(rows.left_out):,} left out of use)" if len(rows.left_out) else ""
    of = f"seed {config.seed}, " if config.seed else ""
    progress.say(
        f"train: {of}fve {fve} on {quality.n_rows:,} {rows.name} rows{with_all}, l0 {quality.l0_mean:.1f} "
        f"({quality.l0_p5:.0f} to {quality.l0_p95:.0f}), {quality.silent_fraction:.1%} of latents silent there"
    )
    gap = l0_gap(quality)
    if abs(gap) > _L0_GAP:
        progress.say(
            f"train: warning: {quality.l0_mean:.1f} latents fire at inference, but training selects "
            f"{quality.train_l0:.1f} ({gap:+.0%}); raise --steps, --decay-steps or --calibrate-tokens"
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
