"""Selections and products as dense one-liners in plain torch: the definition of correct.

Autograd derives the gradients. Nothing here is fast; tests compare the other implementations with it in
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


def weighted_rows(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Sums [G, C] of weight[i] · rows[index[i]] over start[g] <= i < start[g + 1]."""
    group = torch.repeat_interleave(start.diff())
    return torch.zeros(len(start) - 1, len(rows)).to(rows).index_put((group, index), weight, accumulate=True) @ rows


def jumprelu(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Activations z where z > θ, else 0; the last summand is zero with the straight-through gradient for θ."""
    in_window = (z - theta).abs() < bandwidth / 2
    return z * (z > theta) - (theta / bandwidth * in_window).detach() * (theta - theta.detach())


def step(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1 where z > θ, else 0; the last summand as in `jumprelu`."""
    in_window = (z - theta).abs() < bandwidth / 2
    return (z > theta).to(z.dtype) - (in_window.to(z.dtype) / bandwidth).detach() * (theta - theta.detach())


def normalize(batch: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x̃ [B, C] of activations [B, M, D], and its ‖x̃‖² per model [B, M]."""
    x = (batch - mean) * scale[:, None]
    return x.flatten(1), x.square().sum(dim=2)


def residual(f: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, n_models: int) -> tuple[Tensor, Tensor, Tensor]:
    """Residual r [B, C], ‖r‖² per model [B, M], and ⟨r, W_dec[j]⟩ per latent and model [B, F, M]."""
    r = f @ W_dec + b_dec - x
    by_model = r.unflatten(1, (n_models, -1))
    return r, by_model.square().sum(dim=2), torch.einsum("bmd,fmd->bfm", by_model, W_dec.unflatten(1, (n_models, -1)))


def residual_scale(errors: Tensor, total: int, d_model: int, loss: str) -> Tensor:
    """Factor c [B, M] in ∂loss/∂r = c·r, from ‖r‖² [B, M] and the tokens of the step; see `crosscoder.losses`."""
    n_models = errors.shape[1]
    if loss == "mse":
        return torch.full_like(errors, 2 / (total * n_models * d_model))
    return torch.where(errors > 0, 1 / (total * n_models * errors.sqrt()), 0.0)


def column_sums(r: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Σ r, Σ c·r and Σ x̃ over tokens, [3, C], of r and x̃ [B, C] and c [B, M]."""
    scaled = (r.unflatten(1, (c.shape[1], -1)) * c[:, :, None]).flatten(1)
    return torch.stack([r.sum(dim=0), scaled.sum(dim=0), x.sum(dim=0)])


def row_gradients(f: Tensor, delta: Tensor, c: Tensor, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_dec [F, C], W_enc [F, C] and b_enc [F] from f and ∂loss/∂f [B, F], zero where unselected."""
    scaled = (r.unflatten(1, (c.shape[1], -1)) * c[:, :, None]).flatten(1)
    return f.T @ scaled, delta.T @ x, delta.sum(dim=0)


def adam(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after step 1, 2, …. Source: Kingma and Ba 2015, arXiv:1412.6980."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad.square()
    unbiased = v / (1 - betas[1] ** step)
    return weight - lr / (1 - betas[0] ** step) * m / (unbiased.sqrt() + eps), m, v


def code_norm(W_dec: Tensor, n_models: int) -> Tensor:
    """Σ_m ‖W_dec[j, m]‖ [F] of rows [F, C]."""
    return W_dec.unflatten(1, (n_models, -1)).norm(dim=2).sum(dim=1)


def auxk_loss(
    error: Tensor, x: Tensor, W_dec: Tensor, W_enc: Tensor, b_enc: Tensor, code_norm: Tensor, dead: Tensor, k: int
) -> Tensor:
    """L_aux of errors x - x̂ and inputs [B, C] over the dead latents, a mask [F]. Source: see `step`."""
    f = (x @ W_enc.T + b_enc).relu()
    score = torch.where(dead, f.detach() * code_norm, 0.0)
    guess = (f * select_topk(score, k)) @ W_dec
    spread = (error - error.mean(dim=0)).square().sum(dim=1).mean()
    return (error - guess).square().sum(dim=1).mean() / spread if bool(dead.any()) else spread * 0


def _selectable(score: Tensor) -> Tensor:
    return torch.where(torch.isfinite(score), score, -torch.inf)
