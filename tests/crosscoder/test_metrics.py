"""Whole-set figures against one dense computation."""

import math

import pytest
import torch

from fastdiff.crosscoder.metrics import evaluate
from fastdiff.crosscoder.model import Crosscoder


def test_whole_set_figures_do_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(0)
    c = Crosscoder(20, 2, 5, activation="batchtopk", k=3)
    x = torch.randn(100, 2, 5, generator=generator)
    c.initialize(x, init="independent", seed=0)
    c.threshold.fill_(2.5)
    values, selection = c.encode(x)
    error = (x - c.decode(values, selection)).detach().double()
    spread = (x - x.mean(0)).double().square().sum((0, 2))
    fve = 1 - error.square().sum((0, 2)) / spread
    for size in (100, 33, 7):
        quality = evaluate(c, x.split(size))
        assert quality.n_rows == 100
        assert quality.fve == pytest.approx(fve.tolist(), rel=1e-5)
        assert quality.fve_pooled == pytest.approx(float(1 - error.square().sum() / spread.sum()), rel=1e-5)
        assert quality.l0_mean == len(values) / 100
        assert quality.dead_fraction == 1 - len(selection.col.unique()) / 20


def test_no_rows_give_nan():
    quality = evaluate(Crosscoder(3, 2, 4, activation="relu", k=1), [])
    assert quality.n_rows == 0 and math.isnan(quality.fve_pooled) and all(map(math.isnan, quality.fve))
