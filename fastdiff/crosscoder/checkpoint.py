"""Crosscoders on disk: safetensors for numbers, JSON for the rest, no pickle.

    <run>/crosscoder/seed-0/
        model.safetensors        W_enc [F, M, D], b_enc [F], W_dec [F, M, D], b_dec [M, D], threshold [F],
                                 input_mean [M, D], input_scale [M]; all float32
        config.json              {"schema": 1, "format": "fastdiff-crosscoder", "dict_size", "n_models", "d_model",
                                  "activation", "k", "models", "train", "store_sha256", "n_train",
                                  "pool_rows", "steps"}
        checkpoints/step-000500/ model.safetensors, optimizer.safetensors, state.json

`threshold` is one value repeated for batchtopk (compared with f·Σ‖W_dec‖), and per latent for jumprelu (compared
with the pre-activation). A checkpoint directory appears by rename, whole or not at all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import FastdiffError, InputError
from fastdiff.run import SCHEMA, atomic_path, canonical_json, fsync_directory, read_json, write_json

FORMAT = "fastdiff-crosscoder"
MODEL, CONFIG = "model.safetensors", "config.json"
# one to go back to while the next is being written, one in case that write was the last thing that happened
_KEEP = 2


def save_crosscoder(directory: Path, crosscoder: Crosscoder, config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all.

    Raises:
        FastdiffError: A weight is NaN or infinite; nothing is written.
    """
    for name, tensor in crosscoder.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise FastdiffError(f"{directory}: {name} holds NaN or infinity; train again with a lower --lr")
    config = {
        "schema": SCHEMA,
        "format": FORMAT,
        "dict_size": crosscoder.dict_size,
        "n_models": crosscoder.b_dec.shape[0],
        "d_model": crosscoder.b_dec.shape[1],
        "activation": crosscoder.activation,
        "k": crosscoder.k,
        **config,
    }
    _save_tensors(directory / MODEL, dict(crosscoder.state_dict()), {"format": FORMAT, "schema": SCHEMA})
    write_json(directory / CONFIG, config)


def load_crosscoder(directory: Path) -> tuple[Crosscoder, dict[str, Any]]:
    """Read what `save_crosscoder` wrote.

    Returns:
        The crosscoder on the CPU, and its config.json.

    Raises:
        InputError: A file is missing, corrupt, of another schema, or its tensors do not fit its config.
    """
    config = read_json(directory / CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(f"{directory / CONFIG}: format {config.get('format')!r}, expected {FORMAT!r}")
    try:
        shape = {name: int(config[name]) for name in ("dict_size", "n_models", "d_model", "k")}
        activation = str(config["activation"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / CONFIG}: key {error} is missing or no number") from error
    crosscoder = Crosscoder(activation=activation, **shape)
    _load_into(crosscoder, directory / MODEL)
    return crosscoder, config


def save_checkpoint(
    directory: Path, step: int, crosscoder: Crosscoder, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write the full training state after `step` steps and drop all but the newest two."""
    target = directory / f"step-{step:06d}"
    temporary = directory / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_tensors(temporary / MODEL, dict(crosscoder.state_dict()), {"format": FORMAT, "schema": SCHEMA})
    _save_tensors(temporary / "optimizer.safetensors", tensors, {"schema": SCHEMA})
    write_json(temporary / "state.json", {"schema": SCHEMA, "step": step, **state})
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    fsync_directory(directory)
    for old in _checkpoints(directory)[:-_KEEP]:
        shutil.rmtree(old)


def load_checkpoint(directory: Path, crosscoder: Crosscoder) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load the newest checkpoint into `crosscoder`.

    Returns:
        The optimizer's tensors and the state, or None if there is no checkpoint.

    Raises:
        InputError: It is corrupt or of another schema.
    """
    found = _checkpoints(directory)
    if not found:
        return None
    state = read_json(found[-1] / "state.json")
    _load_into(crosscoder, found[-1] / MODEL)
    return _load_tensors(found[-1] / "optimizer.safetensors"), state


def has_checkpoint(directory: Path) -> bool:
    """True if there is something to continue from."""
    return bool(_checkpoints(directory))


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    # one metadata key: with several, safetensors writes them in another order in every process
    with atomic_path(path) as temporary:
        save_file(
            {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
            temporary,
            metadata={"fastdiff": canonical_json(metadata)},
        )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error


def _load_into(crosscoder: Crosscoder, path: Path) -> None:
    tensors, wanted = _load_tensors(path), crosscoder.state_dict()
    for name in wanted.keys() | tensors.keys():
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        if want != got:
            raise InputError(f"{path}: tensor {name} is {got}, but its config.json says {want}")
    with torch.no_grad():
        crosscoder.load_state_dict(tensors)
