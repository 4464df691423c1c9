import numpy as np
import pytest
import torch

from fastdiff import _native
from fastdiff.store.statistics import RunningStats


def rows(n: int, d_model: int, dtype: torch.dtype, shift: float = 30.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + d_model)
    spread = torch.linspace(0.1, 9, d_model)
    return (torch.randn(n, 2, d_model, generator=generator) * spread + torch.linspace(-shift, shift, d_model)).to(dtype)


def check(stats: RunningStats, x: torch.Tensor) -> None:
    found, exact = stats.result(), x.double().numpy()
    assert found is not None and found.n_rows == len(x)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.variance, exact.var(axis=0).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(exact, axis=2).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d_model", [1, 5, 63, 64, 65, 200])
def test_equals_numpy_in_float64_whatever_the_width_and_the_portions(dtype: torch.dtype, d_model: int) -> None:
    x = rows(101, d_model, dtype)
    stats = RunningStats(2, d_model)
    assert stats.result() is None
    for start, stop in [(0, 0), (0, 1), (1, 32), (32, 65), (65, 101)]:
        stats.add(x[start:stop])
    check(stats, x)


def test_rows_need_not_lie_back_to_back() -> None:
    x = rows(90, 40, torch.bfloat16)
    stats = RunningStats(2, 17)
    stats.add(x[::3, :, 3:20])
    check(stats, x[::3, :, 3:20])


def test_a_large_mean_does_not_cancel() -> None:
    # Σx² − n·mean² in float64 would leave 4 digits of this variance
    x = rows(400, 8, torch.float32) * 1e-3 + 1e5
    stats = RunningStats(2, 8)
    for start in range(0, 400, 50):
        stats.add(x[start : start + 50])
    found = stats.result()
    assert found is not None
    np.testing.assert_allclose(found.variance, x.double().numpy().var(axis=0).sum(axis=1), rtol=1e-9)


def test_state_comes_back_bit_for_bit() -> None:
    x = rows(100, 7, torch.bfloat16)
    one = RunningStats(2, 7)
    one.add(x[:50])
    state = one.to_bytes()
    two = RunningStats.from_bytes(state, 2, 7)
    assert two.to_bytes() == state
    for stats in (one, two):
        stats.add(x[50:])
    assert one.to_bytes() == two.to_bytes() != state
    assert one.result() == two.result()


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_state_of_other_sizes_is_refused(cut: int) -> None:
    state = RunningStats(2, 7).to_bytes()
    with pytest.raises(ValueError):
        RunningStats.from_bytes(state[:-cut], 2, 7)
    with pytest.raises(ValueError):
        RunningStats.from_bytes(state, 2, 8)


def test_the_compiled_part_refuses_arrays_that_do_not_fit() -> None:
    mean, norms = np.zeros((2, 5)), np.zeros(2)
    data = np.zeros((3, 2, 5), np.float32)
    assert _native.add_statistics(data, "float32", 4, mean, mean.copy(), norms) == 7
    read_only = np.zeros((2, 5))
    read_only.flags.writeable = False
    for arguments, message in [
        ((data, "float16", 0, mean, mean, norms), "bfloat16 or float32"),
        ((data[:, :, :4].copy(), "float32", 0, mean, mean, norms), "no rows of 40"),
        ((data[:, :, ::2], "float32", 0, mean, mean, norms), "contiguous"),
        ((data, "float32", 0, mean, mean[:, :4], norms), "m2 must be"),
        ((data, "float32", 0, read_only, mean, norms), "mean must be"),
        ((data, "float32", 0, mean.astype(np.float32), mean, norms), "mean must be"),
        ((data, "float32", 0, mean, mean, np.zeros(3)), "for each model"),
        ((data, "float32", 0, mean, mean, np.zeros(0)), "for each model"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.add_statistics(*arguments)
