"""Run directories: one writer at a time, whole files or none, and stages skipped by hash.

    run/  fastdiff.yaml  manifest.json  events.jsonl  .lock  <stage>/…  <stage>/DONE.json

A stage is a directory whose `DONE.json` is written last:

    {"schema": 1, "stage": …, "key": …, "config": {…}, "inputs": {name: sha256}, "outputs": {path: sha256}}

`key` is the sha256 of stage, config and inputs. A stage counts as done only while its key is the wanted one
and every output still has the hash written there; a file that merely exists proves nothing. No hashed file
holds the time of day.

Every stage goes through the same frame, so that none forgets a part of it:

    with rundir.locked(run) as lock:
        …                                        # read the inputs, which nobody else can change now
        stage = lock.stage(directory, "analyze", settings, inputs, OUTPUTS)
        if stage.up_to_date():
            return
        …                                        # refuse what cannot be done; earlier results still stand
        with stage:                              # takes the mark away; an exception puts it back where all is intact
            …                                    # write the outputs
                                                 # recorded in fastdiff.yaml and manifest.json, and only then done
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

import fastdiff
from fastdiff.errors import InputError, LockedError, OptionError, ResourceError

DONE, MANIFEST = "DONE.json", "manifest.json"
_CONFIG = "fastdiff.yaml"
# the mark of the result that a stage is about to replace
_BEFORE = ".DONE.json.before"
# each file format has a number of its own, beside what writes it
DONE_SCHEMA = 1
MANIFEST_SCHEMA = 1


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def sha256_text(text: str) -> str:
    """Hex sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def fsync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Say in one line that the disk, or the user's share of it, is full."""
    try:
        yield
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        # safetensors and SQLite have errors of their own for it
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(words in str(error) for words in ("No space left", "disk is full", "File too large")):
            raise ResourceError(f"{path}: no space left on the device; free some and run again") from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; rename it to `path` once the block has ended well.

    Raises:
        ResourceError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fd = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
            fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, schema: int | None, command: str | None = None) -> Any:
    """Read JSON and check its schema number.

    Args:
        path: The file.
        schema: The number that this fastdiff reads and writes; None for a file that has none.
        command: What makes the file anew, for the message.

    Raises:
        InputError: The file is missing, not JSON, or of another schema.
    """
    again = f"; run `{command}` again" if command else ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{again}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}){again}") from error
    if schema is not None and (not isinstance(value, dict) or value.get("schema") != schema):
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{path}: schema {found!r}, but this fastdiff ({fastdiff.__version__}) reads {schema}{again}")
    return value


@contextmanager
def locked(directory: Path) -> Iterator["Lock"]:
    """Hold the directory's `.lock`, so that no second process writes there.

    Yields:
        What stages of this directory are made with.

    Raises:
        LockedError: Another process holds it; the message says which.
        OptionError: The directory cannot be made or written to.
        ResourceError: The disk is full.
    """
    try:
        with full_disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{directory}: cannot be written to ({error.strerror}); choose another directory") from error
    with lock as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            f.seek(0)
            holder = f.read().strip() or "another process"
            raise LockedError(f"{directory}: {holder} is writing here; wait for it to end") from error
        with full_disk(directory):
            f.seek(0)
            f.truncate()
            f.write(f"process {os.getpid()} on {platform.node()}")
            f.flush()
        yield Lock(directory)


@dataclass(frozen=True)
class Lock:
    """That this process alone writes to a run; only through it are stages made."""

    run: Path

    def stage(
        self,
        directory: Path,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        *,
        schemas: Mapping[str, int] | None = None,
        recorded: bool = True,
        no_options: Sequence[str] = (),
    ) -> "Stage":
        """A stage of this run.

        Args:
            directory: Where its results are.
            name: The command that makes it.
            settings: Its resolved configuration.
            inputs: sha256 of all it reads, by name.
            outputs: The files it writes, relative to `directory`.
            schemas: Schema numbers of those among `outputs` that are JSON with one; in another they are not up to date.
            recorded: Whether fastdiff.yaml and manifest.json of the run speak of it.
            no_options: Those of `settings` that no option sets, so that fastdiff.yaml, which `-c` reads, has no place
                for them.
        """
        return Stage(
            self.run,
            directory,
            name,
            dict(settings),
            dict(inputs),
            tuple(outputs),
            dict(schemas or {}),
            recorded,
            tuple(no_options),
        )


@dataclass(frozen=True)
class Stage:
    """One stage of a run, see the module: its files change only inside `with stage:`.

    Leaving that block well records the stage and then marks it as done, in this order: a process that dies in between
    leaves a stage that is done again, instead of one that counts as done and that the manifest knows nothing of.
    Leaving it by an exception does neither; then the result that was there before still counts, if all of its files
    are as they were.
    """

    run: Path
    directory: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    schemas: dict[str, int]
    recorded: bool
    no_options: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # what the manifest is to say beside the usual

    def up_to_date(self) -> bool:
        """True if the directory holds this very stage, complete, unchanged and in the formats of today."""
        return is_done(self.directory, self.name, self.settings, self.inputs) and all(
            read_json(self.directory / file, None).get("schema") == schema for file, schema in self.schemas.items()
        )

    def begin(self) -> None:
        """Take the mark away, for a stage whose files change before the block that ends it.

        Raises:
            InputError: The run's records cannot be read, so the stage could not be recorded when it has ended.
        """
        if self.recorded:
            _records(self.run)
        begin(self.directory)

    def __enter__(self) -> "Stage":
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            _restore(self.directory)
            return
        if self.recorded:
            options = {name: value for name, value in self.settings.items() if name not in self.no_options}
            record(self.run, self.name, options, **self.facts)
        finish(self.directory, self.name, self.settings, self.inputs, self.outputs)


def is_done(directory: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """True if `directory` holds this very stage, complete and unchanged."""
    path = directory / DONE
    if not path.exists():
        return False
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # a damaged mark is none
    if isinstance(done, dict) and "schema" in done:
        read_json(path, DONE_SCHEMA)  # one of a later fastdiff is not overwritten
    if not _is_mark(done):
        return False
    if done.get("key") != _stage_key(stage, config, inputs):
        return False
    return _changed_output(directory, done) is None


def begin(directory: Path) -> None:
    """Take the stage's mark away before its files change; `_restore` puts it back."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / DONE).exists():
        (directory / DONE).replace(directory / _BEFORE)


def _restore(directory: Path) -> None:
    """Put the mark that `begin` took away back if it is still true; a rename, so that a full disk does not matter."""
    before = directory / _BEFORE
    try:
        done = json.loads(before.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if _is_mark(done) and _changed_output(directory, done) is None:
        before.replace(directory / DONE)


def _is_mark(done: Any) -> bool:
    return isinstance(done, dict) and all(isinstance(done.get(name), dict) for name in ("config", "inputs", "outputs"))


def finish(
    directory: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], outputs: Iterable[str]
) -> None:
    """Mark a stage as done: hash its outputs and write `DONE.json`."""
    write_json(
        directory / DONE,
        {
            "schema": DONE_SCHEMA,
            "stage": stage,
            "key": _stage_key(stage, config, inputs),
            "config": dict(config),
            "inputs": dict(inputs),
            "outputs": {name: sha256_file(directory / name) for name in outputs},
        },
    )
    (directory / _BEFORE).unlink(missing_ok=True)


def read_mark(directory: Path, command: str) -> dict[str, Any]:
    """The stage's `DONE.json`, whether or not what it says of the files is still true.

    Raises:
        InputError: It is missing or damaged; `command` makes it anew.
    """
    done: dict[str, Any] = read_json(directory / DONE, DONE_SCHEMA, command)
    if not _is_mark(done):
        raise InputError(f"{directory / DONE}: not the mark of a stage; run `{command}` again")
    return done


def require_done(directory: Path, command: str) -> dict[str, Any]:
    """The stage's `DONE.json`.

    Raises:
        InputError: The stage has not run, was cut off, or one of its files has changed since.
    """
    if not (directory / DONE).exists():
        raise InputError(f"{directory}: not there or not complete; run `{command}` first")
    done = read_mark(directory, command)
    changed = _changed_output(directory, done)
    if changed is not None:
        raise InputError(f"{directory / changed}: gone or changed since it was written; run `{command}` again")
    return done


def _changed_output(directory: Path, done: Mapping[str, Any]) -> str | None:
    """The first output that is gone or has another hash than its stage wrote down."""
    for name, sha in done["outputs"].items():
        if not (directory / name).is_file() or sha256_file(directory / name) != sha:
            return str(name)
    return None


def _stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return sha256_text(canonical_json([stage, dict(config), dict(inputs)]))


def record(run: Path, stage: str, config: Mapping[str, Any], **facts: Any) -> None:
    """Put a stage's resolved configuration in `fastdiff.yaml` and what it ran with in `manifest.json`.

    Raises:
        InputError: One of the two is there and cannot be read.
    """
    _, manifest = _records(run)
    if config:
        write_section(run, stage, config)
    manifest["stages"][stage] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "versions": versions(),
        **facts,
    }
    write_json(run / MANIFEST, manifest)


def write_section(run: Path, stage: str, config: Mapping[str, Any]) -> None:
    """Put a stage's resolved configuration in `fastdiff.yaml`, unless it is there.

    Raises:
        InputError: The file is there and cannot be read.
    """
    resolved, _ = _records(run)
    if resolved.get(stage) != dict(config):
        sections = {**resolved, stage: dict(config)}
        write_text(run / _CONFIG, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))


def _records(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What fastdiff.yaml and manifest.json say; new ones where there are none."""
    config_path = run / _CONFIG
    try:
        resolved = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.exists() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{config_path}: not readable as YAML; delete it and run again") from error
    if not isinstance(resolved, dict | None):
        raise InputError(f"{config_path}: no sections in it; delete it and run again")
    manifest: dict[str, Any] = {"schema": MANIFEST_SCHEMA, "stages": {}}
    return resolved or {}, read_manifest(run) if (run / MANIFEST).exists() else manifest


def read_manifest(run: Path) -> dict[str, Any]:
    """The run's `manifest.json`: under `stages`, what each was run with.

    Raises:
        InputError: It is missing, not readable, or of another schema.
    """
    command = f"fastdiff train STORE -o {run}"
    manifest: dict[str, Any] = read_json(run / MANIFEST, MANIFEST_SCHEMA, command)
    if not isinstance(manifest.get("stages"), dict):
        raise InputError(f"{run / MANIFEST}: names no stages; run `{command}` again")
    return manifest


def versions() -> dict[str, str]:
    """Versions of Python, fastdiff and what its results depend on."""
    found = {"python": platform.python_version(), "fastdiff": fastdiff.__version__}
    for name in ("torch", "triton", "transformers", "tokenizers", "numpy", "h5py", "safetensors", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Events:
    """The run's `events.jsonl`: one line per fact, appended, with the time of day."""

    def __init__(self, run: Path):
        run.mkdir(parents=True, exist_ok=True)
        self._path = run / "events.jsonl"

    def write(self, stage: str, **facts: Any) -> None:
        """Append one line. A value that JSON cannot hold (NaN) becomes null.

        Raises:
            ResourceError: The disk is full.
        """
        line = {"time": round(time.time(), 3), "stage": stage, **facts}
        with full_disk(self._path), self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(finite(line), ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become null, wherever they stand in it."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
