"""Scores above a threshold, of every implementation, against the dense definition; what happens when places run out."""

import pytest
import torch
from score_cases import (
    DEVICE,
    KINDS,
    assert_slots,
    assert_well_formed,
    bias_and_scale,
    limits,
    mask_of,
    no_bad,
    score_of,
    scores,
)

from fastdiff.kernels import ops, reference
from fastdiff.kernels.above import AboveWork, above_slots
from fastdiff.kernels.slots import ALL_FINITE, Slots

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F"), [(1, 1), (5, 37), (3, 700), (2, 3000)])
def test_above_is_the_dense_definition(kind, backend, B, F):
    score = scores(kind, B, F, torch.float32)
    threshold = torch.linspace(-1, 1, F, device=DEVICE)
    threshold[F // 2] = -torch.inf
    chosen = ops.above(score, threshold, backend=backend)
    assert_well_formed(chosen)
    assert torch.equal(mask_of(chosen), reference.select_above(score, threshold))


def test_float64_scores_are_compared_as_such():
    score = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=DEVICE)
    threshold = torch.ones(2, dtype=torch.float64, device=DEVICE)
    assert mask_of(ops.above(score, threshold, backend="torch")).tolist() == [[False, True]]


def slots_of(B: int, capacity: int) -> Slots:
    integers = [torch.full((n,), -7, dtype=torch.int32, device=DEVICE) for n in (B, B, capacity, capacity)]
    return Slots(*integers, torch.full((capacity,), float("nan"), device=DEVICE))


@pytest.mark.parametrize("kind", ["normal", "not_finite", "all_negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_are_the_dense_selection_of_bias_scale_and_limits(kind, dtype):
    B, F, n_valid = 6, 2500, 5
    stored, (bias, scale) = scores(kind, B, F, dtype), bias_and_scale(F)
    threshold = torch.full((F,), 1.5, device=DEVICE)
    f, score = score_of(stored, bias, scale)
    mask = reference.select_above(score, threshold)
    mask[n_valid:] = False
    slots, total, bad = slots_of(B, int(mask.sum()) + 9), torch.zeros(1, dtype=torch.int64, device=DEVICE), no_bad()
    work = AboveWork.allocate(B, F, torch.device(DEVICE))
    above_slots(stored, bias, scale, threshold, work, limits(n_valid, 1), bad, slots, total, row_offset=30)
    assert_slots(slots, mask, f, row_offset=30)
    assert int(total) == int(mask.sum())
    rows = (~stored[:n_valid].isfinite()).any(dim=1).nonzero().squeeze(1).tolist()
    assert int(bad) == (rows[0] + 30 if rows else ALL_FINITE)


def test_nothing_is_written_beyond_the_places_and_all_are_counted():
    stored = scores("normal", 5, 600, torch.float32)
    threshold = torch.full((600,), 1.0, device=DEVICE)
    mask = reference.select_above(stored, threshold)
    n = int(mask.sum())
    capacity = n // 2
    # the tail stands for whatever lies behind the places
    tail = 50
    whole = slots_of(5, capacity + tail)
    slots = Slots(whole.start, whole.end, whole.col[:capacity], whole.row[:capacity], whole.val[:capacity])
    total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    work = AboveWork.allocate(5, 600, torch.device(DEVICE))
    above_slots(stored, None, None, threshold, work, limits(5, 1), no_bad(), slots, total)
    assert int(total) == n
    kept = torch.zeros_like(mask)
    kept.view(-1)[mask.flatten().nonzero().squeeze(1)[:capacity]] = True
    assert_slots(slots, kept, stored)
    assert bool((whole.col[capacity:] == -7).all()) and bool(whole.val[capacity:].isnan().all())


def test_slots_repeat_bit_for_bit():
    stored, threshold = scores("ties", 4, 600, torch.float32), torch.zeros(600, device=DEVICE)
    runs = []
    for _ in range(2):
        slots, total = slots_of(4, 2400), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        work = AboveWork.allocate(4, 600, torch.device(DEVICE))
        above_slots(stored, None, None, threshold, work, limits(4, 1), no_bad(), slots, total)
        runs.append([*slots, total])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_work_of_another_shape_is_refused():
    stored = torch.ones(2, 600, device=DEVICE)
    work = AboveWork.allocate(2, 100, torch.device(DEVICE))
    total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
        above_slots(stored, None, None, stored[0], work, limits(2, 1), no_bad(), slots_of(2, 4), total)
