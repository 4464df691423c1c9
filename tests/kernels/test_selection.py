"""The selection itself, what the ops refuse, and any scores at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cases import DEVICE, assert_well_formed, mask_of, scores

from fastdiff.kernels import ops, reference, selection
from fastdiff.kernels.selection import Selection


@pytest.mark.parametrize(("B", "F"), [(1, 1), (5, 7), (12, 40)])
def test_entries_by_latent_are_the_same_entries_in_token_order(B, F):
    mask = scores("normal", B, F) > 0.5
    chosen = Selection.from_mask(mask)
    assert_well_formed(chosen)
    assert torch.equal(mask_of(chosen), mask)
    by = chosen.by_latent
    assert torch.equal(by.start.diff(), mask.sum(0))
    assert torch.equal(by.row, chosen.row[by.order])
    for j in range(F):
        entries = by.order[by.start[j] : by.start[j + 1]]
        assert bool((chosen.col[entries] == j).all()) and bool((entries.diff() > 0).all())


def test_reference_selects_the_largest_by_plain_sorting():
    score = scores("ties", 4, 9)
    cells = sorted((-float(score[b, j]), b, j) for b in range(4) for j in range(9) if score[b, j] > 0)
    want = {(b, j) for _, b, j in cells[: 4 * 2]}
    got = {(b, j) for b, j in reference.select_batchtopk(score, 2).nonzero().tolist()}
    assert got == want


@pytest.mark.parametrize(("B", "F"), [(0, 5), (3, 5)])
def test_no_tokens_and_nothing_positive_give_no_entries(B, F):
    score = -torch.ones(B, F, device=DEVICE)
    for backend in ("torch", "triton"):
        for chosen in (
            ops.topk(score, 2, backend=backend),
            ops.batchtopk(score, 2, backend=backend)[0],
            ops.above(score, torch.zeros(F, device=DEVICE), backend=backend),
        ):
            assert_well_formed(chosen)
            assert chosen.n_tokens == B and len(chosen.col) == 0
        assert float(ops.batchtopk(score, 2, backend=backend)[1]) == float("inf")


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
def test_scores_and_scales_that_want_gradients_are_selected_from_all_the_same(backend):
    score = scores("normal", 3, 20, torch.float32).requires_grad_()
    scale = torch.full((20,), 2.0, device=DEVICE, requires_grad=True)
    want = reference.select_batchtopk(score.detach(), 2)
    chosen, lowest = ops.batchtopk(score, 2, scale=scale, backend=backend)
    assert torch.equal(mask_of(chosen), want) and not lowest.requires_grad
    want = reference.select_topk(score.detach(), 2)
    assert torch.equal(mask_of(ops.topk(score, 2, scale=scale, backend=backend)), want)
    want = reference.select_above(score.detach(), scale.detach())
    assert torch.equal(mask_of(ops.above(score, scale, backend=backend)), want)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_kth_largest_is_that_of_a_sorted_row(k):
    values = scores("ties", 6, 8)
    assert torch.equal(selection.kth_largest(values, k), values.sort(dim=1, descending=True).values[:, k - 1])
    assert float(selection.kth_largest(values[0], k)) == float(values[0].sort(descending=True).values[k - 1])


@pytest.mark.parametrize("F", [8, 11])
def test_positions_that_reach_the_bound_are_all_and_in_order(F):
    values = scores("not_finite", 7, F, torch.float32)
    for bound in (torch.tensor(0.5, device=DEVICE), torch.linspace(-1, 1, 7, device=DEVICE).unsqueeze(1)):
        want = (values >= bound).flatten().nonzero().squeeze(1)
        assert torch.equal(selection.reaching(values, bound), want)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\[1, F=5\], got 6"):
        ops.batchtopk(torch.ones(2, 5), 6)
    with pytest.raises(ValueError, match=r"\[1, F=5\], got 0"):
        ops.topk(torch.ones(2, 5), 0)
    with pytest.raises(ValueError, match=r"\[B, F\], got \(5,\)"):
        ops.topk(torch.ones(5), 1)
    for op in (ops.topk, ops.batchtopk):
        with pytest.raises(ValueError, match=r"\[F=5\], got \(4,\)"):
            op(torch.ones(2, 5), 1, scale=torch.ones(4))


@pytest.mark.parametrize(
    "call",
    [
        lambda score: ops.topk(score, 2, backend="triton"),
        lambda score: ops.topk(score, 20, backend="triton"),
        lambda score: ops.batchtopk(score, 2, backend="triton"),
        lambda score: ops.above(score, score[0], backend="triton"),
    ],
)
def test_kernels_refuse_what_they_would_round(call):
    with pytest.raises(ValueError, match="float64"):
        call(torch.ones(2, 20, dtype=torch.float64, device=DEVICE))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_torch_selects_any_scores_as_defined(data):
    B, F = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, F))
    cells = st.sampled_from([0.0, -0.0, -1.0, 0.5, 1.0, 1.0, 2.0, 5e-324, float("inf"), float("-inf"), float("nan")])
    score = torch.tensor(data.draw(st.lists(cells, min_size=B * F, max_size=B * F)), dtype=torch.float64).view(B, F)
    assert torch.equal(mask_of(ops.topk(score, k, backend="torch")), reference.select_topk(score, k))
    assert torch.equal(mask_of(ops.batchtopk(score, k, backend="torch")[0]), reference.select_batchtopk(score, k))
