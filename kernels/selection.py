"""Which latents fire on which token, as a CSR list: the sparse set every other op runs on.

    entry i of token b:  crow[b] <= i < crow[b + 1],  latent col[i], token row[i]

Columns ascend within a token. The same entries grouped by latent (CSC) give the weight gradients; that
view is built once, by a stable sort, when first asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# scores looked at together on a CPU: 2 MB of float32, which stay in its cache
_CHUNK = 1 << 19


class ByLatent(NamedTuple):
    """The same entries, latent by latent: entries order[start[j]:start[j + 1]] belong to latent j."""

    order: Tensor  # [nnz] int64, ascending token within a latent
    start: Tensor  # [F + 1] int64
    row: Tensor  # [nnz] int64, token of each entry in this order


@dataclass(frozen=True)
class Selection:
    """The active (token, latent) pairs of a batch."""

    crow: Tensor  # [B + 1] int64
    col: Tensor  # [nnz] int64
    row: Tensor  # [nnz] int64
    dict_size: int

    @property
    def n_tokens(self) -> int:
        """B."""
        return len(self.crow) - 1

    @cached_property
    def by_latent(self) -> ByLatent:
        """The entries grouped by latent; sorted once."""
        return self.sort_by_latent()

    def sort_by_latent(self) -> ByLatent:
        """The entries grouped by latent, sorted anew."""
        latents, order = self.col.sort(stable=True)
        edges = torch.arange(self.dict_size + 1, device=self.col.device)
        return ByLatent(order, torch.searchsorted(latents, edges), self.row[order])

    @staticmethod
    def from_flat(flat: Tensor, n_tokens: int, dict_size: int) -> "Selection":
        """From ascending positions [nnz] in the flattened [B, F] scores."""
        row = torch.div(flat, dict_size, rounding_mode="floor")
        edges = torch.arange(n_tokens + 1, device=flat.device)
        return Selection(torch.searchsorted(row, edges), flat - row * dict_size, row, dict_size)

    @staticmethod
    def from_mask(mask: Tensor) -> "Selection":
        """From a dense [B, F] of booleans."""
        return Selection.from_flat(mask.flatten().nonzero().squeeze(1), *mask.shape)


def row_chunks(score: Tensor, scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Scores [B, F] times scale [F], a few rows at a time, in a type that compares exactly.

    A chunk lives until the next one is asked for. On a CPU a product [B, F] would cost more than the whole
    selection, for its fresh memory alone.
    """
    n_tokens, dict_size = score.shape
    dtype = torch.promote_types(score.dtype, torch.float32)
    step = max(1, _CHUNK // max(dict_size, 1)) if score.device.type == "cpu" else max(n_tokens, 1)
    buffer = None
    for start in range(0, n_tokens, step):
        rows = slice(start, min(start + step, n_tokens))
        part = score[rows]
        if scale is not None or part.dtype != dtype:
            buffer = torch.empty(part.shape, dtype=dtype, device=score.device) if buffer is None else buffer
            out = buffer[: len(part)]
            part = out.copy_(part) if scale is None else torch.mul(part, scale, out=out)
        yield rows, part


def positive_bound(bound: Tensor) -> Tensor:
    """A bound that only positive scores can reach."""
    return bound.clamp(min=torch.finfo(bound.dtype).smallest_normal * torch.finfo(bound.dtype).eps)


def reaching(part: Tensor, bound: Tensor, *, strict: bool = False) -> Tensor:
    """Ascending positions in the flattened part [R, F] of the values >= bound, or > if strict; the bound broadcasts."""
    if part.device.type != "cpu":
        mask = part > bound if strict else part >= bound
        return mask.flatten().nonzero().squeeze(1)
    # numpy compares and searches 5 times as fast as torch
    mask = (np.greater if strict else np.greater_equal)(part.numpy(), bound.numpy()).reshape(-1)
    if mask.size % 8:
        return torch.from_numpy(np.flatnonzero(mask))
    # few values reach it: look at eight at once first
    words = np.flatnonzero(mask.view(np.int64) != 0)
    inner = np.flatnonzero(mask.reshape(-1, 8)[words])
    return torch.from_numpy(words[inner >> 3] * 8 + (inner & 7))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest along the last dimension, 1 <= k <= its length; no NaN."""
    if values.device.type == "cpu":
        # 131,072 values: 0.1 ms, torch.topk 1.2 ms
        place = values.shape[-1] - k
        return torch.as_tensor(np.partition(values.numpy(), place, axis=-1)[..., place])
    return values.topk(k, dim=-1, sorted=False).values.amin(-1)


def join(found: list[Tensor], values: list[Tensor], score: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and values of all chunks of these scores, less the infinite ones."""
    if not found:
        return score.new_zeros(0, dtype=torch.int64), score.new_zeros(0)
    flat, value = torch.cat(found), torch.cat(values)
    finite = value < torch.inf
    return (flat, value) if bool(finite.all()) else (flat[finite], value[finite])
