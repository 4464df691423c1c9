"""BatchTopK of every implementation against its dense definition: ties, few positives, NaN, all k, odd shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from score_cases import (
    DEVICE,
    KINDS,
    assert_slots,
    assert_well_formed,
    bias_and_scale,
    garbage_slots,
    limits,
    mask_of,
    no_bad,
    score_of,
    scores,
)

from fastdiff.kernels import ops, reference, selection
from fastdiff.kernels.batchtopk import BatchTopKWork, batchtopk_slots
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (3, 7, 2), (5, 64, 64), (17, 131, 3), (32, 96, 40), (8, 160, 1), (130, 20, 1)]


def smallest(score: torch.Tensor, mask: torch.Tensor) -> float:
    return float(score[mask].min()) if bool(mask.any()) else float("inf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), SHAPES)
def test_torch_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F)
    want = reference.select_batchtopk(score, k)
    for backend in ("torch", "dense"):
        chosen, lowest = ops.batchtopk(score, k, backend=backend)
        assert_well_formed(chosen)
        assert torch.equal(mask_of(chosen), want)
        assert lowest.dtype == score.dtype and float(lowest) == smallest(score, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "not_finite"])
def test_torch_takes_the_scale_and_any_number_of_rows_at_a_time(dtype, kind, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 300)
    stored, (_, scale) = scores(kind, 131, 24, dtype), bias_and_scale(24)
    score = stored.to(torch.promote_types(dtype, torch.float32)) * scale
    want = reference.select_batchtopk(score, 2)
    for backend in ("torch", "dense"):
        chosen, lowest = ops.batchtopk(stored, 2, scale=scale, backend=backend)
        assert torch.equal(mask_of(chosen), want)
        assert float(lowest) == smallest(score, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), [(1, 1, 1), (3, 131, 2), (2, 50, 50), (3, 700, 60)])
def test_triton_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F, torch.float32)
    chosen, lowest = ops.batchtopk(score, k, backend="triton")
    assert_well_formed(chosen)
    want = reference.select_batchtopk(score, k)
    assert torch.equal(mask_of(chosen), want)
    assert float(lowest) == smallest(score, want)


def run(stored, bias, scale, n_valid, k, k_max, *, group=None, block=2048, steps=8, row_offset=0):
    B, F = stored.shape
    slots, lowest, bad = garbage_slots(B, k_max), torch.full((1,), float("nan"), device=DEVICE), no_bad()
    work = BatchTopKWork.allocate(B, F, k_max, torch.device(DEVICE), group=group)
    for buffer in vars(work).values():
        if isinstance(buffer, torch.Tensor):
            # what an earlier call left behind must not matter
            buffer.fill_(77)
    batchtopk_slots(
        stored,
        bias,
        scale,
        work,
        limits(n_valid, k),
        slots,
        lowest,
        bad,
        row_offset=row_offset,
        _block=block,
        _steps=steps,
    )
    return slots, lowest, bad


# several programs and ragged blocks everywhere; more groups than n; fewer groups than n
@pytest.mark.parametrize(("F", "k", "k_max", "group"), [(601, 2, 3, None), (333, 10, 12, 16), (100, 40, 100, 16)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in KINDS] + [(kind, torch.bfloat16) for kind in ("normal", "not_finite", "tiny")],
    ids=str,
)
def test_slots_are_the_dense_selection_of_bias_scale_and_limits(F, k, k_max, group, kind, dtype):
    B, n_valid = 3, 2
    stored, (bias, scale) = scores(kind, B, F, dtype), bias_and_scale(F)
    slots, lowest, bad = run(stored, bias, scale, n_valid, k, k_max, group=group, block=32, steps=2, row_offset=20)
    f, score = score_of(stored, bias, scale)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[:n_valid] = reference.select_batchtopk(score[:n_valid], k)
    assert_slots(slots, mask, f, row_offset=20)
    assert float(lowest) == smallest(score, mask)
    assert slots.start[0] == 0 and torch.equal(slots.start[1:], slots.end[:-1])
    rows = (~stored[:n_valid].isfinite()).any(dim=1).nonzero().squeeze(1).tolist()
    assert int(bad) == (rows[0] + 20 if rows else ALL_FINITE)


def test_tied_groups_beyond_the_list_are_not_needed():
    """One score above the rest, which all tie: groups at the bound fill the list, and the first in order win."""
    stored = torch.ones(3, 128, device=DEVICE)
    stored[2, 77] = 2.0
    stored[1, :40] = 0.0
    slots, lowest, _ = run(stored, None, None, 3, 5, 5, group=16)
    assert_slots(slots, reference.select_batchtopk(stored, 5), stored)
    assert float(lowest) == 1.0


def test_no_valid_token_selects_nothing():
    stored = torch.ones(3, 40, device=DEVICE)
    slots, lowest, _ = run(stored, None, None, 0, 2, 2)
    assert_slots(slots, torch.zeros_like(stored, dtype=torch.bool), stored)
    assert float(lowest) == float("inf")


def test_slots_repeat_bit_for_bit():
    stored, (bias, scale) = scores("ties", 4, 333, torch.float32), bias_and_scale(333)
    runs = [run(stored, bias, scale, 4, 10, 10) for _ in range(2)]
    for first, second in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(runs[0][1], runs[1][1])


def test_what_does_not_fit_is_refused():
    stored = torch.ones(2, 40, device=DEVICE)
    work = BatchTopKWork.allocate(2, 40, 4, torch.device(DEVICE))
    with pytest.raises(ValueError, match=r"8 slots.*and 6"):
        batchtopk_slots(stored, None, None, work, limits(2, 3), garbage_slots(2, 3), torch.ones(1), no_bad())
    with pytest.raises(ValueError, match="use a smaller micro-batch"):
        BatchTopKWork.allocate(1 << 16, 1 << 20, 1 << 12, torch.device("meta"))


CELLS = st.sampled_from([0.0, -0.0, -1.0, 0.5, 1.0, 1.0, 2.0, 1e-45, float("inf"), float("-inf"), float("nan")])


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_triton_selects_any_scores_as_defined(data):
    B, F = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, F))
    score = torch.tensor(data.draw(st.lists(CELLS, min_size=B * F, max_size=B * F))).view(B, F).to(DEVICE)
    chosen, lowest = ops.batchtopk(score, k, backend="triton")
    want = reference.select_batchtopk(score, k)
    assert torch.equal(mask_of(chosen), want)
    assert float(lowest) == smallest(score, want)
