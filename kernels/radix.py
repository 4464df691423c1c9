"""What exact selections share: ranks, ties, and the n-th largest of many integers by four digits of eight bits.

Positive floats order as their bits do (`group_max.sortable`), so the integers here are not negative, and 0 is never
selected. 256 bins: 2048 would take 192 registers a thread on Triton 3.6.
"""

import triton
import triton.language as tl


@triton.jit
def rank(mask):
    """How many are set up to each place, in row-major order, itself included."""
    inner = tl.cumsum(mask.to(tl.int32), axis=1)
    per_row = tl.sum(mask.to(tl.int32), axis=1)
    return (tl.cumsum(per_row, axis=0) - per_row)[:, None] + inner


@triton.jit
def take_ties(bits, bound, quota):
    """What lies above the bound, and the first `quota` that equal it; 0 is never taken."""
    tied = (bits == bound) & (bits > 0)
    return (bits > bound) | (tied & (rank(tied) <= quota))


@triton.jit
def digit_histogram(bits, prefix, ROUND: tl.constexpr):
    """Counts [256] of digit ROUND, of those integers above 0 whose digits before it are the prefix's."""
    mask = bits > 0
    if ROUND > 0:
        mask &= (bits >> (32 - 8 * ROUND)) == (prefix >> (32 - 8 * ROUND))
    return tl.histogram((bits >> (24 - 8 * ROUND)) & 0xFF, 256, mask=mask)


@triton.jit
def pick_digit(histogram, wanted):
    """The digit of the `wanted`-th largest, and which one it is among those that share it.

    With fewer than wanted, the smallest is meant.
    """
    digits = tl.arange(0, 256)
    total = tl.sum(histogram, axis=0)
    wanted = tl.minimum(wanted, total)
    reach = total - tl.cumsum(histogram, axis=0) + histogram
    digit = tl.max(tl.where((reach >= wanted) & (histogram > 0), digits, 0), axis=0)
    return digit, wanted - tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
