"""Which model a latent belongs to: by decoder norms (`class`) and by latent scaling (`specific`)."""

import numpy as np
import torch
from torch import Tensor

CLASSES = ("tuned_only", "base_only", "shared", "other")
_SHARED = (0.4, 0.6)


def delta_norm(W_dec: Tensor) -> Tensor:
    """Say which model each latent belongs to, from its two decoder norms.

        Δ_norm[j] = ½ · ((‖W_dec[j, 1]‖ - ‖W_dec[j, 0]‖) / max(‖W_dec[j, 0]‖, ‖W_dec[j, 1]‖) + 1)

    0 is base-only, 0.5 shared, 1 tuned-only. Some published code subtracts the other way round.

    Args:
        W_dec: Decoder, [F, 2, D], any float dtype. Model 0 is the base, model 1 the tuned one.

    Returns:
        [F], float64, in [0, 1]. NaN where both rows are zero: such a latent belongs to neither.

    Raises:
        ValueError: W_dec does not hold exactly two models.

    Source:
        Minder et al. 2025, arXiv:2504.02922. A high Δ_norm alone does not prove a latent new: see `scaling`.

    Example:
        >>> delta_norm(torch.tensor([[[3.0], [0.0]], [[1.0], [1.0]], [[0.0], [2.0]]])).tolist()
        [0.0, 0.5, 1.0]
    """
    if W_dec.ndim != 3 or W_dec.shape[1] != 2:
        raise ValueError(f"delta_norm needs W_dec of shape [F, 2, D], got {tuple(W_dec.shape)}")
    base, tuned = W_dec.detach().double().norm(dim=-1).unbind(dim=1)
    return 0.5 * ((tuned - base) / torch.maximum(base, tuned) + 1)


def decoder_cosine(W_dec: Tensor) -> Tensor:
    """Cosine between a latent's two decoder rows, [F] float64; NaN where one is zero."""
    base, tuned = W_dec.detach().double().unbind(dim=1)
    return (base * tuned).sum(dim=-1) / (base.norm(dim=-1) * tuned.norm(dim=-1))


def classify(delta: np.ndarray) -> np.ndarray:
    """Class by Δ_norm [F]: > 0.9 tuned_only, < 0.1 base_only, 0.4 to 0.6 shared, else other."""
    shared = (delta >= _SHARED[0]) & (delta <= _SHARED[1])
    return np.select([delta > 0.9, delta < 0.1, shared], CLASSES[:3], default=CLASSES[3])


def specific(
    delta: np.ndarray,
    nu_error: np.ndarray,
    nu_reconstruction: np.ndarray,
    *,
    nu_error_max: float = 0.2,
    nu_reconstruction_max: float = 0.5,
) -> np.ndarray:
    """Model that alone has the latent, by latent scaling: "tuned", "base" or "".

    A latent of the shared class never counts: where fine-tuning has turned its direction, ν is about 0 too,
    since the other model's row is orthogonal to it, yet both decoders write it with equal strength.

    Args:
        delta: Δ_norm, [F]; above 0.6 is the tuned side, below 0.4 the base side.
        nu_error: [F], NaN where the latent never fired.
        nu_reconstruction: [F].
        nu_error_max: |ν_error| must be below this.
        nu_reconstruction_max: |ν_reconstruction| must be below this.

    Returns:
        [F] of str. A latent of one model that the norms miss (rare ones, mostly) is found this way.

    Source:
        Minder et al. 2025, arXiv:2504.02922, final figure: ν_error < 0.2 and ν_reconstruction < 0.5.
    """
    absent = (np.abs(nu_error) < nu_error_max) & (np.abs(nu_reconstruction) < nu_reconstruction_max)
    return np.select([absent & (delta > _SHARED[1]), absent & (delta < _SHARED[0])], ["tuned", "base"], default="")
