"""Objectives against hand-written sums and finite differences; AuxK reaches dead latents only."""

import math

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
    assert losses.l0_target(torch.tensor(8.25), 8).item() == pytest.approx((1 / 32) ** 2)
    assert losses.l0_target(torch.tensor(7.75), 8).item() == pytest.approx((1 / 32) ** 2)


def test_l0_far_from_the_target_pulls_no_harder():
    slopes = []
    for value in (8.5 + 1e-3, 12.0, 4096.0):
        l0 = torch.tensor(value, requires_grad=True)
        slopes.append(torch.autograd.grad(losses.l0_target(l0, 8), l0)[0].item() * 8)
    assert slopes == pytest.approx([2 / 16] * 3)


def test_auxk_ranks_by_the_code_norm():
    error, W_dec = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0)), torch.rand(2, 1, 3)
    pre = torch.tensor([[1.0, 2.0]]).expand(4, 2).contiguous().requires_grad_()
    for norm, chosen in (([1.0, 1.0], 1), ([3.0, 1.0], 0)):
        (gradient,) = torch.autograd.grad(losses.auxk(error, pre, W_dec, torch.tensor(norm), 1), pre)
        assert gradient[:, chosen].all() and not gradient[:, 1 - chosen].any()


@pytest.mark.parametrize("kind", ["l2norm", "mse"])
def test_difference_is_of_each_model_to_the_first(kind):
    error = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = []
    for b in range(5):
        for m in (1, 2):
            off = error[b, m] - error[b, 0]
            parts.append(float(off.norm() if kind == "l2norm" else off.square().mean()))
    assert losses.difference(error, kind).item() == pytest.approx(sum(parts) / 10)
    assert losses.difference(error[:, :1].expand(5, 3, 4), kind).item() == 0.0


def test_prefixes_weigh_alike():
    errors = [torch.full((2, 1, 4), value) for value in (1.0, 2.0, 6.0)]
    assert losses.prefixes(errors, "mse").item() == pytest.approx((1 + 4 + 36) / 3)
    assert losses.prefixes(errors, "l2norm").item() == pytest.approx((2 + 4 + 12) / 3)
    assert torch.equal(losses.prefixes(errors[:1], "mse"), losses.reconstruction(errors[0], "mse"))


def test_tanh_penalty_against_a_sum():
    values, latents = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0, 1, 0])
    norm, weight = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 1.0])
    want = (0.5 * math.tanh(2 * 0.1) + math.tanh(2 * 0.6) + 0.5 * math.tanh(2 * 0.05)) / 4
    assert losses.tanh_penalty(values, latents, norm, weight, 4, 2.0).item() == pytest.approx(want)


def test_pre_activation_against_a_sum():
    pre = torch.tensor([[-1.0, 0.4], [0.2, 9.0]])
    want = (1.5 * 2 + 0.6 * 3 + 0.3 * 2) / 2
    assert losses.pre_activation(pre, torch.tensor([0.5, 1.0]), torch.tensor([2.0, 3.0])).item() == pytest.approx(want)


def test_gradients_against_finite_differences():
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    error = random(4, 3, 5)
    for kind in ("l2norm", "mse"):
        assert check(lambda e, kind=kind: losses.reconstruction(e, kind), error)
        assert check(lambda e, kind=kind: losses.difference(e, kind), error)
        assert check(lambda e, kind=kind: losses.prefixes([e, 2 * e + 1, e.square()], kind), error)
    pre, W_dec, norm = random(4, 6), random(6, 3, 5), random(6).detach().abs().requires_grad_()
    for k_aux in (3, 6):
        assert check(lambda p, W, k=k_aux: losses.auxk(error.detach(), p, W, norm.detach(), k), (pre, W_dec))
    values, latents = random(4), torch.tensor([0, 3, 3, 5])
    weight = torch.tensor([0.1, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert check(lambda v, s: losses.l1(v, latents, s, 4), (values, norm))
    assert check(lambda v, s: losses.tanh_penalty(v, latents, s, weight, 4, 4.0), (values, norm))
    assert check(losses.pre_activation, (pre, random(6), norm))
    assert check(lambda l0: losses.l0_target(l0, 3.0), random())
