"""Encoder scores and their group maxima against the dense definition."""

import pytest
import torch
from pairs import DEVICE, assert_no_worse, randn

from fastdiff.kernels import ops, reference
from fastdiff.kernels.encoder_scores import Tile, encoder_scores_into
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu

SMALL = Tile(16, 32, 16, warps=4, stages=2)
SHAPES = [(1, 1, 1), (5, 17, 33), (37, 70, 20), (16, 32, 16)]


@pytest.mark.parametrize("backend", ["torch", "dense", "auto"])
@pytest.mark.parametrize(("B", "F", "C"), SHAPES)
def test_is_the_dense_product_in_float64(backend, B, F, C):
    x, W_enc, b_enc = randn(B, C, seed=1), randn(F, C, seed=2), randn(F, seed=3)
    got = ops.encoder_scores(x, W_enc.requires_grad_(), b_enc, backend=backend)
    torch.testing.assert_close(got, reference.encoder_scores(x, W_enc, b_enc).detach(), rtol=1e-12, atol=1e-12)
    assert not got.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "F", "C"), SHAPES)
def test_low_precision_inputs_are_summed_in_float32(backend, dtype, B, F, C):
    x, W_enc, b_enc = randn(B, C, seed=1, dtype=dtype), randn(F, C, seed=2, dtype=dtype), randn(F, seed=3)
    b_enc = b_enc.float()
    truth = reference.encoder_scores(x.double(), W_enc.double(), b_enc.double())
    got = ops.encoder_scores(x, W_enc, b_enc, backend=backend)
    assert got.dtype == torch.float32
    assert_no_worse(got, reference.encoder_scores(x.float(), W_enc.float(), b_enc), truth, tol=1e-5)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store_bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_maxima_are_those_of_the_stored_scores_to_the_bit(out_dtype, store_bias, scaled):
    B, F, C, n_valid, group = 37, 75, 20, 35, 8
    x, W_enc = randn(B, C, seed=1, dtype=torch.bfloat16), randn(F, C, seed=2, dtype=torch.bfloat16)
    bias, scale = randn(F, seed=3, dtype=torch.float32), randn(F, seed=4, dtype=torch.float32).abs()
    out = torch.empty(B, F, dtype=out_dtype, device=DEVICE)
    maxima = torch.empty(B, -(-F // group), device=DEVICE)
    limits = torch.tensor([n_valid, 1], dtype=torch.int32, device=DEVICE)
    bad = torch.tensor([ALL_FINITE], dtype=torch.int32, device=DEVICE)
    encoder_scores_into(
        x,
        W_enc,
        out,
        bias=bias,
        store_bias=store_bias,
        scale=scale if scaled else None,
        maxima=maxima,
        limits=limits,
        bad=bad,
        group=group,
        _tile=SMALL,
    )
    plain = x.float() @ W_enc.float().T + (bias if store_bias else 0)
    torch.testing.assert_close(out, plain.to(out_dtype), rtol=1e-2 if out_dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    score = (out.float() + (0 if store_bias else bias)) * (scale if scaled else 1)
    score[n_valid:] = -torch.inf
    padded = torch.full((B, maxima.shape[1] * group), -torch.inf, device=DEVICE)
    padded[:, :F] = score
    assert torch.equal(maxima, padded.view(B, -1, group).amax(dim=2))
    assert bad.item() == ALL_FINITE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_token_that_is_not_finite_is_noted(value):
    B, F, C, group = 40, 33, 7, 16
    x, W_enc = randn(B, C, seed=1, dtype=torch.float32), randn(F, C, seed=2, dtype=torch.float32)
    out, maxima = torch.empty(B, F, device=DEVICE), torch.empty(B, 3, device=DEVICE)
    x[[20, 33, 39], 3] = value
    x[37, 0] = value
    for n_valid, want in ((40, 1020), (20, ALL_FINITE), (21, 1020)):
        limits = torch.tensor([n_valid, 1], dtype=torch.int32, device=DEVICE)
        bad = torch.tensor([ALL_FINITE], dtype=torch.int32, device=DEVICE)
        encoder_scores_into(
            x, W_enc, out, maxima=maxima, limits=limits, bad=bad, group=group, row_offset=1000, _tile=SMALL
        )
        assert bad.item() == want
        assert bool((maxima[20] == -torch.inf).all()) and bool(maxima[:20].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tile_gives_the_same_product(dtype):
    B, F, C = 150, 40, 50  # ten row blocks of 16: more than run side by side
    x, W_enc = randn(B, C, seed=1, dtype=dtype), randn(F, C, seed=2, dtype=dtype)
    want = x.float() @ W_enc.float().T
    for tile in (SMALL, Tile(64, 16, 32, warps=4, stages=2)):
        out = torch.empty(B, F, device=DEVICE)
        encoder_scores_into(x, W_enc, out, _tile=tile)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        again = torch.empty(B, F, device=DEVICE)
        encoder_scores_into(x, W_enc, again, _tile=tile)
        assert torch.equal(out, again)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend):
    x, W_enc, b_enc = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((5, 6), (9, 6), (9,)))

    def scores(x, W_enc, b_enc):
        return ops.encoder_scores(x * 2, W_enc, b_enc, backend=backend)

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, W_enc, b_enc), scores(x, W_enc, b_enc))


def test_what_does_not_go_together_is_refused():
    x, W_enc, b_enc = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((5, 6), (9, 6), (9,)))
    out = torch.empty(5, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(5, 6\), \(9, 5\)"):
        ops.encoder_scores(x, W_enc[:, :5], b_enc)
    with pytest.raises(ValueError, match=r"float32 and torch\.bfloat16"):
        ops.encoder_scores(x, W_enc.bfloat16(), b_enc)
    with pytest.raises(ValueError, match=r"multiplies.*got torch\.float64"):
        ops.encoder_scores(x.double(), W_enc.double(), b_enc, backend="triton")
    with pytest.raises(ValueError, match="maxima need limits and bad"):
        encoder_scores_into(x, W_enc, out, maxima=torch.empty(5, 1, device=DEVICE))
    with pytest.raises(ValueError, match="bias would be ignored"):
        encoder_scores_into(x, W_enc, out, bias=b_enc)
    limits, bad = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (2, 1))
    with pytest.raises(ValueError, match=r"must be \(5, 1\).*got \(5, 2\)"):
        encoder_scores_into(x, W_enc, out, maxima=torch.empty(5, 2, device=DEVICE), limits=limits, bad=bad)
