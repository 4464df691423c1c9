"""Maxima of groups of neighbouring scores: where the largest scores of a row or a batch can be, in one pass over them.

    score[b, j] = (stored[b, j] + bias[j]) · scale[j]           out[b, g] = max of score[b, j] over the j of group g

The n-th largest group maximum bounds the n-th largest score from below: n groups that reach it hold n scores that do.
So an exact selection needs to read only the groups that reach the bound. That holds only if maxima and selection use
one and the same score, to the bit: hence the functions here, which every selection kernel uses, on the *stored*
scores (which may be bfloat16), compiled without fused multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# scores per program: 16 a thread with 4 warps
_TILE = 2048
# rows that share a program's biases and scales, which then cost an eighth of the traffic of the scores
_ROWS = 8


@triton.jit
def per_latent(ptr, cols, mask, default: tl.constexpr):
    """Numbers that latents have, such as biases; the default where the pointer is None."""
    if ptr is None:
        value = tl.full(cols.shape, default, tl.float32)
    else:
        value = tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def finite_score(stored, bias, scale, mask):
    """The score that decides; -inf where it is not finite or not there."""
    score = (stored + bias) * scale
    return tl.where(mask & (tl.abs(score) < float("inf")), score, float("-inf"))


@triton.jit
def sortable(score):
    """Positive scores as integers in the same order; 0 for those that can never be selected."""
    return tl.where(score > 0, score.to(tl.int32, bitcast=True), 0)


@triton.jit
def _group_max_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    out_ptr,  # [B, G]
    limits_ptr,  # [2]
    bad_ptr,  # [1]
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
    n_valid = tl.load(limits_ptr)
    first = tl.program_id(0) * ROWS
    first_bad = tl.full((GROUPS, GROUP), 0x7FFFFFFF, tl.int32)
    for r in range(ROWS):
        row = first + r
        mask = (cols < F) & (row < n_valid)
        stored = tl.load(scores_ptr + row.to(tl.int64) * stride + cols, mask=mask, other=0.0).to(tl.float32)
        first_bad = tl.where(tl.abs(stored) < float("inf"), first_bad, tl.minimum(first_bad, row))
        maxima = tl.max(finite_score(stored, bias, scale, mask), axis=1)
        tl.store(out_ptr + row.to(tl.int64) * G + group, maxima, mask=(group < G) & (row < B))
    lowest = tl.min(tl.min(first_bad, axis=1), axis=0)
    tl.atomic_min(bad_ptr, lowest + row_offset, mask=lowest < 0x7FFFFFFF)


def group_max(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    limits: Tensor,
    bad: Tensor,
    *,
    group: int = 64,
    row_offset: int = 0,
    _tile: int = _TILE,
    _rows: int = _ROWS,
) -> None:
    """Fill out with the largest finite score of each group; note the first token whose stored score is not finite.

    Args:
        scores: Stored pre-activations, [B, F], float32 or bfloat16, rows contiguous.
        bias: Added to them, [F] float32.
        scale: Multiplies the sum, [F] float32, not negative.
        out: [B, ceil(F / group)] float32; -inf for a group without finite score and for rows from limits[0] on.
        limits: [2] int32, number of tokens and k; see `slots`.
        bad: [1] int32, lowered to the first token below limits[0] that holds NaN or infinity.
        group: Neighbouring latents per group, a power of two.
        row_offset: Token number of the first row.

    Raises:
        ValueError: out does not fit the scores and the group.
    """
    B, F = scores.shape
    G = triton.cdiv(F, group)
    if out.shape != (B, G):
        raise ValueError(f"maxima of groups of {group} must be {(B, G)} for scores {(B, F)}, got {tuple(out.shape)}")
    check_scores(scores)
    groups = max(1, min(_tile // group, triton.next_power_of_2(G)))
    _group_max_kernel[(triton.cdiv(B, _rows), triton.cdiv(G, groups))](
        scores,
        bias,
        scale,
        out,
        limits,
        bad,
        B,
        F,
        G,
        scores.stride(0),
        row_offset,
        GROUP=group,
        GROUPS=groups,
        ROWS=_rows,
        num_warps=4,
        enable_fp_fusion=False,
    )


def check_scores(scores: Tensor) -> None:
    """Refuse what the selection kernels would round or misread.

    Raises:
        ValueError: A dtype that float32 does not hold, or rows that are not contiguous.
    """
    if scores.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"selection kernels take float32, bfloat16 or float16 scores, got {scores.dtype}")
    if scores.ndim != 2 or scores.stride(1) != 1:
        raise ValueError(f"scores must be [B, F] with contiguous rows, got strides {scores.stride()}")
