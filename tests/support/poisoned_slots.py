"""Slots as a selection kernel may leave them: gaps between tokens, and garbage in every slot that no token owns."""

import torch

from fastdiff.kernels.slots import Slots


def poisoned_slots(f: torch.Tensor, *, gap: int = 2, row_offset: int = 0) -> Slots:
    """The nonzero activations of f [B, F] as float32 slots; an unused slot has a huge token and NaN as activation."""
    n_tokens, dict_size = f.shape
    start, end, col, row, val = [], [], [], [], []

    def leave_unused(n):
        col.extend([dict_size] * n)
        row.extend([2**31 - 1] * n)
        val.extend([float("nan")] * n)

    for b in range(n_tokens):
        leave_unused(gap)
        latents = f[b].nonzero().flatten().tolist()
        start.append(len(col))
        col.extend(latents)
        row.extend([b + row_offset] * len(latents))
        val.extend(f[b, latents].tolist())
        end.append(len(col))
    leave_unused(gap)
    integers = [torch.tensor(values, dtype=torch.int32, device=f.device) for values in (start, end, col, row)]
    return Slots(*integers, torch.tensor(val, dtype=torch.float32, device=f.device))


def by_slot(slots: Slots, dense: torch.Tensor) -> torch.Tensor:
    """Elements of dense [B, F, ...] where the slots are, in slot order; NaN where no token owns the slot."""
    out = dense.new_full((len(slots.col), *dense.shape[2:]), float("nan"))
    for b, (start, end) in enumerate(zip(slots.start.tolist(), slots.end.tolist(), strict=True)):
        out[start:end] = dense[b, slots.col[start:end].long()]
    return out
