"""What a crosscoder reads of stored activations [B, M_stored, D]: all models, some of them, or a difference.

    all          every model: a crosscoder
    0   1,2      those, by number: one of them is a plain sparse autoencoder
    difference   model 1 - model 0, M = 1: a difference-SAE

A store may hold any sources that share their tokens: models, checkpoints of one training, layers.
"""

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError, OptionError
from fastdiff.store.format import Stats
from fastdiff.store.reader import ActivationStore
from fastdiff.store.statistics import RunningStats

# rows read at a time for the statistics of a difference
_PASS_ROWS = 4096


def chosen_models(inputs: str, n_stored: int) -> list[int]:
    """Numbers of the models that take part, of `n_stored`.

    Raises:
        OptionError: There is no such model, or one is named twice.
    """
    numbers = {"all": list(range(n_stored)), "difference": [0, 1]}.get(inputs)
    if numbers is None:
        numbers = [int(part) for part in inputs.split(",") if part]
    if not numbers or max(numbers) >= n_stored or len(set(numbers)) < len(numbers):
        raise OptionError(
            f"--inputs {inputs}: the store has {n_stored} models, numbered from 0; name each at most once"
        )
    return numbers


def n_inputs(inputs: str, n_stored: int) -> int:
    """M of the crosscoder."""
    numbers = chosen_models(inputs, n_stored)
    return 1 if inputs == "difference" else len(numbers)


def input_names(inputs: str, models: list[str]) -> list[str]:
    """A name for each of the M inputs, given those of the stored models."""
    return ["difference"] if inputs == "difference" else [models[i] for i in chosen_models(inputs, len(models))]


def take(x: Tensor, inputs: str) -> Tensor:
    """The inputs [B, M, D] of stored activations [B, M_stored, D]; a difference is float32, the rest as stored."""
    if inputs == "all":
        return x
    if inputs == "difference":
        return x[:, 1:2].float() - x[:, :1].float()
    return x[:, chosen_models(inputs, x.shape[1])].contiguous()


def input_stats(store: ActivationStore, inputs: str) -> tuple[Tensor, Tensor]:
    """Mean [M, D] and total variance [M] of the inputs over the store's usable rows, float64.

    Raises:
        InputError: A value is NaN or infinite.
    """
    stats: Stats | None = store.stats()
    assert stats is not None
    if inputs != "difference":
        models = chosen_models(inputs, store.n_models)
        mean, variance = np.asarray(stats.mean), np.asarray(stats.variance)
        return torch.from_numpy(mean[models]), torch.from_numpy(variance[models])
    usable = store.usable_rows()
    rows = np.arange(store.n_rows, dtype=np.int64) if usable is None else usable
    running = RunningStats(1, store.d_model)
    for start in range(0, len(rows), _PASS_ROWS):
        running.add(take(store.rows(rows[start : start + _PASS_ROWS]), inputs))
    stats = running.result()
    assert stats is not None  # the store's own statistics would have refused
    if not np.isfinite(stats.variance).all():
        raise InputError(f"{store.path}: a difference of activations is NaN or infinite; extract the store again")
    return torch.tensor(stats.mean, dtype=torch.float64), torch.tensor(stats.variance, dtype=torch.float64)
