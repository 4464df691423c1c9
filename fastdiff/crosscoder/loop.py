"""The steps of training: several crosscoders over one stream of batches, with logs, evaluations and checkpoints."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import rundir
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.checkpoint import Checkpoints
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.rows import EvaluationRows, evaluation_rows
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import ResourceError
from fastdiff.interrupt import StopRequests
from fastdiff.kernels.step import Figures
from fastdiff.memory import is_out_of_memory
from fastdiff.progress import Progress
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler
from fastdiff.tracking import Trackers


class Member:
    """One seed's crosscoder in training.

    Where memory runs out it goes on with half the micro-batch, which keeps the batch: TopK with the same gradients,
    BatchTopK with a selection within each part.

    Args:
        config: Of this seed.
        target: Its directory.
        crosscoder: Its weights.
        checkpoints: Where it is kept.
        micro_batch: Tokens at a time that an earlier process had backed off to; None is what the configuration says.
    """

    trainer: Trainer | FusedTrainer
    trackers: Trackers  # set before the first step

    def __init__(
        self,
        config: TrainConfig,
        target: Path,
        crosscoder: Crosscoder,
        checkpoints: Checkpoints,
        micro_batch: int | None,
    ):
        self.config, self.target, self.crosscoder, self.checkpoints = config, target, crosscoder, checkpoints
        self.best: float | None = None  # largest pooled fve of an evaluation
        self.micro_batch = micro_batch or config.micro_batch or config.batch_size
        while True:
            try:
                self.trainer = make_trainer(crosscoder, config.model_copy(update={"micro_batch": self.micro_batch}))
                return
            except (MemoryError, RuntimeError) as error:
                self._halve(error)

    def step(self, batch: Tensor, events: rundir.Events, progress: Progress) -> None:
        """One update, with a smaller micro-batch if need be.

        Raises:
            ResourceError: Not even one token at a time fits the memory.
        """
        fits = True
        while True:
            try:
                if not fits:
                    self.trainer.back_off(self.micro_batch)
                self.trainer.step(batch)
                return
            except (MemoryError, RuntimeError) as error:
                self._halve(error)
            fits, step = False, self.trainer.step_number
            events.write("back_off", seed=self.config.seed, step=step, micro_batch=self.micro_batch)
            progress.say(f"train: out of memory at step {step}; from here on {self.micro_batch} tokens at a time")

    def _halve(self, error: BaseException) -> None:
        if not is_out_of_memory(error):
            raise error
        smaller = next((n for n in range(self.micro_batch // 2, 0, -1) if self.config.batch_size % n == 0), None)
        if smaller is None:
            raise ResourceError("out of memory with one token at a time; lower --dict-size") from error
        self.micro_batch = smaller


def run_steps(
    members: list[Member],
    store: ActivationStore,
    shuffler: Shuffler,
    start: int,
    events: rundir.Events,
    stop: StopRequests,
    progress: Progress,
) -> None:
    """Step all members to the end.

    Raises:
        KeyboardInterrupt, SystemExit: A signal asked for it, and checkpoints were written.
    """
    config = members[0].config
    device = members[0].crosscoder.b_enc.device
    meter = _Meter(shuffler)
    held_out = evaluation_rows(store, config.holdout, config.eval_tokens) if config.eval_every else None
    with progress.task("train", config.steps, "steps", start, rate=(config.batch_size, "tokens")) as task:
        for step, batch in enumerate(shuffler.stream(start, config.steps, device), start + 1):
            ks = [member.trainer.k for member in members]
            for member in members:
                member.step(batch, events, progress)
            note = ""
            if step % config.log_every == 0 or step == config.steps:
                speed = meter.read(step - start, config.batch_size)
                for member, k in zip(members, ks, strict=True):
                    line = _log_line(member.trainer.window(), member.config, k) | speed
                    events.write("train", step=step, seed=member.config.seed, **line)
                    member.trackers.log(step, {"train": line})
                    note = note or _note(line)
            task.advance(1, note)
            last = step == config.steps
            if held_out is not None and step % config.eval_every == 0 and not last:
                for member in members:
                    _evaluate(member, held_out, step, events)
            asked = stop.signal is not None
            if asked or (step % config.checkpoint_every == 0 and not last):
                # there must always be a step that all have
                for member in members:
                    member.checkpoints.wait(best=False)
                for member in members:
                    _checkpoint(member, step, shuffler)
            if asked:
                for member in members:
                    member.checkpoints.wait()
                progress.say(f"train: stopped after step {step}; the same command continues from there")
                stop.leave()


class _Meter:
    """Tokens per second and the share of the time spent waiting for rows, since it was last read."""

    def __init__(self, shuffler: Shuffler):
        self._shuffler, self._since, self._steps = shuffler, time.monotonic(), 0

    def read(self, steps: int, batch_size: int) -> dict[str, Any]:
        """Figures after so many steps of this process."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        tokens = (steps - self._steps) * batch_size
        waited = self._shuffler.wait_seconds
        self._since, self._steps, self._shuffler.wait_seconds = now, steps, 0.0
        return {"tokens_per_second": round(tokens / seconds), "loader_wait": round(waited / seconds, 4)}


def _log_line(figures: Figures, config: TrainConfig, k: int) -> dict[str, Any]:
    return {
        "loss": figures.loss / figures.n_steps,
        "fve": (1 - figures.squared_error / figures.spread).tolist(),
        "l0": figures.n_active / figures.n_tokens,
        "dead": figures.n_dead / config.dict_size,
        "k": k,
    }


def _note(line: dict[str, Any]) -> str:
    fve = " ".join(f"{v:.3f}" for v in line["fve"])
    return f"fve {fve}  l0 {line['l0']:.1f}  dead {line['dead']:.1%}  wait {line['loader_wait']:.0%}"


def _evaluate(member: Member, rows: EvaluationRows, step: int, events: rundir.Events) -> None:
    """Measure on held-out rows; the best crosscoder so far is kept."""
    config = member.config
    # a step that is not finite must not be evaluated, and on CUDA steps may still be under way
    member.trainer.state()
    quality = rows.measure(member.crosscoder, config.batch_size, check_crc=config.check_reads)
    facts = {"rows": rows.name, **quality.facts()}
    events.write("evaluate", step=step, seed=config.seed, **facts)
    member.trackers.log(step, {"evaluate": facts})
    if quality.fve_pooled > (-math.inf if member.best is None else member.best):
        member.best = quality.fve_pooled
        found = {"train": config.identity(), "steps": step, "fve_pooled": quality.fve_pooled}
        member.checkpoints.save_best(member.crosscoder, found)


def _checkpoint(member: Member, step: int, shuffler: Shuffler) -> None:
    state = {
        "threads": torch.get_num_threads(),
        "pool_rows": shuffler.pool_rows,
        "micro_batch": member.micro_batch,
        "best": member.best,
        "config": member.config.identity(),
    }
    member.checkpoints.save(step, member.crosscoder, member.trainer.state(), state)
