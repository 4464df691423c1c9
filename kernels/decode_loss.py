"""Residual, loss and the gradient of every activation from the decoder rows of the active pairs.

    r[b]      = Σ_e val[e] · W_dec[col[e]] + b_dec - x[b]                over the slots e of token b
    dots[e]   = ⟨r[b], W_dec[col[e]]⟩                                    per slice of one model's columns
    c[b, m]   = 1 / (total · M · ‖r[b, m]‖)   or   2 / (total · M · D)   ∂loss/∂r = c · r
    delta[e]  = Σ_m c[b, m] · ⟨r[b, m], W_dec[col[e], m]⟩                ∂loss/∂val

A slice gathers its rows twice, once for each product: the second time most are in the L2 cache, and registers for all
rows of a token would take several warps (see `_ROWS`). The gradient needs ‖r‖ of the whole model, which no slice knows:
slices leave unscaled partial sums, `token_gradients` joins them. r itself stays unscaled: rounding it a second time
would cost accuracy.

B tokens, M models, D width, C = M·D, F latents, S slices of 256 columns that never straddle two models.
"""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.slots import Slots

# what the one warp of a program holds, 64 values a thread. More warps would add up the rows through shared memory,
# whose bank conflicts cost more than the second gather: 6.5 instead of 3.4 ms (H200, configuration A)
_COLUMNS = 256
_ROWS = 8
_ENTRIES = 128
_SLICES_AT_ONCE = 8


def slices(n_models: int, d_model: int, *, _columns: int = _COLUMNS) -> int:
    """S, the slices that the columns of all models are cut into."""
    return n_models * triton.cdiv(d_model, _columns)


@triton.jit
def _rows_of(W_ptr, col_ptr, first, end, cols, inside, C, ROWS: tl.constexpr):
    """Slice [ROWS, COLUMNS] of the decoder rows of slots first … first + ROWS - 1, zero from `end` on."""
    e = first + tl.arange(0, ROWS)
    latent = tl.load(col_ptr + e, mask=e < end, other=0).to(tl.int64)
    mask = (e < end)[:, None] & inside[None, :]
    return tl.load(W_ptr + latent[:, None] * C + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _decode_loss_kernel(
    start_ptr,  # [B]
    end_ptr,  # [B]
    col_ptr,  # [capacity]
    val_ptr,  # [capacity]
    W_dec_ptr,  # [F, C]
    b_dec_ptr,  # [C]
    x_ptr,  # [B, C]
    resid_ptr,  # [B, C]
    squares_ptr,  # [B, S]
    dots_ptr,  # [S, capacity]
    limits_ptr,  # [2]
    capacity,
    C,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # one program: one token, one slice; tokens are fast, so that a slice of W_dec stays in L2
    b, m = tl.program_id(0).to(tl.int64), tl.program_id(2)
    within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = within < D
    cols = m * D + within
    offset = b * C + cols
    s = m * tl.num_programs(1) + tl.program_id(1)
    square_ptr = squares_ptr + b * (tl.num_programs(1) * tl.num_programs(2)) + s
    dots_ptr += s.to(tl.int64) * capacity

    valid = b < tl.load(limits_ptr)
    begin = tl.load(start_ptr + b)
    end = tl.where(valid, tl.load(end_ptr + b), begin)
    base = tl.load(b_dec_ptr + cols, mask=inside, other=0.0)
    base -= tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(begin, end, ROWS):
        rows = _rows_of(W_dec_ptr, col_ptr, first, end, cols, inside, C, ROWS)
        e = first + tl.arange(0, ROWS)
        val = tl.load(val_ptr + e, mask=e < end, other=0.0)
        total += tl.sum(val[:, None] * rows.to(tl.float32), axis=0)
    r = tl.where(inside & valid, total + base, 0.0)
    tl.store(resid_ptr + offset, r.to(resid_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr, tl.sum(r * r, axis=0))
    for first in range(begin, end, ROWS):
        rows = _rows_of(W_dec_ptr, col_ptr, first, end, cols, inside, C, ROWS)
        e = first + tl.arange(0, ROWS)
        tl.store(dots_ptr + e, tl.sum(rows.to(tl.float32) * r[None, :], axis=1), mask=e < end)


def decode_loss(
    slots: Slots,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    resid: Tensor,
    squares: Tensor,
    dots: Tensor,
    limits: Tensor,
    *,
    n_models: int,
    _rows: int = _ROWS,
    _columns: int = _COLUMNS,
) -> None:
    """Write the residual, its squares and its products with the decoder rows of each token.

    Args:
        slots: Pairs of B tokens; `slots.row` is not read.
        W_dec: [F, C] bfloat16 or float32.
        b_dec: [C] float32.
        x: x̃, [B, C].
        resid: Output r, unscaled, [B, C]; tokens from limits[0] on are zero.
        squares: Output Σ r² of each slice before rounding, [B, S] float32; tokens from limits[0] on are zero.
        dots: Output ⟨r, W_dec[col]⟩ of each slice, [S, capacity] float32; slots without a token are left alone.
        limits: [2] int32; the first limits[0] tokens count.
        n_models: M.
    """
    n_tokens, width = x.shape
    n_slices = slices(n_models, width // n_models, _columns=_columns)
    assert W_dec.is_contiguous() and x.is_contiguous() and resid.is_contiguous() and dots.is_contiguous()
    assert resid.shape == x.shape and width % n_models == 0 and W_dec.shape[1] == width
    assert squares.shape == (n_tokens, n_slices) and dots.shape == (n_slices, len(slots.col))
    _decode_loss_kernel[(n_tokens, n_slices // n_models, n_models)](
        slots.start,
        slots.end,
        slots.col,
        slots.val,
        W_dec,
        b_dec,
        x,
        resid,
        squares,
        dots,
        limits,
        dots.shape[1],
        width,
        width // n_models,
        ROWS=_rows,
        COLUMNS=_columns,
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["row_offset"])
def _token_gradients_kernel(
    start_ptr,  # [B]
    end_ptr,  # [B]
    squares_ptr,  # [B, S]
    dots_ptr,  # [S, capacity]
    limits_ptr,  # [2]
    total_ptr,  # [1]
    c_ptr,  # [B, M]
    errors_ptr,  # [B, M]
    delta_ptr,  # [capacity]
    bad_ptr,  # [1]
    capacity,
    row_offset,
    D,
    per_model,
    L2NORM: tl.constexpr,
    M: tl.constexpr,
    MODELS: tl.constexpr,  # M and per_model, padded to powers of two
    PER_MODEL: tl.constexpr,
    ENTRIES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # one program: one token
    b = tl.program_id(0)
    valid = b < tl.load(limits_ptr)
    models, part = tl.arange(0, MODELS), tl.arange(0, PER_MODEL)
    mask = (models < M)[:, None] & (part < tl.where(valid, per_model, 0))[None, :]
    squares_ptr += b.to(tl.int64) * M * per_model
    squares = tl.load(squares_ptr + models[:, None] * per_model + part[None, :], mask=mask, other=0.0)
    error = tl.sum(squares, axis=1)
    weight = tl.load(total_ptr).to(tl.float32) * M
    if L2NORM:
        positive = error > 0
        c = tl.where(positive, tl.div_rn(1.0, weight * tl.sqrt_rn(tl.where(positive, error, 1.0))), 0.0)
    else:
        c = tl.div_rn(2.0, weight * D) + tl.zeros([MODELS], dtype=tl.float32)
    c = tl.where(valid, c, 0.0)
    own = b.to(tl.int64) * M + models
    tl.store(c_ptr + own, c, mask=models < M)
    tl.store(errors_ptr + own, error, mask=models < M)
    # not < infinity: NaN too
    wrong = tl.sum(((error < float("inf")) == 0).to(tl.int32), axis=0)

    begin = tl.load(start_ptr + b)
    end = tl.where(valid, tl.load(end_ptr + b), begin)
    for first in range(begin, end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        delta = tl.zeros([ENTRIES], dtype=tl.float32)
        for m in tl.static_range(M):
            dots = tl.zeros([AT_ONCE, ENTRIES], dtype=tl.float32)
            for s in range(0, per_model, AT_ONCE):
                row = s + tl.arange(0, AT_ONCE)
                address = (m * per_model + row).to(tl.int64)[:, None] * capacity + e[None, :]
                there = (row < per_model)[:, None] & (e < end)[None, :]
                dots += tl.load(dots_ptr + address, mask=there, other=0.0)
            delta += tl.sum(tl.where(models == m, c, 0.0), axis=0) * tl.sum(dots, axis=0)
        tl.store(delta_ptr + e, delta, mask=e < end)
        wrong += tl.sum(((tl.abs(delta) < float("inf")) == 0).to(tl.int32), axis=0)
    if wrong > 0:
        tl.atomic_min(bad_ptr, b + row_offset, sem="relaxed")


def token_gradients(
    slots: Slots,
    squares: Tensor,
    dots: Tensor,
    limits: Tensor,
    total: Tensor,
    c: Tensor,
    errors: Tensor,
    delta: Tensor,
    bad: Tensor,
    *,
    n_models: int,
    d_model: int,
    loss: Literal["l2norm", "mse"],
    row_offset: int,
    _columns: int = _COLUMNS,
    _entries: int = _ENTRIES,
    _at_once: int = _SLICES_AT_ONCE,
) -> None:
    """Join what `decode_loss` left per slice, in a fixed order, into the loss and its gradients.

    Args:
        slots: Pairs of B tokens; start and end are read.
        squares: From `decode_loss`, [B, S].
        dots: From `decode_loss`, [S, capacity].
        limits: [2] int32; the first limits[0] tokens count.
        total: Tokens of the whole optimizer step, [1] int32.
        c: Output ∂loss/∂r = c·r, [B, M] float32; 0 where r = 0 under "l2norm", and from token limits[0] on.
        errors: Output ‖r[b, m]‖², [B, M] float32.
        delta: Output ∂loss/∂val, [capacity] float32; 0 in slots that no token owns.
        bad: [1] int32; lowered to the number of the first token whose error or gradient is not finite.
        n_models: M.
        d_model: D.
        loss: "l2norm": mean of ‖r[b, m]‖. "mse": mean of ‖r[b, m]‖² / D.
        row_offset: Number of the first token, for `bad`.

    Raises:
        ValueError: An unknown loss.
    """
    if loss not in ("l2norm", "mse"):
        raise ValueError(f"loss must be l2norm or mse, got {loss!r}")
    per_model = triton.cdiv(d_model, _columns)
    assert squares.is_contiguous() and dots.is_contiguous() and squares.shape[1] == len(dots) == n_models * per_model
    assert c.is_contiguous() and errors.is_contiguous() and c.shape == errors.shape == (len(squares), n_models)
    # the kernel visits tokens, so nobody else writes the slots without one
    delta.zero_()
    _token_gradients_kernel[(len(squares),)](
        slots.start,
        slots.end,
        squares,
        dots,
        limits,
        total,
        c,
        errors,
        delta,
        bad,
        dots.shape[1],
        row_offset,
        d_model,
        per_model,
        L2NORM=loss == "l2norm",
        M=n_models,
        MODELS=triton.next_power_of_2(n_models),
        PER_MODEL=triton.next_power_of_2(per_model),
        ENTRIES=_entries,
        AT_ONCE=_at_once,
        num_warps=4,
        enable_fp_fusion=True,
    )
