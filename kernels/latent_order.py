"""The pairs of a step latent by latent, in buffers of fixed size and without waiting for the device.

    place i of latent j:  start[j] <= i < start[j + 1],  slot entry[i], token token[i], activation val[i], …

The sort is stable, so slots ascend within a latent and every sum over a latent has one order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class LatentOrder(NamedTuple):
    """Slots sorted by latent; the slots that no token owns come last, as zeros."""

    start: Tensor  # [F + 1] int32
    longest_first: Tensor  # [F] int32, latents by descending number of pairs, ties by latent
    entry: Tensor  # [capacity] int32
    token: Tensor  # [capacity] int32
    val: Tensor  # [capacity] float32
    delta: Tensor  # [capacity] float32

    @staticmethod
    def allocate(capacity: int, dict_size: int, device: torch.device) -> "LatentOrder":
        """Room for `capacity` slots of `dict_size` latents."""
        places = torch.zeros(2, capacity, dtype=torch.int32, device=device)
        values = torch.zeros(2, capacity, device=device)
        start = torch.zeros(dict_size + 1, dtype=torch.int32, device=device)
        longest_first = torch.arange(dict_size, dtype=torch.int32, device=device)
        return LatentOrder(start, longest_first, *places, *values)


@triton.jit
def _permute_kernel(
    slot_ptr,  # [capacity] int64
    n_owned_ptr,  # [1], the last element of start
    row_ptr,  # [capacity]
    val_ptr,  # [capacity]
    delta_ptr,  # [capacity]
    entry_out_ptr,  # [capacity]
    token_out_ptr,  # [capacity]
    val_out_ptr,  # [capacity]
    delta_out_ptr,  # [capacity]
    capacity,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < capacity
    # an unused slot may hold anything
    owned = i < tl.load(n_owned_ptr)
    slot = tl.load(slot_ptr + i, mask=inside, other=0)
    tl.store(entry_out_ptr + i, slot.to(tl.int32), mask=inside)
    tl.store(token_out_ptr + i, tl.load(row_ptr + slot, mask=owned, other=0), mask=inside)
    tl.store(val_out_ptr + i, tl.load(val_ptr + slot, mask=owned, other=0.0), mask=inside)
    tl.store(delta_out_ptr + i, tl.load(delta_ptr + slot, mask=owned, other=0.0), mask=inside)


def order_by_latent(
    slots_col: Tensor, slots_row: Tensor, slots_val: Tensor, delta: Tensor, order: LatentOrder, *, _block: int = _BLOCK
) -> None:
    """Sort slots by latent into `order`.

    The slots may be those of several micro-batches, one after the other. The sorts take their buffers from torch's
    allocator, which a CUDA graph keeps.

    Args:
        slots_col: Latents, [capacity] int32, F where unused.
        slots_row: Tokens, [capacity] int32.
        slots_val: Activations, [capacity] float32.
        delta: Their gradients, [capacity] float32.
        order: Output; every element is written.
    """
    capacity, dict_size = len(order.entry), len(order.longest_first)
    assert len(slots_col) == len(slots_row) == len(slots_val) == len(delta) == capacity
    latents, slot = slots_col.sort(stable=True)
    edges = torch.arange(dict_size + 1, dtype=slots_col.dtype, device=slots_col.device)
    torch.searchsorted(latents, edges, out_int32=True, out=order.start)
    order.longest_first.copy_(order.start.diff().argsort(descending=True, stable=True))
    _permute_kernel[(triton.cdiv(capacity, _block),)](
        slot,
        order.start[dict_size:],
        slots_row,
        slots_val,
        delta,
        order.entry,
        order.token,
        order.val,
        order.delta,
        capacity,
        BLOCK=_block,
        num_warps=4,
        enable_fp_fusion=True,
    )
