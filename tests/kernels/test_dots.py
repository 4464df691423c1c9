"""Inner products of selected pairs against the dense product at those pairs."""

import pytest
import torch
from pairs import CASES, DEVICE, assert_no_worse, randn, random_selection

from fastdiff.kernels import dots, ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), [*CASES, (4, 6, 5, -1.0)])
def test_is_the_dense_product_in_float64(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    left, right = randn(B, C, seed=1), randn(F, C, seed=2)
    got = ops.dots(s, left, right, backend=backend)
    torch.testing.assert_close(got, (left @ right.T)[s.row, s.col], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_a_plain_product(backend, dtype):
    s = random_selection(6, 40, 0.5, seed=3)
    left, right = randn(6, 300, seed=1, dtype=dtype), randn(40, 300, seed=2, dtype=dtype)
    truth = (left.double() @ right.double().T)[s.row, s.col]
    got = ops.dots(s, left, right, backend=backend)
    assert got.dtype == torch.float32
    assert_no_worse(got, (left @ right.T)[s.row, s.col], truth, tol=1e-5)


def test_a_token_with_more_entries_than_its_programs_hold():
    s = random_selection(2, 90, 1.0, seed=4)
    left, right = randn(2, 9, seed=1, dtype=torch.float32), randn(90, 9, seed=2, dtype=torch.float32)
    out = torch.empty(len(s.col), device=DEVICE)
    dots.dots_into(s.crow.int(), s.col.int(), left, right, out, _block=(4, 4))
    torch.testing.assert_close(out, (left @ right.T)[s.row, s.col], rtol=1e-5, atol=1e-5)
    again = torch.empty_like(out)
    dots.dots_into(s.crow.int(), s.col.int(), left, right, again, _block=(4, 4))
    assert torch.equal(out, again)


def test_shapes_that_disagree_are_named():
    s = random_selection(6, 20, 0.2, seed=3)
    with pytest.raises(ValueError, match=r"B=6, C\] and right \[F=20, C\].*\(6, 3\) and \(19, 3\)"):
        ops.dots(s, randn(6, 3, seed=1), randn(19, 3, seed=1))
