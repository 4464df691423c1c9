"""Gradient rows and their norms against the definition: empty and full latents, slices with tails, AuxK's rows."""

import pytest
import torch
from row_problem import DEVICE, SHAPES, F, Problem, same

from fastdiff.kernels.row_gradients import norm_rows, weight_gradients

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("M", "D"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_definition(M, D, dtype):
    problem = Problem(M, D, dtype=dtype)
    for got, truth in zip(problem.gradients(), problem.truth(), strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-6, atol=2e-6)
        assert not got[0].any()


@pytest.mark.parametrize(("M", "D"), SHAPES)
@pytest.mark.parametrize("aux", [False, True])
def test_norm_sums_the_squares_of_the_gradients(M, D, aux):
    problem = Problem(M, D)
    if aux:
        problem.add_aux()
    squares = torch.full((F, problem.T), torch.nan, device=DEVICE)
    norm_rows(*problem.batch, problem.aux, squares, **problem.small)
    dec, enc, bias = problem.gradients()
    expected = dec.double().square().sum(1) + enc.double().square().sum(1) + bias.double().square()
    torch.testing.assert_close(squares.double().sum(1), expected, rtol=1e-6, atol=0)
    # what the update reports is the same, and not clipped
    reported = torch.full_like(squares, torch.nan)
    problem.update(problem.state(), squares=reported, clip=0.25)
    torch.testing.assert_close(reported, squares, rtol=1e-6, atol=0)


def test_order_of_the_latents_does_not_matter():
    problem = Problem(2, 20)
    order, *batch = problem.batch
    results = []
    for longest_first in (order.longest_first, order.longest_first.flip(0)):
        G, b = torch.empty(2, F, 40, device=DEVICE), torch.empty(F, device=DEVICE)
        weight_gradients(order._replace(longest_first=longest_first.contiguous()), *batch, *G, b, **problem.small)
        results.append((G, b))
    assert same(*results)


@pytest.mark.parametrize("hot", [0, 2, F, F + 3])
def test_every_slice_of_every_latent_has_a_program_whatever_starts_first(hot):
    problem = Problem(2, 70)
    expected = problem.gradients()
    G, b = torch.full((2, F, 140), torch.nan, device=DEVICE), torch.full((F,), torch.nan, device=DEVICE)
    weight_gradients(*problem.batch, *G, b, **problem.small | {"_hot": hot})
    assert same((*G, b), expected)
