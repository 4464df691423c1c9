"""Weights and activations whose latents fire as unevenly as those of real crosscoders.

Latent j fires on a share p_j of the tokens, p lognormal (σ = 2, at most 0.7, Σ p_j = k). Token b has the norm r_b,
lognormal, so that tokens differ in how many latents fire on them; its spread is chosen so that the standard
deviation of that number is 0.7·k. Both matter: frequent latents are what caches hold, and long rows are what a kernel
with one program per token waits for.

    x_b = r_b · normal        pre_bj ~ r_b · √M · normal + b_j        b_j puts the share p_j above the threshold τ/s_j
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.benchmark.shapes import Shape
from fastdiff.crosscoder.model import Crosscoder

_SIGMA = 2.0
_ROW_SPREAD = 0.7  # standard deviation of the row lengths over k
_LARGEST = 0.7
# thresholds over the spread of pre-activations, so that about a tenth of them is positive
_HEIGHT = 2.0
_DEAD_NORM = 0.01


@dataclass(frozen=True)
class Synthetic:
    """Where a measured step starts."""

    crosscoder: Crosscoder
    batches: list[Tensor]  # [B, M, D] each
    dead: Tensor  # [F] bool, latents that cannot fire


def synthetic(
    shape: Shape,
    device: torch.device,
    *,
    seed: int = 0,
    dead_share: float = 0.0,
    n_batches: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> Synthetic:
    """Draw weights and batches.

    Args:
        shape: Sizes.
        device: Where everything is drawn and stays.
        seed: Of everything drawn.
        dead_share: Share of the latents whose decoder norm is too small for them to be selected. Half of their
            pre-activations are positive, so AuxK has something to choose from.
        n_batches: How many batches, all different.
        dtype: Of the batches.
    """
    rng = np.random.default_rng(seed)
    F, M, D = shape.dict_size, shape.n_models, shape.d_model
    dead = np.zeros(F, bool)
    dead[rng.permutation(F)[: round(dead_share * F)]] = True
    frequency = np.zeros(F)
    frequency[~dead] = _frequencies(rng, int((~dead).sum()), shape.k)
    quantile, sigma = _quantiles(frequency, shape.k)

    norms = np.exp(rng.normal(0, 0.2, (F, M)))
    norms[dead] *= _DEAD_NORM
    # τ/s_j over √M, so that all of them reach the same τ
    height = _HEIGHT * M / norms.sum(axis=1)
    b_enc = np.where(dead, 0.0, (height - quantile) * np.sqrt(M))

    generator = torch.Generator(device).manual_seed(seed)
    crosscoder = Crosscoder(F, M, D, activation="batchtopk", k=shape.k).to(device)
    with torch.no_grad():
        crosscoder.W_enc.normal_(generator=generator)
        crosscoder.W_enc /= crosscoder.W_enc.norm(dim=-1, keepdim=True)
        crosscoder.W_dec.copy_(crosscoder.W_enc)
        crosscoder.W_dec *= torch.from_numpy(norms).to(crosscoder.W_dec)[:, :, None]
        crosscoder.b_enc.copy_(torch.from_numpy(b_enc))
    batches = []
    for _ in range(n_batches):
        radius = torch.from_numpy(np.exp(sigma * rng.standard_normal(shape.n_tokens))).to(device, torch.float32)
        x = torch.randn(shape.n_tokens, M, D, generator=generator, device=device)
        batches.append((x * radius[:, None, None]).to(dtype))
    return Synthetic(crosscoder, batches, torch.from_numpy(dead).to(device))


@dataclass(frozen=True)
class Spread:
    """How uneven a selection is."""

    row_std: float  # standard deviation of the row lengths over k
    longest_row: int
    sigma: float  # standard deviation of the log frequency, of latents that fired
    hot_share: float  # share of the pairs that the latents hold which fire on more than 1/121 of the tokens
    fired_share: float  # share of the latents that fired at all

    def __str__(self) -> str:
        return (
            f"rows: std {self.row_std:.2f}·k, longest {self.longest_row}; latents: {self.fired_share:.0%} fire, "
            f"{self.hot_share:.0%} of the pairs in those that fire on more than 1 of 121 tokens"
        )


@torch.no_grad()
def spread(data: Synthetic, shape: Shape, *, check: bool = True) -> Spread:
    """Count what BatchTopK selects on the first batch, token by token so that no [B, F] tensor is copied.

    Raises:
        ValueError: Rows are more even than 0.6·k; figures from such data would flatter.
    """
    crosscoder = data.crosscoder
    x = crosscoder.normalize(data.batches[0]).flatten(1)
    norm = crosscoder.code_norm()
    chunks = [slice(at, at + 512) for at in range(0, shape.n_tokens, 512)]
    W_enc = crosscoder.W_enc.flatten(1)

    def score(at: slice) -> Tensor:
        return torch.addmm(crosscoder.b_enc, x[at], W_enc.T).relu_() * norm

    # the B·k-th largest score: candidates of a chunk are its largest, of which it cannot hold more than n
    n = shape.n_pairs
    best = torch.cat([_largest(score(at).flatten(), n) for at in chunks])
    bound = best.topk(min(n, len(best))).values[-1].clamp(min=torch.finfo(torch.float32).tiny)
    fires = [score(at) >= bound for at in chunks]
    rows = torch.cat([part.sum(dim=1) for part in fires]).double()
    latents = torch.stack([part.sum(dim=0) for part in fires]).sum(dim=0).double()
    fired = latents[latents > 0]
    found = Spread(
        row_std=float(rows.std()) / shape.k,
        longest_row=int(rows.max()),
        sigma=float(fired.log().std()),
        hot_share=float(latents[latents > shape.n_tokens / 121].sum() / latents.sum()),
        fired_share=len(fired) / shape.dict_size,
    )
    if check and found.row_std < 0.6:
        raise ValueError(f"row lengths must have a standard deviation of at least 0.6·k, got {found.row_std:.2f}·k")
    return found


def _largest(flat: Tensor, n: int) -> Tensor:
    flat = flat[flat > 0]
    return flat.topk(min(n, len(flat)), sorted=False).values


def _frequencies(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Lognormal, at most `_LARGEST`, summing to k; [n]."""
    raw = np.exp(rng.normal(0, _SIGMA, n))
    low, high = 0.0, _LARGEST / raw.min()
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * raw, _LARGEST).sum() < k else (low, scale)
    return np.minimum(high * raw, _LARGEST)


def _quantiles(frequency: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Where r·normal exceeds each frequency's share, and the σ of log r that gives the wanted row lengths."""
    alive = frequency > 0
    low, high = 0.0, 1.0
    for _ in range(20):
        sigma = (low + high) / 2
        quantile = np.zeros_like(frequency)
        quantile[alive] = _quantile(frequency[alive], sigma)
        low, high = (sigma, high) if _row_std(quantile[alive], sigma) < _ROW_SPREAD * k else (low, sigma)
    return quantile, high


# Gauss-Hermite nodes for a standard normal
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _quantile(share: np.ndarray, sigma: float) -> np.ndarray:
    grid = np.linspace(-12, 40, 4001)
    tail = _tail(grid[:, None] / np.exp(sigma * _NODES)) @ _WEIGHTS
    # np.interp wants ascending abscissae
    return np.interp(-np.log(share), -np.log(np.maximum(tail, 1e-300)), grid)


def _row_std(quantile: np.ndarray, sigma: float) -> float:
    """Standard deviation over tokens of how many latents fire; that of independent latents comes on top."""
    mean = np.array([_tail(quantile / r).sum() for r in np.exp(sigma * _NODES)])
    return float(np.sqrt(np.maximum(0, (mean**2 @ _WEIGHTS) - (mean @ _WEIGHTS) ** 2)))


def _tail(z: np.ndarray) -> np.ndarray:
    """P(normal > z)."""
    return 0.5 * torch.special.erfc(torch.from_numpy(np.ascontiguousarray(z)) / 2**0.5).numpy()
