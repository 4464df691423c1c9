"""Kernels of `batchtopk.batchtopk_slots`, in the order in which they run.

Two searches of the same kind, first among group maxima, then among the scores of the listed groups: four histograms
find the bound; each row counts what lies above it and what equals it; the rows' sums say where each row writes and how
many ties it may take. Atomics add integers only, so their order does not matter.
"""

import triton
import triton.language as tl

from fastdiff.kernels.group_max import finite_score, per_latent, sortable
from fastdiff.kernels.radix import digit_histogram, pick_digit, rank, take_ties


@triton.jit
def _after(histograms_ptr, states_ptr, limits_ptr, ROUND: tl.constexpr):
    """The digits picked before this round, and which number among their equals is wanted.

    Every program picks the last round's digit for itself; one of them must store the outcome for the next round.
    """
    if ROUND == 0:
        wanted = tl.load(limits_ptr) * tl.load(limits_ptr + 1)
        prefix = wanted * 0
    else:
        prefix = tl.load(states_ptr + 2 * (ROUND - 1))
        histogram = tl.load(histograms_ptr + 256 * (ROUND - 1) + tl.arange(0, 256))
        digit, wanted = pick_digit(histogram, tl.load(states_ptr + 2 * (ROUND - 1) + 1))
        prefix = prefix | (digit << (32 - 8 * ROUND))
    if tl.program_id(0) == 0:
        tl.store(states_ptr + 2 * ROUND, prefix)
        tl.store(states_ptr + 2 * ROUND + 1, wanted)
    return prefix, wanted


@triton.jit
def _add_histogram(histograms_ptr, histogram, ROUND: tl.constexpr):
    digits = tl.arange(0, 256)
    tl.atomic_add(histograms_ptr + 256 * ROUND + digits, histogram, mask=histogram > 0)


@triton.jit
def _row_span(counts_ptr, ends_ptr, quota, b, B):
    """Place of row b's first entry, how many it has, and how many of those may be ties; from [2, B] counts and sums."""
    above = tl.load(counts_ptr + b)
    tied = tl.load(counts_ptr + B + b)
    above_before = tl.load(ends_ptr + b) - above
    tied_before = tl.load(ends_ptr + B + b) - tied
    ties = tl.minimum(tl.maximum(quota - tied_before, 0), tied)
    return above_before + tl.minimum(tied_before, quota), above + ties, ties


@triton.jit
def _total(counts_ptr, ends_ptr, quota, B):
    first, count, _ties = _row_span(counts_ptr, ends_ptr, quota, B - 1, B)
    return first + count


@triton.jit
def maxima_digits_kernel(
    maxima_ptr,  # [B * G]
    histograms_ptr,  # [4, 256]
    states_ptr,  # [5, 2]
    limits_ptr,  # [2]
    n_maxima,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: STEPS blocks of maxima, rows without regard."""
    prefix, _wanted = _after(histograms_ptr, states_ptr, limits_ptr, ROUND)
    first = tl.program_id(0) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    histogram = tl.zeros((256,), tl.int32)
    for step in range(STEPS):
        i = first + step * BLOCK
        bits = sortable(tl.load(maxima_ptr + i, mask=i < n_maxima, other=float("-inf")))
        histogram += digit_histogram(bits, prefix, ROUND)
    _add_histogram(histograms_ptr, histogram, ROUND)


@triton.jit
def count_groups_kernel(
    maxima_ptr,  # [B, G]
    histograms_ptr,  # [4, 256]
    states_ptr,  # [5, 2]
    limits_ptr,  # [2]
    counts_ptr,  # [2, B]
    B,
    G,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    bound, _quota = _after(histograms_ptr, states_ptr, limits_ptr, 4)
    b = tl.program_id(0)
    n_above = b * 0
    n_tied = b * 0
    for start in range(0, G, BLOCK):
        group = start + tl.arange(0, BLOCK)
        bits = sortable(tl.load(maxima_ptr + b.to(tl.int64) * G + group, mask=group < G, other=float("-inf")))
        n_above += tl.sum((bits > bound).to(tl.int32), axis=0)
        n_tied += tl.sum(((bits == bound) & (bits > 0)).to(tl.int32), axis=0)
    tl.store(counts_ptr + b, n_above)
    tl.store(counts_ptr + B + b, n_tied)


@triton.jit
def list_groups_kernel(
    maxima_ptr,  # [B, G]
    states_ptr,  # [5, 2]
    counts_ptr,  # [2, B]
    ends_ptr,  # [2, B]
    list_ptr,  # [B * min(k_max, G)]
    B,
    G,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    bound = tl.load(states_ptr + 8)
    b = tl.program_id(0)
    place, _count, ties_left = _row_span(counts_ptr, ends_ptr, tl.load(states_ptr + 9), b, B)
    for start in range(0, G, BLOCK):
        group = (start + tl.arange(0, BLOCK))[None, :]
        bits = sortable(tl.load(maxima_ptr + b.to(tl.int64) * G + group, mask=group < G, other=float("-inf")))
        taken = take_ties(bits, bound, ties_left)
        tl.store(list_ptr + place + rank(taken) - 1, b * G + group, mask=taken)
        place += tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
        ties_left -= tl.sum(tl.sum((taken & (bits == bound)).to(tl.int32), axis=1), axis=0)


@triton.jit
def _listed_scores(scores_ptr, bias_ptr, scale_ptr, list_ptr, q, end, F, G, stride, GROUP: tl.constexpr):
    """Latents, activations and sortable scores [Q, GROUP] of the listed groups at places q < end."""
    flat = tl.load(list_ptr + q, mask=q < end, other=0)
    row = flat // G
    cols = (flat - row * G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (q < end)[:, None] & (cols < F)
    stored = tl.load(scores_ptr + row.to(tl.int64)[:, None] * stride + cols, mask=mask, other=0.0).to(tl.float32)
    bias = per_latent(bias_ptr, cols, mask, 0.0)
    scale = per_latent(scale_ptr, cols, mask, 1.0)
    return cols, stored + bias, sortable(finite_score(stored, bias, scale, mask))


@triton.jit
def score_digits_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    list_ptr,  # [B * min(k_max, G)]
    group_states_ptr,  # [5, 2]
    group_counts_ptr,  # [2, B]
    group_ends_ptr,  # [2, B]
    histograms_ptr,  # [4, 256]
    states_ptr,  # [5, 2]
    limits_ptr,  # [2]
    B,
    F,
    G,
    stride,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    Q: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: STEPS times Q listed groups."""
    prefix, _wanted = _after(histograms_ptr, states_ptr, limits_ptr, ROUND)
    end = _total(group_counts_ptr, group_ends_ptr, tl.load(group_states_ptr + 9), B)
    first = tl.program_id(0) * (Q * STEPS)
    histogram = tl.zeros((256,), tl.int32)
    for start in range(first, tl.minimum(first + Q * STEPS, end), Q):
        q = start + tl.arange(0, Q)
        _cols, _f, bits = _listed_scores(scores_ptr, bias_ptr, scale_ptr, list_ptr, q, end, F, G, stride, GROUP)
        histogram += digit_histogram(tl.reshape(bits, (Q * GROUP,)), prefix, ROUND)
    _add_histogram(histograms_ptr, histogram, ROUND)


@triton.jit
def count_scores_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    list_ptr,  # [B * min(k_max, G)]
    group_states_ptr,  # [5, 2]
    group_counts_ptr,  # [2, B]
    group_ends_ptr,  # [2, B]
    histograms_ptr,  # [4, 256]
    states_ptr,  # [5, 2]
    limits_ptr,  # [2]
    counts_ptr,  # [2, B]
    B,
    F,
    G,
    stride,
    GROUP: tl.constexpr,
    Q: tl.constexpr,
):
    """One program: the listed groups of one row."""
    bound, _quota = _after(histograms_ptr, states_ptr, limits_ptr, 4)
    b = tl.program_id(0)
    first, n_groups, _ties = _row_span(group_counts_ptr, group_ends_ptr, tl.load(group_states_ptr + 9), b, B)
    end = first + n_groups
    n_above = b * 0
    n_tied = b * 0
    for start in range(first, end, Q):
        q = start + tl.arange(0, Q)
        _cols, _f, bits = _listed_scores(scores_ptr, bias_ptr, scale_ptr, list_ptr, q, end, F, G, stride, GROUP)
        n_above += tl.sum(tl.sum((bits > bound).to(tl.int32), axis=1), axis=0)
        n_tied += tl.sum(tl.sum(((bits == bound) & (bits > 0)).to(tl.int32), axis=1), axis=0)
    tl.store(counts_ptr + b, n_above)
    tl.store(counts_ptr + B + b, n_tied)


@triton.jit
def emit_kernel(
    scores_ptr,  # [B, F]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    list_ptr,  # [B * min(k_max, G)]
    group_states_ptr,  # [5, 2]
    group_counts_ptr,  # [2, B]
    group_ends_ptr,  # [2, B]
    states_ptr,  # [5, 2]
    counts_ptr,  # [2, B]
    ends_ptr,  # [2, B]
    start_ptr,  # [B]
    end_ptr,  # [B]
    col_ptr,  # [B * k_max]
    row_ptr,  # [B * k_max]
    val_ptr,  # [B * k_max]
    lowest_ptr,  # [1] int32 bits of a float32
    B,
    F,
    G,
    k_max,
    stride,
    row_offset,
    GROUP: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the listed groups of one row, and a B-th of the slots in case they stay unused."""
    b = tl.program_id(0)
    bound = tl.load(states_ptr + 8)
    quota = tl.load(states_ptr + 9)
    total = _total(counts_ptr, ends_ptr, quota, B)
    if b == 0:
        tl.store(lowest_ptr, tl.where(total > 0, bound, 0x7F800000))
    place, count, ties_left = _row_span(counts_ptr, ends_ptr, quota, b, B)
    tl.store(start_ptr + b, place)
    tl.store(end_ptr + b, place + count)
    first, n_groups, _ties = _row_span(group_counts_ptr, group_ends_ptr, tl.load(group_states_ptr + 9), b, B)
    last = first + n_groups
    for start in range(first, last, Q):
        q = start + tl.arange(0, Q)
        cols, f, bits = _listed_scores(scores_ptr, bias_ptr, scale_ptr, list_ptr, q, last, F, G, stride, GROUP)
        taken = take_ties(bits, bound, ties_left)
        at = place + rank(taken) - 1
        tl.store(col_ptr + at, cols, mask=taken)
        tl.store(row_ptr + at, tl.zeros_like(cols) + (b + row_offset), mask=taken)
        tl.store(val_ptr + at, f, mask=taken)
        place += tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
        ties_left -= tl.sum(tl.sum((taken & (bits == bound)).to(tl.int32), axis=1), axis=0)
    share_end = (b + 1) * k_max
    for start in range(tl.maximum(b * k_max, total), share_end, BLOCK):
        i = tl.arange(0, BLOCK)
        unused = i < share_end - start
        tl.store(col_ptr + start + i, tl.zeros((BLOCK,), tl.int32) + F, mask=unused)
        tl.store(row_ptr + start + i, tl.zeros((BLOCK,), tl.int32) + (b + row_offset), mask=unused)
        tl.store(val_ptr + start + i, tl.zeros((BLOCK,), tl.float32), mask=unused)
