"""Whether the results in a run directory are those its stages wrote, and the store is the one they were made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fastdiff.errors import InputError
from fastdiff.run import DONE, canonical_json, read_json, sha256_file, sha256_text
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify import Findings

# crosscoder has a directory per seed
_STAGES = ("crosscoder/seed-*", "analysis", "annotate", "compare", "report")


class _Done(BaseModel):
    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


def is_run(path: Path) -> bool:
    """True if a directory holds stages, and is no store."""
    return path.is_dir() and (any(_stages(path)) or (path / "manifest.json").exists())


def verify_run(path: Path) -> Findings:
    """Check a run directory: all outputs of its stages, and the identity of the store.

    Args:
        path: The run.

    Returns:
        What was found; nothing is raised for a bad run.
    """
    found = Findings(path)
    n_files = n_stages = 0
    stores = {}
    for stage in _stages(path):
        done = _read_done(stage, found)
        if done is None:
            continue
        n_stages += 1
        for name, sha256 in done.outputs.items():
            n_files += 1
            if not (stage / name).is_file():
                found.add(f"{stage / name}: gone; run `fastdiff {done.stage}` again")
            elif sha256_file(stage / name) != sha256:
                found.add(f"{stage / name}: changed since it was written; run `fastdiff {done.stage}` again")
        if done.stage == "train" and "store" in done.inputs:
            stores[stage] = done.inputs["store"]
    _check_store(path, stores, found)
    found.facts |= {"stages": n_stages, "files": n_files}
    found.text = f"{n_files} files of {n_stages} stages"
    return found


def _stages(path: Path) -> Iterator[Path]:
    for pattern in _STAGES:
        for directory in sorted(path.glob(pattern)):
            if directory.is_dir():
                yield directory


def _read_done(stage: Path, found: Findings) -> _Done | None:
    if not (stage / DONE).exists():
        found.add(f"{stage}: no {DONE}, the stage was not finished; run it again")
        return None
    try:
        done = _Done.model_validate(read_json(stage / DONE))
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


def _check_store(path: Path, stores: dict[Path, str], found: Findings) -> None:
    """The store, if it is still where training found it, is the one that was trained on."""
    if not stores:
        return
    try:
        where = Path(read_json(path / "manifest.json")["stages"]["train"]["store"])
    except InputError as error:
        found.add(str(error))
        return
    except (KeyError, TypeError, RecursionError):
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
