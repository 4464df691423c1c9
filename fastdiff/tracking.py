"""Figures of training in TensorBoard, Trackio or Weights & Biases, beside `events.jsonl`, which has all of them.

Nothing leaves the machine unless the environment asks for it: TensorBoard writes `<run>/tensorboard/<name>`, Trackio
`<run>/trackio` (or where its own TRACKIO_DIR points), wandb `<run>/wandb`, offline unless WANDB_MODE=online. A package
is imported only when it is asked for. What a killed training had logged behind its last checkpoint is logged again:
TensorBoard forgets the first time, Trackio shows both.

`<run>/tracking.json` has the id of each name's curves, which a resumed training continues:

    {"schema": 1, "ids": {"seed-0": "3fa8b2c1"}}
"""

import contextvars
import importlib
import importlib.util
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from fastdiff import rundir
from fastdiff.errors import OptionError
from fastdiff.progress import SILENT, Progress

_PROJECT = "fastdiff"
_IDS = "tracking.json"
_IDS_SCHEMA = 1


class _Tracker(Protocol):
    """One package's log of one crosscoder."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the figures of a step."""

    def close(self, ok: bool) -> None:
        """Write what is left; `ok` is False if training did not come to its end."""


class Trackers:
    """Where figures go besides `events.jsonl`. One that fails is left out from then on, and training goes on.

    Args:
        trackers: By kind.
        models: What a list with a figure per model is split by.
        progress: Where to say that one failed.
    """

    def __init__(self, trackers: dict[str, _Tracker], models: Sequence[str], progress: Progress):
        self._trackers, self._models, self._progress = trackers, models, progress

    def log(self, step: int, facts: Mapping[str, Any]) -> None:
        """Send what one line of `events.jsonl` holds: the numbers in it, see `figures_of`."""
        figures = figures_of(facts, self._models)
        for kind, tracker in list(self._trackers.items()):
            # a package of others, with disks, sockets and processes of its own, may raise anything, and a training of
            # hours must not end over a curve
            try:
                tracker.log(step, figures)
            except Exception as error:
                del self._trackers[kind]
                self._progress.say(
                    f"track: warning: {kind} failed at step {step} ({_line(error)}) and gets nothing more; "
                    f"events.jsonl has all figures"
                )

    def close(self, ok: bool) -> None:
        """End all of them; `ok` is False if training did not come to its end."""
        for kind, tracker in self._trackers.items():
            # as in `log`: the crosscoder is saved, and an error here would hide that
            try:
                tracker.close(ok)
            except Exception as error:
                self._progress.say(f"track: warning: {kind} may lack the last figures ({_line(error)})")
        self._trackers.clear()


@contextmanager
def open_trackers(
    kinds: Sequence[str],
    run: Path,
    name: str,
    settings: Mapping[str, Any],
    progress: Progress = SILENT,
    *,
    start: int,
    models: Sequence[str],
) -> Iterator[Trackers]:
    """Log one crosscoder's training with some packages.

    Args:
        kinds: "tensorboard", "trackio", "wandb"; none is fine.
        run: Run directory.
        name: Of this crosscoder within the run, such as "seed-0".
        settings: What it is trained with; shown beside its curves.
        progress: Where to say what the user should know.
        start: Step from which this process goes on. 0 begins new curves; else those of `name` are continued.
        models: Names of the crosscoder's inputs, for the figures that there are one of per model.

    Raises:
        OptionError: A package is not installed, or cannot start.
        InputError: `tracking.json` cannot be read.
    """
    check_trackers(kinds)
    curves = _curves_id(run, name, new=start == 0) if set(kinds) - {"tensorboard"} else ""
    trackers: dict[str, _Tracker] = {}
    opened, ok = Trackers(trackers, _labels(models), progress), False
    try:
        for kind in dict.fromkeys(kinds):
            # as in `Trackers.log`, but the user is still there to mend it
            try:
                if kind == "tensorboard":
                    trackers[kind] = _TensorBoard(run / "tensorboard" / name, settings, start)
                elif kind == "trackio":
                    trackers[kind] = _Trackio(run, name, curves, settings, progress)
                else:
                    trackers[kind] = _Wandb(run, name, curves, settings, progress)
            except Exception as error:
                raise OptionError(f"--track {kind}: {_line(error)}; mend that, or leave it out") from error
        yield opened
        ok = True
    finally:
        opened.close(ok)


def check_trackers(kinds: Sequence[str]) -> None:
    """Look whether the packages are there, without loading them.

    Raises:
        OptionError: One is not.
    """
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise OptionError(
                f"--track {kind}: not installed; pip install -c constraints.txt -e '.[track]', or pip install {kind}"
            )


def figures_of(facts: Mapping[str, Any], models: Sequence[str]) -> dict[str, float]:
    """The numbers in nested facts, under names like `fve/base` and `groups/source/chat/n_rows`.

    A list with as many entries as there are models is a figure of each. Other lists (histograms), text and None are
    left out.
    """
    found: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, list | tuple) and len(value) == len(models):
            value = dict(zip(models, value, strict=True))
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": number for key, number in figures_of(value, models).items()}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def _labels(models: Sequence[str]) -> list[str]:
    """Names short enough for a plot: what follows the last slash, or numbers where those are the same."""
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return short if len(set(short)) == len(short) else [str(i) for i in range(len(short))]


def _curves_id(run: Path, name: str, *, new: bool) -> str:
    """The id under which packages know the curves of `name`."""
    path = run / _IDS
    ids = dict(rundir.read_json(path, _IDS_SCHEMA)["ids"]) if path.exists() else {}
    if new or name not in ids:
        ids[name] = secrets.token_hex(4)
        rundir.write_json(path, {"schema": _IDS_SCHEMA, "ids": ids})
    return str(ids[name])


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of the environment inside the block; None takes one away."""
    before = {name: os.environ.get(name) for name in values}

    def put(wanted: Mapping[str, str | None]) -> None:
        for name, value in wanted.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


def _line(error: Exception) -> str:
    """An error of others in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


class _TensorBoard:
    def __init__(self, directory: Path, settings: Mapping[str, Any], start: int):
        # not tensorboard's own writer, which knows no purge_step
        package = importlib.import_module("torch.utils.tensorboard")
        if start == 0:
            shutil.rmtree(directory, ignore_errors=True)
        # what a killed process logged behind its last checkpoint is logged again
        self._writer = package.SummaryWriter(str(directory), purge_step=start + 1 if start else None)
        self._writer.add_text("settings", f"```json\n{json.dumps(dict(settings), indent=1)}\n```", start)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        # its thread has them in a queue, which a kill would lose
        self._writer.flush()

    def close(self, ok: bool) -> None:
        self._writer.close()


class _Trackio:
    """Local only. Its thread writes to the disk, and warns on stderr itself if that fails."""

    def __init__(self, run: Path, name: str, curves: str, settings: Mapping[str, Any], progress: Progress):
        wanted = Path(os.environ.get("TRACKIO_DIR") or run / "trackio").resolve()
        # variables that would make it upload
        ignored = {name: None for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)}
        for variable in ignored:
            progress.say(f"track: trackio writes to this machine only; {variable} is not used")
        with _environment({"TRACKIO_DIR": str(wanted), **ignored}), _offline_hub(), redirect_stdout(io.StringIO()):
            package = importlib.import_module("trackio")
            # an empty context: another seed's run stays open, and so does one that the caller has begun
            self._run = contextvars.Context().run(
                package.init,
                project=_PROJECT,
                name=f"{run.resolve().name}-{name}-{curves}",
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # it reads the variable once, when it is imported
        if Path(package.TRACKIO_DIR).resolve() != wanted:
            progress.say(f"track: trackio was in use before in this process and keeps to {package.TRACKIO_DIR}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, ok: bool) -> None:
        # it says "Uploading logs" even where it does not
        with redirect_stdout(io.StringIO()):
            self._run.finish()


@contextmanager
def _offline_hub() -> Iterator[None]:
    """No request to the Hugging Face Hub inside the block: trackio asks it for the name of a user who is logged in."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class _Wandb:
    def __init__(self, run: Path, name: str, curves: str, settings: Mapping[str, Any], progress: Progress):
        online = os.environ.get("WANDB_MODE") == "online"
        if not online:
            # reports on errors in wandb itself; read by it and by the process that it starts
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        package = importlib.import_module("wandb")
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=f"{run.resolve().name}-{name}",
            id=curves,
            dir=str(run.resolve()),
            mode="online" if online else "offline",
            config=dict(settings),
            resume="allow",
            # another seed's run stays open
            reinit="create_new",
            # it would put itself between the progress bar and the terminal
            settings=package.Settings(console="off", silent=True),
        )
        if online:
            progress.say(f"track: {self._run.url}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)
