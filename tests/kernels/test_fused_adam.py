"""Adam on gradient rows against torch's: tiny gradients, empty latents, rounded moments and copies, bad tokens."""

import numpy as np
import pytest
import torch
from row_problem import DEVICE, SETTINGS, SHAPES, F, Problem, clone, flag, parameters, rates, same

from fastdiff.kernels import reference
from fastdiff.kernels.fused_adam import RowState, finish_norms, update_flat
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("M", "D"), SHAPES)
@pytest.mark.parametrize("aux", [False, True])
def test_update_is_adam(M, D, aux):
    problem = Problem(M, D)
    if aux:
        problem.add_aux()
    state = problem.state()
    before = clone(state)
    problem.update(state, clip=0.3)
    for now, old, gradient in zip(parameters(state), parameters(before), problem.truth(), strict=True):
        weight, m, v = (tensor.double() for tensor in old)
        expected = reference.adam(weight, 0.3 * gradient.double(), m, v, step=3, lr=1e-2, **SETTINGS)
        for got, truth in zip(now, expected, strict=True):
            torch.testing.assert_close(got, truth.float(), rtol=1e-6, atol=1e-6)


def test_empty_latent_decays():
    problem = Problem(2, 16)
    state = problem.state()
    before = clone(state)
    problem.update(state)
    for now, old in zip(parameters(state), parameters(before), strict=True):
        torch.testing.assert_close(now[1][0], 0.9 * old[1][0])
        torch.testing.assert_close(now[2][0], 0.999 * old[2][0])
        assert (now[0][0] != old[0][0]).any()


@pytest.mark.parametrize("size", [1e-9, 1e-8, 1e-7, 1e-6])
def test_tiny_gradients_as_torch_does(size):
    # next to eps the update depends on the size of the gradient; weights near zero show it in full
    problem = Problem(2, 16)
    problem.c *= size
    problem.delta_dense *= size
    state = RowState(*(torch.zeros_like(tensor) for tensor in problem.state()))
    mine = [tensor.clone().double().requires_grad_() for tensor, *_ in parameters(state)]
    plain = [tensor.clone().requires_grad_() for tensor, *_ in parameters(state)]
    adams = [torch.optim.Adam(tensors, lr=1e-3, **SETTINGS) for tensors in (mine, plain)]
    for step in (1, 2, 3):
        problem.update(state, step=step, lr=1e-3)
        for tensors, adam in zip((mine, plain), adams, strict=True):
            for tensor, gradient in zip(tensors, problem.truth(), strict=True):
                tensor.grad = gradient.to(tensor.dtype)
            adam.step()
    for (weight, *_), truth, single in zip(parameters(state), mine, plain, strict=True):
        worst = (single.detach() - truth.detach()).abs().max() + 1e-6 * truth.detach().abs().max()
        assert (weight - truth.detach()).abs().max() <= worst
        assert truth.detach().abs().max() > 1e-4


def test_shadows_and_norms_are_those_of_the_new_weights():
    for M, D in SHAPES:
        problem = Problem(M, D)
        state = problem.state()
        norms = problem.update(state)
        assert torch.equal(state.W_dec_shadow, state.W_dec.bfloat16())
        assert torch.equal(state.W_enc_shadow, state.W_enc.bfloat16())
        squares = state.W_dec.double().unflatten(1, (M, D)).square().sum(2)
        torch.testing.assert_close(norms.sum(1), squares.float(), rtol=1e-6, atol=0)
        code_norm = torch.empty(F, device=DEVICE)
        finish_norms(norms, code_norm, flag(ALL_FINITE))
        torch.testing.assert_close(code_norm, reference.code_norm(state.W_dec.double(), M).float(), rtol=1e-6, atol=0)


def test_without_shadows_weights_are_the_same():
    problem = Problem(2, 16)
    with_shadows = problem.state()
    without = clone(with_shadows)._replace(W_dec_shadow=None, W_enc_shadow=None)
    problem.update(with_shadows)
    problem.update(without)
    for one, two in zip(parameters(with_shadows), parameters(without), strict=True):
        assert same(one, two)


def test_nothing_is_written_once_a_token_is_bad():
    problem = Problem(2, 20)
    state, bad = problem.state(torch.bfloat16), 3
    norms, squares = torch.ones(F, problem.T, 2, device=DEVICE), torch.ones(F, problem.T, device=DEVICE)
    code_norm, flat = torch.ones(F, device=DEVICE), [torch.ones(5, device=DEVICE) for _ in range(4)]
    problem.x[:] = torch.nan
    before = clone(state)
    problem.update(state, bad=bad, norms=norms, squares=squares)
    norms.fill_(4.0)
    finish_norms(norms, code_norm, flag(bad))
    update_flat(*flat, rates(1, 0.1), torch.ones(1, device=DEVICE), flag(bad), **SETTINGS)
    assert same(state, before)
    assert (norms == 4).all() and (squares == 1).all() and (code_norm == 1).all()
    assert all((tensor == 1).all() for tensor in flat)


def test_flat_update_is_adam():
    generator = torch.Generator().manual_seed(0)
    param, grad, m = (torch.randn(45, generator=generator).to(DEVICE) for _ in range(3))
    v = torch.rand(45, generator=generator).to(DEVICE)
    old = [tensor.double() for tensor in (param, 0.5 * grad, m, v)]
    clip = torch.tensor([0.5], device=DEVICE)
    update_flat(param, grad, m, v, rates(4, 0.1), clip, flag(ALL_FINITE), **SETTINGS, _block=32)
    for got, truth in zip((param, m, v), reference.adam(*old, step=4, lr=0.1, **SETTINGS), strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(moments):
    problem = Problem(3, 20)
    problem.add_aux()
    one = problem.state(moments)
    two = clone(one)
    norms_one, norms_two = problem.update(one), problem.update(two)
    assert same(one, two) and torch.equal(norms_one, norms_two)


def philox(seed, step, latent, place):
    """The four words of Philox4x32-7 for counters (latent, place, step) [n]; Salmon et al. 2011."""
    low, mask = np.uint64(2**32 - 1), 32
    n = len(place)
    c = [
        np.asarray(word, dtype=np.uint64) for word in (latent, place, np.full(n, step % 2**32), np.full(n, step >> 32))
    ]
    key = [np.uint64(seed % 2**32), np.uint64(seed >> 32)]
    for _ in range(7):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> mask) ^ c[1] ^ key[0], b & low, (a >> mask) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c


@pytest.mark.parametrize(("M", "D"), [(2, 20), (1, 70), (3, 20)])
@pytest.mark.parametrize(("seed", "step"), [(5, 3), (2**40 + 17, 2**33 + 5)])
def test_bfloat16_moments_are_rounded_by_philox(M, D, seed, step):
    problem = Problem(M, D)
    state = problem.state(torch.bfloat16)
    single = RowState(*(tensor.float() for tensor in state))._replace(W_dec_shadow=None, W_enc_shadow=None)
    problem.update(state, step=step, seed=seed)
    problem.update(single, step=step, seed=seed)
    latent, m, d = np.indices((F, M, D)).reshape(3, -1)
    words = philox(seed, step, latent, m * ((D + 1) // 2) + d // 2)
    half = np.where(d % 2 == 0, 0, 16).astype(np.uint64)
    rounded = (state.W_dec_m, state.W_dec_v, state.W_enc_m, state.W_enc_v)
    exact = (single.W_dec_m, single.W_dec_v, single.W_enc_m, single.W_enc_v)
    for word, got, value in zip(words, rounded, exact, strict=True):
        bits = value.cpu().numpy().view(np.uint32).reshape(-1) + ((word >> half) & np.uint64(0xFFFF)).astype(np.uint32)
        expected = (bits >> np.uint32(16)).astype(np.uint16)
        assert np.array_equal(got.cpu().view(torch.int16).numpy().view(np.uint16).reshape(-1), expected)
    # rounding is for storage: this step's weights do not see it
    for name in ("W_dec", "W_enc", "b_enc", "b_enc_m", "b_enc_v"):
        torch.testing.assert_close(getattr(state, name), getattr(single, name), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_rounding_is_unbiased_and_differs_by_tensor_step_and_seed():
    problem = Problem(2, 70)
    problem.f[:] = 0
    state = problem.state(torch.bfloat16)
    for tensor in (state.W_dec_m, state.W_dec_v, state.W_enc_m, state.W_enc_v):
        tensor.fill_(1.0)
    seen = []
    for step, seed in ((1, 0), (2, 0), (1, 1)):
        run = clone(state)
        problem.update(run, step=step, seed=seed)
        seen += [run.W_dec_m, run.W_enc_m]
        for m, v in ((run.W_dec_m, run.W_dec_v), (run.W_enc_m, run.W_enc_v)):
            # bfloat16 neighbours of 0.9 and 0.999 are 2^-8 apart; the mean of n roundings stays within 5 deviations
            for moment, exact in ((m, 0.9), (v, 0.999)):
                deviation = 2**-9 / moment.numel() ** 0.5
                assert abs(moment.double().mean().item() - exact) < 5 * deviation
                assert len(moment.unique()) == 2
    assert not any(torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))


@pytest.mark.slow
def test_second_moment_in_bfloat16_decays():
    # rounded to nearest it would stay at 1 for ever
    problem = Problem(1, 70)
    problem.f[:] = 0
    state = problem.state(torch.bfloat16)
    state.W_dec_v.fill_(1.0)
    for step in range(1, 13):
        problem.update(state, step=step)
    assert abs(state.W_dec_v.double().mean().item() - 0.999**12) < 0.002
