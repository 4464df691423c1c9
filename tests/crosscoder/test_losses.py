"""Objectives against hand-written sums; AuxK reaches dead latents only."""

import pytest
import torch

from fastdiff.crosscoder import losses


def test_reconstruction_is_averaged_over_tokens_and_models():
    error = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [6.0, 8.0]]])
    assert losses.reconstruction(error, "l2norm").item() == pytest.approx((5 + 1 + 0 + 10) / 4)
    assert losses.reconstruction(error, "mse").item() == pytest.approx((25 + 1 + 0 + 100) / 8)


def test_norm_of_a_perfect_token_has_a_finite_gradient():
    error = torch.zeros(2, 2, 3, requires_grad=True)
    losses.reconstruction(error, "l2norm").backward()
    assert torch.equal(error.grad, torch.zeros(2, 2, 3))


def test_auxk_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    B, M, D, n_dead, k_aux = 5, 2, 4, 7, 3
    error = torch.randn(B, M, D, generator=generator, dtype=torch.float64)
    pre = torch.randn(B, n_dead, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(n_dead, M, D, generator=generator, dtype=torch.float64)
    s = W_dec.norm(dim=-1).sum(1)
    miss = spread = 0.0
    mean = error.flatten(1).mean(0)
    for b in range(B):
        order = sorted(range(n_dead), key=lambda j: -max(0.0, pre[b, j].item()) * s[j].item())
        estimate = sum(max(0.0, pre[b, j].item()) * W_dec[j].flatten() for j in order[:k_aux])
        miss += float((error[b].flatten() - estimate).square().sum())
        spread += float((error[b].flatten() - mean).square().sum())
    assert losses.auxk(error, pre, W_dec, W_dec.norm(dim=-1).sum(1), k_aux).item() == pytest.approx(
        miss / spread, rel=1e-12
    )


def test_auxk_gives_no_gradient_to_the_error():
    error = torch.randn(3, 2, 4, requires_grad=True)
    pre = torch.rand(3, 5, requires_grad=True)
    W_dec = torch.rand(5, 2, 4, requires_grad=True)
    losses.auxk(error, pre, W_dec, torch.ones(5), 5).backward()
    assert error.grad is None
    assert float(pre.grad.abs().sum()) > 0 and float(W_dec.grad.abs().sum()) > 0


def test_auxk_of_a_constant_error_is_zero():
    assert losses.auxk(torch.ones(3, 2, 4), torch.rand(3, 5), torch.rand(5, 2, 4), torch.ones(5), 5).item() == 0.0


def test_l1_weighs_activations_by_decoder_norms():
    values, latents = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0])
    assert losses.l1(values, latents, torch.tensor([10.0, 100.0]), 4).item() == (10 + 200 + 30) / 4


def test_l0_target_is_zero_on_target():
    assert losses.l0_target(torch.tensor(8.0), 8).item() == 0.0
    assert losses.l0_target(torch.tensor(12.0), 8).item() == pytest.approx(0.25)
