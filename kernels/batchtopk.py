"""BatchTopK: the n = B·k largest positive scores of a batch, exact, ties to the lowest token, then latent.

`batchtopk` in plain torch; `batchtopk_slots` as kernels that write a step's slots and never synchronise:

    group maxima → the n-th largest of them, by four histograms of eight bits → a list of the groups that reach it
                 → the n-th largest score in those groups, by four histograms → count, scan, emit

Why the listed groups suffice: the n-th largest positive group maximum is reached by n groups, so by n scores, and a
group below it holds none of the n largest. Of the groups that tie with it only the first n - (groups above it) count,
which keeps the list within n: a score equal to the bound in a later one has as many equals before it as the selection
can still take. With fewer than n positive groups all of them are listed.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastdiff.kernels.batchtopk_kernels import (
    count_groups_kernel,
    count_scores_kernel,
    emit_kernel,
    list_groups_kernel,
    maxima_digits_kernel,
    score_digits_kernel,
)
from fastdiff.kernels.group_max import check_scores, group_max
from fastdiff.kernels.selection import Selection, join, kth_largest, positive_bound, reaching, row_chunks
from fastdiff.kernels.slots import ALL_FINITE, Slots

# maxima, or scores, that a program looks at in one step: 16 a thread with 4 warps
_BLOCK = 2048
# steps of a program that counts digits: more make fewer atomic additions
_STEPS = 8


def batchtopk(score: Tensor, k: int, scale: Tensor | None = None) -> tuple[Selection, Tensor]:
    """The B·k largest positive scores of the batch, times scale where given; see `reference.select_batchtopk`.

    Args:
        score: [B, F]; only products with scale that are finite and above 0 are selected.
        k: In [1, F].
        scale: [F], not negative; saves the product [B, F].

    Returns:
        The selection and the smallest selected score [], infinity where nothing is selected.
    """
    n_tokens, dict_size = score.shape
    n = n_tokens * k
    bound = positive_bound(_batch_bound(score, scale, n))
    found, values = [], []
    for rows, part in row_chunks(score, scale):
        flat = reaching(part, bound)
        values.append(part.take(flat))
        found.append(flat + rows.start * dict_size)
    flat, value = join(found, values, score)
    if len(flat) > n:
        smallest = kth_largest(value, n)
        kept = (value >= smallest).nonzero().squeeze(1)
        flat, value = flat.take(kept), value.take(kept)
        if len(flat) > n:
            ties = (value == smallest).nonzero().squeeze(1)
            keep = torch.ones_like(value, dtype=torch.bool)
            keep[ties[n - len(flat) :]] = False
            flat, value = flat[keep], value[keep]
    lowest = value.amin() if len(value) else torch.full_like(bound, torch.inf)
    # a stored score is its own value; a product may need the wider type it was compared in
    return Selection.from_flat(flat, n_tokens, dict_size), lowest.to(score.dtype) if scale is None else lowest


def _batch_bound(score: Tensor, scale: Tensor | None, n: int) -> Tensor:
    """The n-th largest maximum of groups of one latent on neighbouring tokens, or 0 where there are fewer groups.

    The scale is not negative and the same for the whole group, so it can wait until after the maximum: rounding is
    monotone.
    """
    n_tokens, dict_size = score.shape
    fold = 64
    while fold > 1 and n_tokens // fold * dict_size < 2 * n:
        fold //= 2
    maxima = score[: n_tokens // fold * fold].unflatten(0, (-1, fold)).amax(1)
    maxima = maxima.to(torch.promote_types(score.dtype, torch.float32))
    if scale is not None:
        maxima = maxima * scale
    if n == 0:
        return maxima.new_zeros(())
    return kth_largest(maxima.nan_to_num(0.0, 0.0, 0.0).flatten(), n)


@dataclass(frozen=True)
class BatchTopKWork:
    """Buffers of `batchtopk_slots` for one micro-batch shape; their content means nothing between calls."""

    group: int
    k_max: int
    maxima: Tensor  # [B, G] float32
    listed: Tensor  # [B * min(k_max, G)] int32, groups numbered through the batch
    histograms: Tensor  # [2, 4, 256] int32, of maxima and of scores
    states: Tensor  # [2, 5, 2] int32, picked digits and the number still wanted, before each round and after the last
    counts: Tensor  # [2, 2, B] int32, for groups and for scores: above the bound, equal to it
    ends: Tensor  # [2, 2, B] int32, running sums of the counts

    @staticmethod
    def allocate(
        n_tokens: int, dict_size: int, k_max: int, device: torch.device, *, group: int | None = None
    ) -> "BatchTopKWork":
        """Buffers for B tokens, F latents and up to k_max latents a token.

        Groups have 64 latents, or 16 where groups of 64 would leave more than a quarter of the scores to be read
        again; any power of two is exact.

        Raises:
            ValueError: A count would not fit 32 bits.
        """
        if group is None:
            group = 64 if 4 * 64 * k_max <= dict_size else 16
        G = triton.cdiv(dict_size, group)
        n_listed = n_tokens * min(k_max, G)
        if n_listed * group >= 2**31 or n_tokens * G > 2**30:
            raise ValueError(
                f"{n_tokens} tokens with {k_max} of {dict_size} latents are too many for one selection; "
                "use a smaller micro-batch"
            )

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return BatchTopKWork(
            group=group,
            k_max=k_max,
            maxima=torch.zeros(n_tokens, G, device=device),
            listed=integers(n_listed),
            histograms=integers(2, 4, 256),
            states=integers(2, 5, 2),
            counts=integers(2, 2, n_tokens),
            ends=integers(2, 2, n_tokens),
        )


def batchtopk_slots(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    work: BatchTopKWork,
    limits: Tensor,
    slots: Slots,
    lowest: Tensor,
    bad: Tensor,
    *,
    row_offset: int = 0,
    _block: int = _BLOCK,
    _steps: int = _STEPS,
) -> None:
    """Write the limits[0]·limits[1] largest positive scores of the batch into the first slots; never synchronises.

    Args:
        scores: Stored pre-activations, [B, F], float32 or bfloat16, rows contiguous.
        bias: Added to them, [F] float32. The value of a slot has it.
        scale: Multiplies the sum for the selection, [F] float32, not negative. The value of a slot lacks it.
        work: Buffers allocated for B, F and k_max.
        limits: [2] int32; rows from limits[0] on get no entry.
        slots: Of B·k_max places, filled from the front.
        lowest: [1] float32, becomes the smallest selected score; infinity where nothing is selected.
        bad: [1] int32, lowered to the first token whose stored score is not finite; see `group_max`.
        row_offset: Token number of the first row.

    Raises:
        ValueError: Work and slots are not of this shape.
    """
    B, F = scores.shape
    group, k_max, maxima = work.group, work.k_max, work.maxima
    G = maxima.shape[1]
    if len(maxima) != B or triton.cdiv(F, group) != G or len(slots.col) != B * k_max:
        raise ValueError(
            f"scores {(B, F)} with k_max={k_max} need maxima {(B, triton.cdiv(F, group))} and {B * k_max} slots, "
            f"got {tuple(maxima.shape)} and {len(slots.col)}"
        )
    check_scores(scores)
    group_max(scores, bias, scale, maxima, limits, bad, group=group, row_offset=row_offset)

    work.histograms.zero_()
    options = {"num_warps": 4, "enable_fp_fusion": False}
    of_groups, of_scores = work.histograms.unbind()
    group_states, states = work.states.unbind()
    group_counts, counts = work.counts.unbind()
    group_ends, ends = work.ends.unbind()

    for digit_round in range(4):
        maxima_digits_kernel[(triton.cdiv(B * G, _block * _steps),)](
            maxima,
            of_groups,
            group_states,
            limits,
            B * G,
            ROUND=digit_round,
            BLOCK=_block,
            STEPS=_steps,
            **options,
        )
    row_block = min(_block, triton.next_power_of_2(max(G, 2)))
    count_groups_kernel[(B,)](maxima, of_groups, group_states, limits, group_counts, B, G, BLOCK=row_block, **options)
    torch.cumsum(group_counts, 1, dtype=torch.int32, out=group_ends)
    list_groups_kernel[(B,)](
        maxima, group_states, group_counts, group_ends, work.listed, B, G, BLOCK=row_block, **options
    )

    Q = max(2, _block // group)
    # a histogram of 2048 scores in groups of 16 does not fit the registers of sm_80
    digits_Q = Q if group == 64 else max(2, Q // 2)
    listed = (scores, bias, scale, work.listed, group_states, group_counts, group_ends)
    for digit_round in range(4):
        score_digits_kernel[(triton.cdiv(len(work.listed), digits_Q * _steps),)](
            *listed,
            of_scores,
            states,
            limits,
            B,
            F,
            G,
            scores.stride(0),
            ROUND=digit_round,
            GROUP=group,
            Q=digits_Q,
            STEPS=_steps,
            **options,
        )
    count_scores_kernel[(B,)](
        *listed, of_scores, states, limits, counts, B, F, G, scores.stride(0), GROUP=group, Q=Q, **options
    )
    torch.cumsum(counts, 1, dtype=torch.int32, out=ends)
    emit_kernel[(B,)](
        *listed,
        states,
        counts,
        ends,
        *slots,
        lowest.view(torch.int32),
        B,
        F,
        G,
        k_max,
        scores.stride(0),
        row_offset,
        GROUP=group,
        Q=Q,
        BLOCK=_block,
        **options,
    )


def batchtopk_triton(score: Tensor, k: int, scale: Tensor | None = None) -> tuple[Selection, Tensor]:
    """`batchtopk` by the kernels; synchronises to learn how many entries there are."""
    B, F = score.shape
    score = score.contiguous()
    limits = torch.tensor([B, k], dtype=torch.int32, device=score.device)
    bad = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=score.device)
    slots = Slots.allocate(B, k, score.device)
    lowest = torch.full((1,), torch.inf, device=score.device)
    work = BatchTopKWork.allocate(B, F, k, score.device)
    batchtopk_slots(score, None, scale, work, limits, slots, lowest, bad)
    crow = torch.zeros(B + 1, dtype=torch.int64, device=score.device)
    crow[1:] = slots.end
    n = int(crow[-1])
    selection = Selection(crow, slots.col[:n].long(), slots.row[:n].long(), F)
    return selection, lowest[0].to(score.dtype) if scale is None else lowest[0]
