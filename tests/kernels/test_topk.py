"""TopK of every implementation against its dense definition: ties, few positives, NaN, all k, odd shapes."""

import pytest
import torch
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
from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.slots import ALL_FINITE
from fastdiff.kernels.topk import group_size, mask_topk, topk_slots, topk_slots_radix

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (3, 7, 2), (5, 64, 64), (17, 131, 3), (32, 96, 40), (8, 160, 1), (9, 700, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), SHAPES)
def test_torch_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F)
    chosen = ops.topk(score, k, backend="torch")
    assert_well_formed(chosen)
    assert torch.equal(mask_of(chosen), reference.select_topk(score, k))
    assert torch.equal(mask_of(ops.topk(score, k, backend="dense")), reference.select_topk(score, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "not_finite"])
def test_torch_takes_the_scale_and_any_number_of_rows_at_a_time(dtype, kind, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 300)
    score, (_, scale) = scores(kind, 11, 136, dtype), bias_and_scale(136)
    want = reference.select_topk(score.to(torch.promote_types(dtype, torch.float32)) * scale, 4)
    for backend in ("torch", "dense"):
        assert torch.equal(mask_of(ops.topk(score, 4, scale=scale, backend=backend)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), [(1, 1, 1), (3, 131, 2), (2, 50, 50), (2, 700, 520)])
def test_triton_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F, torch.float32)
    chosen = ops.topk(score, k, backend="triton")
    assert_well_formed(chosen)
    assert torch.equal(mask_of(chosen), reference.select_topk(score, k))


# k_max · 64 · 4 <= F, so groups of 64; then of 16; then every group of a row survives
@pytest.mark.parametrize(("F", "k_max", "group"), [(601, 2, 64), (333, 10, 16), (100, 90, 16)])
@pytest.mark.parametrize("kind", ["ties", "not_finite", "few_positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_are_the_dense_selection_of_bias_scale_and_limits(F, k_max, group, kind, dtype):
    B, n_valid, k = 3, 2, max(1, k_max - 1)
    assert group_size(k_max, F) == group
    stored, (bias, scale) = scores(kind, B, F, dtype), bias_and_scale(F)
    slots, bad, maxima = garbage_slots(B, k_max), no_bad(), torch.empty(B, -(-F // group), device=DEVICE)
    group_max(stored, bias, scale, maxima, limits(n_valid, k), bad, group=group)
    topk_slots(stored, bias, scale, maxima, limits(n_valid, k), slots, k_max=k_max, group=group, row_offset=50)
    f, score = score_of(stored, bias, scale)
    mask = reference.select_topk(score, k)
    mask[n_valid:] = False
    assert_slots(slots, mask, f, row_offset=50)
    assert slots.start.tolist() == [b * k_max for b in range(B)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 7), (torch.bfloat16, 30), (torch.float32, 1)], ids=str)
def test_radix_slots_are_the_dense_selection_too(kind, dtype, k):
    B, F, k_max, n_valid = 3, 150, 30, 2
    stored, (bias, scale) = scores(kind, B, F, dtype), bias_and_scale(F)
    slots, bad = garbage_slots(B, k_max), no_bad()
    topk_slots_radix(stored, bias, scale, limits(n_valid, k), bad, slots, k_max=k_max, row_offset=50, _block=64)
    f, score = score_of(stored, bias, scale)
    mask = reference.select_topk(score, k)
    mask[n_valid:] = False
    assert_slots(slots, mask, f, row_offset=50)
    rows = (~stored[:n_valid].isfinite()).any(dim=1).nonzero().squeeze(1).tolist()
    assert int(bad) == (rows[0] + 50 if rows else ALL_FINITE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(150, 20), (65, 1), (1, 1), (90, 90), (40, 1792)])
def test_mask_topk_keeps_the_largest_and_zeroes_the_rest(kind, n, k):
    f, (_, scale) = scores(kind, 3, n, torch.float32), bias_and_scale(n)
    want = torch.where(reference.select_topk(f * scale, k), f, 0.0)
    mask_topk(f, scale, k, _block=64)
    assert torch.equal(f, want)


def test_mask_topk_without_scale_inside_a_wider_tensor():
    wide = scores("normal", 4, 90, torch.float32)
    want = torch.where(reference.select_topk(wide[:, :70], 9), wide[:, :70], 0.0)
    beside = wide[:, 70:].clone()
    mask_topk(wide[:, :70], None, 9)
    assert torch.equal(wide[:, :70], want) and torch.equal(wide[:, 70:], beside)


@pytest.mark.parametrize(
    ("k_max", "F", "group"),
    [(100, 114688, 64), (100, 73728, 64), (32, 4096, 16), (512, 131072, 16), (513, 131072, None), (300, 131073, None)],
)
def test_group_size_is_what_registers_hold(k_max, F, group):
    assert group_size(k_max, F) == group


def test_slots_repeat_bit_for_bit():
    stored, (bias, scale) = scores("ties", 4, 333, torch.float32), bias_and_scale(333)
    runs = []
    for _ in range(2):
        slots, maxima = garbage_slots(4, 10), torch.empty(4, 21, device=DEVICE)
        group_max(stored, bias, scale, maxima, limits(4, 10), no_bad(), group=16)
        topk_slots(stored, bias, scale, maxima, limits(4, 10), slots, k_max=10, group=16)
        runs.append(slots)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_what_does_not_fit_is_refused():
    stored, maxima = torch.ones(2, 40, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"8 slots.*got 6"):
        topk_slots(stored, None, None, maxima, limits(2, 3), garbage_slots(2, 3), k_max=4, group=16)
    with pytest.raises(ValueError, match=r"8 slots, got 6"):
        topk_slots_radix(stored, None, None, limits(2, 3), no_bad(), garbage_slots(2, 3), k_max=4)
    wide = torch.ones(1, 2000, device=DEVICE)
    with pytest.raises(ValueError, match="use topk_slots_radix"):
        topk_slots(wide, None, None, torch.ones(1, 125), limits(1, 3), garbage_slots(1, 600), k_max=600, group=16)
