"""Normalised inputs of a batch in one pass, with the flag that stops a step before a NaN reaches a weight.

    x̃[b, m] = (x[b, m] - mean[m]) · scale[m]     in float32, rounded once to the dtype of the output

B rows, M models, D width, C = M·D.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["n_rows", "row_offset"])
def _normalize_kernel(
    batch_ptr,  # [n_rows, M, D]
    mean_ptr,  # [M, D]
    scale_ptr,  # [M]
    x_ptr,  # [B, M·D]
    squares_ptr,  # [B, M]
    limits_ptr,  # [2]
    bad_ptr,  # [1]
    n_rows,
    row_offset,
    D,
    BLOCK: tl.constexpr,
):
    # one program: one token of one model
    b, m = tl.program_id(0), tl.program_id(1)
    n_models = tl.num_programs(1)
    first = (b.to(tl.int64) * n_models + m) * D
    # columns of this token that count
    width = tl.where((b < tl.load(limits_ptr)) & (b < n_rows), D, 0)
    scale = tl.load(scale_ptr + m)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        raw = tl.load(batch_ptr + first + cols, mask=cols < width, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + m * D + cols, mask=inside, other=0.0)
        rounded = tl.where(cols < width, (raw - mean) * scale, 0.0).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + first + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
        squares += value * value
    total = tl.sum(squares, axis=0)
    tl.store(squares_ptr + b.to(tl.int64) * n_models + m, total)
    # false for NaN too
    finite = total < float("inf")
    if finite == 0:
        tl.atomic_min(bad_ptr, b + row_offset, sem="relaxed")


def normalize(
    batch: Tensor,
    mean: Tensor,
    scale: Tensor,
    x: Tensor,
    squares: Tensor,
    limits: Tensor,
    bad: Tensor,
    *,
    row_offset: int,
    _block: int = _BLOCK,
) -> None:
    """Write x̃ and its squared norms, and report the first token that is not finite.

    Args:
        batch: Stored activations, [n, M, D] contiguous with n ≤ B, any float dtype.
        mean: [M, D] float32.
        scale: [M] float32.
        x: Output x̃, [B, M·D] bfloat16 or float32; rows from limits[0] or n on are zero.
        squares: Output ‖x̃[b, m]‖² of the rounded x̃, [B, M] float32.
        limits: [2] int32; the first limits[0] rows count.
        bad: [1] int32; lowered to the number of the first token with a NaN, an infinity, or a ‖x̃‖² beyond float32.
        row_offset: Number of the first token, for `bad`.
    """
    n_rows, n_models, d_model = batch.shape
    assert batch.is_contiguous() and mean.is_contiguous() and x.is_contiguous() and squares.is_contiguous()
    assert n_rows <= len(x) and x.shape[1] == n_models * d_model and squares.shape == (len(x), n_models)
    _normalize_kernel[(len(x), n_models)](
        batch,
        mean,
        scale,
        x,
        squares,
        limits,
        bad,
        n_rows,
        row_offset,
        d_model,
        BLOCK=_block,
        num_warps=4,
        enable_fp_fusion=False,
    )
