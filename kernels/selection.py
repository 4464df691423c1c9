"""Which latents fire on which token, as a CSR list: the sparse set every other op runs on.

    entry i of token b:  crow[b] <= i < crow[b + 1],  latent col[i], token row[i]

Columns ascend within a token. The same entries grouped by latent (CSC) give the weight gradients; that
view is built once, by a stable sort, when first asked for.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# selection looks at maxima of this many neighbouring scores before it looks at scores
_GROUP = 16


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
        """The entries grouped by latent."""
        latents, order = self.col.sort(stable=True)
        edges = torch.arange(self.dict_size + 1, device=self.col.device)
        return ByLatent(order, torch.searchsorted(latents, edges), self.row[order])

    @staticmethod
    def from_flat(flat: Tensor, n_tokens: int, dict_size: int) -> "Selection":
        """From ascending positions [nnz] in the flattened [B, F] scores."""
        row = torch.div(flat, dict_size, rounding_mode="floor")
        edges = torch.arange(n_tokens + 1, device=flat.device)
        return Selection(torch.searchsorted(row, edges), flat - row * dict_size, row, dict_size)


def topk(score: Tensor, k: int) -> Selection:
    """The k largest positive scores of each row; see `reference.select_topk`."""
    score = _selectable(score)
    n_tokens, dict_size = score.shape
    bound = score.topk(min(k, dict_size), dim=1, sorted=False).values.amin(1, keepdim=True)
    mask = score > bound.clamp(min=0)
    tied = (score == bound) & (bound > 0)
    # ties are rare: only their rows pay for the running count that keeps the lowest indices
    free = (k - mask.sum(1, keepdim=True)).clamp(min=0)
    mask |= tied & (tied.cumsum(1) <= free) if bool((tied.sum(1, keepdim=True) > free).any()) else tied
    return Selection.from_flat(mask.flatten().nonzero().squeeze(1), n_tokens, dict_size)


def batchtopk(score: Tensor, k: int) -> tuple[Selection, Tensor]:
    """The B·k largest positive scores of the batch, and the smallest of them; see `reference.select_batchtopk`.

    Exact without sorting B·F scores: n groups whose maximum reaches a bound hold at least n scores that do,
    so the n-th largest group maximum bounds the n-th largest score from below, and only the few scores that
    reach it are ranked.

    Returns:
        The selection and the smallest selected score [], infinity where nothing is selected.
    """
    score = _selectable(score)
    n_tokens, dict_size = score.shape
    flat = score.flatten()
    n = min(n_tokens * k, flat.numel())
    whole = flat[: flat.numel() // _GROUP * _GROUP].view(-1, _GROUP).amax(1)
    bound = flat.new_zeros(())
    if n <= len(whole):
        bound = whole.topk(n, sorted=False).values.amin().clamp(min=0)
    candidates = ((flat >= bound) & (flat > 0)).nonzero().squeeze(1)
    values = flat[candidates]
    if len(candidates) > n:
        smallest = values.topk(n, sorted=False).values.amin()
        keep = values > smallest
        ties = (values == smallest).nonzero().squeeze(1)
        keep[ties[: n - int(keep.sum())]] = True
        candidates, values = candidates[keep], values[keep]
    lowest = values.amin() if len(values) else torch.full_like(bound, torch.inf)
    return Selection.from_flat(candidates, n_tokens, dict_size), lowest


def above(score: Tensor, threshold: Tensor) -> Selection:
    """Scores [B, F] above each latent's threshold [F]; see `reference.select_above`."""
    mask = (score > threshold) & torch.isfinite(score)
    return Selection.from_flat(mask.flatten().nonzero().squeeze(1), *score.shape)


def _selectable(score: Tensor) -> Tensor:
    # max(NaN, 0) is NaN in torch, so non-finite scores are taken out by hand
    return score.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)
