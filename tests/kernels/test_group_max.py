"""Group maxima against dense ones, bit by bit; who is blamed for a score that is not finite."""

import pytest
import torch
from score_cases import DEVICE, KINDS, bias_and_scale, limits, no_bad, score_of, scores

from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu


def dense_maxima(score: torch.Tensor, group: int, n_valid: int) -> torch.Tensor:
    score = torch.where(score.isfinite(), score, -torch.inf)
    score[n_valid:] = -torch.inf
    padding = -score.shape[1] % group
    return torch.nn.functional.pad(score, (0, padding), value=-torch.inf).unflatten(1, (-1, group)).amax(2)


def first_bad(stored: torch.Tensor, n_valid: int) -> int:
    rows = (~stored[:n_valid].isfinite()).any(dim=1).nonzero().squeeze(1).tolist()
    return min(rows, default=ALL_FINITE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "F", "group"), [(9, 150, 16), (3, 200, 64)])
def test_maxima_are_the_dense_ones(kind, dtype, B, F, group):
    stored = scores(kind, B, F, dtype)
    bias, scale = bias_and_scale(F)
    out, bad = torch.full((B, -(-F // group)), float("nan"), device=DEVICE), no_bad()
    group_max(stored, bias, scale, out, limits(B - 1, 1), bad, group=group, row_offset=0, _tile=256, _rows=4)
    assert torch.equal(out, dense_maxima(score_of(stored, bias, scale)[1], group, B - 1))
    assert int(bad) == first_bad(stored, B - 1)


@pytest.mark.parametrize(("with_bias", "with_scale"), [(False, False), (True, False), (False, True)])
def test_bias_and_scale_can_be_left_out(with_bias, with_scale):
    stored = scores("normal", 5, 70, torch.float32)
    bias, scale = bias_and_scale(70)
    bias, scale = bias if with_bias else None, scale if with_scale else None
    out = torch.empty(5, 2, device=DEVICE)
    group_max(stored, bias, scale, out, limits(5, 1), no_bad())
    assert torch.equal(out, dense_maxima(score_of(stored, bias, scale)[1], 64, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_token_that_is_not_finite_is_named_once_padding_is_not(value):
    stored = torch.ones(12, 40, device=DEVICE)
    out, bad = torch.empty(12, 3, device=DEVICE), no_bad()
    stored[11, 3] = value
    group_max(stored, None, None, out, limits(11, 1), bad, group=16, row_offset=100)
    assert int(bad) == ALL_FINITE
    stored[9, 39] = stored[4, 0] = value
    group_max(stored, None, None, out, limits(11, 1), bad, group=16, row_offset=100)
    assert int(bad) == 104
    group_max(stored[5:], None, None, out[5:], limits(6, 1), bad, group=16, row_offset=105)
    assert int(bad) == 104, "an earlier token must stay"


def test_a_score_that_overflows_is_no_maximum_and_nobodys_fault():
    stored = torch.tensor([[3e38, 1.0, -3e38, 2.0]], device=DEVICE)
    out, bad = torch.empty(1, 1, device=DEVICE), no_bad()
    group_max(stored, None, torch.full((4,), 2.0, device=DEVICE), out, limits(1, 1), bad, group=16)
    assert float(out) == 4.0 and int(bad) == ALL_FINITE


def test_rows_may_be_further_apart_than_they_are_long():
    wide = scores("normal", 6, 100, torch.float32)
    out = torch.empty(6, 5, device=DEVICE)
    group_max(wide[:, :70], None, None, out, limits(6, 1), no_bad(), group=16)
    assert torch.equal(out, dense_maxima(wide[:, :70].clone(), 16, 6))


def test_what_does_not_fit_is_refused():
    stored = torch.ones(2, 40, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, 3\).*got \(2, 2\)"):
        group_max(stored, None, None, torch.empty(2, 2), limits(2, 1), no_bad(), group=16)
    with pytest.raises(ValueError, match="float64"):
        group_max(stored.double(), None, None, torch.empty(2, 3), limits(2, 1), no_bad(), group=16)
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        group_max(stored.T.contiguous().T, None, None, torch.empty(2, 3), limits(2, 1), no_bad(), group=16)
