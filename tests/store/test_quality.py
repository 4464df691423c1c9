"""Shuffle quality: figures against brute force, known orders, and the law of block orders."""

import itertools

import numpy as np
import pytest

from fastdiff import _native
from fastdiff.store.quality import block_excess, shuffle_quality


def documents(n, mean, seed=0):
    """Documents of lognormal lengths, n rows in all: (n,) ids that are neither dense nor ascending."""
    length = np.maximum(1, np.random.default_rng(seed).lognormal(np.log(mean) - 0.32, 0.8, 4 * n // mean + 8))
    return (np.repeat(np.arange(len(length)), length.astype(int))[:n] * 7919 + 5) % 1_000_003


def block_order(n, block_rows, pool_rows, seed):
    """Blocks in random order, mixed within windows of pool_rows rows."""
    random = np.random.default_rng(seed)
    rows = (random.permutation(n // block_rows)[:, None] * block_rows + np.arange(block_rows)).ravel()
    return np.concatenate([random.permutation(rows[i : i + pool_rows]) for i in range(0, n, pool_rows)])


def test_counts_agree_with_brute_force():
    n, B = 103, 10
    ids = documents(n, 9)
    rows = np.random.default_rng(3).permutation(n)
    found = shuffle_quality(rows, ids, batch_size=B)
    partners = [
        sum(ids[j] == ids[i] for j in batch if j != i)
        for batch in rows[: n // B * B].reshape(-1, B).tolist()
        for i in batch
    ]
    pairs = [ids[i] == ids[j] for i, j in itertools.permutations(range(n), 2)]
    assert found.n_rows == 100
    assert found.partners == pytest.approx(np.mean(partners))
    assert found.partners_exact == pytest.approx((B - 1) * np.mean(pairs))
    assert found.adjacent == pytest.approx(np.mean([ids[a] == ids[b] for a, b in itertools.pairwise(rows)]))
    assert found.adjacent_exact == pytest.approx(np.mean(pairs))
    assert found.displacement == pytest.approx(np.mean([abs(int(r) - p) / n for p, r in enumerate(rows)]))
    cells = [[0.0] * 16 for _ in range(16)]
    for position, row in enumerate(rows.tolist()):
        cells[row * 16 // n][position * 16 // n] += 1
    size = [sum(p * 16 // n == i for p in range(n)) for i in range(16)]
    chi = sum((cells[i][j] - size[i] * size[j] / n) ** 2 * n / size[i] / size[j] for i in range(16) for j in range(16))
    assert found.chi_square == pytest.approx(chi / 225)


def test_source_order_is_the_worst():
    n, B, length = 1 << 14, 256, 1024
    found = shuffle_quality(np.arange(n), np.arange(n) // length, batch_size=B, rho=0.2, n_effects=64)
    assert found.partners == B - 1
    assert found.adjacent == pytest.approx(1 - (n // length - 1) / (n - 1))
    assert found.displacement == 0
    assert found.chi_square == pytest.approx(n * 15 / 225)
    # every batch is of one document: 1 + rho·(B - 1), less the document effects' share in the mean over all
    assert found.deff == pytest.approx(1 + 0.2 * (B - 1), rel=0.15)
    assert found.deff_expected == pytest.approx(1 + 0.2 * (B - 1 - found.partners_exact))


def test_the_seeded_permutation_is_perfect():
    n, B = 1 << 17, 256
    found = shuffle_quality(
        lambda position, count: _native.permute(n, 11, 0, position, count), documents(n, 300), batch_size=B
    )
    assert found.partners == pytest.approx(found.partners_exact, rel=0.02)
    assert found.adjacent == pytest.approx(found.adjacent_exact, abs=5 * np.sqrt(found.adjacent_exact / n))
    assert abs(found.deff - 1) < 5 * found.deff_error < 0.15
    assert found.displacement == pytest.approx(1 / 3, abs=0.005)
    assert found.chi_square == pytest.approx(1, abs=5 * np.sqrt(2 / 225))


@pytest.mark.parametrize(("block_rows", "pool_rows"), [(8, 4096), (16, 8192), (32, 4096), (32, 16384)])
def test_a_block_order_follows_the_law(block_rows, pool_rows):
    n, B, rho = 1 << 18, 512, 0.2
    found = shuffle_quality(
        block_order(n, block_rows, pool_rows, 5), np.arange(n) // 4096, batch_size=B, rho=rho, n_effects=16
    )
    excess = block_excess(rho, B, block_rows, pool_rows)
    # blocks of one document lie beside each other too, which a pool of a sixteenth of the data lowers by as much
    assert rho * (found.partners - found.partners_exact) == pytest.approx(excess * (1 - pool_rows / n), rel=0.06)
    assert found.deff - 1 == pytest.approx(excess, abs=5 * found.deff_error + 0.06 * excess)
    assert found.deff == pytest.approx(found.deff_expected, abs=5 * found.deff_error)
    assert found.chi_square > 0.4 * block_rows
    assert found.displacement == pytest.approx(1 / 3, abs=0.02)


def test_the_law_at_one_row_per_block_and_at_the_default():
    assert block_excess(0.2, 4096, 1, 1 << 18) == 0
    assert block_excess(0.2, 2048, 32, 131072) == pytest.approx(0.2 * 2048 * 31 / 131072)


def test_the_simulated_values_depend_on_the_seed_only():
    ids, rows = documents(4096, 50), np.random.default_rng(0).permutation(4096)
    first, again, other = (shuffle_quality(rows, ids, batch_size=64, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.deff != other.deff and first.partners == other.partners


def test_without_a_document_effect_no_order_is_bad():
    n = 1 << 14
    found = shuffle_quality(np.arange(n), np.arange(n) // 512, batch_size=128, rho=0.0, n_effects=32)
    assert found.deff == pytest.approx(1, abs=5 * found.deff_error)
    assert found.deff_expected == 1


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (np.array([0, 1, 2, 2]), {}),
        (np.array([0, 1, 2]), {}),
        (np.array([0, 1, 2, 3, 4]), {}),
        (np.array([0, 1, 2, 7]), {}),
        (np.arange(4), {"batch_size": 5}),
        (np.arange(4), {"batch_size": 0}),
        (np.arange(4), {"rho": 1.5}),
        (np.arange(4), {"n_effects": 0}),
    ],
)
def test_what_is_no_order_is_refused(rows, options):
    with pytest.raises(ValueError, match=r"order|batch_size|rho"):
        shuffle_quality(rows, np.zeros(4, np.int64), **{"batch_size": 2, **options})
