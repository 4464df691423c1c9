"""Weighted sums of gathered rows: decoding, and the gradients of both weight matrices.

    out[g] = Σ weight[i] · rows[index[i]]    over start[g] <= i < start[g + 1]

    decode    groups are tokens, rows are W_dec's, weights are activations
    dW_dec    groups are latents, rows are the gradients of the tokens' outputs, weights are activations
    dW_enc    groups are latents, rows are the tokens' inputs, weights are gradients of activations

A matrix product with a sparse left factor that reads only what it needs. One program owns one group and a slice of
columns and adds its rows up in their order, so there are no atomics and repeats are bit-identical; programs that run
side by side share a slice, which then stays in the L2 cache. Sums run in float32, of float64 in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

# numbers that the one warp of a program holds in registers, 64 a thread; half as many of float64. With more warps a
# tile of rows is added up through shared memory, whose bank conflicts took nearly all of 31 ms (H200, gradients at A)
_TILE = 2048
# half a kilobyte of a bfloat16 row: what one warp loads at once
_BLOCK_C = 256
# groups have about k entries, so more rows at once would mostly be masked
_MOST_ROWS = 128


@triton.jit
def _weighted_rows_kernel(
    index_ptr,  # [nnz]
    rows_ptr,  # [R, C]
    start_ptr,  # [G + 1]
    weight_ptr,  # [nnz]
    out_ptr,  # [G, C]
    C,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM: tl.constexpr,
):
    # one program: one group, BLOCK_C columns
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    begin = tl.load(start_ptr + group)
    end = tl.load(start_ptr + group + 1)
    acc = tl.zeros((BLOCK_I, BLOCK_C), dtype=SUM)
    for first in range(begin, end, BLOCK_I):
        place = first + tl.arange(0, BLOCK_I)
        used = place < end
        row = tl.load(index_ptr + place, mask=used, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + place, mask=used, other=0.0).to(SUM)
        part = tl.load(rows_ptr + row[:, None] * C + cols[None, :], mask=used[:, None] & in_row[None, :], other=0.0).to(
            SUM
        )
        acc += weight[:, None] * part
    tl.store(out_ptr + group * C + cols, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=in_row)


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What products of these are summed in: float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def weighted_rows_into(
    index: Tensor, rows: Tensor, start: Tensor, weight: Tensor, out: Tensor, *, _block: tuple[int, int] | None = None
) -> None:
    """Launch the kernel; nothing is allocated and nothing waits for the device.

    Args:
        index: Which row, [nnz], int32 or int64, each in [0, R). Not checked.
        rows: [R, C], contiguous.
        start: Where each group begins, [G + 1], int32 or int64, the last being where the last group ends.
        weight: [nnz].
        out: [G, C], contiguous; every element is written, zero for an empty group.
    """
    n_groups, C = out.shape
    wide = sum_dtype(rows.dtype, weight.dtype) == torch.float64
    block_i, block_c = _block or _tile(C, _TILE // 2 if wide else _TILE)
    _weighted_rows_kernel[(n_groups, triton.cdiv(C, block_c))](
        index,
        rows,
        start,
        weight,
        out,
        C,
        BLOCK_I=block_i,
        BLOCK_C=block_c,
        SUM=tl.float64 if wide else tl.float32,
        num_warps=1,
        enable_fp_fusion=True,
    )


def weighted_rows_torch(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The same in plain torch; see `weighted_rows`."""
    # embedding_bag of bfloat16 rows is off by up to 0.06 on a CPU
    dtype = sum_dtype(rows.dtype, weight.dtype)
    out = functional.embedding_bag(
        index, rows.to(dtype), start, mode="sum", per_sample_weights=weight.to(dtype), include_last_offset=True
    )
    return out.to(out_dtype)


@torch.library.custom_op("fastdiff::weighted_rows", mutates_args=())
def weighted_rows(
    index: Tensor, rows: Tensor, start: Tensor, weight: Tensor, out_dtype: torch.dtype, backend: str
) -> Tensor:
    """Weighted sums [G, C] in `out_dtype`; `ops.weighted_rows` says more. Has no gradient: `sparse_decode` has."""
    if backend == "torch":
        return weighted_rows_torch(index, rows, start, weight, out_dtype)
    out = rows.new_empty(len(start) - 1, rows.shape[1], dtype=out_dtype)
    weighted_rows_into(index, rows, start, weight, out)
    return out


@weighted_rows.register_fake
def _(index, rows, start, weight, out_dtype, backend):
    return rows.new_empty(start.shape[0] - 1, rows.shape[1], dtype=out_dtype)


@torch.library.custom_op("fastdiff::sum_by_latent", mutates_args=())
def sum_by_latent(values: Tensor, col: Tensor, order: Tensor, start: Tensor, backend: str) -> Tensor:
    """Sums [F] of the values [nnz] of each latent; col of the selection, order and start of its `ByLatent`."""
    one, first = values.new_ones(1, 1), torch.zeros_like(order)
    return weighted_rows(first, one, start, values[order], values.dtype, backend).squeeze(1)


@sum_by_latent.register_fake
def _(values, col, order, start, backend):
    return values.new_empty(start.shape[0] - 1)


@torch.library.custom_op("fastdiff::at_entries", mutates_args=())
def at_entries(per_latent: Tensor, col: Tensor, order: Tensor | None, start: Tensor | None, backend: str) -> Tensor:
    """per_latent[col], [nnz]; order and start are needed for the gradient only."""
    return per_latent[col]


@at_entries.register_fake
def _(per_latent, col, order, start, backend):
    return per_latent.new_empty(col.shape)


def _setup(ctx, inputs, output):
    _, *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _sum_by_latent_backward(ctx, d_out):
    col, order, start = ctx.saved_tensors
    return at_entries(d_out, col, order, start, ctx.backend), None, None, None, None


def _at_entries_backward(ctx, d_out):
    return sum_by_latent(d_out.contiguous(), *ctx.saved_tensors, ctx.backend), None, None, None, None


sum_by_latent.register_autograd(_sum_by_latent_backward, setup_context=_setup)
at_entries.register_autograd(_at_entries_backward, setup_context=_setup)


def _tile(C: int, size: int) -> tuple[int, int]:
    block_c = min(_BLOCK_C, triton.next_power_of_2(C))
    return min(_MOST_ROWS, size // block_c), block_c
