"""Gradient rows of one latent at a time: the sums that the fused update, the exact clip and other optimizers share.

    G_dec[j, m] = Σ_e val[e] · c[b, m] · r[b, m]      G_enc[j] = Σ_e delta[e] · x̃[b]      over the pairs e of latent j,
    g_b_enc[j]  = Σ_e delta[e]                        each plus AuxK's rows                b = token[e]

One program owns the same columns of all models of one latent and adds up its pairs in token order, one after the other:
a tile of several pairs would be added up through shared memory at the end, whose bank conflicts alone took 55 of 59 ms
on an H200. Latents with most pairs start first; slices of columns are slow, so that a slice of r and x̃ stays in L2.
M models, D width, C = M·D, F latents, T slices.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.latent_order import LatentOrder

# of each model; a lone model gets twice as many, so that its float32 loads are 128 bits a thread too
COLUMNS = 512
# pairs whose rows are asked for at once
ENTRIES = 2
# the most frequent latents, of which all slices start first: the end of the longest sum is what everything waits for
HOT = 128
# models · columns of a tile at most
_TILE = 2048


class AuxRows(NamedTuple):
    """Dense gradient rows of some latents, to be added to the sparse ones."""

    place: Tensor  # [F] int32, row of the latent below, -1 where it has none
    dec: Tensor  # [n, C] float32 or bfloat16
    enc: Tensor  # [n, C] float32 or bfloat16
    bias: Tensor  # [n] float32


def row_slices(n_models: int, d_model: int, *, _columns: int = COLUMNS) -> int:
    """T, the slices that the columns of each model are cut into."""
    return triton.cdiv(d_model, row_tile(n_models, d_model, _columns)["COLUMNS"])


def row_tile(n_models: int, d_model: int, columns: int) -> dict[str, int]:
    """Constants of a kernel whose tile has at most `columns` columns of each model."""
    models = triton.next_power_of_2(n_models)
    columns = columns if models > 1 else 2 * columns
    return {"MODELS": models, "COLUMNS": max(16, min(columns, triton.next_power_of_2(d_model), _TILE // models))}


@triton.jit
def latent_and_slice(longest_first_ptr, F, T, HOT: tl.constexpr):
    """What program i of F·T works on."""
    i = tl.program_id(0)
    n_hot = tl.minimum(HOT, F)
    if i < n_hot * T:
        place, part = i % n_hot, i // n_hot
    else:
        rest, n_rest = i - n_hot * T, F - n_hot
        place, part = n_hot + rest % n_rest, rest // n_rest
    return tl.load(longest_first_ptr + place).to(tl.int64), part


@triton.jit
def gradient_tile(
    j,
    part,
    start_ptr,
    token_ptr,
    val_ptr,
    delta_ptr,
    c_ptr,
    resid_ptr,
    x_ptr,
    aux_place_ptr,
    aux_dec_ptr,
    aux_enc_ptr,
    aux_bias_ptr,
    D,
    M: tl.constexpr,
    MODELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Slice `part` of the gradient rows of latent j: decoder and encoder [MODELS, COLUMNS], bias [], and their places.

    Places beyond M models and D columns are zero.
    """
    models = tl.arange(0, MODELS)
    cols = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (models < M)[:, None] & (cols < D)[None, :]
    place = models[:, None] * D + cols[None, :]
    dec = tl.zeros([MODELS, COLUMNS], dtype=tl.float32)
    enc = tl.zeros([MODELS, COLUMNS], dtype=tl.float32)
    bias = 0.0
    end = tl.load(start_ptr + j + 1)
    for first in range(tl.load(start_ptr + j), end, ENTRIES):
        for i in tl.static_range(ENTRIES):
            owned = first + i < end
            token = tl.load(token_ptr + first + i, mask=owned, other=0).to(tl.int64)
            val = tl.load(val_ptr + first + i, mask=owned, other=0.0)
            delta = tl.load(delta_ptr + first + i, mask=owned, other=0.0)
            scale = tl.load(c_ptr + token * M + models, mask=owned & (models < M), other=0.0)
            address = token * (M * D) + place
            r = tl.load(resid_ptr + address, mask=owned & inside, other=0.0)
            x = tl.load(x_ptr + address, mask=owned & inside, other=0.0)
            dec += (val * scale)[:, None] * r.to(tl.float32)
            enc += delta * x.to(tl.float32)
            bias += delta
    if aux_place_ptr is not None:
        row = tl.load(aux_place_ptr + j).to(tl.int64)
        if row >= 0:
            dense = row * (M * D) + place
            dec += tl.load(aux_dec_ptr + dense, mask=inside, other=0.0).to(tl.float32)
            enc += tl.load(aux_enc_ptr + dense, mask=inside, other=0.0).to(tl.float32)
            bias += tl.load(aux_bias_ptr + row)
    return dec, enc, bias, place, inside


@triton.jit
def squared_norm(dec, enc, bias, part):
    """Σ g² of what `gradient_tile` gave."""
    matrices = tl.sum(tl.sum(dec * dec + enc * enc, axis=1), axis=0)
    # the bias belongs to the latent, not to a slice
    return matrices + tl.where(part == 0, bias * bias, 0.0)


@triton.jit
def _norm_rows_kernel(
    start_ptr,  # [F + 1]
    longest_first_ptr,  # [F]
    token_ptr,  # [capacity]
    val_ptr,  # [capacity]
    delta_ptr,  # [capacity]
    c_ptr,  # [B, M]
    resid_ptr,  # [B, C]
    x_ptr,  # [B, C]
    aux_place_ptr,  # [F]
    aux_dec_ptr,  # [n, C]
    aux_enc_ptr,  # [n, C]
    aux_bias_ptr,  # [n]
    squares_ptr,  # [F, T]
    D,
    F,
    T,
    M: tl.constexpr,
    MODELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HOT: tl.constexpr,
):
    # one program: one latent, COLUMNS columns of each model
    j, part = latent_and_slice(longest_first_ptr, F, T, HOT)
    dec, enc, bias, _, _ = gradient_tile(
        j, part, start_ptr, token_ptr, val_ptr, delta_ptr, c_ptr, resid_ptr, x_ptr,
        aux_place_ptr, aux_dec_ptr, aux_enc_ptr, aux_bias_ptr, D, M, MODELS, COLUMNS, ENTRIES,
    )  # fmt: skip
    tl.store(squares_ptr + j * T + part, squared_norm(dec, enc, bias, part))


@triton.jit
def _weight_gradients_kernel(
    start_ptr,  # [F + 1]
    longest_first_ptr,  # [F]
    token_ptr,  # [capacity]
    val_ptr,  # [capacity]
    delta_ptr,  # [capacity]
    c_ptr,  # [B, M]
    resid_ptr,  # [B, C]
    x_ptr,  # [B, C]
    G_dec_ptr,  # [F, C]
    G_enc_ptr,  # [F, C]
    g_bias_ptr,  # [F]
    D,
    F,
    T,
    M: tl.constexpr,
    MODELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HOT: tl.constexpr,
):
    # one program: one latent, COLUMNS columns of each model
    j, part = latent_and_slice(longest_first_ptr, F, T, HOT)
    dec, enc, bias, place, inside = gradient_tile(
        j, part, start_ptr, token_ptr, val_ptr, delta_ptr, c_ptr, resid_ptr, x_ptr,
        None, None, None, None, D, M, MODELS, COLUMNS, ENTRIES,
    )  # fmt: skip
    offset = j * (M * D) + place
    tl.store(G_dec_ptr + offset, dec.to(G_dec_ptr.dtype.element_ty), mask=inside)
    tl.store(G_enc_ptr + offset, enc.to(G_enc_ptr.dtype.element_ty), mask=inside)
    if part == 0:
        tl.store(g_bias_ptr + j, bias)


def batch_arguments(order: LatentOrder, c: Tensor, resid: Tensor, x: Tensor, n_models: int) -> tuple[Tensor, ...]:
    """The kernels' first eight arguments."""
    assert resid.is_contiguous() and x.is_contiguous() and c.is_contiguous()
    assert resid.shape == x.shape and c.shape == (len(x), n_models) and x.shape[1] % n_models == 0
    return order.start, order.longest_first, order.token, order.val, order.delta, c, resid, x


def norm_rows(
    order: LatentOrder,
    c: Tensor,
    resid: Tensor,
    x: Tensor,
    aux: AuxRows | None,
    squares: Tensor,
    *,
    n_models: int,
    _columns: int = COLUMNS,
    _entries: int = ENTRIES,
    _hot: int = HOT,
) -> None:
    """Write the squared gradient norm of each latent: what the exact clip needs before the update.

    Args:
        order: The step's pairs by latent.
        c: From `token_gradients`, [B, M] float32, for all tokens of the step.
        resid: r, [B, C].
        x: x̃, [B, C].
        aux: Rows to add to the gradients.
        squares: Output Σ g² over W_dec, W_enc and, in slice 0, b_enc; [F, T] float32.
        n_models: M.
    """
    d_model = x.shape[1] // n_models
    tile = row_tile(n_models, d_model, _columns)
    n_slices = triton.cdiv(d_model, tile["COLUMNS"])
    assert squares.is_contiguous() and squares.shape == (len(order.longest_first), n_slices)
    _norm_rows_kernel[(squares.numel(),)](
        *batch_arguments(order, c, resid, x, n_models),
        *(aux or (None, None, None, None)),
        squares,
        d_model,
        len(squares),
        n_slices,
        M=n_models,
        **tile,
        ENTRIES=_entries,
        HOT=_hot,
        num_warps=4,
        enable_fp_fusion=True,
    )


def weight_gradients(
    order: LatentOrder,
    c: Tensor,
    resid: Tensor,
    x: Tensor,
    G_dec: Tensor,
    G_enc: Tensor,
    b: Tensor,
    *,
    n_models: int,
    _columns: int = COLUMNS,
    _entries: int = ENTRIES,
    _hot: int = HOT,
) -> None:
    """Write the gradients that `update_rows` applies, without AuxK's rows.

    Args:
        order: The pairs by latent.
        c: From `token_gradients`, [B, M] float32.
        resid: r, [B, C].
        x: x̃, [B, C].
        G_dec: Output, [F, C], any float dtype.
        G_enc: Output, [F, C], any float dtype.
        b: Output gradient of b_enc, [F] float32.
        n_models: M.
    """
    d_model = x.shape[1] // n_models
    tile = row_tile(n_models, d_model, _columns)
    assert G_dec.is_contiguous() and G_enc.is_contiguous() and b.is_contiguous()
    assert G_dec.shape == G_enc.shape == (len(b), x.shape[1]) and len(b) == len(order.longest_first)
    n_slices = triton.cdiv(d_model, tile["COLUMNS"])
    _weight_gradients_kernel[(len(b) * n_slices,)](
        *batch_arguments(order, c, resid, x, n_models),
        G_dec,
        G_enc,
        b,
        d_model,
        len(b),
        n_slices,
        M=n_models,
        **tile,
        ENTRIES=_entries,
        HOT=_hot,
        num_warps=4,
        enable_fp_fusion=True,
    )
