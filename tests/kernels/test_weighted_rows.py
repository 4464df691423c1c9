"""Weighted sums of gathered rows against the dense product, by group and by latent."""

import pytest
import torch
from pairs import CASES, DEVICE, assert_no_worse, fresh, randn, random_selection

from fastdiff.kernels import ops, reference, weighted_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), [*CASES, (4, 6, 5, -1.0)])
def test_is_the_dense_product_in_float64(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    rows, weight = randn(F, C, seed=1), randn(len(s.col), seed=2)
    want = torch.zeros(B, F, dtype=torch.float64, device=DEVICE).index_put((s.row, s.col), weight) @ rows
    got = ops.weighted_rows(s.col, rows, s.crow, weight, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_a_plain_product(backend, dtype):
    s = random_selection(11, 50, 0.4, seed=3)
    rows, weight = randn(50, 37, seed=1, dtype=dtype), randn(len(s.col), seed=2, dtype=torch.float32)
    truth = reference.weighted_rows(s.col, rows.double(), s.crow, weight.double())
    plain = reference.weighted_rows(s.col, rows, s.crow, weight.to(dtype))
    got = ops.weighted_rows(s.col, rows, s.crow, weight, backend=backend)
    assert got.dtype == dtype
    assert_no_worse(got, plain, truth, tol=1e-6)
    # one rounding, of the sum: the float32 weights keep their digits
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    assert bool(((got.double() - truth).abs() <= step * truth.abs() + 1e-5).all())


@pytest.mark.parametrize("block", [(1, 8), (4, 16), (16, 2)])
def test_blocks_with_ragged_edges_and_int32_places(block):
    s = random_selection(9, 20, 0.5, seed=5)
    rows, weight = randn(20, 21, seed=1, dtype=torch.float32), randn(len(s.col), seed=2, dtype=torch.float32)
    out = torch.empty(9, 21, device=DEVICE)
    weighted_rows.weighted_rows_into(s.col.int(), rows, s.crow.int(), weight, out, _block=block)
    torch.testing.assert_close(out, reference.weighted_rows(s.col, rows, s.crow, weight), rtol=1e-5, atol=1e-5)


def test_repeats_are_bit_identical():
    s = random_selection(16, 12, 0.7, seed=6)
    by = s.by_latent
    rows, weight = randn(16, 30, seed=1, dtype=torch.float32), randn(len(s.col), seed=2, dtype=torch.float32)
    first, second = (ops.weighted_rows(by.row, rows, by.start, weight, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_backward_is_refused():
    s = random_selection(4, 6, 0.5, seed=7)
    rows = randn(6, 3, seed=1).requires_grad_()
    out = ops.weighted_rows(s.col, rows, s.crow, randn(len(s.col), seed=2), backend="torch")
    with pytest.raises(RuntimeError, match=r"weighted_rows.*no autograd formula"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), CASES)
def test_sum_by_latent_and_its_gradient(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    values, d_out = randn(len(s.col), seed=1).requires_grad_(), randn(F, seed=2)
    got = ops.sum_by_latent(s, values, backend=backend)
    want = torch.zeros(F, dtype=torch.float64, device=DEVICE).index_add(0, s.col, values.detach())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(got, values, d_out)
    assert torch.equal(gradient, d_out[s.col])


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), CASES)
def test_at_entries_and_its_gradient(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    theta, d_out = randn(F, seed=1).requires_grad_(), randn(len(s.col), seed=2)
    got = ops.at_entries(s, theta, backend=backend)
    assert torch.equal(got, theta[s.col])
    (gradient,) = torch.autograd.grad(got, theta, d_out)
    (want,) = torch.autograd.grad(theta[s.col], theta, d_out)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)


def test_at_entries_sorts_only_for_a_gradient():
    s = fresh(random_selection(5, 7, 0.5, seed=8))
    ops.at_entries(s, randn(7, seed=1), backend="torch")
    assert "by_latent" not in vars(s)
    ops.at_entries(s, randn(7, seed=1).requires_grad_(), backend="torch")
    assert "by_latent" in vars(s)
