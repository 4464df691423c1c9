"""Gradient and Adam step of both weight matrices in one kernel: no gradient ever reaches memory.

A program updates the very columns whose gradient it added up (`row_gradients`). A latent without pairs has gradient
zero, and its moments decay.

Adam: Kingma and Ba 2015, arXiv:1412.6980, as in torch.optim.Adam. Moments in bfloat16 are rounded stochastically:
to nearest, a second moment would stop decaying, for (1 - β2) of it is less than half a unit in its last place. The
random bits are Philox4x32-7 (Salmon et al. 2011), a function of (seed, step, latent, model, column, tensor) alone.

M models, D width, C = M·D, F latents, T slices.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.latent_order import LatentOrder
from fastdiff.kernels.row_gradients import (
    COLUMNS,
    ENTRIES,
    HOT,
    AuxRows,
    batch_arguments,
    gradient_tile,
    latent_and_slice,
    row_tile,
    squared_norm,
)
from fastdiff.kernels.slots import ALL_FINITE

_ALL_FINITE = tl.constexpr(ALL_FINITE)
# squares that a program of `finish_norms` holds
_TILE = 2048


class RowState(NamedTuple):
    """The weights that belong to a latent, their Adam moments, and their copies for the matrix products."""

    W_dec: Tensor  # [F, C] float32
    W_dec_m: Tensor  # [F, C] float32 or bfloat16
    W_dec_v: Tensor  # [F, C], dtype of W_dec_m
    W_dec_shadow: Tensor | None  # [F, C] bfloat16, W_dec rounded to nearest
    W_enc: Tensor  # [F, C] float32
    W_enc_m: Tensor  # [F, C], dtype of W_dec_m
    W_enc_v: Tensor  # [F, C], dtype of W_dec_m
    W_enc_shadow: Tensor | None  # [F, C] bfloat16, W_enc rounded to nearest
    b_enc: Tensor  # [F] float32
    b_enc_m: Tensor  # [F] float32
    b_enc_v: Tensor  # [F] float32


def adam_rates(lr: float, betas: tuple[float, float], t: int) -> tuple[float, float]:
    """Adam's numbers of step t = 1, 2, …: lr / (1 - β1^t) and 1 / √(1 - β2^t)."""
    return lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** -0.5


@triton.jit
def _adam(weight, m, v, grad, rate, correction, beta1, beta2, rest1, rest2, eps):
    """New weight and moments; `rate` and `correction` are of `adam_rates`, `rest` is 1 - β in double precision."""
    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * grad * grad
    return weight - rate * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps), m, v


@triton.jit
def _store_moment(ptr, value, word, mask):
    """Store as float32, or as bfloat16 rounded up as often as it is near the upper neighbour."""
    if ptr.dtype.element_ty == tl.bfloat16:
        # an even column takes the low half of a word, the next column the high half
        bits = tl.interleave(word & 0xFFFF, word >> 16)
        u = value.to(tl.uint32, bitcast=True)
        finite = (u & 0x7F800000) != 0x7F800000
        value = (tl.where(finite, u + bits, u) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(ptr, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _random_words(seed, step, j, part, D, MODELS: tl.constexpr, COLUMNS: tl.constexpr):
    """A word for each of four tensors and each pair of columns, [MODELS, COLUMNS / 2]."""
    half = part * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    pair = tl.arange(0, MODELS)[:, None] * ((D + 1) // 2) + half[None, :]
    zero = pair * 0
    low, high = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True), (step >> 32).to(tl.int32)
    return tl.philox(seed, zero + j.to(tl.int32), pair, zero + low, zero + high, n_rounds=7)


@triton.jit
def _update_matrix(
    w_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,
    offset,
    mask,
    grad,
    word_m,
    word_v,
    rate,
    correction,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
):
    """Adam on one tile of a matrix; the new weights, zero outside the mask."""
    w = tl.load(w_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    m = tl.load(m_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    v = tl.load(v_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w, m, v = _adam(w, m, v, grad, rate, correction, beta1, beta2, rest1, rest2, eps)
    tl.store(w_ptr + offset, w, mask=mask, eviction_policy="evict_first")
    _store_moment(m_ptr + offset, m, word_m, mask)
    _store_moment(v_ptr + offset, v, word_v, mask)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + offset, w.to(tl.bfloat16), mask=mask, eviction_policy="evict_first")
    return tl.where(mask, w, 0.0)


@triton.jit(do_not_specialize=["seed"])
def _update_rows_kernel(
    start_ptr,  # [F + 1]
    longest_first_ptr,  # [F]
    token_ptr,  # [capacity]
    val_ptr,  # [capacity]
    delta_ptr,  # [capacity]
    c_ptr,  # [B, M]
    resid_ptr,  # [B, C]
    x_ptr,  # [B, C]
    W_dec_ptr,  # [F, C], as the next seven
    W_dec_m_ptr,
    W_dec_v_ptr,
    W_dec_shadow_ptr,
    W_enc_ptr,
    W_enc_m_ptr,
    W_enc_v_ptr,
    W_enc_shadow_ptr,
    b_enc_ptr,  # [F]
    b_enc_m_ptr,  # [F]
    b_enc_v_ptr,  # [F]
    aux_place_ptr,  # [F]
    aux_dec_ptr,  # [n, C]
    aux_enc_ptr,  # [n, C]
    aux_bias_ptr,  # [n]
    rates_ptr,  # [2]
    clip_scale_ptr,  # [1]
    counter_ptr,  # [1]
    bad_ptr,  # [1]
    norms_ptr,  # [F, T, M]
    squares_ptr,  # [F, T]
    D,
    F,
    T,
    seed,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    M: tl.constexpr,
    MODELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HOT: tl.constexpr,
):
    # one program: one latent, COLUMNS columns of each model
    if tl.load(bad_ptr) != _ALL_FINITE:
        return
    j, part = latent_and_slice(longest_first_ptr, F, T, HOT)
    out = j * T + part
    dec, enc, bias, place, inside = gradient_tile(
        j, part, start_ptr, token_ptr, val_ptr, delta_ptr, c_ptr, resid_ptr, x_ptr,
        aux_place_ptr, aux_dec_ptr, aux_enc_ptr, aux_bias_ptr, D, M, MODELS, COLUMNS, ENTRIES,
    )  # fmt: skip
    if squares_ptr is not None:
        tl.store(squares_ptr + out, squared_norm(dec, enc, bias, part))
    scale = tl.load(clip_scale_ptr)
    rate, correction = tl.load(rates_ptr), tl.load(rates_ptr + 1)

    if W_dec_m_ptr.dtype.element_ty == tl.bfloat16:
        words = _random_words(seed, tl.load(counter_ptr), j, part, D, MODELS, COLUMNS)
    else:
        words = None, None, None, None
    offset = j * (M * D) + place
    w = _update_matrix(
        W_dec_ptr, W_dec_m_ptr, W_dec_v_ptr, W_dec_shadow_ptr, offset, inside, dec * scale, words[0], words[1],
        rate, correction, beta1, beta2, rest1, rest2, eps,
    )  # fmt: skip
    models = tl.arange(0, MODELS)
    tl.store(norms_ptr + out * M + models, tl.sum(w * w, axis=1), mask=models < M)
    _update_matrix(
        W_enc_ptr, W_enc_m_ptr, W_enc_v_ptr, W_enc_shadow_ptr, offset, inside, enc * scale, words[2], words[3],
        rate, correction, beta1, beta2, rest1, rest2, eps,
    )  # fmt: skip
    if part == 0:
        b, m, v = tl.load(b_enc_ptr + j), tl.load(b_enc_m_ptr + j), tl.load(b_enc_v_ptr + j)
        b, m, v = _adam(b, m, v, bias * scale, rate, correction, beta1, beta2, rest1, rest2, eps)
        tl.store(b_enc_ptr + j, b)
        tl.store(b_enc_m_ptr + j, m)
        tl.store(b_enc_v_ptr + j, v)


@triton.jit
def _finish_norms_kernel(
    norms_ptr,  # [F, T, M]
    code_norm_ptr,  # [F]
    bad_ptr,  # [1]
    F,
    T,
    M: tl.constexpr,
    MODELS: tl.constexpr,
    SLICES: tl.constexpr,
    LATENTS: tl.constexpr,
):
    if tl.load(bad_ptr) != _ALL_FINITE:
        return
    j = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    part, models = tl.arange(0, SLICES)[None, :, None], tl.arange(0, MODELS)[None, None, :]
    mask = (j < F)[:, None, None] & (part < T) & (models < M)
    squares = tl.load(norms_ptr + (j.to(tl.int64)[:, None, None] * T + part) * M + models, mask=mask, other=0.0)
    tl.store(code_norm_ptr + j, tl.sum(tl.sqrt_rn(tl.sum(squares, axis=1)), axis=1), mask=j < F)


@triton.jit
def _update_flat_kernel(
    param_ptr,  # [n]
    grad_ptr,  # [n]
    m_ptr,  # [n]
    v_ptr,  # [n]
    rates_ptr,  # [2]
    clip_scale_ptr,  # [1]
    bad_ptr,  # [1]
    n,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    BLOCK: tl.constexpr,
):
    if tl.load(bad_ptr) != _ALL_FINITE:
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    grad = tl.load(grad_ptr + i, mask=mask, other=0.0) * tl.load(clip_scale_ptr)
    p = tl.load(param_ptr + i, mask=mask, other=0.0)
    m = tl.load(m_ptr + i, mask=mask, other=0.0)
    v = tl.load(v_ptr + i, mask=mask, other=0.0)
    rate, correction = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    p, m, v = _adam(p, m, v, grad, rate, correction, beta1, beta2, rest1, rest2, eps)
    tl.store(param_ptr + i, p, mask=mask)
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)


def update_rows(
    order: LatentOrder,
    c: Tensor,
    resid: Tensor,
    x: Tensor,
    state: RowState,
    aux: AuxRows | None,
    rates: Tensor,
    clip_scale: Tensor,
    counter: Tensor,
    bad: Tensor,
    norms: Tensor,
    squares: Tensor | None,
    *,
    n_models: int,
    betas: tuple[float, float],
    eps: float,
    seed: int,
    _columns: int = COLUMNS,
    _entries: int = ENTRIES,
    _hot: int = HOT,
) -> None:
    """One Adam step of W_dec, W_enc and b_enc; nothing is written once `bad` names a token.

    Args:
        order: The step's pairs by latent.
        c: From `token_gradients`, [B, M] float32, for all tokens of the step.
        resid: r, [B, C].
        x: x̃, [B, C].
        state: Updated in place.
        aux: Rows to add to the gradients.
        rates: `adam_rates` of the step, [2] float32.
        clip_scale: Factor on all gradients, [1] float32.
        counter: Step, which with `seed` decides the rounding of bfloat16 moments; [1] int64.
        bad: [1] int32.
        norms: Output Σ W_dec² of the new weights by latent, slice and model; [F, T, M] float32.
        squares: Output as of `norm_rows`, [F, T] float32, before `clip_scale`; None: not wanted.
        n_models: M.
        betas: β1 and β2.
        eps: Added to the root of the second moment.
        seed: Of the rounding.
    """
    d_model = x.shape[1] // n_models
    tile = row_tile(n_models, d_model, _columns)
    F, T = len(order.longest_first), triton.cdiv(d_model, tile["COLUMNS"])
    assert all(tensor is None or tensor.is_contiguous() for tensor in (*state, *(aux or ()), norms, squares))
    assert len({tensor.dtype for tensor in (state.W_dec_m, state.W_dec_v, state.W_enc_m, state.W_enc_v)}) == 1
    assert norms.shape == (F, T, n_models) and (squares is None or squares.shape == (F, T))
    _update_rows_kernel[(F * T,)](
        *batch_arguments(order, c, resid, x, n_models),
        *state,
        *(aux or (None, None, None, None)),
        rates,
        clip_scale,
        counter,
        bad,
        norms,
        squares,
        d_model,
        F,
        T,
        seed,
        *betas,
        *(1 - beta for beta in betas),
        eps,
        M=n_models,
        **tile,
        ENTRIES=_entries,
        HOT=_hot,
        num_warps=4,
        enable_fp_fusion=True,
    )


def finish_norms(norms: Tensor, code_norm: Tensor, bad: Tensor) -> None:
    """Write s[j] = Σ_m ‖W_dec[j, m]‖ [F] from the squares [F, T, M] of `update_rows`, unless `bad` names a token."""
    n_latents, n_slices, n_models = norms.shape
    parts, models = triton.next_power_of_2(n_slices), triton.next_power_of_2(n_models)
    block = max(1, _TILE // (parts * models))
    assert norms.is_contiguous() and code_norm.is_contiguous() and len(code_norm) == n_latents
    _finish_norms_kernel[(triton.cdiv(n_latents, block),)](
        norms,
        code_norm,
        bad,
        n_latents,
        n_slices,
        M=n_models,
        MODELS=models,
        SLICES=parts,
        LATENTS=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def update_flat(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    rates: Tensor,
    clip_scale: Tensor,
    bad: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    _block: int = 1024,
) -> None:
    """One Adam step of a small float32 tensor [n] whose gradient is at hand; arguments as of `update_rows`."""
    assert all(tensor.is_contiguous() and tensor.numel() == param.numel() for tensor in (param, grad, m, v))
    _update_flat_kernel[(triton.cdiv(param.numel(), _block),)](
        param,
        grad,
        m,
        v,
        rates,
        clip_scale,
        bad,
        param.numel(),
        *betas,
        *(1 - beta for beta in betas),
        eps,
        BLOCK=_block,
        num_warps=4,
        enable_fp_fusion=True,
    )
