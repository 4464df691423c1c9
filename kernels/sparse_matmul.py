"""The two sparse matrix products of a crosscoder, with gradients that touch active latents only.

    decode:  out[b]   = Σ_i values[i] · W_dec[col[i]]               over the entries i of token b
    encode:  values[i] = ⟨x[row[i]], W_enc[col[i]]⟩ + b_enc[col[i]]

    d_values[i] = ⟨d_out[row[i]], W_dec[col[i]]⟩                    dW_dec[j] = Σ_{i of j} values[i] · d_out[row[i]]
                                                                     dW_enc[j] = Σ_{i of j} d_values[i] · x[row[i]]

Decode and both weight gradients are the same gather-and-add, `embedding_bag`, over the entries by token or by
latent.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.kernels.selection import Selection


def gather_add(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of gathered rows: out[g] = Σ weight[i] · rows[index[i]] over start[g] <= i < start[g + 1].

    Args:
        index: Which row, [nnz] int64.
        rows: [R, C].
        start: Where each of G groups begins, [G + 1] int64, the last being nnz.
        weight: [nnz], dtype of rows.

    Returns:
        [G, C]; zero for an empty group. No gradient is recorded for index and start.
    """
    return functional.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weight, include_last_offset=True)


def _dots(selection: Selection, left: Tensor, right: Tensor) -> Tensor:
    """⟨left[row[i]], right[col[i]]⟩ for every entry, left [B, C], right [F, C]."""
    _hear_beta_warning()
    pattern = torch.sparse_csr_tensor(
        selection.crow,
        selection.col,
        left.new_zeros(len(selection.col)),
        (selection.n_tokens, selection.dict_size),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


@functools.cache
def _hear_beta_warning() -> None:
    """Torch warns once per process that CSR is in beta; take that here, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([]), torch.tensor([]), (1, 1))


class SparseDecode(torch.autograd.Function):
    """Differentiable in values and W_dec."""

    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.selection = selection
        return gather_add(selection.col, W_dec, selection.crow, values)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        values, W_dec = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_values = d_W_dec = None
        if ctx.needs_input_grad[0]:
            d_values = _dots(ctx.selection, d_out, W_dec)
        if ctx.needs_input_grad[1]:
            by = ctx.selection.by_latent
            d_W_dec = gather_add(by.row, d_out, by.start, values[by.order])
        return d_values, d_W_dec, None


class SparseEncode(torch.autograd.Function):
    """Differentiable in W_enc and b_enc; the input is data and gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(x)
        ctx.selection = selection
        return pre[selection.row, selection.col]

    @staticmethod
    def backward(ctx, d_values: Tensor):
        (x,) = ctx.saved_tensors
        by = ctx.selection.by_latent
        d_sorted = d_values[by.order]
        d_W_enc = d_b_enc = None
        if ctx.needs_input_grad[1]:
            d_W_enc = gather_add(by.row, x, by.start, d_sorted)
        if ctx.needs_input_grad[2]:
            d_b_enc = gather_add(torch.zeros_like(by.row), d_sorted.new_ones(1, 1), by.start, d_sorted).squeeze(1)
        return None, d_W_enc, d_b_enc, None, None
