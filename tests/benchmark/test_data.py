"""Synthetic weights and batches fire as unevenly as they claim."""

import dataclasses

import numpy as np
import pytest
import torch

from fastdiff.benchmark import data as data_module
from fastdiff.benchmark.data import spread, synthetic
from fastdiff.benchmark.shapes import SHAPES, Shape
from fastdiff.kernels import ops

SHAPE = Shape("middle", 600, 2, 32, 700, 10)
CPU = torch.device("cpu")


def pairs(made, shape=SHAPE):
    """What BatchTopK selects on the first batch."""
    c = made.crosscoder
    pre = c.pre_activations(c.normalize(made.batches[0]))
    return ops.batchtopk(pre.relu() * c.code_norm(), shape.k)[0]


@pytest.fixture(scope="module")
def made():
    return synthetic(SHAPE, CPU, dtype=torch.float32)


def test_spread_counts_what_is_selected(made):
    selection, found = pairs(made), spread(made, SHAPE)
    rows = selection.crow.diff().double()
    latents = selection.col.bincount(minlength=SHAPE.dict_size).double()
    assert found.row_std == pytest.approx(float(rows.std()) / SHAPE.k, rel=1e-6)
    assert found.longest_row == int(rows.max())
    assert found.fired_share == pytest.approx(float((latents > 0).double().mean()))
    assert found.hot_share == pytest.approx(float(latents[latents > 600 / 121].sum() / latents.sum()))


def test_rows_and_latents_are_uneven(made):
    found = spread(made, SHAPE)
    assert 0.6 <= found.row_std <= 1.1
    # lognormal with σ = 2, cut where a latent fires less than once
    assert 1.0 <= found.sigma <= 2.5


def test_latents_fire_as_often_as_they_were_drawn_to():
    frequency = data_module._frequencies(np.random.default_rng(0), SHAPE.dict_size, SHAPE.k)
    assert frequency.sum() == pytest.approx(SHAPE.k) and frequency.max() <= 0.7
    quantile, sigma = data_module._quantiles(frequency, SHAPE.k)
    r = np.exp(sigma * np.random.default_rng(1).standard_normal(400_000))
    z = r * np.random.default_rng(2).standard_normal(400_000)
    often = frequency > 0.01
    drawn = np.array([(z > q).mean() for q in quantile[often]])
    np.testing.assert_allclose(drawn, frequency[often], rtol=0.1)


def test_dead_latents_are_never_selected_but_half_of_them_could_be_by_auxk():
    made = synthetic(SHAPE, CPU, dead_share=0.3, dtype=torch.float32)
    assert int(made.dead.sum()) == 210
    assert not bool(made.dead[pairs(made).col].any())
    pre = made.crosscoder.pre_activations(made.crosscoder.normalize(made.batches[0]))[:, made.dead]
    assert 0.4 < float((pre > 0).double().mean()) < 0.6


def test_even_rows_are_refused(made):
    # every token of the same norm
    batch = made.batches[0]
    even = batch / batch.flatten(1).norm(dim=1)[:, None, None] * batch[0].numel() ** 0.5
    with pytest.raises(ValueError, match=r"at least 0\.6·k, got 0\."):
        spread(dataclasses.replace(made, batches=[even]), SHAPE)


def test_the_seed_decides():
    first, again, other = (synthetic(SHAPE, CPU, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.batches[1], again.batches[1]) and not torch.equal(first.batches[1], other.batches[1])
    assert torch.equal(first.crosscoder.W_enc, again.crosscoder.W_enc)
    assert not torch.equal(first.batches[0], first.batches[1])


def test_named_sizes():
    assert SHAPES["A"].n_weights == 2 * 114_688 * 7168 and SHAPES["A"].n_pairs == 819_200
    assert SHAPES["C"].with_sizes(k=None) is SHAPES["C"]
    assert SHAPES["C"].with_sizes(k=4, n_tokens=8) == Shape("custom", 8, 2, 256, 4096, 4)
