import pytest
import torch

from fastdiff.kernels import reference
from fastdiff.kernels.column_sums import column_sums, column_sums_work

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sums(resid, x, c, n_valid):
    out = torch.empty(3, x.shape[1], device=DEVICE)
    work = column_sums_work(len(x), x.shape[1], x.device, _chunk=4)
    limits = torch.tensor([n_valid, 1], dtype=torch.int32, device=DEVICE)
    column_sums(resid, x, c, out, work, limits, n_models=c.shape[1], _chunk=4, _rows=2, _columns=16)
    return out


def inputs(B, M, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B)
    resid, x = (torch.randn(B, M * D, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return resid, x, torch.rand(B, M, generator=generator).to(DEVICE)


@pytest.mark.parametrize(("B", "M", "D"), [(1, 1, 20), (11, 2, 20), (8, 3, 16), (5, 2, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_definition(B, M, D, dtype):
    resid, x, c = inputs(B, M, D, dtype)
    expected = reference.column_sums(resid.double(), x.double(), c.double()).float()
    torch.testing.assert_close(sums(resid, x, c, B), expected, rtol=1e-6, atol=2e-6)


def test_rows_beyond_the_limit_do_not_count():
    resid, x, c = inputs(11, 2, 20)
    # a limit inside a chunk, at its end, and before the last two chunks
    for n_valid in (6, 8, 3, 0):
        poisoned = [tensor.clone() for tensor in (resid, x, c)]
        for tensor in poisoned:
            tensor[n_valid:] = torch.nan
        expected = reference.column_sums(*(tensor[:n_valid].double() for tensor in (resid, x, c))).float()
        torch.testing.assert_close(sums(*poisoned, n_valid), expected, rtol=1e-6, atol=2e-6)


def test_repeats_bit_for_bit():
    resid, x, c = inputs(11, 2, 20)
    assert torch.equal(sums(resid, x, c, 11), sums(resid, x, c, 11))
