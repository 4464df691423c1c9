"""Selections and products as dense one-liners in plain torch: the definition of correct.

JumpReLU, whose gradient is a straight-through estimate, is defined by the formulas in `jumprelu`. Elsewhere
autograd derives the gradients. Nothing here is fast; tests compare the other implementations with it in
float64. A selection is a boolean mask [B, F]; ties go to the lowest index (of the row for TopK, of the
flattened batch for BatchTopK); only scores above zero are ever selected, NaN and infinity never.
"""

import torch
from torch import Tensor


def encoder_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Pre-activations [B, F] of inputs [B, C] under encoder rows [F, C] and biases [F]."""
    return x @ W_enc.T + b_enc


def select_topk(score: Tensor, k: int) -> Tensor:
    """Mask of the k largest positive scores of each row. Source: Gao et al. 2024, arXiv:2406.04093."""
    score = _selectable(score)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
    return mask & (score > 0)


def select_batchtopk(score: Tensor, k: int) -> Tensor:
    """Mask of the B·k largest positive scores of the batch. Source: Bussmann et al. 2024, arXiv:2412.06410."""
    score = _selectable(score)
    order = score.flatten().argsort(descending=True, stable=True)[: len(score) * k]
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device).scatter_(0, order, True)
    return mask.view_as(score) & (score > 0)


def select_above(score: Tensor, threshold: Tensor) -> Tensor:
    """Mask of scores [B, F] above each latent's threshold [F]."""
    return torch.isfinite(score) & (score > threshold)


def sparse_decode(f: Tensor, W_dec: Tensor) -> Tensor:
    """Reconstruction without bias [B, C] from activations [B, F], zero where unselected, and rows [F, C]."""
    return f @ W_dec


def _selectable(score: Tensor) -> Tensor:
    return torch.where(torch.isfinite(score), score, -torch.inf)
