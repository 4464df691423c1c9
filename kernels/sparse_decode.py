"""Sparse decode: add up the decoder rows of the latents that fired.

    out[b]      = Σ values[i] · W_dec[col[i]]       over the entries i of token b
    d_values[i] = ⟨d_out[row[i]], W_dec[col[i]]⟩
    dW_dec[j]   = Σ values[i] · d_out[row[i]]       over the entries i of latent j

A dense decode reads all F rows of W_dec for every token, this one those that fired; the gradients touch no others
either. Both sums are `weighted_rows`, over the entries by token and by latent; the products are `dots`.

Method: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, appendix D.
"""

import torch
from torch import Tensor

from fastdiff.kernels.dots import dots
from fastdiff.kernels.weighted_rows import weighted_rows


@torch.library.custom_op("fastdiff::sparse_decode", mutates_args=())
def sparse_decode(
    values: Tensor,
    W_dec: Tensor,
    crow: Tensor,
    col: Tensor,
    order: Tensor | None,
    start: Tensor | None,
    by_row: Tensor | None,
    backend: str,
) -> Tensor:
    """Reconstruction without bias [B, C], dtype of W_dec; `ops.sparse_decode` says more.

    Args:
        values: [nnz].
        W_dec: [F, C].
        crow: Of the selection, [B + 1].
        col: Of the selection, [nnz].
        order: Of `ByLatent`, [nnz], like the next two; needed for the gradient of W_dec only.
        start: [F + 1].
        by_row: [nnz].
        backend: "triton" or "torch".
    """
    return weighted_rows(col, W_dec, crow, values, W_dec.dtype, backend)


@sparse_decode.register_fake
def _(values, W_dec, crow, col, order, start, by_row, backend):
    return W_dec.new_empty(crow.shape[0] - 1, W_dec.shape[1])


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    values, W_dec, crow, col, order, start, by_row = ctx.saved_tensors
    d_out = d_out.contiguous()
    d_values = d_W_dec = None
    if ctx.needs_input_grad[0]:
        d_values = dots(crow, col, d_out, W_dec, values.dtype, ctx.backend)
    if ctx.needs_input_grad[1]:
        d_W_dec = weighted_rows(by_row, d_out, start, values[order], W_dec.dtype, ctx.backend)
    return d_values, d_W_dec, None, None, None, None, None, None


sparse_decode.register_autograd(_backward, setup_context=_setup)
