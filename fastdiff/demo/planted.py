"""Activations with a known dictionary: no language model, and every exclusive direction is known.

    x_b = Σ_j a_bj · [owner_j ∋ base | tuned] · (d_j^base | d_j^tuned) + noise

Latent j fires on a token with probability `frequency_j`, its strength is 1 + |normal|·0.3. A shared latent's
direction in the tuned model is the base model's, turned a little, as fine-tuning turns it; an exclusive one
exists in one model only.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    """Activations and the truth behind them."""

    activations: Tensor  # [N, 2, D] float32
    directions: Tensor  # [J, 2, D] float32, zero in the model that lacks the latent
    owner: list[str]  # "shared", "base" or "tuned", per latent
    frequency: Tensor  # [J] float64


def planted_activations(
    seed: int,
    *,
    n_tokens: int,
    d_model: int,
    shared: int,
    exclusive: dict[float, int],
    shared_frequency: tuple[float, float] = (0.005, 0.05),
    noise: float = 0.05,
    turn: float = 0.3,
) -> Planted:
    """Draw a ground-truth dictionary and tokens from it.

    Args:
        seed: Of everything drawn.
        n_tokens: N.
        d_model: D.
        shared: Number of latents both models have; their frequencies are log-uniform.
        exclusive: How many latents only base has, and as many only tuned has, by frequency.
        shared_frequency: Smallest and largest frequency of the shared ones.
        noise: Standard deviation of each coordinate's noise.
        turn: Length of what is added to a shared unit direction in the tuned model; 0.3 is a cosine of 0.96.

    Returns:
        Activations [N, 2, D] and the truth.
    """
    rng = np.random.default_rng(seed)
    owner = ["shared"] * shared
    low, high = shared_frequency
    frequency = list(np.exp(rng.uniform(np.log(low), np.log(high), shared)))
    for rate, count in exclusive.items():
        owner += ["base"] * count + ["tuned"] * count
        frequency += [rate] * (2 * count)
    directions = rng.standard_normal((len(owner), 2, d_model)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions[:shared, 1] = directions[:shared, 0] + turn * directions[:shared, 1]
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions[[o == "tuned" for o in owner], 0] = 0
    directions[[o == "base" for o in owner], 1] = 0
    x = rng.standard_normal((n_tokens, 2, d_model)).astype(np.float32) * noise
    for j, rate in enumerate(frequency):
        rows = np.flatnonzero(rng.random(n_tokens) < rate)
        strength = 1 + 0.3 * np.abs(rng.standard_normal(len(rows))).astype(np.float32)
        x[rows] += strength[:, None, None] * directions[j]
    rates = torch.tensor(frequency, dtype=torch.float64)
    return Planted(torch.from_numpy(x), torch.from_numpy(directions), owner, rates)


def recovered(
    planted: Planted, W_dec: Tensor, flagged: dict[str, Tensor], min_cosine: float = 0.8
) -> dict[str, dict[float, float]]:
    """Recall by side and frequency, and precision by side under the key 0.0.

    Args:
        planted: The truth.
        W_dec: [F, 2, D] in the space of the activations (a scale per model does not matter).
        flagged: Latents [F] bool called exclusive, by side: "base", "tuned".
        min_cosine: A flagged latent stands for a direction if the cosine in the side's own model is above this.

    Returns:
        {side: {frequency: recall, 0.0: precision}}; precision is the share of flagged latents that stand for an
        exclusive direction of that side, 1.0 if none is flagged.
    """
    found: dict[str, dict[float, float]] = {}
    for model, side in enumerate(("base", "tuned")):
        latents = torch.nn.functional.normalize(W_dec[flagged[side], model], dim=-1)
        members = torch.tensor([o == side for o in planted.owner])
        cosine = latents @ planted.directions[members, model].T  # [flagged, members]
        rates = planted.frequency[members]
        hit = (cosine > min_cosine).any(dim=0) if len(latents) else torch.zeros(len(rates), dtype=torch.bool)
        found[side] = {float(r): float(hit[rates == r].double().mean()) for r in rates.unique()}
        matched = (cosine > min_cosine).any(dim=1)
        found[side][0.0] = float(matched.double().mean()) if len(latents) else 1.0
    return found
