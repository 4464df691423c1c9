"""The active (token, latent) pairs of a batch in places that are allocated once.

`Selection` has as many entries as there are pairs, so its size must be read back from the device. A step that never
waits for the device, and that a CUDA graph can replay, keeps its pairs in a fixed number of slots instead:

    slot i of token b:  start[b] <= i < end[b],  latent col[i], token row[i], activation val[i]

Columns ascend within a token. A slot that no token owns has col = F, which sorts behind every latent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# what `bad` holds while every number was finite; kernels lower it to the first token that was not
ALL_FINITE = 2**31 - 1


class Slots(NamedTuple):
    """Pairs of B tokens in `capacity` slots."""

    start: Tensor  # [B] int32
    end: Tensor  # [B] int32
    col: Tensor  # [capacity] int32, F where unused
    row: Tensor  # [capacity] int32, token of the slot, counted from the first micro-batch; undefined where unused
    val: Tensor  # [capacity] float32, pre-activation with bias, 0 where unused

    @staticmethod
    def allocate(n_tokens: int, k_max: int, device: torch.device) -> "Slots":
        """Slots for B tokens with at most k_max pairs each on average.

        Raises:
            ValueError: B·k_max does not fit 32 bits.
        """
        capacity = n_tokens * k_max
        if capacity >= 2**31:
            raise ValueError(f"{n_tokens} tokens of {k_max} latents exceed 2^31 pairs; use a smaller batch")
        edges = torch.zeros(2, n_tokens, dtype=torch.int32, device=device)
        places = torch.zeros(2, capacity, dtype=torch.int32, device=device)
        return Slots(edges[0], edges[1], places[0], places[1], torch.zeros(capacity, device=device))
