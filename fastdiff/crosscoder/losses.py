"""Training objectives as pure functions of tensors.

    loss = reconstruction [+ prefixes] [+ differences] [+ more latents] + coefficient · (AuxK | L1 | L0 | tanh)

B tokens, M models, D width, F latents; errors e = x̃ - x̂ are [B, M, D]. s [F] is the code norm (`model.code_norm_of`).
Means over tokens and sums over latents are linear in the tokens, so a batch in parts of B_i of B tokens has the loss
Σ_i B_i/B · loss_i; `l0_target` and `auxk` are not, see there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# where the penalty of L0 turns from a square into a line
_L0_REACH = 1 / 16


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


def difference(error: Tensor, kind: str) -> Tensor:
    """How far the differences between each model and the first are off: `reconstruction` of e_m - e_0, m > 0.

    Since (x̃_m - x̃_0) - (x̂_m - x̂_0) = e_m - e_0, what both models get wrong alike costs nothing here.

    Args:
        error: [B, M, D], M at least 2.
        kind: As in `reconstruction`.

    Returns:
        [].

    Source:
        Delta-crosscoder, arXiv:2603.04426, in the form of its public re-implementations (mse).
    """
    return reconstruction(error[:, 1:] - error[:, :1], kind)


def prefixes(errors: Sequence[Tensor], kind: str) -> Tensor:
    """Matryoshka: mean of `reconstruction` over the errors [B, M, D] that the first latents make alone and all make.

    Source:
        Bussmann et al. 2025, arXiv:2503.17547, with equal weights.
    """
    return torch.stack([reconstruction(error, kind) for error in errors]).mean()


def auxk(error: Tensor, pre: Tensor, W_dec: Tensor, code_norm: Tensor, k_aux: int) -> Tensor:
    """How well the dead latents explain what the living ones leave over.

        L_aux = mean_b ‖ē_b - ê_b‖² / mean_b ‖ē_b - mean_b ē‖²,   ē = e without gradient, models concatenated
        ê_b   = Σ over the k_aux dead latents with the largest ReLU(pre)·s of  ReLU(pre_j) · W_dec[j]

    Args:
        error: e, [B, M, D].
        pre: Pre-activations of the dead latents, [B, n_dead], with gradient.
        W_dec: Their decoder rows, [n_dead, M, D], with gradient.
        code_norm: Their s, [n_dead].
        k_aux: Dead latents per token, in [1, n_dead].

    Returns:
        []; 0 where the error does not vary.

    Source:
        Gao et al. 2024, arXiv:2406.04093, section A.2; crosscoder form in Minder et al. 2025.
    """
    target = error.detach().flatten(1)
    f = pre.relu()
    if k_aux < pre.shape[1]:
        score = (f * code_norm).detach()
        chosen = score.topk(k_aux, dim=1, sorted=False).indices
        f = f * torch.zeros_like(f).scatter_(1, chosen, 1.0)
    miss = (target - f @ W_dec.flatten(1)).square().sum(dim=1).mean()
    spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
    # 0/0 would be NaN in the backward pass even where its value is replaced
    return torch.where(spread > 0, miss / torch.where(spread > 0, spread, 1.0), torch.zeros_like(miss))


def l1(values: Tensor, latents: Tensor, penalty: Tensor, n_tokens: int) -> Tensor:
    """Mean over tokens of Σ_j f_j · s_j · w_j, the penalty that makes a latent of one model cheap.

    Args:
        values: f of the active pairs, [nnz].
        latents: Their latents, [nnz].
        penalty: s · w, [F], with gradient; w is 1, or less for designated shared latents.
        n_tokens: B.

    Returns:
        [].

    Source:
        Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"; w: Anthropic, February
        2025, "Insights on Crosscoder Model Diffing".
    """
    return (values * penalty[latents]).sum() / n_tokens


def tanh_penalty(
    values: Tensor, latents: Tensor, code_norm: Tensor, weight: Tensor, n_tokens: int, scale: float
) -> Tensor:
    """An L0 that strong activations do not pay more for: mean over tokens of Σ_j w_j · tanh(c · f_j · s_j).

    Args:
        values: f of the active pairs, [nnz].
        latents: Their latents, [nnz].
        code_norm: s, [F], with gradient.
        weight: w, [F]; 1, or less for designated shared latents.
        n_tokens: B.
        scale: c.

    Returns:
        [].

    Source:
        Anthropic, January 2025, "Dictionary Learning Optimization Techniques", c = 4.
    """
    return (weight[latents] * torch.tanh(scale * values * code_norm[latents])).sum() / n_tokens


def pre_activation(pre: Tensor, threshold: Tensor, code_norm: Tensor) -> Tensor:
    """Mean over tokens of Σ_j ReLU(θ_j - pre_j) · s_j, which pulls silent latents back.

    On pre-activations: fed with activations after JumpReLU, as in published code, dead latents get no gradient.

    Args:
        pre: Pre-activations of all pairs, [B, F], with gradient.
        threshold: θ, [F], with gradient.
        code_norm: s, [F], with gradient.

    Returns:
        [].

    Source:
        Anthropic, January 2025, "Dictionary Learning Optimization Techniques", weight 3e-6.
    """
    return ((threshold - pre).relu() @ code_norm).mean()


def l0_target(l0: Tensor, target: float) -> Tensor:
    """How far L0 is off, zero at the wanted number of active latents per token.

        r²            where |r| ≤ δ = 1/16,     r = L0 / target - 1
        δ(2|r| - δ)   beyond

    Its slope is at most 2δ. Training starts with L0 many times too large, where the slope of r² alone would silence
    latents for good: on planted data a weight that brought L0 within 5 % left half of them dead, and 2 % this way.

    Its gradient depends on L0 of the whole batch: a part of one hands in its own share plus the others' as a constant.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435, section 6, has r² everywhere.
    """
    # half of r² is what torch has
    return 2 * torch.nn.functional.huber_loss(l0 / target, torch.ones_like(l0), reduction="none", delta=_L0_REACH)
