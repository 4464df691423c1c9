"""The calibrated threshold against a sort of all scores."""

import pytest
import torch

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.threshold import calibrated_threshold

F, M, D = 30, 2, 6


def made(k: int, code_norm: str = "crosscoder") -> Crosscoder:
    crosscoder = Crosscoder(F, M, D, activation="batchtopk", k=k, code_norm=code_norm)
    generator = torch.Generator().manual_seed(k)
    for weight in (crosscoder.W_enc, crosscoder.W_dec):
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return crosscoder


@pytest.mark.parametrize("code_norm", ["crosscoder", "sae", "none"])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_exactly_k_latents_fire_on_average(k, code_norm):
    crosscoder = made(k, code_norm)
    x = torch.randn(101, M, D, generator=torch.Generator().manual_seed(9))
    x[:10] *= 50  # the first batch has most of the large scores
    theta = calibrated_threshold(crosscoder, lambda: x.split(17))
    score = crosscoder.pre_activations(x).relu() * crosscoder.code_norm()
    ranked = score.flatten().sort(descending=True).values
    assert ranked[101 * k] < theta < ranked[101 * k - 1]
    crosscoder.threshold.fill_(theta)
    assert len(crosscoder.encode(x)[0]) == 101 * k


def test_where_fewer_are_positive_all_of_them_fire():
    crosscoder = made(4)
    crosscoder.b_enc.data.fill_(-1000.0)
    assert calibrated_threshold(crosscoder, lambda: [torch.randn(5, M, D)]) == 0.0
    assert calibrated_threshold(crosscoder, list) == 0.0
