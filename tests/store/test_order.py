"""The block order against a twin in plain Python, written from the specification in csrc/order.hpp."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import _native

WORD = 2**64 - 1


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return _native.permute(n, seed & WORD, epoch, 0, n)


def twin(n: int, seed: int, block: int, pool: int, rank: int, world: int, epoch: int) -> list[np.ndarray]:
    """The windows of one epoch."""
    n_blocks = -(-n // block)
    if block == 1:
        return [permutation(n, seed, epoch)[rank::world]]
    entries = permutation(n_blocks, seed ^ 0xB5297A4D3F84D5A9, epoch)[rank::world]
    if len(entries) == 0:
        return [np.empty(0, np.int64)]
    n_windows = -(-len(entries) // (pool // block))
    windows = []
    for w in range(n_windows):
        ids = np.sort(entries[w * len(entries) // n_windows : (w + 1) * len(entries) // n_windows])
        rows = np.concatenate([np.arange(i * block, min(n, (i + 1) * block)) for i in ids])
        windows.append(rows[permutation(len(rows), seed + (w * world + rank) * 0x9E3779B97F4A7C15, epoch)])
    return windows


AWKWARD = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 251, 1023, 1024, 1025]


@pytest.mark.parametrize("n", AWKWARD)
@pytest.mark.parametrize(("block", "pool"), [(1, 1), (2, 2), (3, 10), (8, 64), (32, 96), (32, 10**6)])
def test_the_order_is_what_the_specification_says(n: int, block: int, pool: int) -> None:
    for world in (1, 2, 5):
        for rank in range(world):
            order = _native.BlockOrder(n, 11, block, pool, rank, world)
            expected = [w for epoch in range(3) for w in twin(n, 11, block, pool, rank, world, epoch)]
            rows = np.concatenate(expected)
            assert [order.rows_in_epoch(e) for e in range(3)] == [
                sum(map(len, twin(n, 11, block, pool, rank, world, e))) for e in range(3)
            ]
            if len(rows) == 0:
                continue
            assert np.array_equal(order.rows(0, len(rows)), rows)
            if block > 1:
                assert max(map(len, expected)) <= order.largest_window <= max(pool, block)
                starts = np.cumsum([0, *map(len, expected)])
                assert [order.left_in_window(int(s)) for s in starts[:-1]] == list(map(len, expected))


@pytest.mark.parametrize("world", range(1, 8))
@pytest.mark.parametrize("n", AWKWARD)
def test_ranks_are_disjoint_and_cover_every_epoch(n: int, world: int) -> None:
    for block, pool in ((1, 1), (4, 16), (32, 64)):
        for epoch in range(3):
            parts = []
            for rank in range(world):
                order = _native.BlockOrder(n, 3, block, pool, rank, world)
                before = sum(order.rows_in_epoch(e) for e in range(epoch))
                if order.rows_in_epoch(epoch):
                    parts.append(order.rows(before, order.rows_in_epoch(epoch)))
            assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 5000),
    seed=st.integers(0, WORD),
    block=st.integers(1, 70),
    pool=st.integers(1, 6000),
    world=st.integers(1, 7),
    where=st.floats(0, 3),
    data=st.data(),
)
def test_any_stretch_of_the_stream_is_that_stretch(n, seed, block, pool, world, where, data) -> None:
    rank = data.draw(st.integers(0, world - 1))
    order = _native.BlockOrder(n, seed, block, max(pool, block), rank, world)
    if order.rows_in_epoch(0) == 0 or order.rows_in_epoch(1) == 0:
        return
    whole = order.rows(0, 3 * n // world + 50)
    start = min(int(where * n / world), len(whole) - 1)
    count = data.draw(st.integers(0, min(500, len(whole) - start)))
    assert np.array_equal(order.rows(start, count), whole[start : start + count])


def test_one_window_is_an_exact_shuffle() -> None:
    for n in (1, 33, 1000):
        order = _native.BlockOrder(n, 5, 32, 1024)
        exact = _native.BlockOrder(n, 5, 1, 1)
        assert np.array_equal(order.rows(0, 3 * n), exact.rows(0, 3 * n))
        assert np.array_equal(order.rows(0, n), permutation(n, 5, 0))


def test_blocks_stay_together_and_windows_are_mixed() -> None:
    n, block, pool = 64_000, 32, 6400
    rows = _native.BlockOrder(n, 0, block, pool).rows(0, n)
    windows = rows.reshape(10, pool)
    blocks = np.sort(windows // block, axis=1).reshape(10, pool // block, block)
    assert (blocks == blocks[:, :, :1]).all()  # whole blocks
    assert len(np.unique(blocks[:, :, 0])) == n // block
    # inside a window a row stands anywhere: the mean distance of a random shuffle is a third
    places = np.argsort(np.argsort(windows, axis=1), axis=1)
    distance = np.abs(places - np.arange(pool)).mean() / pool
    assert abs(distance - 1 / 3) < 0.01
    assert not np.array_equal(rows, _native.BlockOrder(n, 0, block, pool).rows(n, n))


def test_block_order_v1_never_changes() -> None:
    rows = np.concatenate(
        [_native.BlockOrder(10_007, 42, 32, 2048, rank, 3).rows(5_000, 7_000) for rank in range(3)]
    ).astype("<i8")
    golden = "d2abbbc01670b7fa4df7f98863d958e491666ac50521e33135c655e986f447dd"
    assert hashlib.sha256(rows.tobytes()).hexdigest() == golden


def test_a_billion_rows_need_no_memory() -> None:
    order = _native.BlockOrder(10**9, 1, 32, 131_072)
    far = order.rows(7 * 10**9 + 12_345, 1000)
    assert far.min() >= 0
    assert far.max() < 10**9
    assert order.largest_window <= 131_072


def test_impossible_orders_are_refused() -> None:
    for bad in [(0, 0, 32, 64), (2**62 + 1, 0, 1, 1), (10, 0, 0, 1), (10, 0, 32, 31), (10, 0, 1, 1, 2, 2)]:
        with pytest.raises(ValueError, match=r"must be|less than"):
            _native.BlockOrder(*bad)
    for without in (_native.BlockOrder(5, 0, 1, 1), _native.BlockOrder(5, 0, 32, 32, 1, 2)):
        with pytest.raises(ValueError, match="there are no windows"):
            without.left_in_window(0)
    with pytest.raises(ValueError, match="rank 6 has no rows"):
        _native.BlockOrder(5, 0, 1, 1, 6, 7).rows(0, 1)
