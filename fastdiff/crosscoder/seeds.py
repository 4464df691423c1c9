"""The crosscoders of a run: which seeds are finished, which can be compared with one, what they were trained on."""

from pathlib import Path
from typing import Any

from fastdiff import rundir
from fastdiff.crosscoder.saved import read_config
from fastdiff.crosscoder.train import directory_of
from fastdiff.errors import InputError
from fastdiff.progress import Progress


def finished_seeds(run: Path) -> dict[int, Path]:
    """The crosscoders of a run, by seed."""
    directories = (path.parent for path in run.glob(f"crosscoder/seed-*/{rundir.DONE}"))
    seeds = {directory.name.removeprefix("seed-"): directory for directory in directories}
    return {int(seed): seeds[seed] for seed in sorted(filter(str.isdecimal, seeds), key=int)}


def first_crosscoder(run: Path) -> Path:
    """Where the crosscoder of the lowest finished seed is; where that of seed 0 will be, if none is finished."""
    return next(iter(finished_seeds(run).values()), directory_of(run, 0))


def store_of(run: Path) -> Path:
    """Where the store is that a run was trained on.

    Raises:
        InputError: It is no longer there.
    """
    manifest = rundir.read_manifest(run)
    path = Path(manifest["stages"]["train"]["store"])
    if not path.exists():
        raise InputError(f"{path}: the store this run was trained on is gone; give its new place with --store")
    return path


def comparable(
    run: Path, finished: dict[int, Path], seed: int, store_sha256: str, progress: Progress
) -> tuple[dict[int, Path], dict[str, str]]:
    """Other seeds whose latents live in the same space, so that they can be matched, and the hashes of their weights.

    A seed that was trained on something else is left out, and that is said.
    """
    others, hashes = {}, {}
    mine = _space(read_config(directory_of(run, seed)))
    for other, directory in finished.items():
        if other == seed:
            continue
        trained = rundir.require_done(directory, f"fastdiff train STORE -o {run} --seed {other}")
        space = _space(read_config(directory))
        differ = ["store"] * (trained["inputs"]["store"] != store_sha256)
        differ += [name for name, value in space.items() if value != mine[name]]
        if differ:
            progress.say(f"analyze: {directory}: of another {differ[0]}, so no latent is compared with its latents")
            continue
        others[other], hashes[f"seed-{other}"] = directory, trained["outputs"]["model.safetensors"]
    return others, hashes


def _space(facts: dict[str, Any]) -> dict[str, Any]:
    """What decides, beside the store, which space decoder rows live in."""
    settings = facts["train"]
    return {
        "number of models": facts["n_models"],
        "width": facts["d_model"],
        "--inputs": settings.get("inputs", "all"),
        "--normalize": settings["normalize"],
    }
