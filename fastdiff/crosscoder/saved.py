"""Finished crosscoders on disk: safetensors for numbers, JSON for the rest, no pickle.

    <run>/crosscoder/seed-0/
        model.safetensors        W_enc [F, M, D], b_enc [F], W_dec [F, M, D], b_dec [M, D], threshold [F],
                                 input_mean [M, D], input_scale [M]; all float32
        config.json              {"schema": 1, "format": "fastdiff-crosscoder", "dict_size", "n_models", "d_model",
                                  "activation", "k", "code_norm", "inputs", "models", "train", "store_sha256",
                                  "n_train", "left_out", "quality", "pool_rows", "steps"}
        best/                    the same two files, of the step that was best so far
        checkpoints/             see `fastdiff.crosscoder.checkpoint`

`n_models` is M, the number of inputs: 1 for a difference. `code_norm` is crosscoder, sae or none; where it is absent,
crosscoder. `inputs` says what of the stored activations is reconstructed (`fastdiff.crosscoder.inputs`); where it is
absent, all. `threshold` is one value repeated for batchtopk (compared with f·S, S the code norm), and per latent for
jumprelu (compared with the pre-activation).
"""

import json
import re
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.crosscoder.model import CodeNorm, Crosscoder
from fastdiff.errors import FastdiffError, InputError
from fastdiff.rundir import atomic_path, canonical_json, read_json, write_json

FORMAT = "fastdiff-crosscoder"
SCHEMA = 1
MODEL, CONFIG = "model.safetensors", "config.json"
_INPUTS = re.compile(r"all|difference|\d+(,\d+)*")


def save_crosscoder(directory: Path, crosscoder: Crosscoder, config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all.

    Raises:
        FastdiffError: A weight is NaN or infinite; nothing is written.
        ResourceError: The disk is full.
    """
    refuse_not_finite(directory, crosscoder)
    write_crosscoder(directory, dict(crosscoder.state_dict()), describe(crosscoder, config))


def refuse_not_finite(directory: Path, crosscoder: Crosscoder) -> None:
    """Say which weight is NaN or infinite, if one is.

    Raises:
        FastdiffError: One is.
    """
    for name, tensor in crosscoder.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise FastdiffError(f"{directory}: {name} holds NaN or infinity; train again with a lower --lr")


def describe(crosscoder: Crosscoder, facts: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a crosscoder, and `facts`."""
    return {
        "schema": SCHEMA,
        "format": FORMAT,
        "dict_size": crosscoder.dict_size,
        "n_models": crosscoder.b_dec.shape[0],
        "d_model": crosscoder.b_dec.shape[1],
        "activation": crosscoder.activation,
        "k": crosscoder.k,
        "code_norm": crosscoder.code_norm_kind,
        "inputs": crosscoder.inputs,
        **facts,
    }


def write_crosscoder(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a crosscoder's state and what `describe` said of it, each file whole or not at all.

    Raises:
        ResourceError: The disk is full.
    """
    save_tensors(directory / MODEL, tensors, {"format": FORMAT, "schema": SCHEMA})
    write_json(directory / CONFIG, config)


def read_config(directory: Path) -> dict[str, Any]:
    """A crosscoder's config.json.

    Raises:
        InputError: It is missing, not JSON, or of another schema.
    """
    config: dict[str, Any] = read_json(directory / CONFIG, SCHEMA, "fastdiff train")
    return config


def load_crosscoder(directory: Path) -> tuple[Crosscoder, dict[str, Any]]:
    """Read what `save_crosscoder` wrote.

    Returns:
        The crosscoder on the CPU, and its config.json.

    Raises:
        InputError: A file is missing, corrupt, of another schema, or its tensors do not fit its config.
    """
    path = directory / CONFIG
    config = read_config(directory)
    if config.get("format") != FORMAT:
        raise InputError(f"{path}: format {config.get('format')!r}, expected {FORMAT!r}")
    try:
        shape = {name: int(config[name]) for name in ("dict_size", "n_models", "d_model", "k")}
        activation = str(config["activation"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: key {error} is missing or no number") from error
    code_norm, inputs = config.get("code_norm", "crosscoder"), config.get("inputs", "all")
    if code_norm not in get_args(CodeNorm):
        raise InputError(f"{path}: code_norm {code_norm!r}, expected one of {', '.join(get_args(CodeNorm))}")
    if not isinstance(inputs, str) or not _INPUTS.fullmatch(inputs):
        raise InputError(f"{path}: inputs {inputs!r}, expected all, difference or numbers of models such as 0,2")
    crosscoder = Crosscoder(activation=activation, code_norm=code_norm, inputs=inputs, **shape)
    load_into(crosscoder, directory / MODEL)
    return crosscoder, config


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; equal tensors give equal bytes in every process.

    Raises:
        ResourceError: The disk is full.
    """
    # one metadata key: with several, safetensors writes them in another order in every process
    with atomic_path(path) as temporary:
        save_file(
            {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
            temporary,
            metadata={"fastdiff": canonical_json(metadata)},
        )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        InputError: It is missing or corrupt.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error


def load_into(crosscoder: Crosscoder, path: Path) -> None:
    """Read a crosscoder's tensors into one of the same shape, which is changed only if all of them fit.

    Raises:
        InputError: The file is missing or corrupt, or of another shape.
    """
    tensors, wanted = load_tensors(path), crosscoder.state_dict()
    for name in wanted.keys() | tensors.keys():
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        if want != got:
            raise InputError(f"{path}: tensor {name} is {got}, but the configuration says {want}")
    with torch.no_grad():
        crosscoder.load_state_dict(tensors)
