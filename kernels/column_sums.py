"""Column sums of a batch: Σ_b r, Σ_b c·r (the gradient of b_dec) and Σ_b x̃, always added in the same order.

Every chunk of rows leaves its sums in a buffer, then one program per block of columns adds the chunks. B tokens,
M models, D width, C = M·D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 256
_ROWS = 16
_COLUMNS = 128


def column_sums_work(n_tokens: int, width: int, device: torch.device, *, _chunk: int = _CHUNK) -> Tensor:
    """The buffer `column_sums` needs for [B, C] tensors: [chunks, 3, C] float32."""
    return torch.empty(triton.cdiv(n_tokens, _chunk), 3, width, device=device)


@triton.jit
def _chunk_sums_kernel(
    resid_ptr,  # [B, C]
    x_ptr,  # [B, C]
    c_ptr,  # [B, M]
    work_ptr,  # [chunks, 3, C]
    limits_ptr,  # [2]
    n_tokens,
    M,
    D,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # one program: CHUNK rows of one model's COLUMNS columns
    per_model = tl.cdiv(D, COLUMNS)
    m = tl.program_id(0) // per_model
    within = tl.program_id(0) % per_model * COLUMNS + tl.arange(0, COLUMNS)
    inside = within < D
    cols = m * D + within
    chunk = tl.program_id(1)
    n_valid = tl.minimum(tl.load(limits_ptr), n_tokens)
    end = tl.minimum((chunk + 1) * CHUNK, n_valid)
    sum_r = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum_cr = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum_x = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(chunk * CHUNK, end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & inside[None, :]
        address = row.to(tl.int64)[:, None] * (M * D) + cols[None, :]
        r = tl.load(resid_ptr + address, mask=there, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + row.to(tl.int64) * M + m, mask=row < end, other=0.0)
        sum_r += r
        sum_cr += c[:, None] * r
        sum_x += tl.load(x_ptr + address, mask=there, other=0.0).to(tl.float32)
    work_ptr += chunk.to(tl.int64) * 3 * M * D + cols
    tl.store(work_ptr, tl.sum(sum_r, axis=0), mask=inside)
    tl.store(work_ptr + M * D, tl.sum(sum_cr, axis=0), mask=inside)
    tl.store(work_ptr + 2 * M * D, tl.sum(sum_x, axis=0), mask=inside)


@triton.jit
def _add_chunks_kernel(
    work_ptr,  # [chunks, width]
    out_ptr,  # [width]
    n_chunks,
    width,
    COLUMNS: tl.constexpr,
):
    # one program: COLUMNS columns
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for _ in range(n_chunks):
        total += tl.load(work_ptr + cols, mask=cols < width, other=0.0)
        work_ptr += width
    tl.store(out_ptr + cols, total, mask=cols < width)


def column_sums(
    resid: Tensor,
    x: Tensor,
    c: Tensor,
    out: Tensor,
    work: Tensor,
    limits: Tensor,
    *,
    n_models: int,
    _chunk: int = _CHUNK,
    _rows: int = _ROWS,
    _columns: int = _COLUMNS,
) -> None:
    """Write the three sums over tokens.

    Args:
        resid: r, [B, C].
        x: x̃, [B, C].
        c: From `token_gradients`, [B, M] float32.
        out: Output Σ r, Σ c·r and Σ x̃, [3, C] float32.
        work: From `column_sums_work`.
        limits: [2] int32; the first limits[0] tokens count.
        n_models: M.
    """
    n_tokens, width = resid.shape
    chunks = triton.cdiv(n_tokens, _chunk)
    assert resid.is_contiguous() and x.is_contiguous() and x.shape == resid.shape
    assert c.is_contiguous() and c.shape == (n_tokens, n_models)
    assert out.is_contiguous() and work.is_contiguous() and work.shape == (chunks, *out.shape)
    d_model = width // n_models
    _chunk_sums_kernel[(n_models * triton.cdiv(d_model, _columns), chunks)](
        resid,
        x,
        c,
        work,
        limits,
        n_tokens,
        n_models,
        d_model,
        CHUNK=_chunk,
        ROWS=_rows,
        COLUMNS=_columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
    _add_chunks_kernel[(triton.cdiv(3 * width, _columns),)](
        work, out, chunks, 3 * width, COLUMNS=_columns, num_warps=4, enable_fp_fusion=True
    )
