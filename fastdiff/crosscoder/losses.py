"""Training objectives as pure functions of tensors.

    loss = reconstruction + coefficient · (AuxK | L1 | L0)

B tokens, M models, D width, F latents; errors e = x̃ - x̂ are [B, M, D].
"""

import torch
from torch import Tensor


def reconstruction(error: Tensor, kind: str) -> Tensor:
    """How far the reconstruction is off, averaged over tokens and models.

    Args:
        error: [B, M, D].
        kind: "l2norm": mean of ‖e_bm‖₂, not squared (Minder et al. 2025, arXiv:2504.02922). "mse": mean of
            ‖e_bm‖₂² / D.

    Returns:
        [].
    """
    if kind == "l2norm":
        return torch.linalg.vector_norm(error, dim=-1).mean()
    return error.square().mean()


def auxk(error: Tensor, pre: Tensor, W_dec: Tensor, k_aux: int) -> Tensor:
    """How well the dead latents explain what the living ones leave over.

        L_aux = mean_b ‖ē_b - ê_b‖² / mean_b ‖ē_b - mean_b ē‖²,   ē = e without gradient, models concatenated
        ê_b   = Σ over the k_aux dead latents with the largest ReLU(pre)·s of  ReLU(pre_j) · W_dec[j]

    Args:
        error: e, [B, M, D].
        pre: Pre-activations of the dead latents, [B, n_dead], with gradient.
        W_dec: Their decoder rows, [n_dead, M, D], with gradient.
        k_aux: Dead latents per token, in [1, n_dead].

    Returns:
        []; 0 where the error does not vary.

    Source:
        Gao et al. 2024, arXiv:2406.04093, section A.2; crosscoder form in Minder et al. 2025.
    """
    target = error.detach().flatten(1)
    f = pre.relu()
    if k_aux < pre.shape[1]:
        score = (f * W_dec.norm(dim=-1).sum(dim=1)).detach()
        chosen = score.topk(k_aux, dim=1, sorted=False).indices
        f = f * torch.zeros_like(f).scatter_(1, chosen, 1.0)
    miss = (target - f @ W_dec.flatten(1)).square().sum(dim=1).mean()
    spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
    # 0/0 would be NaN in the backward pass even where its value is replaced
    return torch.where(spread > 0, miss / torch.where(spread > 0, spread, 1.0), torch.zeros_like(miss))


def l1(values: Tensor, latents: Tensor, code_norm: Tensor, n_tokens: int) -> Tensor:
    """Mean over tokens of Σ_j f_j · s_j, the penalty that makes a latent of one model cheap.

    Args:
        values: f of the active pairs, [nnz].
        latents: Their latents, [nnz].
        code_norm: s, [F], with gradient.
        n_tokens: B.

    Returns:
        [].

    Source:
        Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """
    return (values * code_norm[latents]).sum() / n_tokens


def l0_target(l0: Tensor, target: float) -> Tensor:
    """(L0 / target - 1)², zero at the wanted number of active latents per token.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435, section 6.
    """
    return (l0 / target - 1).square()
