"""The crosscoder at inference: selection rules, initialisation, invariances."""

import pytest
import torch

from fastdiff.crosscoder.model import Crosscoder, code_norm_of, geometric_median
from fastdiff.crosscoder.structure import Structure


def random_crosscoder(
    activation: str, seed: int = 0, F: int = 40, M: int = 2, D: int = 6, code_norm: str = "crosscoder"
) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)
    c = Crosscoder(F, M, D, activation=activation, k=3, code_norm=code_norm)
    with torch.no_grad():
        for parameter in (c.W_enc, c.b_enc, c.W_dec, c.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        c.threshold.copy_(torch.rand(F, generator=generator) * 4)
    return c


@pytest.mark.parametrize("code_norm", ["crosscoder", "sae", "none"])
@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
@pytest.mark.parametrize("M", [1, 2, 3])
def test_which_latents_fire(activation, code_norm, M):
    c = random_crosscoder(activation, M=M, code_norm=code_norm)
    x = torch.randn(9, M, 6, generator=torch.Generator().manual_seed(1))
    pre = torch.einsum("bmd,fmd->bf", x, c.W_enc) + c.b_enc
    s = {
        "crosscoder": c.W_dec.norm(dim=-1).sum(1),
        "sae": c.W_dec.square().sum(dim=(1, 2)).sqrt(),
        "none": torch.ones(40),
    }[code_norm]
    want = {
        "batchtopk": pre.relu() * s > c.threshold,
        "topk": torch.zeros_like(pre).scatter(1, (pre.relu() * s).topk(3, dim=1).indices, 1.0) * (pre > 0) > 0,
        "jumprelu": pre > c.threshold,
        "relu": pre > 0,
    }[activation]
    values, selection = c.encode(x)
    got = torch.zeros_like(pre)
    got[selection.row, selection.col] = values
    torch.testing.assert_close(got, (pre * want).detach(), rtol=1e-5, atol=1e-5)
    want_out = torch.einsum("bf,fmd->bmd", got, c.W_dec) + c.b_dec
    torch.testing.assert_close(c.decode(values, selection), want_out, rtol=1e-4, atol=1e-4)


def test_normalize_centres_and_scales_each_model():
    c = Crosscoder(4, 2, 3, activation="relu", k=1)
    c.input_mean.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    c.input_scale.copy_(torch.tensor([2.0, 0.5]))
    x = torch.tensor([[[2.0, 2, 3], [4, 7, 6]]], dtype=torch.bfloat16)
    torch.testing.assert_close(c.normalize(x), torch.tensor([[[2.0, 0, 0], [0, 1, 0]]]))


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_rescaling_a_latent_changes_nothing(activation):
    c = random_crosscoder(activation)
    x = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(1))
    values, selection = c.encode(x)
    out = c.decode(values, selection)
    with torch.no_grad():
        c.W_enc[5] *= 4
        c.b_enc[5] *= 4
        c.W_dec[5] /= 4
    scaled, again = c.encode(x)
    assert torch.equal(again.col, selection.col) and torch.equal(again.row, selection.row)
    torch.testing.assert_close(c.decode(scaled, again), out, rtol=1e-4, atol=1e-4)


def test_code_norms():
    W_dec = torch.tensor([[[3.0, 4.0], [0.0, 12.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    assert code_norm_of(W_dec, "crosscoder").tolist() == [17.0, 0.0]
    assert code_norm_of(W_dec, "sae").tolist() == [13.0, 0.0]
    assert code_norm_of(W_dec, "none").tolist() == [1.0, 1.0]
    for kind in ("crosscoder", "sae"):
        (gradient,) = torch.autograd.grad(code_norm_of(W_dec, kind).sum(), W_dec)
        assert bool(gradient.isfinite().all()) and not gradient[1].any()


@pytest.mark.parametrize("init", ["shared", "independent"])
def test_initialisation_obeys_a_structure(init):
    free, bound = (Crosscoder(12, 2, 8, activation="batchtopk", k=3) for _ in range(2))
    first = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0))
    free.initialize(first, init=init, seed=5)
    bound.initialize(first, init=init, seed=5, structure=Structure(shared=3, exclusive=2))
    for name in ("W_enc", "W_dec"):
        got, want = getattr(bound, name), getattr(free, name)
        assert torch.equal(got[:3], want[:3, :1].expand(3, 2, 8))
        assert torch.equal(got[3:8], want[3:8])
        assert torch.equal(got[8:10, 0], want[8:10, 0]) and not got[8:10, 1].any()
        assert torch.equal(got[10:, 1], want[10:, 1]) and not got[10:, 0].any()
    assert torch.equal(bound.b_dec, free.b_dec)


@pytest.mark.parametrize(("init", "equal"), [("shared", True), ("independent", False)])
def test_initial_rows_are_unit_and_tied(init, equal):
    c = Crosscoder(30, 2, 8, activation="batchtopk", k=3)
    c.initialize(torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0)), init=init, seed=5)
    torch.testing.assert_close(c.W_enc.norm(dim=-1), torch.ones(30, 2))
    assert torch.equal(c.W_enc, c.W_dec)
    assert torch.equal(c.W_enc[:, 0], c.W_enc[:, 1]) == equal
    before = c.W_enc.clone()
    c.initialize(torch.zeros(5, 2, 8), init=init, seed=6)
    assert not torch.equal(c.W_enc, before), "the seed must matter"


def test_geometric_median_resists_an_outlier_and_minimises_the_summed_distance():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 4, generator=generator)
    points[0] = 1000.0
    median = geometric_median(points)

    def total(at):
        return float((points - at).norm(dim=1).sum())

    assert total(median) < total(points.mean(0))
    for _ in range(50):
        assert total(median) <= total(median + 0.05 * torch.randn(4, generator=generator)) + 1e-3
