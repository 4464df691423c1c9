"""Selections against their dense definition: odd shapes, ties, few positives, NaN and infinity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels import ops, reference
from fastdiff.kernels.selection import Selection


def scores(kind: str, B: int, F: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(B * 1000 + F)
    score = torch.randn(B, F, generator=generator, dtype=torch.float64)
    if kind == "ties":
        score = (score * 2).round()
    elif kind == "few_positive":
        score = torch.where(torch.rand(B, F, generator=generator) < 0.05, score.abs(), -score.abs())
    elif kind == "all_negative":
        score = -score.abs() - 1
    elif kind == "constant":
        score = torch.ones(B, F, dtype=torch.float64)
    elif kind == "not_finite":
        score.view(-1)[:: max(3, B)] = torch.nan
        score.view(-1)[1 :: max(4, B)] = torch.inf
        score.view(-1)[2 :: max(5, B)] = -torch.inf
    elif kind == "one_row":
        score[1:] = -1
        score[:1] = score[:1].abs() + 5
    return score


KINDS = ["normal", "ties", "few_positive", "all_negative", "constant", "not_finite", "one_row"]
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 64, 64), (17, 131, 3), (32, 96, 40), (8, 160, 1)]


def mask_of(selection: Selection) -> torch.Tensor:
    mask = torch.zeros(selection.n_tokens, selection.dict_size, dtype=torch.bool)
    mask[selection.row, selection.col] = True
    return mask


def assert_well_formed(selection: Selection) -> None:
    assert selection.crow[0] == 0 and selection.crow[-1] == len(selection.col) == len(selection.row)
    counts = torch.bincount(selection.row, minlength=selection.n_tokens)
    assert torch.equal(selection.crow.diff(), counts)
    flat = selection.row * selection.dict_size + selection.col
    assert bool((flat.diff() > 0).all()), "entries must ascend by token, then latent, without repeats"
    by = selection.by_latent
    assert torch.equal(by.start.diff(), torch.bincount(selection.col, minlength=selection.dict_size))
    assert torch.equal(by.row, selection.row[by.order])
    for j in selection.col.unique().tolist():
        entries = by.order[by.start[j] : by.start[j + 1]]
        assert bool((selection.col[entries] == j).all()) and bool((entries.diff() > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), SHAPES)
def test_topk_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F)
    selection = ops.topk(score, k)
    assert_well_formed(selection)
    assert torch.equal(mask_of(selection), reference.select_topk(score, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "F", "k"), SHAPES)
def test_batchtopk_is_the_dense_definition(kind, B, F, k):
    score = scores(kind, B, F)
    selection, lowest = ops.batchtopk(score, k)
    assert_well_formed(selection)
    want = reference.select_batchtopk(score, k)
    assert torch.equal(mask_of(selection), want)
    assert float(lowest) == (float(score[want].min()) if bool(want.any()) else float("inf"))


def test_reference_selects_the_largest_by_plain_sorting():
    score = scores("ties", 4, 9)
    cells = sorted((-float(score[b, j]), b, j) for b in range(4) for j in range(9) if score[b, j] > 0)
    want = {(b, j) for _, b, j in cells[: 4 * 2]}
    got = {(b, j) for b, j in reference.select_batchtopk(score, 2).nonzero().tolist()}
    assert got == want


@pytest.mark.parametrize("kind", KINDS)
def test_above_is_the_dense_definition(kind):
    score = scores(kind, 11, 37)
    threshold = torch.linspace(-1, 1, 37, dtype=torch.float64)
    selection = ops.above(score, threshold)
    assert_well_formed(selection)
    assert torch.equal(mask_of(selection), reference.select_above(score, threshold))


def test_k_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[1, F=5\], got 6"):
        ops.batchtopk(torch.ones(2, 5), 6)
    with pytest.raises(ValueError, match=r"\[1, F=5\], got 0"):
        ops.topk(torch.ones(2, 5), 0)
    with pytest.raises(ValueError, match=r"\[B, F\], got \(5,\)"):
        ops.topk(torch.ones(5), 1)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_scores_are_selected_as_defined(data):
    B, F = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, F))
    cells = st.sampled_from([0.0, -0.0, -1.0, 0.5, 1.0, 1.0, 2.0, float("inf"), float("-inf"), float("nan")])
    score = torch.tensor(data.draw(st.lists(cells, min_size=B * F, max_size=B * F)), dtype=torch.float64).view(B, F)
    assert torch.equal(mask_of(ops.topk(score, k)), reference.select_topk(score, k))
    assert torch.equal(mask_of(ops.batchtopk(score, k)[0]), reference.select_batchtopk(score, k))
