"""Latent scaling: is a latent's direction present in each model? Exact, for all latents, in one pass.

For latent j with direction d (the tuned model's decoder row, or the base model's), activation f_n and target y_n,

    β = argmin_β Σ_n ‖β f_n d - y_n‖² = ⟨d, Σ_n f_n y_n⟩ / (‖d‖² Σ_n f_n²)

with, for model m, the targets

    error           y = x̃_m - (x̂_m - f W_dec[j, m])      what the other latents leave over
    reconstruction  y = x̂_m                                what all latents write, with b_dec
    activation      y = x̃_m

Since y is linear in e_m = x̃_m - x̂_m and x̂_m, three sums per latent, direction and model suffice:

    C = Σ f²      S_m = Σ f ⟨d, e_m⟩      R_m = Σ f ⟨d, x̂_m⟩
    β_error,m = S_m/(‖d‖² C) + ⟨d, W_dec[j, m]⟩/‖d‖²
    β_reconstruction,m = R_m/(‖d‖² C)          β_activation,m = (R_m + S_m)/(‖d‖² C)

⟨d_j, Σ_n f_nj e_nm⟩ needs Σ_n f_nj e_nm, the same gather as a weight gradient: only active pairs cost anything,
O(N·L0·M·D) in all. Everything after the encoder runs in float64.

ν = β of the model that should lack the latent / β of the model that has it: about 0 for a latent of one model,
about 1 for a shared one. A high ν_error means the crosscoder merely failed to use the latent there (complete
shrinkage), a high ν_reconstruction that other latents write it (latent decoupling).

Source: Minder et al. 2025, arXiv:2504.02922, section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.kernels import ops
from fastdiff.kernels.selection import Selection

TARGETS = ("error", "reconstruction", "activation")


@dataclass
class ScalingSums:
    """The running sums; direction first, then model."""

    squares: Tensor  # C [F] float64
    error: Tensor  # S [F, 2 directions, M] float64
    reconstruction: Tensor  # R [F, 2 directions, M] float64

    @staticmethod
    def zeros(dict_size: int, n_models: int) -> "ScalingSums":
        """Nothing seen yet."""
        shape = (dict_size, 2, n_models)
        return ScalingSums(
            torch.zeros(dict_size, dtype=torch.float64),
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(shape, dtype=torch.float64),
        )

    @torch.no_grad()
    def add(self, W_dec: Tensor, b_dec: Tensor, x: Tensor, values: Tensor, selection: Selection) -> None:
        """Take in a batch.

        Args:
            W_dec: [F, M, D] float64.
            b_dec: [M, D] float64.
            x: x̃, [B, M, D].
            values: f of the pairs that fire, [nnz].
            selection: Which they are.
        """
        by = selection.by_latent
        f = values.double()
        reconstruction = ops.sparse_decode(f, selection, W_dec.flatten(1)).view(x.shape) + b_dec
        # a running sum would be faster, but loses a weak latent's squares behind a strong one's
        self.squares += ops.sum_by_latent(selection, f.square()).cpu()
        f = f[by.order]
        for sums, target in ((self.error, x - reconstruction), (self.reconstruction, reconstruction)):
            weighted = ops.weighted_rows(by.row, target.flatten(1), by.start, f).view(W_dec.shape)  # Σ_n f y_m
            sums += torch.einsum("fkd,fmd->fkm", W_dec[:, :2], weighted).cpu()

    def betas(self, W_dec: Tensor) -> dict[str, Tensor]:
        """β by target.

        Args:
            W_dec: [F, M, D].

        Returns:
            For each of error, reconstruction, activation: [F, 2, M] float64, β along the base (0) or tuned (1)
            model's direction for each model's target. NaN for a latent that never fired or has no direction.
        """
        rows = W_dec.detach().double()
        directions = rows[:, :2]
        norm = directions.square().sum(dim=-1)[:, :, None]  # ‖d‖² [F, 2, 1]
        scale = norm * self.squares[:, None, None]
        own = torch.einsum("fkd,fmd->fkm", directions, rows) / norm
        error, reconstruction = self.error / scale, self.reconstruction / scale
        nan = torch.where(scale > 0, 0.0, torch.nan)
        return {
            "error": error + own + nan,
            "reconstruction": reconstruction + nan,
            "activation": reconstruction + error + nan,
        }


def unmatched_energy(betas: Tensor, W_dec: Tensor) -> Tensor:
    """Energy of every latent that only the tuned model has minus what only base has, over all of its energy.

    Unlike ν it looks in both directions, so a latent whose direction was turned counts on both sides.

    Args:
        betas: The target error of `ScalingSums.betas`, [F, 2, M].
        W_dec: [F, M, D].

    Returns:
        [F] float64 from -1 (base alone) to 1 (tuned alone): (‖d_t‖² u_t - ‖d_b‖² u_b) / (‖d_t‖² + ‖d_b‖²), where u is
        the share of a direction that the other model lacks, 1 - ν held to [0, 1], and 0 where ν is unknown. NaN for a
        latent that never fired.
    """
    energy = W_dec[:, :2].detach().double().square().sum(dim=-1)
    present = torch.stack([betas[:, 0, 1] / betas[:, 0, 0], betas[:, 1, 0] / betas[:, 1, 1]], dim=1)
    missing = 1 - present.clamp(0, 1).nan_to_num(nan=1.0)
    signed = (energy * missing)[:, 1] - (energy * missing)[:, 0]
    never = betas[:, :2, :2].isnan().flatten(1).all(dim=1)
    return (signed / energy.sum(dim=1)).masked_fill(never, torch.nan)


def nu(betas: Tensor, delta_norm: Tensor) -> Tensor:
    """ν of every latent, in the role that its side of Δ_norm = 0.5 gives it.

    Args:
        betas: One target of `ScalingSums.betas`, [F, 2, M].
        delta_norm: [F], 0 base-only … 1 tuned-only.

    Returns:
        [F] float64: β_base/β_tuned along the tuned direction where Δ_norm >= 0.5, else β_tuned/β_base along the
        base direction. So 0 always means "only the model this latent leans to has it".
    """
    tuned = betas[:, 1, 0] / betas[:, 1, 1]
    base = betas[:, 0, 1] / betas[:, 0, 0]
    return torch.where(delta_norm >= 0.5, tuned, base)
