"""Sparse encode: the pre-activations of selected pairs, taken from those of all, with sparse gradients.

    values[i] = pre[row[i], col[i]] = ⟨x[row[i]], W_enc[col[i]]⟩ + b_enc[col[i]]
    dW_enc[j] = Σ d_values[i] · x[row[i]]       over the entries i of latent j
    db_enc[j] = Σ d_values[i]

The dense product was made once, to find out which pairs are selected; its gradient is zero everywhere else, so neither
the gradient [B, F] nor a second dense product exists.
"""

import torch
from torch import Tensor

from fastdiff.kernels.weighted_rows import sum_by_latent, weighted_rows


@torch.library.custom_op("fastdiff::sparse_encode", mutates_args=())
def sparse_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre: Tensor,
    col: Tensor,
    row: Tensor,
    order: Tensor | None,
    start: Tensor | None,
    by_row: Tensor | None,
    backend: str,
) -> Tensor:
    """Pre-activations [nnz], dtype of pre; `ops.sparse_encode` says more.

    Args:
        x: Inputs, [B, C].
        W_enc: [F, C]; only its gradient depends on it.
        b_enc: [F], likewise.
        pre: Of all pairs, [B, F].
        col: Of the selection, [nnz].
        row: Of the selection, [nnz].
        order: Of `ByLatent`, [nnz], like the next two; needed for gradients only.
        start: [F + 1].
        by_row: [nnz].
        backend: "triton" or "torch".
    """
    return pre[row, col]


@sparse_encode.register_fake
def _(x, W_enc, b_enc, pre, col, row, order, start, by_row, backend):
    return pre.new_empty(col.shape)


def _setup(ctx, inputs, output):
    x, W_enc, b_enc, _, col, _, order, start, by_row, ctx.backend = inputs
    ctx.save_for_backward(x, col, order, start, by_row)
    ctx.dtypes = W_enc.dtype, b_enc.dtype


def _backward(ctx, d_values):
    x, col, order, start, by_row = ctx.saved_tensors
    d_values = d_values.contiguous()
    d_W_enc = d_b_enc = None
    if ctx.needs_input_grad[1]:
        d_W_enc = weighted_rows(by_row, x, start, d_values[order], ctx.dtypes[0], ctx.backend)
    if ctx.needs_input_grad[2]:
        d_b_enc = sum_by_latent(d_values, col, order, start, ctx.backend).to(ctx.dtypes[1])
    return None, d_W_enc, d_b_enc, None, None, None, None, None, None, None


sparse_encode.register_autograd(_backward, setup_context=_setup)
