import numpy as np
import pytest

from fastdiff import _native

WORD = 2**64 - 1


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def order_v1(n: int, seed: int, epoch: int, x: int) -> int:
    """The specification in csrc/permutation.hpp, in Python."""
    state, keys = mix(mix(seed) ^ epoch), []
    for i in range(6):
        state = mix((state + i) & WORD)
        keys.append(state)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        x = (left << half) | right
        if x < n:
            return x


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 1000, 65537])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 0), (WORD, 123456789)])
def test_order_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    got = _native.permute(n, seed, epoch, 0, n)
    assert got.dtype == np.int64
    assert np.array_equal(np.sort(got), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 1000, 65537, 10**12 + 39, 2**62])
def test_order_equals_its_specification(n: int) -> None:
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (WORD, 5), (3, WORD)]:
        for start in {0, n // 2, max(0, n - 50)}:
            count = min(50, n - start)
            expected = [order_v1(n, seed, epoch, start + i) for i in range(count)]
            assert _native.permute(n, seed, epoch, start, count).tolist() == expected


def test_order_v1_never_changes() -> None:
    assert _native.permute(1000, 0, 0, 0, 8).tolist() == [499, 705, 678, 603, 168, 274, 708, 670]
    assert _native.permute(1000, 1, 2, 500, 4).tolist() == [620, 962, 805, 601]


def test_seeds_and_epochs_give_unlike_orders() -> None:
    n = 4096
    orders = [_native.permute(n, seed, epoch, 0, n) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in [np.arange(n), *orders[:i]]:
            # equal places of two random permutations are Poisson with mean 1
            assert int((one == other).sum()) < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_order_spreads_neighbours() -> None:
    # rows that lie together must not stay together: positions against sources in a 16 x 16 table
    n = 65536
    got = _native.permute(n, 5, 0, 0, n)
    table = np.histogram2d(np.arange(n), got, bins=16)[0]
    chi2 = float(((table - n / 256) ** 2 / (n / 256)).sum())
    assert chi2 < 225 + 5 * np.sqrt(2 * 225)
    assert int((np.abs(np.diff(got)) == 1).sum()) < 20


def test_impossible_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to"):
        _native.permute(0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="reach past n = 10"):
        _native.permute(10, 0, 0, 5, 6)
    with pytest.raises(ValueError, match="reach past"):
        _native.permute(10, 0, 0, WORD, 2)
    with pytest.raises(TypeError):
        _native.permute(10, -1, 0, 0, 1)
