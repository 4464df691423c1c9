"""Sparse encode and decode against dense products: values and every gradient, in float64."""

import pytest
import torch

from fastdiff.kernels import ops, reference
from fastdiff.kernels.selection import Selection


def random_selection(B: int, F: int, density: float, seed: int) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, F, generator=generator) < density
    if B > 2:
        mask[B // 2] = False  # a token on which nothing fires
    if F > 2:
        mask[:, F // 2] = False  # a latent that never fires
        mask[:, F // 3] = True  # one that always does
    return Selection.from_flat(mask.flatten().nonzero().squeeze(1), B, F)


CASES = [(1, 1, 1, 1.0), (5, 17, 3, 0.3), (16, 64, 33, 0.1), (7, 40, 128, 0.0), (33, 9, 5, 1.0)]


@pytest.mark.parametrize(("B", "F", "C", "density"), CASES)
def test_decode_is_the_dense_product(B, F, C, density):
    selection = random_selection(B, F, density, seed=B)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(len(selection.col), generator=generator, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(F, C, generator=generator, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(B, C, generator=generator, dtype=torch.float64)

    f = torch.zeros(B, F, dtype=torch.float64).index_put((selection.row, selection.col), values)
    want = reference.sparse_decode(f, W_dec)
    got = ops.sparse_decode(values, selection, W_dec)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for got_grad, want_grad in zip(
        torch.autograd.grad(got, (values, W_dec), d_out),
        torch.autograd.grad(want, (values, W_dec), d_out),
        strict=True,
    ):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("B", "F", "C", "density"), CASES)
def test_encode_is_the_dense_product_at_the_selected_pairs(B, F, C, density):
    selection = random_selection(B, F, density, seed=B)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, C, generator=generator, dtype=torch.float64)
    W_enc = torch.randn(F, C, generator=generator, dtype=torch.float64, requires_grad=True)
    b_enc = torch.randn(F, generator=generator, dtype=torch.float64, requires_grad=True)
    d_values = torch.randn(len(selection.col), generator=generator, dtype=torch.float64)

    want = reference.encoder_scores(x, W_enc, b_enc)[selection.row, selection.col]
    got = ops.sparse_encode(x, W_enc, b_enc, ops.encoder_scores(x, W_enc, b_enc), selection)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for got_grad, want_grad in zip(
        torch.autograd.grad(got, (W_enc, b_enc), d_values),
        torch.autograd.grad(want, (W_enc, b_enc), d_values),
        strict=True,
    ):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_only_the_asked_gradient_is_computed():
    selection = random_selection(6, 20, 0.2, seed=3)
    values = torch.rand(len(selection.col))
    W_dec = torch.rand(20, 4, requires_grad=True)
    ops.sparse_decode(values, selection, W_dec).sum().backward()
    assert W_dec.grad is not None and values.grad is None


def test_results_repeat_bit_for_bit():
    selection = random_selection(64, 128, 0.1, seed=4)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(len(selection.col), generator=generator, requires_grad=True)
    W_dec = torch.randn(128, 48, generator=generator, requires_grad=True)

    def gradients():
        fresh = Selection(selection.crow, selection.col, selection.row, selection.dict_size)
        return torch.autograd.grad(ops.sparse_decode(values, fresh, W_dec).square().sum(), (values, W_dec))

    first, second = gradients(), gradients()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ops.sparse_decode(torch.ones(3), s, torch.ones(20, 4)), r"got \(3,\)"),
        (lambda s: ops.sparse_decode(torch.ones(len(s.col)), s, torch.ones(19, 4)), r"\(19, 4\)"),
        (
            lambda s: ops.encoder_scores(torch.ones(2, 3), torch.ones(4, 5), torch.ones(4)),
            r"\(2, 3\), \(4, 5\)",
        ),
        (lambda s: ops.above(torch.ones(2, 3), torch.ones(4)), r"\(2, 3\), \(4,\)"),
        (
            lambda s: ops.sparse_encode(torch.ones(2, 3), torch.ones(20, 3), torch.ones(20), torch.ones(2, 20), s),
            r"B=2.*and 6",
        ),
    ],
)
def test_shapes_that_disagree_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_selection(6, 20, 0.2, seed=3))
