from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff.errors import InputError, OptionError
from fastdiff.store.mixed import MixedShuffler, shares
from fastdiff.store.reader import ActivationStore


def make(path: Path, n: int, first: float, d_model: int = 3) -> ActivationStore:
    """Rows whose values are their number, from `first` on."""
    values = (first + np.arange(n, dtype=np.float32))[:, None, None] * np.ones((1, 2, d_model), np.float32)
    with h5py.File(path, "w") as f:
        f.create_dataset("activations", data=values)
    return ActivationStore(path)


def test_every_batch_has_its_shares_and_every_store_its_epochs(tmp_path: Path) -> None:
    with make(tmp_path / "a.h5", 300, 0) as a, make(tmp_path / "b.h5", 50, 1000) as b:
        mixed = MixedShuffler([a, b], [3, 1], batch_size=20, seed=5)
        assert mixed.counts == [15, 5]
        batches = [batch[:, 0, 0].numpy() for batch in mixed.stream(0, 20)]
    assert all((batch[:15] < 1000).all() and (batch[15:] >= 1000).all() for batch in batches)
    assert np.array_equal(np.sort(np.concatenate([batch[:15] for batch in batches])), np.arange(300))
    of_b = np.concatenate([batch[15:] for batch in batches]).reshape(2, 50) - 1000
    assert np.array_equal(np.sort(of_b, axis=1), np.tile(np.arange(50), (2, 1)))  # the small store's two epochs


def test_resuming_and_single_batches_give_the_same(tmp_path: Path) -> None:
    with make(tmp_path / "a.h5", 100, 0) as a, make(tmp_path / "b.h5", 70, 1000) as b:

        def mixed() -> MixedShuffler:
            return MixedShuffler([a, b], [0.5, 0.5], batch_size=9, seed=1, mode="exact")

        whole = list(mixed().stream(0, 30))
        for at in (0, 1, 17, 30):
            assert all(torch.equal(x, y) for x, y in zip(whole[at:], mixed().stream(at, 30), strict=True))
        for step, batch in enumerate(whole):
            assert torch.equal(batch, mixed().batch(step))
            rows_a, rows_b = mixed().row_numbers(step)
            assert np.array_equal(batch[:, 1, 2].numpy(), np.r_[rows_a, 1000 + rows_b])


@pytest.mark.parametrize(
    ("weights", "batch_size", "expected"),
    [([1], 7, [7]), ([1, 1, 1], 10, [4, 3, 3]), ([0.7, 0.3], 4096, [2867, 1229]), ([5, 3, 2], 9, [4, 3, 2])],
)
def test_shares_are_in_proportion_and_sum_to_the_batch(
    weights: list[float], batch_size: int, expected: list[int]
) -> None:
    assert shares(weights, batch_size) == expected


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    for weights in ([0.0, 1], [-1, 1], [float("nan"), 1], [float("inf"), 1]):
        with pytest.raises(OptionError, match="positive numbers"):
            shares(weights, 10)
    with pytest.raises(OptionError, match=r"weight 0.001: less than one row in a batch of 10"):
        shares([1, 0.001], 10)
    with make(tmp_path / "a.h5", 10, 0) as a, make(tmp_path / "b.h5", 10, 0, d_model=4) as b:
        with pytest.raises(OptionError, match="2 stores and 1 weights"):
            MixedShuffler([a, b], [1], batch_size=4, seed=0)
        with pytest.raises(InputError, match=r"holds 2 x 4 float32 .* but .* holds 2 x 3 float32"):
            MixedShuffler([a, b], [1, 1], batch_size=4, seed=0)


def test_the_pools_share_the_memory(tmp_path: Path) -> None:
    with make(tmp_path / "a.h5", 9000, 0) as a, make(tmp_path / "b.h5", 9000, 0) as b:
        mixed = MixedShuffler([a, b], [3, 1], batch_size=400, seed=0, memory_bytes=40_000)
        assert sum(shuffler.pool_bytes for shuffler in mixed.shufflers) <= 40_000
        assert mixed.shufflers[0].pool_bytes > 2 * mixed.shufflers[1].pool_bytes
