import pytest
import torch

from fastdiff.kernels import reference
from fastdiff.kernels.normalize import normalize
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(n, M, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + M + D)
    batch = torch.randn(n, M, D, generator=generator) * 3 + 1
    mean, scale = torch.randn(M, D, generator=generator), torch.rand(M, generator=generator) + 0.5
    return batch.to(DEVICE, dtype), mean.to(DEVICE), scale.to(DEVICE)


def run(batch, mean, scale, *, rows, n_valid, dtype=torch.float32, row_offset=0, bad=ALL_FINITE):
    _, M, D = batch.shape
    x = torch.empty(rows, M * D, dtype=dtype, device=DEVICE)
    squares = torch.empty(rows, M, device=DEVICE)
    limits = torch.tensor([n_valid, 1], dtype=torch.int32, device=DEVICE)
    bad = torch.tensor([bad], dtype=torch.int32, device=DEVICE)
    normalize(batch, mean, scale, x, squares, limits, bad, row_offset=row_offset, _block=32)
    return x, squares, int(bad)


@pytest.mark.parametrize(("M", "D"), [(1, 20), (2, 70), (3, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_is_the_definition_rounded_once(M, D, dtype, stored):
    batch, mean, scale = inputs(5, M, D, stored)
    x, squares, bad = run(batch, mean, scale, rows=5, n_valid=5, dtype=dtype)
    exact, _ = reference.normalize(batch.double(), mean.double(), scale.double())
    single, _ = reference.normalize(batch.float(), mean, scale)
    assert torch.equal(x, single.to(dtype))
    assert (x - exact).abs().max() <= (single.to(dtype) - exact).abs().max()
    torch.testing.assert_close(squares, x.double().unflatten(1, (M, D)).square().sum(2).float(), rtol=1e-6, atol=0)
    assert bad == ALL_FINITE


def test_rows_beyond_the_tokens_are_zero():
    batch, mean, scale = inputs(5, 2, 20)
    batch[4] = torch.nan
    for rows, n_valid in ((7, 4), (7, 3), (5, 0)):
        x, squares, bad = run(batch, mean, scale, rows=rows, n_valid=n_valid)
        assert (x[:n_valid] != 0).all()
        assert not x[n_valid:].any() and not squares[n_valid:].any()
        assert bad == ALL_FINITE


def test_rows_the_batch_lacks_are_zero():
    batch, mean, scale = inputs(3, 2, 20)
    x, squares, _ = run(batch, mean, scale, rows=5, n_valid=5)
    assert (x[:3] != 0).all() and not x[3:].any() and not squares[3:].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_reports_the_first_token_that_is_not_finite(value):
    batch, mean, scale = inputs(5, 2, 70)
    batch[4, 0, 0] = batch[2, 1, 69] = value
    *_, bad = run(batch, mean, scale, rows=5, n_valid=5, row_offset=100, dtype=torch.bfloat16)
    assert bad == 102
    *_, bad = run(batch, mean, scale, rows=5, n_valid=5, row_offset=100, bad=7)
    assert bad == 7


def test_repeats_bit_for_bit():
    batch, mean, scale = inputs(4, 3, 70)
    first = run(batch, mean, scale, rows=4, n_valid=4)
    again = run(batch, mean, scale, rows=4, n_valid=4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
