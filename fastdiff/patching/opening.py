"""Language models opened again: each must be what the store recorded, and compute what the store holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdiff.errors import InputError
from fastdiff.extraction.models import Hook, ModelSource, describe, load, weights_sha256
from fastdiff.patching.documents import Document
from fastdiff.patching.refusal import CannotRun
from fastdiff.store.format import TORCH_DTYPES
from fastdiff.store.reader import ActivationStore

# mean squared distance of what a model computes to what is stored, as a share of the variance: another precision or
# device stays far below, another token, model or position far above
_MAX_DISTANCE = 0.05


@dataclass(frozen=True)
class Target:
    """A model, and where in it the activations were read."""

    index: int  # among those that the caller works on
    number: int  # among the store's
    source: ModelSource
    dtype: torch.dtype | Literal["auto"]
    layer: int
    hook: Hook


def find_target(store: ActivationStore, index: int, number: int, caller: str) -> Target:
    """A model that is what the store recorded.

    Args:
        store: Where its activations are.
        index: Its place among those that the caller works on.
        number: Its number in the store.
        caller: The option or command that needs it, for messages.

    Raises:
        CannotRun: It is not, or the store does not say where the activations were taken.
    """
    info = store.meta.models[number]
    hook = next((hook for hook in get_args(Hook) if hook == info.hook), None)
    if info.layer is None or hook is None:
        raise CannotRun(
            f"{store.path}: does not say at which layer and hook {info.name} was read",
            f"{caller} needs both; make the store with fastdiff extract",
        )
    # what was a directory must not be looked for on the Hub
    if info.weights_sha256 is not None and not Path(info.name).is_dir():
        raise CannotRun(
            f"{info.name}: no such directory, and {store.path} was extracted from it",
            "put it back, or run where fastdiff extract was run",
        )
    try:
        source = describe(info.name)
    except InputError as error:
        raise CannotRun(str(error), f"put back the model that {store.path} was extracted from") from error
    if not 0 <= info.layer < source.n_layers or source.d_model != store.d_model:
        raise CannotRun(
            f"{info.name}: has {source.n_layers} layers of width {source.d_model}, but {store.path} has "
            f"activations of layer {info.layer} and width {store.d_model}",
            "put back the model that was stored, or extract again",
        )
    recorded = (info.weights_sha256, info.revision)
    # a store of another tool may know neither; then only what the model computes is compared
    if recorded != (None, None) and recorded != (weights_sha256(info.name), source.revision):
        raise CannotRun(f"{info.name}: has changed since {store.path} was extracted", "put it back, or extract again")
    return Target(index, number, source, TORCH_DTYPES.get(info.dtype or "", "auto"), info.layer, hook)


def open_model(
    target: Target, dtype: torch.dtype | Literal["auto"], device: torch.device, *, head: bool = True
) -> PreTrainedModel:
    """Load a model whole.

    Raises:
        CannotRun: Its weights are damaged, or lack a parameter.
    """
    try:
        return load(target.source.name, dtype, device, head=head)
    except InputError as error:
        raise CannotRun(str(error), "put back a model with its head, saved as safetensors") from error


def check_fits(source: ModelSource, documents: Sequence[Document]) -> None:
    """Refuse ids and positions that a model has no embedding for; fastdiff's own stores have none.

    Raises:
        CannotRun: There are some.
    """
    largest = max(int(document.ids.max()) for document in documents)
    longest = max(len(document.ids) for document in documents)
    limit = getattr(source.config, "max_position_embeddings", None) or longest
    if largest >= source.config.vocab_size or longest > limit:
        raise CannotRun(
            f"{source.name}: embeds {source.config.vocab_size} tokens and {limit} positions, but the store has "
            f"token id {largest} and a document of {longest}",
            "it is not the model that was stored; put that one back, or extract again",
        )


def check_same(store: ActivationStore, target: Target, computed: Tensor, stored: Tensor) -> None:
    """Refuse a model, tokens or positions that do not give the stored activations [n, D].

    Raises:
        CannotRun: They are further apart than another precision puts them.
    """
    squares = float((computed.double() - stored.double()).square().sum())
    variance = store.stats().variance[target.number] * len(stored)
    if not squares <= _MAX_DISTANCE * variance:
        raise CannotRun(
            f"{target.source.name}: does not compute what {store.path} holds (squared distance "
            f"{squares / variance if variance else math.inf:.3g} of the variance)",
            "extract it again",
        )
