"""TopK: the k largest positive scores of each row, exact, ties to the lowest latent.

`topk` in plain torch; `topk_slots` and `topk_slots_radix` as kernels that write a step's slots; `mask_topk` for values
that are kept dense.

Why group maxima suffice: the k-th largest maximum is reached by k groups, so by k scores, and a group below it holds
none of the k largest. Of the groups that tie with it only the first k - (groups above it) count: a value equal to the
bound in a later one has as many equals with a lower index as the selection can still take.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.group_max import check_scores, finite_score, group_max, per_latent, sortable
from fastdiff.kernels.radix import digit_histogram, pick_digit, rank, take_ties
from fastdiff.kernels.selection import Selection, join, kth_largest, positive_bound, reaching, row_chunks
from fastdiff.kernels.slots import ALL_FINITE, Slots

# scores, or maxima, of a row that one program holds in registers: 32 a thread with 8 warps
_IN_REGISTERS = 8192
# scores per step where a row is streamed
_BLOCK = 2048


def topk(score: Tensor, k: int, scale: Tensor | None = None) -> Selection:
    """The k largest positive scores of each row, times scale where given; see `reference.select_topk`.

    Args:
        score: [B, F]; only products with scale that are finite and above 0 are selected.
        k: In [1, F].
        scale: [F], not negative; saves the product [B, F].

    Returns:
        At most k pairs per token, ties to the lowest latent.
    """
    n_tokens, dict_size = score.shape
    # groups of `fold` latents that lie F // fold apart: torch takes such maxima at memory speed
    fold = 64
    while fold > 1 and dict_size // fold < 2 * k:
        fold //= 2
    found, values = [], []
    for rows, part in row_chunks(score, scale):
        maxima = part[:, : dict_size // fold * fold].unflatten(1, (fold, -1)).amax(1).nan_to_num(0.0, 0.0, 0.0)
        flat = reaching(part, positive_bound(kth_largest(maxima, k)).unsqueeze(1))
        values.append(part.take(flat))
        found.append(flat + rows.start * dict_size)
    flat, value = join(found, values, score)
    row = torch.div(flat, dict_size, rounding_mode="floor")
    return Selection.from_flat(flat[_k_of_each_row(row, value, n_tokens, k)], n_tokens, dict_size)


def _k_of_each_row(row: Tensor, value: Tensor, n_tokens: int, k: int) -> Tensor:
    """Which [nnz] of the values, in row order, are among the k largest of their row, ties to the first."""
    counts = torch.bincount(row, minlength=n_tokens)
    width = int(counts.max()) if n_tokens else 0
    if width <= k:
        return torch.ones_like(row, dtype=torch.bool)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    padded = value.new_full((n_tokens, width), -torch.inf)
    padded[row, place] = value
    bound = kth_largest(padded, k)
    tied = value == bound[row]
    free = k - (padded > bound.unsqueeze(1)).sum(1)
    n_tied = torch.bincount(row[tied], minlength=n_tokens)
    rank_of_tie = tied.cumsum(0) - (n_tied.cumsum(0) - n_tied)[row]
    return (value > bound[row]) | (tied & (rank_of_tie <= free[row]))


@triton.jit
def _largest(bits, k):
    """The k largest of the [R, C] integers above 0, ties in row-major order: 31 counts decide 31 bits of the bound."""
    bound = k * 0
    bit = bound + 0x40000000
    for _ in range(31):
        reach = tl.sum(tl.sum((bits >= (bound | bit)).to(tl.int32), axis=1), axis=0)
        bound = tl.where(reach >= k, bound | bit, bound)
        bit = bit >> 1
    above = tl.sum(tl.sum((bits > bound).to(tl.int32), axis=1), axis=0)
    return take_ties(bits, bound, k - above)


@triton.jit
def _row_bits(scores_ptr, bias_ptr, scale_ptr, cols, n):
    """Stored values of the row that scores_ptr points to, with bias, and their scores as integers."""
    mask = cols < n
    stored = tl.load(scores_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = per_latent(bias_ptr, cols, mask, 0.0)
    scale = per_latent(scale_ptr, cols, mask, 1.0)
    return stored, stored + bias, sortable(finite_score(stored, bias, scale, mask))


@triton.jit
def _row_bound(scores_ptr, bias_ptr, scale_ptr, n, k, BLOCK: tl.constexpr):
    """The k-th largest integer of a row, digit by digit, and how many of its equals are among the k."""
    prefix = k * 0
    wanted = k
    for digit_round in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, n, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            _stored, _f, bits = _row_bits(scores_ptr, bias_ptr, scale_ptr, cols, n)
            histogram += digit_histogram(bits, prefix, digit_round)
        digit, wanted = pick_digit(histogram, wanted)
        prefix = prefix | (digit << (24 - 8 * digit_round))
    return prefix, wanted


@triton.jit
def _close_row(start_ptr, end_ptr, col_ptr, row_ptr, val_ptr, b, count, F, k_max, row_offset, K_BLOCK: tl.constexpr):
    """Say where the row's entries are and clear the slots it does not need."""
    first = b * k_max
    tl.store(start_ptr + b, first)
    tl.store(end_ptr + b, first + count)
    for start in range(0, k_max, K_BLOCK):
        place = start + tl.arange(0, K_BLOCK)
        unused = (place >= count) & (place < k_max)
        tl.store(col_ptr + first + place, tl.zeros((K_BLOCK,), tl.int32) + F, mask=unused)
        tl.store(row_ptr + first + place, tl.zeros((K_BLOCK,), tl.int32) + (b + row_offset), mask=unused)
        tl.store(val_ptr + first + place, tl.zeros((K_BLOCK,), tl.float32), mask=unused)


@triton.jit
def _topk_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    maxima_ptr,  # [B, G]
    limits_ptr,  # [2]
    start_ptr,  # [B]
    end_ptr,  # [B]
    col_ptr,  # [B * k_max]
    row_ptr,  # [B * k_max]
    val_ptr,  # [B * k_max]
    F,
    G,
    k_max,
    stride,
    row_offset,
    GROUP: tl.constexpr,
    G_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    # one program: one row
    b = tl.program_id(0)
    k = tl.minimum(tl.load(limits_ptr + 1), k_max)
    group = tl.arange(0, G_BLOCK)[None, :]
    maxima = tl.load(maxima_ptr + b.to(tl.int64) * G + group, mask=group < G, other=float("-inf"))
    survives = _largest(sortable(maxima), k)
    # at most k groups survive; until the entries are known, the row's own slots hold their numbers
    tl.store(col_ptr + b * k_max + rank(survives) - 1, group, mask=survives)
    tl.debug_barrier()
    n_groups = tl.sum(tl.sum(survives.to(tl.int32), axis=1), axis=0)
    q = tl.arange(0, K_BLOCK)
    listed = tl.load(col_ptr + b * k_max + q, mask=q < n_groups, other=0)
    tl.debug_barrier()

    cols = listed[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (q < n_groups)[:, None] & (cols < F)
    stored = tl.load(scores_ptr + b.to(tl.int64) * stride + cols, mask=mask, other=0.0).to(tl.float32)
    bias = per_latent(bias_ptr, cols, mask, 0.0)
    scale = per_latent(scale_ptr, cols, mask, 1.0)
    taken = _largest(sortable(finite_score(stored, bias, scale, mask)), k)
    place = b * k_max + rank(taken) - 1
    tl.store(col_ptr + place, cols, mask=taken)
    tl.store(row_ptr + place, tl.zeros_like(cols) + (b + row_offset), mask=taken)
    tl.store(val_ptr + place, stored + bias, mask=taken)
    count = tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
    _close_row(start_ptr, end_ptr, col_ptr, row_ptr, val_ptr, b, count, F, k_max, row_offset, K_BLOCK)


@triton.jit
def _topk_radix_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    limits_ptr,  # [2]
    bad_ptr,  # [1]
    start_ptr,  # [B]
    end_ptr,  # [B]
    col_ptr,  # [B * k_max]
    row_ptr,  # [B * k_max]
    val_ptr,  # [B * k_max]
    F,
    k_max,
    stride,
    row_offset,
    BLOCK: tl.constexpr,
):
    # one program: one row, read five times
    b = tl.program_id(0)
    k = tl.minimum(tl.load(limits_ptr + 1), k_max)
    n = tl.where(b < tl.load(limits_ptr), F, 0)
    scores_ptr += b.to(tl.int64) * stride
    bound, quota = _row_bound(scores_ptr, bias_ptr, scale_ptr, n, k, BLOCK)
    count = k * 0
    ties = k * 0
    n_bad = k * 0
    for start in range(0, n, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        stored, f, bits = _row_bits(scores_ptr, bias_ptr, scale_ptr, cols, n)
        taken = take_ties(bits, bound, quota - ties)
        place = b * k_max + count + rank(taken) - 1
        tl.store(col_ptr + place, cols, mask=taken)
        tl.store(row_ptr + place, tl.zeros_like(cols) + (b + row_offset), mask=taken)
        tl.store(val_ptr + place, f, mask=taken)
        count += tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
        ties += tl.sum(tl.sum((taken & (bits == bound)).to(tl.int32), axis=1), axis=0)
        n_bad += tl.sum(tl.sum(tl.where(tl.abs(stored) < float("inf"), 0, 1), axis=1), axis=0)
    _close_row(start_ptr, end_ptr, col_ptr, row_ptr, val_ptr, b, count, F, k_max, row_offset, BLOCK)
    tl.atomic_min(bad_ptr, b + row_offset, mask=n_bad > 0)


@triton.jit
def _mask_topk_kernel(
    f_ptr,  # [B, n]
    scale_ptr,  # [n] or None
    n,
    k,
    stride,
    BLOCK: tl.constexpr,
):
    # one program: one row, read five times and written once
    f_ptr += tl.program_id(0).to(tl.int64) * stride
    # k is a constant where it is 1
    bound, quota = _row_bound(f_ptr, None, scale_ptr, n, tl.full((), k, tl.int32), BLOCK)
    # the next loop stores what other lanes have loaded
    tl.debug_barrier()
    ties = quota * 0
    for start in range(0, n, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        _stored, f, bits = _row_bits(f_ptr, None, scale_ptr, cols, n)
        taken = take_ties(bits, bound, quota - ties)
        ties += tl.sum(tl.sum((taken & (bits == bound)).to(tl.int32), axis=1), axis=0)
        tl.store(f_ptr + cols, tl.where(taken, f, 0.0), mask=cols < n)


def group_size(k_max: int, dict_size: int) -> int | None:
    """Latents per group of maxima for `group_max` and `topk_slots`; None where a row needs `topk_slots_radix`.

    64, or 16 where groups of 64 would leave more than a quarter of the row to be read again. None above 512 latents
    a token, or where a program's registers do not hold what it must compare.
    """
    for group in (64, 16):
        read_again = group * triton.next_power_of_2(k_max)
        fits = read_again <= _IN_REGISTERS and triton.cdiv(dict_size, group) <= _IN_REGISTERS
        if fits and (4 * group * k_max <= dict_size or group == 16):
            return group
    return None


def topk_slots(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    maxima: Tensor,
    limits: Tensor,
    slots: Slots,
    *,
    k_max: int,
    group: int,
    row_offset: int = 0,
) -> None:
    """Write each row's limits[1] largest positive scores into its k_max slots; never synchronises.

    Args:
        scores: Stored pre-activations, [B, F], float32 or bfloat16, rows contiguous.
        bias: Added to them, [F] float32. The value of a slot has it.
        scale: Multiplies the sum for the selection, [F] float32, not negative. The value of a slot lacks it.
        maxima: What `group_max` made of the same three with the same group, [B, ceil(F / group)].
        limits: [2] int32; rows from limits[0] on get no entry.
        slots: Of B·k_max places; row b gets those from b·k_max on.
        k_max: At least limits[1].
        group: As `group_size` says.
        row_offset: Token number of the first row.

    Raises:
        ValueError: Slots or maxima do not fit, or the group is too large for the registers.
    """
    B, F = scores.shape
    G = triton.cdiv(F, group)
    if len(slots.col) != B * k_max or maxima.shape != (B, G):
        raise ValueError(
            f"B={B}, k_max={k_max} and groups of {group} need {B * k_max} slots and maxima {(B, G)}, "
            f"got {len(slots.col)} and {tuple(maxima.shape)}"
        )
    k_block = triton.next_power_of_2(max(k_max, 2))
    if group * k_block > max(_IN_REGISTERS, 2 * group) or G > _IN_REGISTERS:
        raise ValueError(f"k_max={k_max} of F={F} does not fit groups of {group}; use topk_slots_radix")
    check_scores(scores)
    _topk_kernel[(B,)](
        scores,
        bias,
        scale,
        maxima,
        limits,
        *slots,
        F,
        G,
        k_max,
        scores.stride(0),
        row_offset,
        GROUP=group,
        G_BLOCK=triton.next_power_of_2(max(G, 2)),
        K_BLOCK=k_block,
        num_warps=8,
        enable_fp_fusion=False,
    )


def topk_slots_radix(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    limits: Tensor,
    bad: Tensor,
    slots: Slots,
    *,
    k_max: int,
    row_offset: int = 0,
    _block: int = _BLOCK,
) -> None:
    """`topk_slots` for any k_max and F, without group maxima: reads the scores five times.

    Takes over from `group_max` the look for scores that are not finite; see there for `bad`.

    Raises:
        ValueError: The slots are not B·k_max.
    """
    B, F = scores.shape
    if len(slots.col) != B * k_max:
        raise ValueError(f"B={B} and k_max={k_max} need {B * k_max} slots, got {len(slots.col)}")
    check_scores(scores)
    _topk_radix_kernel[(B,)](
        scores,
        bias,
        scale,
        limits,
        bad,
        *slots,
        F,
        k_max,
        scores.stride(0),
        row_offset,
        BLOCK=_block,
        num_warps=8,
        enable_fp_fusion=False,
    )


def mask_topk(f: Tensor, scale: Tensor | None, k: int, *, _block: int = _BLOCK) -> None:
    """Zero all of each row but the values whose f·scale is among the k largest positive ones, in place.

    Args:
        f: [B, n] float32, rows contiguous; ties go to the lowest column, NaN and infinity become 0.
        scale: [n] float32, not negative.
        k: At least 1; n or more keeps every positive value.
    """
    check_scores(f)
    B, n = f.shape
    _mask_topk_kernel[(B,)](f, scale, n, k, f.stride(0), BLOCK=_block, num_warps=8, enable_fp_fusion=False)


def topk_triton(score: Tensor, k: int, scale: Tensor | None = None) -> Selection:
    """`topk` by the kernels; synchronises to learn how many entries there are."""
    (B, F), device = score.shape, score.device
    score = score.contiguous()
    limits = torch.tensor([B, k], dtype=torch.int32, device=device)
    bad = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=device)
    slots = Slots.allocate(B, k, device)
    group = group_size(k, F)
    if group is None:
        topk_slots_radix(score, None, scale, limits, bad, slots, k_max=k)
    else:
        maxima = torch.empty(B, triton.cdiv(F, group), device=device)
        group_max(score, None, scale, maxima, limits, bad, group=group)
        topk_slots(score, None, scale, maxima, limits, slots, k_max=k, group=group)
    used = slots.col < F
    crow = torch.zeros(B + 1, dtype=torch.int64, device=device)
    torch.cumsum(slots.end - slots.start, 0, dtype=torch.int64, out=crow[1:])
    return Selection(crow, slots.col[used].long(), slots.row[used].long(), F)
