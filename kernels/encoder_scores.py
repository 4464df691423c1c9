"""Encoder scores: the one dense product of a training step, and the largest score of every group of latents.

    out[b, j]     = ⟨x[b], W_enc[j]⟩ (+ bias[j])                     stored, rounded to the dtype of out
    maxima[b, g]  = max of score[b, j] over the j of group g         scores as in `group_max`, of what out holds

cuBLAS is the default for the product. The kernel is the alternative that takes the maxima on the way out, which saves
reading out once. Selection compares maxima with scores that it computes from out, so they are of the stored, rounded
numbers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.group_max import finite_score, per_latent
from fastdiff.kernels.matmul import matmul_into

# row blocks whose programs run side by side, so that they share W_enc's rows in the L2 cache
_ROW_BLOCKS = 8
_LOW = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """What a program computes at once."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int


# by CUDA architecture, for 16-bit inputs: the largest without register spills, checked ahead of time with and without
# maxima. 128 x 256 spills on sm_80 (27 loads and stores) and sm_100 (6); sm_86 and sm_89 have 99 KiB of shared memory
_TILES = {
    80: Tile(128, 128, 64, warps=8, stages=4),
    90: Tile(128, 256, 64, warps=8, stages=4),
    100: Tile(128, 128, 64, warps=8, stages=4),
}
_TILE = Tile(128, 128, 64, warps=8, stages=3)
# addresses that cannot be joined to 128 bits, which those of rows of odd widths cannot, take registers: 128 x 256 then
# spills 687 times on sm_90
_TILE_ODD = Tile(64, 128, 32, warps=8, stages=3)
_TILE_FLOAT32 = Tile(64, 64, 32, warps=4, stages=3)


@triton.jit
def _encoder_scores_kernel(
    x_ptr,  # [B, C]
    W_enc_ptr,  # [F, C]
    out_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    maxima_ptr,  # [B, G] or None
    limits_ptr,  # [2] or None
    bad_ptr,  # [1] or None
    B,
    F,
    C,
    G,
    row_offset,
    STORE_BIAS: tl.constexpr,
    MAXIMA: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    # one program: ROWS tokens, LATENTS latents; consecutive programs walk down ROW_BLOCKS row blocks, then right
    program = tl.program_id(0)
    n_down, n_right = tl.cdiv(B, ROWS), tl.cdiv(F, LATENTS)
    band = program // (ROW_BLOCKS * n_right)
    in_band = program % (ROW_BLOCKS * n_right)
    height = tl.minimum(n_down - band * ROW_BLOCKS, ROW_BLOCKS)
    row = (band * ROW_BLOCKS + in_band % height) * ROWS + tl.arange(0, ROWS)
    right = in_band // height
    latent = right * LATENTS + tl.arange(0, LATENTS)
    offset, depth = row.to(tl.int64), tl.arange(0, DEPTH)
    x_ptrs = x_ptr + offset[:, None] * C + depth[None, :]
    W_ptrs = W_enc_ptr + latent.to(tl.int64)[None, :] * C + depth[:, None]
    acc = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
    for first in range(0, C, DEPTH):
        deep = first + depth < C
        x = tl.load(x_ptrs, mask=(row < B)[:, None] & deep[None, :], other=0.0)
        W = tl.load(W_ptrs, mask=(latent < F)[None, :] & deep[:, None], other=0.0)
        # float32 stays float32: tf32 keeps 10 bits of it
        acc = tl.dot(x, W, acc, input_precision="ieee")
        x_ptrs += DEPTH
        W_ptrs += DEPTH
    bias = per_latent(bias_ptr, latent, latent < F, 0.0)
    if STORE_BIAS:
        acc += bias[None, :]
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset[:, None] * F + latent[None, :], stored, mask=(row < B)[:, None] & (latent < F)[None, :])
    if MAXIMA:
        held = stored.to(tl.float32)
        valid = (row < tl.minimum(tl.load(limits_ptr), B))[:, None] & (latent < F)[None, :]
        scale = per_latent(scale_ptr, latent, latent < F, 1.0)
        if STORE_BIAS:
            score = finite_score(held, 0.0, scale[None, :], valid)
        else:
            score = finite_score(held, bias[None, :], scale[None, :], valid)
        # one reduction finds both: a second one spills on sm_90 and crashes the compiler of Triton 3.7 on sm_100, which
        # no reduction to one number per row survives; hence the atomics of every group below
        score = tl.where(valid & (tl.abs(held) < float("inf")), score, tl.where(valid, float("inf"), float("-inf")))
        best = tl.max(tl.reshape(score, (ROWS, LATENTS // GROUP, GROUP)), axis=2)
        group = right * (LATENTS // GROUP) + tl.arange(0, LATENTS // GROUP)
        maxima = tl.where(best < float("inf"), best, float("-inf"))
        mask = (row < B)[:, None] & (group < G)[None, :]
        tl.store(maxima_ptr + offset[:, None] * G + group[None, :], maxima, mask=mask)
        token = tl.broadcast_to(row[:, None] + row_offset, (ROWS, LATENTS // GROUP))
        tl.atomic_min(bad_ptr + tl.zeros_like(token), token, mask=mask & (best == float("inf")))


def encoder_scores_into(
    x: Tensor,
    W_enc: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    store_bias: bool = False,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    limits: Tensor | None = None,
    bad: Tensor | None = None,
    group: int = 64,
    row_offset: int = 0,
    _tile: Tile | None = None,
) -> None:
    """Launch the kernel; nothing is allocated and nothing waits for the device.

    Args:
        x: Inputs, [B, C], bfloat16, float16 or float32, contiguous.
        W_enc: Encoder rows, [F, C], dtype of x, contiguous.
        out: [B, F], contiguous, any of these dtypes; every element is written.
        bias: [F]; part of the scores that maxima are of, and of out where store_bias.
        store_bias: Whether out holds the bias already.
        scale: [F], not negative; multiplies stored score plus bias for the maxima.
        maxima: [B, ceil(F / group)] float32; -inf for a group without finite score, for rows from limits[0] on, and,
            unlike in `group_max`, for a group that holds a stored score which is not finite.
        limits: [2] int32, number of tokens and k, see `slots`; goes with maxima.
        bad: [1] int32, lowered to the first token below limits[0] whose stored score is NaN or infinity; likewise.
        group: Neighbouring latents per group, a power of two.
        row_offset: Token number of the first row.

    Raises:
        ValueError: A dtype the kernel does not multiply, or arguments that go together and do not.
    """
    (B, C), F = x.shape, len(W_enc)
    if x.dtype != W_enc.dtype or x.dtype not in (*_LOW, torch.float32):
        raise ValueError(
            f"the kernel multiplies bfloat16, float16 or float32 by the same, got {x.dtype} and {W_enc.dtype}"
        )
    if maxima is not None and (limits is None or bad is None):
        raise ValueError("maxima need limits and bad")
    if bias is not None and maxima is None and not store_bias:
        raise ValueError("bias would be ignored without maxima or store_bias")
    tile = _tile or _tile_for(x, W_enc)
    G = triton.cdiv(F, group)
    if maxima is not None and (maxima.shape != (B, G) or tile.latents % group):
        raise ValueError(
            f"maxima of groups of {group} must be {(B, G)}, got {tuple(maxima.shape)}; "
            f"a group must divide {tile.latents} latents"
        )
    _encoder_scores_kernel[(triton.cdiv(B, tile.rows) * triton.cdiv(F, tile.latents),)](
        x,
        W_enc,
        out,
        bias,
        scale,
        maxima,
        limits,
        bad,
        B,
        F,
        C,
        G,
        row_offset,
        STORE_BIAS=store_bias,
        MAXIMA=maxima is not None,
        GROUP=group,
        ROWS=tile.rows,
        LATENTS=tile.latents,
        DEPTH=tile.depth,
        ROW_BLOCKS=_ROW_BLOCKS,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # a float32 product needs it; the score has no sum after a product, so none of it can be fused
        enable_fp_fusion=True,
    )


def encoder_scores_torch(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The product with bias in plain torch, in float32 or more; see `ops.encoder_scores`."""
    if x.dtype in _LOW:
        # on a CPU a bfloat16 product takes 22 ms instead of 54 (2048 tokens, 512 columns, 4096 latents, two cores), but
        # a score of 8 bits ties with many others
        scores = x.new_empty(len(x), len(W_enc), dtype=torch.float32)
        matmul_into(scores, x, W_enc.T)
        return scores.add_(b_enc)
    return torch.addmm(b_enc.to(x.dtype), x, W_enc.T)


@torch.library.custom_op("fastdiff::encoder_scores", mutates_args=())
def encoder_scores_triton(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The product with bias by the kernel, [B, F] float32. Has no gradient: `sparse_encode` has."""
    out = x.new_empty(len(x), len(W_enc), dtype=torch.float32)
    encoder_scores_into(x, W_enc, out, bias=b_enc, store_bias=True)
    return out


@encoder_scores_triton.register_fake
def _(x, W_enc, b_enc):
    return x.new_empty(x.shape[0], W_enc.shape[0], dtype=torch.float32)


def _tile_for(x: Tensor, W_enc: Tensor) -> Tile:
    if x.dtype == torch.float32:
        return _TILE_FLOAT32
    if any(width % 16 for width in W_enc.shape):
        return _TILE_ODD
    # the interpreter has no architecture
    if x.device.type == "cpu":
        return _TILE
    return _TILES.get(triton.runtime.driver.active.get_current_target().arch, _TILE)
