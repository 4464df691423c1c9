"""Every finite score above its latent's threshold: the selection of JumpReLU and of inference.

`above` in plain torch; `above_slots` as kernels: count per row and group of 256 latents in one pass over the scores,
scan, then read again only the groups that have any. How many there are is known on the device only, so the places are
given and what does not fit is counted, not written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.group_max import check_scores, finite_score, per_latent
from fastdiff.kernels.selection import Selection, join, reaching, row_chunks
from fastdiff.kernels.slots import ALL_FINITE, Slots

_GROUP = 256
# groups per program, 16 scores a thread with 4 warps
_GROUPS = 8
# rows that share a program's biases, scales and thresholds
_ROWS = 4


def above(score: Tensor, threshold: Tensor) -> Selection:
    """Scores [B, F] above each latent's threshold [F]; see `reference.select_above`."""
    dict_size = score.shape[1]
    threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
    found, values = [], []
    for rows, part in row_chunks(score, None):
        flat = reaching(part, threshold, strict=True)
        values.append(part.take(flat))
        found.append(flat + rows.start * dict_size)
    return Selection.from_flat(join(found, values, score)[0], *score.shape)


@triton.jit
def _count_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    threshold_ptr,  # [F]
    limits_ptr,  # [2]
    bad_ptr,  # [1]
    counts_ptr,  # [B, G]
    B,
    F,
    G,
    stride,
    row_offset,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # one program: GROUPS groups of ROWS rows
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    bias = per_latent(bias_ptr, cols, cols < F, 0.0)
    scale = per_latent(scale_ptr, cols, cols < F, 1.0)
    threshold = per_latent(threshold_ptr, cols, cols < F, 0.0)
    n_valid = tl.load(limits_ptr)
    first = tl.program_id(0) * ROWS
    first_bad = tl.full((GROUPS, GROUP), 0x7FFFFFFF, tl.int32)
    for r in range(ROWS):
        row = first + r
        mask = (cols < F) & (row < n_valid)
        stored = tl.load(scores_ptr + row.to(tl.int64) * stride + cols, mask=mask, other=0.0).to(tl.float32)
        first_bad = tl.where(tl.abs(stored) < float("inf"), first_bad, tl.minimum(first_bad, row))
        hit = finite_score(stored, bias, scale, mask) > threshold
        count = tl.sum(hit.to(tl.int32), axis=1)
        tl.store(counts_ptr + row.to(tl.int64) * G + group, count, mask=(group < G) & (row < B))
    lowest = tl.min(tl.min(first_bad, axis=1), axis=0)
    tl.atomic_min(bad_ptr, lowest + row_offset, mask=lowest < 0x7FFFFFFF)


@triton.jit
def _emit_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    threshold_ptr,  # [F]
    counts_ptr,  # [B, G]
    ends_ptr,  # [B * G] int64
    col_ptr,  # [capacity]
    row_ptr,  # [capacity]
    val_ptr,  # [capacity]
    F,
    G,
    capacity,
    stride,
    row_offset,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # one program: GROUPS groups of one row, of which those without a hit are not read
    b = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = b.to(tl.int64) * G + group
    count = tl.load(counts_ptr + at, mask=group < G, other=0)
    before = tl.load(ends_ptr + at, mask=group < G, other=0) - count
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (count > 0)[:, None] & (cols < F)
    stored = tl.load(scores_ptr + b.to(tl.int64) * stride + cols, mask=mask, other=0.0).to(tl.float32)
    bias = per_latent(bias_ptr, cols, mask, 0.0)
    scale = per_latent(scale_ptr, cols, mask, 1.0)
    hit = finite_score(stored, bias, scale, mask) > per_latent(threshold_ptr, cols, mask, 0.0)
    place = before[:, None] + tl.cumsum(hit.to(tl.int32), axis=1) - 1
    fits = hit & (place < capacity)
    tl.store(col_ptr + place, cols, mask=fits)
    tl.store(row_ptr + place, tl.zeros_like(cols) + (b + row_offset), mask=fits)
    tl.store(val_ptr + place, stored + bias, mask=fits)


@triton.jit
def _close_kernel(
    ends_ptr,  # [B, G] int64
    start_ptr,  # [B]
    end_ptr,  # [B]
    col_ptr,  # [capacity]
    row_ptr,  # [capacity]
    val_ptr,  # [capacity]
    total_ptr,  # [1] int64
    B,
    F,
    G,
    n_ends,
    capacity,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program: edges of ROWS rows, and BLOCK slots in case they stay unused
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = tl.load(ends_ptr + (row + 1).to(tl.int64) * G - 1, mask=row < B, other=0)
    start = tl.load(ends_ptr + row.to(tl.int64) * G - 1, mask=(row > 0) & (row < B), other=0)
    tl.store(start_ptr + row, tl.minimum(start, capacity).to(tl.int32), mask=row < B)
    tl.store(end_ptr + row, tl.minimum(end, capacity).to(tl.int32), mask=row < B)
    total = tl.load(ends_ptr + n_ends - 1)
    if tl.program_id(0) == 0:
        tl.store(total_ptr, total)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unused = (place >= total) & (place < capacity)
    tl.store(col_ptr + place, tl.zeros((BLOCK,), tl.int32) + F, mask=unused)
    tl.store(row_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=unused)
    tl.store(val_ptr + place, tl.zeros((BLOCK,), tl.float32), mask=unused)


@dataclass(frozen=True)
class AboveWork:
    """Buffers of `above_slots` for one micro-batch shape; their content means nothing between calls."""

    counts: Tensor  # [B, G] int32
    ends: Tensor  # [B * G] int64, running sum of the counts

    @staticmethod
    def allocate(n_tokens: int, dict_size: int, device: torch.device) -> "AboveWork":
        """Buffers for B tokens and F latents."""
        G = triton.cdiv(dict_size, _GROUP)
        return AboveWork(
            torch.zeros(n_tokens, G, dtype=torch.int32, device=device),
            torch.zeros(n_tokens * G, dtype=torch.int64, device=device),
        )


def count_above(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    threshold: Tensor,
    work: AboveWork,
    limits: Tensor,
    bad: Tensor,
    *,
    row_offset: int = 0,
) -> None:
    """First half of `above_slots`, same arguments: after it work.ends[-1] is the number of hits."""
    B, F = scores.shape
    G = triton.cdiv(F, _GROUP)
    if work.counts.shape != (B, G):
        raise ValueError(f"scores {(B, F)} need counts {(B, G)}, got {tuple(work.counts.shape)}")
    check_scores(scores)
    groups = min(_GROUPS, triton.next_power_of_2(G))
    _count_kernel[(triton.cdiv(B, _ROWS), triton.cdiv(G, groups))](
        scores,
        bias,
        scale,
        threshold,
        limits,
        bad,
        work.counts,
        B,
        F,
        G,
        scores.stride(0),
        row_offset,
        GROUP=_GROUP,
        GROUPS=groups,
        ROWS=_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    torch.cumsum(work.counts.view(-1), 0, dtype=torch.int64, out=work.ends)


def emit_above(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    threshold: Tensor,
    work: AboveWork,
    slots: Slots,
    total: Tensor,
    *,
    row_offset: int = 0,
) -> None:
    """Second half of `above_slots`, same arguments."""
    B, F = scores.shape
    G = work.counts.shape[1]
    capacity = len(slots.col)
    groups = min(_GROUPS, triton.next_power_of_2(G))
    _emit_kernel[(B, triton.cdiv(G, groups))](
        scores,
        bias,
        scale,
        threshold,
        work.counts,
        work.ends,
        slots.col,
        slots.row,
        slots.val,
        F,
        G,
        capacity,
        scores.stride(0),
        row_offset,
        GROUP=_GROUP,
        GROUPS=groups,
        num_warps=4,
        enable_fp_fusion=False,
    )
    block = 1024
    _close_kernel[(triton.cdiv(max(B, capacity), block),)](
        work.ends, *slots, total, B, F, G, B * G, capacity, ROWS=block, BLOCK=block, num_warps=4
    )


def above_slots(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    threshold: Tensor,
    work: AboveWork,
    limits: Tensor,
    bad: Tensor,
    slots: Slots,
    total: Tensor,
    *,
    row_offset: int = 0,
) -> None:
    """Write the pairs whose score is above the latent's threshold into the first slots; never synchronises.

    Args:
        scores: Stored pre-activations, [B, F], float32 or bfloat16, rows contiguous.
        bias: Added to them, [F] float32. The value of a slot has it.
        scale: Multiplies the sum for the selection, [F] float32. The value of a slot lacks it.
        threshold: [F] float32; may be negative.
        work: Buffers allocated for B and F.
        limits: [2] int32; rows from limits[0] on get no entry. limits[1] is not read.
        bad: [1] int32, lowered to the first token whose stored score is not finite; see `group_max`.
        slots: Any number of places, filled from the front.
        total: [1] int64, becomes the number of pairs. Where it exceeds the places, the first ones are there, and
            start and end stop at the last place.
        row_offset: Token number of the first row.

    Raises:
        ValueError: Work is not of this shape.
    """
    count_above(scores, bias, scale, threshold, work, limits, bad, row_offset=row_offset)
    emit_above(scores, bias, scale, threshold, work, slots, total, row_offset=row_offset)


def above_triton(score: Tensor, threshold: Tensor) -> Selection:
    """`above` by the kernels; synchronises once, to learn how many pairs there are."""
    B, F = score.shape
    device = score.device
    score, threshold = score.contiguous(), threshold.contiguous()
    limits = torch.tensor([B, 1], dtype=torch.int32, device=device)
    bad = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=device)
    work = AboveWork.allocate(B, F, device)
    count_above(score, None, None, threshold, work, limits, bad)
    n = int(work.ends[-1]) if B else 0
    edges = torch.zeros(2, B, dtype=torch.int32, device=device)
    places = torch.zeros(2, n, dtype=torch.int32, device=device)
    slots = Slots(edges[0], edges[1], places[0], places[1], torch.zeros(n, device=device))
    emit_above(score, None, None, threshold, work, slots, torch.zeros(1, dtype=torch.int64, device=device))
    crow = torch.zeros(B + 1, dtype=torch.int64, device=device)
    crow[1:] = slots.end
    return Selection(crow, slots.col.long(), slots.row.long(), F)
