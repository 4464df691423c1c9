"""Whether the results in a run directory are those its stages wrote, and the store is the one they were made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fastdiff.errors import InputError
from fastdiff.progress import SILENT, Progress
from fastdiff.rundir import (
    DONE,
    DONE_SCHEMA,
    canonical_json,
    read_json,
    read_manifest,
    read_mark,
    sha256_file,
    sha256_text,
)
from fastdiff.store.format import STORE_FILE
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify import Findings, verify_store

# where each command's results are; train has a directory per seed
_STAGES = {
    "train": "crosscoder/seed-*",
    "attribute": "attribution",
    "analyze": "analysis",
    "annotate": "annotate",
    "compare": "compare",
    "report": "report",
}


class _Done(BaseModel):
    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


def is_run(path: Path) -> bool:
    """True if a directory holds stages, or the manifest of some; it may be a store too."""
    return path.is_dir() and (any(_stages(path)) or (path / "manifest.json").exists())


def verify_run(path: Path, *, quick: bool = False, n_threads: int = 2, progress: Progress = SILENT) -> Findings:
    """Check a run directory: all outputs of its stages, and the identity of the store.

    Args:
        path: The run. If it is a store too, that is checked first.
        quick: As for `verify_store`.
        n_threads: As for `verify_store`.
        progress: Where to report.

    Returns:
        What was found; nothing is raised for a bad run.
    """
    found = Findings(path)
    if (path / STORE_FILE).exists():
        found.merge(verify_store(path, quick=quick, n_threads=n_threads, progress=progress))
    found.merge(_verify_stages(path))
    return found


def _verify_stages(path: Path) -> Findings:
    found = Findings(path)
    n_files = n_stages = 0
    stores, dones = {}, {}
    recorded = _recorded(path, found)
    for name in recorded or {}:
        if name in _STAGES and not any(_directories(path, name)):
            found.add(f"{path / _STAGES[name]}: gone, but manifest.json names it; run `fastdiff {name}` again")
    if not recorded and not any(_stages(path)):
        found.add(f"{path}: no stages in it; run `fastdiff train`, or copy the run again")
    for stage in _stages(path):
        done = _read_done(stage, found)
        if done is None:
            continue
        n_stages += 1
        dones[stage.relative_to(path).as_posix()] = done
        for name, sha256 in done.outputs.items():
            n_files += 1
            if not (stage / name).is_file():
                found.add(f"{stage / name}: gone; run `fastdiff {done.stage}` again")
            elif sha256_file(stage / name) != sha256:
                found.add(f"{stage / name}: changed since it was written; run `fastdiff {done.stage}` again")
        if done.stage == "train" and "store" in done.inputs:
            stores[stage] = done.inputs["store"]
    if stores and recorded is not None:
        _check_store(path, recorded, stores, found)
    _check_chain(path, dones, found)
    found.facts |= {"stages": n_stages, "files": n_files}
    found.text = f"{n_files} files of {n_stages} stages"
    return found


def _stages(path: Path) -> Iterator[Path]:
    for name in _STAGES:
        yield from _directories(path, name)


def _directories(path: Path, stage: str) -> Iterator[Path]:
    for directory in sorted(path.glob(_STAGES[stage])):
        if directory.is_dir():
            yield directory


def _recorded(path: Path, found: Findings) -> dict[str, Any] | None:
    """What the manifest says of each stage, or None if it cannot be read; nothing where only reports are."""
    manifest = path / "manifest.json"
    # reports of older versions are not recorded
    if not manifest.exists() and not any(_directories(path, "train")):
        return {}
    try:
        stages = read_manifest(path).get("stages")
    except InputError as error:
        found.add(str(error))
        return None
    if not isinstance(stages, dict):
        found.add(f"{manifest}: does not say what was run; run `fastdiff train` again")
        return None
    return stages


def _read_done(stage: Path, found: Findings) -> _Done | None:
    if not (stage / DONE).exists():
        found.add(f"{stage}: no {DONE}, the stage was not finished; run it again")
        return None
    try:
        done = _Done.model_validate(read_json(stage / DONE, DONE_SCHEMA))
        key = sha256_text(canonical_json([done.stage, done.config, done.inputs]))
    except InputError as error:
        found.add(str(error))
    except ValidationError as error:
        first = error.errors()[0]
        found.add(f"{stage / DONE}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run the stage again")
    except (ValueError, RecursionError) as error:  # NaN, a lone surrogate, a deep nest
        found.add(f"{stage / DONE}: not what a stage writes ({error}); run the stage again")
    else:
        if key == done.key:
            return done
        found.add(
            f"{stage / DONE}: its key does not fit its stage, config and inputs; run `fastdiff {done.stage}` again"
        )
    return None


def _check_chain(path: Path, dones: dict[str, _Done], found: Findings) -> None:
    """That every stage was made of what the stages before it hold now."""
    own = {f"{where}/{name}": sha256 for where, done in dones.items() for name, sha256 in done.outputs.items()}
    for where, done in dones.items():
        taken = _taken(done)
        changed = sorted(name for name, sha256 in taken.items() if own.get(name, sha256) != sha256)
        if done.stage == "compare":
            for name, run in zip(done.config.get("names", []), done.config.get("paths", []), strict=False):
                now = _outputs(path / run)
                of_run = f"{name}/"
                mine = {k.removeprefix(of_run): v for k, v in done.inputs.items() if k.startswith(of_run)}
                changed += [f"{name}/{key}" for key, sha256 in sorted(mine.items()) if now.get(key, sha256) != sha256]
        if changed:
            files = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            found.add(f"{path / where}: made of another version of {files}; run `fastdiff {done.stage}` again")


def _taken(done: _Done) -> dict[str, str]:
    """Hashes of a stage's inputs by the file of the run that they are of."""
    if done.stage == "annotate":
        return {f"analysis/{name}": sha256 for name, sha256 in done.inputs.items()}
    seeds = {"model": f"seed-{done.config.get('train_seed', 0)}"}
    files = {name: seeds.get(name, name) for name in done.inputs}
    return {
        f"crosscoder/{file}/model.safetensors" if file.startswith("seed-") else file: done.inputs[name]
        for name, file in files.items()
    }


def _outputs(run: Path) -> dict[str, str]:
    """What the stages of a run say they have written, which verifying that run checks; damaged marks say nothing."""
    found: dict[str, str] = {}
    for stage in _stages(run):
        try:
            outputs = read_mark(stage, "")["outputs"]
        except InputError:
            continue
        found |= {f"{stage.relative_to(run).as_posix()}/{name}": sha256 for name, sha256 in outputs.items()}
    return found


def _check_store(path: Path, recorded: dict[str, Any], stores: dict[Path, str], found: Findings) -> None:
    """The store, if it is still where training found it, is the one that was trained on."""
    try:
        where = Path(recorded["train"]["store"])
    except (KeyError, TypeError):
        found.add(f"{path / 'manifest.json'}: does not say where the store is; run `fastdiff train` again")
        return
    if not where.exists():
        found.note(f"{where}: the store is no longer there, so it is not compared")
        return
    try:
        with ActivationStore(where) as store:
            sha256 = store.sha256()
    except InputError as error:
        found.add(str(error))
        return
    for stage, wanted in stores.items():
        if sha256 != wanted:
            found.add(f"{where}: not the store that {stage} was trained on; extract or train again")
    found.note(f"{where}: only its identity was compared; `fastdiff verify {where}` checks what it holds")
