"""Checkpoints of training: everything a run needs to go on to the same bits, written while it goes on.

    <run>/crosscoder/seed-0/checkpoints/step-000500/
        model.safetensors        as in `fastdiff.crosscoder.saved`
        optimizer.safetensors    the trainer's other tensors
        state.json               {"schema": 1, "step": 500, …, "versions": {…}, "sha256": {file: sha256}}

"sha256" has both tensor files, and under "state.json" the hash of everything else in that file, those two included, as
canonical JSON.

A checkpoint is written as `.step-000500.tmp` and gets its name when all of it is on the disk; one that is dropped loses
its name before its files. So what bears the name is whole, whenever the process was killed. A step that is saved once
more (several seeds continue at the newest step that all have) first becomes `step-000500.old`, which stands for it
until the new one does.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import (
    FORMAT,
    MODEL,
    SCHEMA,
    describe,
    load_into,
    load_tensors,
    refuse_not_finite,
    save_tensors,
    write_crosscoder,
)
from fastdiff.errors import InputError
from fastdiff.rundir import (
    canonical_json,
    fsync_directory,
    full_disk,
    read_json,
    sha256_file,
    sha256_text,
    versions,
    write_json,
)

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
STATE_SCHEMA = 1
# keys of state.json that the trainer's state may not have
_OWN = frozenset({"schema", "step", "versions", "sha256"})
_NAME = re.compile(r"step-(\d{6,})(\.old)?")


class Checkpoints:
    """The checkpoints of one crosscoder, written by one thread in the background.

    What goes wrong there is raised by the next `save`, `save_best` or `wait` or at the end of the block. If the block
    ends by an exception, that one is raised, with a note of the other; what was started is finished.

    Args:
        directory: `<run>/crosscoder/seed-0/checkpoints`; made by the first `save`.
        keep: How many of the newest stay. With several seeds at least 2, and all have to `wait(best=False)` before
            the first saves again: else there may be no step that all have.
    """

    def __init__(self, directory: Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory, self.keep = directory, keep
        self.best = directory.parent / "best"
        # its thread starts with the first write, and ends what it has begun even if the program is about to end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                for failure in self._failures("checkpoint", "best"):
                    error.add_note(f"what was written meanwhile failed too: {failure}")
        finally:
            self._thread.shutdown(wait=False)

    def save(self, step: int, crosscoder: Crosscoder, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps to host memory, and start to write it; training may go on at once.

        Waits for the checkpoint before, so that there is one copy at a time. All but the newest `keep` go when this one
        is on the disk; so do those of later steps, from before training went back to an earlier one.

        Args:
            step: Its number.
            crosscoder: The weights.
            tensors: Everything else the trainer needs.
            state: What JSON can hold of the rest; its keys stand beside "schema", "step", "versions" and "sha256".

        Raises:
            ResourceError: The disk was full at the write before.
        """
        taken = sorted(state.keys() & _OWN)
        if taken:
            raise ValueError(f"state must not have {', '.join(taken)}")
        facts = _frozen({"schema": STATE_SCHEMA, "step": step, **state})
        self._end("checkpoint")
        weights, others = _host_copy(crosscoder.state_dict()), _host_copy(tensors)
        self._start("checkpoint", self._write, step, weights, others, facts)

    def save_best(self, crosscoder: Crosscoder, facts: Mapping[str, Any]) -> None:
        """Copy the weights to host memory and start to write them to `best`, where `load_crosscoder` reads them.

        Waits for the best before, but not for a checkpoint.

        Args:
            crosscoder: The weights.
            facts: For config.json, as for `save_crosscoder`.

        Raises:
            FastdiffError: A weight is NaN or infinite; nothing is written.
            ResourceError: The disk was full at the write before.
        """
        refuse_not_finite(self.best, crosscoder)
        config = _frozen(describe(crosscoder, dict(facts)))
        self._end("best")
        self._start("best", write_crosscoder, self.best, _host_copy(crosscoder.state_dict()), config)

    def wait(self, *, best: bool = True) -> None:
        """Return when what was started is on the disk; without `best`, when the checkpoint is.

        Raises:
            ResourceError: The disk is full.
        """
        self._end("checkpoint", *["best"] * best)

    def clear(self) -> None:
        """Remove all checkpoints, each whole or not at all."""
        self.wait()
        self._drop([path for _, path in self._found()])

    def steps(self) -> list[int]:
        """Steps of all checkpoints, in ascending order."""
        return sorted({step for step, _ in self._found()})

    def load(self, step: int, crosscoder: Crosscoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load the checkpoint of a step; nothing is changed unless all of it is good.

        Args:
            step: One of `steps()`.
            crosscoder: Gets the weights.

        Returns:
            The trainer's tensors, on the CPU, and state.json.

        Raises:
            InputError: A file is missing, corrupt, or of another schema or shape.
        """
        path = self._path(step)
        if not path.is_dir():
            path = self._aside(step)
        if not path.is_dir():
            raise InputError(f"{self._path(step)}: no such checkpoint")
        try:
            state = _read_state(path)
            tensors = load_tensors(path / OPTIMIZER)
            load_into(crosscoder, path / MODEL)
        except InputError as error:
            before = [number for number in self.steps() if number < step]
            then = f"continues from step {before[-1]}" if before else "starts anew"
            raise InputError(f"{error}; delete {path}, and training {then}") from error
        return tensors, state

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _aside(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}.old"

    def _found(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]

    def _start(self, kind: str, function: Callable[..., None], *arguments: Any) -> None:
        self._pending[kind] = self._thread.submit(function, *arguments)

    def _end(self, *kinds: str) -> None:
        """Wait for what was started of these kinds, and raise what went wrong."""
        failures = self._failures(*kinds)
        for other in failures[1:]:
            failures[0].add_note(f"what was written meanwhile failed too: {other}")
        if failures:
            raise failures[0]

    def _failures(self, *kinds: str) -> list[BaseException]:
        """What went wrong, once these kinds have ended, with them and with whatever else has ended; told once."""
        failures = []
        for kind, future in list(self._pending.items()):
            if kind in kinds or future.done():
                # a signal may interrupt this line; what is pending then stays so
                failure = future.exception()
                del self._pending[kind]
                if failure is not None:
                    failures.append(failure)
        return failures

    def _write(self, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        target, temporary = self._path(step), self.directory / f".step-{step:06d}.tmp"
        with full_disk(target):
            self._tidy()
            try:
                temporary.mkdir()
                save_tensors(temporary / MODEL, weights, {"format": FORMAT, "schema": SCHEMA})
                save_tensors(temporary / OPTIMIZER, tensors, {"schema": STATE_SCHEMA})
                facts = {**facts, "versions": versions()}
                hashes = {name: sha256_file(temporary / name) for name in (MODEL, OPTIMIZER)}
                own = sha256_text(canonical_json({**facts, "sha256": hashes}))
                write_json(temporary / STATE, {**facts, "sha256": {**hashes, STATE: own}})
                if target.is_dir():
                    target.replace(self._aside(step))
                temporary.replace(target)
                fsync_directory(self.directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = [number for number in self.steps() if number <= step][-self.keep :]
            self._drop([path for number, path in self._found() if number not in kept or path != self._path(number)])

    def _tidy(self) -> None:
        """Make the directory, without anything that a killed process left half done."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            fsync_directory(self.directory.parent)
        for left in list(self.directory.glob(".step-*.tmp")):
            shutil.rmtree(left)
        for step, path in self._found():
            if path == self._aside(step):
                if self._path(step).is_dir():
                    self._drop([path])
                else:
                    path.replace(self._path(step))

    def _drop(self, paths: list[Path]) -> None:
        """Take the names away, then the files: what is killed in between leaves no half of a checkpoint."""
        gone = []
        for path in paths:
            away = path.with_name(f".{path.name}.tmp")
            shutil.rmtree(away, ignore_errors=True)
            gone.append(path.replace(away))
        if gone:
            fsync_directory(self.directory)
        for path in gone:
            shutil.rmtree(path)


def common_step(checkpoints: list[Checkpoints]) -> int | None:
    """The newest step that all have, or None if there is none."""
    if not checkpoints:
        return None
    return max(set.intersection(*(set(one.steps()) for one in checkpoints)), default=None)


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of its own of every tensor, also of those on the CPU: training changes them in place."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _frozen(facts: dict[str, Any]) -> dict[str, Any]:
    """What JSON holds of `facts`, now: what they are made of may change before they are written."""
    frozen: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    return frozen


def _read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose every hash is right.

    Raises:
        InputError: A file is missing, changed, or of another schema.
    """
    state: dict[str, Any] = read_json(path / STATE, STATE_SCHEMA)
    hashes = state.get("sha256")
    if not isinstance(hashes, dict):
        raise InputError(f"{path / STATE}: has no sha256")
    others = {name: sha for name, sha in hashes.items() if name != STATE}
    try:
        own = sha256_text(canonical_json({**state, "sha256": others}))
    except ValueError as error:  # NaN, or half of a character
        raise InputError(f"{path / STATE}: changed since it was written ({error})") from error
    if hashes.get(STATE) != own:
        raise InputError(f"{path / STATE}: changed since it was written")
    for name in (MODEL, OPTIMIZER):
        if hashes.get(name) != sha256_file(path / name):
            raise InputError(f"{path / name}: changed since it was written")
    return state
