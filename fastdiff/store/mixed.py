"""Batches with a fixed share of rows from each of several stores."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.errors import InputError, OptionError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler, default_memory


class MixedShuffler:
    """Batches of which each store gives its share, in a seeded order of its own.

    Every batch holds the same number of rows of a store, the shares rounded to whole rows (largest remainder), in the
    order of the stores: a trainer sums over a batch, so their places in it do not matter. A store with few rows begins
    its next epoch earlier than the others. Batch s of each store is batch s of a `Shuffler`, so all that is said there
    about resuming holds here.

    Args:
        stores: Stores of the same models, width and type.
        weights: Share of each store; they are divided by their sum.
        batch_size: B, rows per batch.
        seed: Of the order.
        memory_bytes: The most memory the pools take together; by default a quarter of what the process may use.
        options: What else a `Shuffler` takes, the same for all stores.

    Attributes:
        shufflers: One per store.
        counts: Rows of each store in a batch.

    Raises:
        OptionError: A weight is not positive or too small for one row per batch, or an option cannot work.
        InputError: The stores do not go together, or one has no rows.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        memory_bytes: int | None = None,
        **options: Any,
    ):
        if len(weights) != len(stores) or not stores:
            raise OptionError(f"{len(stores)} stores and {len(weights)} weights: there must be one weight per store")
        first = stores[0]
        for store in stores[1:]:
            here, there = _kind(store), _kind(first)
            if here != there:
                raise InputError(f"{store.path}: holds {here}, but {first.path} holds {there}; mix equal ones")
        self.counts = shares(weights, batch_size)
        self.shufflers = []
        for store, count in zip(stores, self.counts, strict=True):
            memory = (memory_bytes or default_memory()) * count // batch_size
            self.shufflers.append(Shuffler(store, batch_size=count, seed=seed, memory_bytes=memory, **options))

    def row_numbers(self, step: int) -> list[NDArray[np.int64]]:
        """The row numbers of batch `step` in each store."""
        return [shuffler.row_numbers(step) for shuffler in self.shufflers]

    def batch(self, step: int) -> Tensor:
        """Batch `step`: [B, M, D] in the stored type."""
        return torch.cat([shuffler.batch(step) for shuffler in self.shufflers])

    def stream(self, start: int, stop: int) -> Generator[Tensor]:
        """Batches start, …, stop - 1: [B, M, D] in the stored type, in memory of their own.

        Raises:
            InputError: A store cannot be read, or a check failed.
        """
        with ExitStack() as stack:
            streams = [stack.enter_context(closing(s.stream(start, stop))) for s in self.shufflers]
            for _ in range(start, stop):
                yield torch.cat([next(stream) for stream in streams])


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """Rows of each part in a batch: in proportion to the weights, in sum the batch size, by largest remainder.

    Raises:
        OptionError: A weight is not a positive number, or a part would get no row.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise OptionError(f"weights {', '.join(map(str, weights))}: they must be positive numbers")
    exact = np.array(weights, np.float64) / sum(weights) * batch_size
    counts = np.floor(exact).astype(np.int64)
    first_served = np.argsort(counts - exact, kind="stable")
    counts[first_served[: batch_size - int(counts.sum())]] += 1
    if counts.min() < 1:
        raise OptionError(
            f"weight {weights[int(counts.argmin())]}: less than one row in a batch of {batch_size}; "
            "raise it, or the batch size"
        )
    return [int(count) for count in counts]


def _kind(store: ActivationStore) -> str:
    names = ", ".join(model.name for model in store.meta.models)
    return f"{store.n_models} x {store.d_model} {str(store.dtype).removeprefix('torch.')} of {names}"
