"""What a fused training step of a crosscoder takes and gives, whichever implementation runs it.

    r_b   = Σ_j f_bj · W_dec[j] + b_dec - x_b                    f from BatchTopK or TopK, x_b [M, D]
    c_bm  = 1 / (N·M·‖r_bm‖)  (l2norm; 0 where ‖r‖ = 0)   or   2 / (N·M·D)  (mse)         N tokens in the update
    δ_bj  = Σ_m c_bm ⟨r_bm, W_dec[j, m]⟩                         for selected pairs
    G_dec[j, m] = Σ_b f_bj c_bm r_bm        G_enc[j] = Σ_b δ_bj x_b
    g_b_dec     = Σ_b c_b r_b               g_b_enc[j] = Σ_b δ_bj

AuxK (Gao et al. 2024, arXiv:2406.04093, A.2; crosscoder form in Minder et al. 2025, arXiv:2504.02922), over the latents
that have not fired for `dead_tokens` tokens, those of this update included:

    V   = Σ_b ‖r_b‖² / B - ‖Σ_b r_b / B‖²                        B tokens in the micro-batch
    u_b = 2α / (N·V) · (ê_b + r_b),   ê_b = Σ f^aux_bj W_dec[j]  f^aux: the D/2 largest ReLU(pre_j)·s_j of the dead
    G_dec[j] += Σ_b f^aux_bj u_b      G_enc[j] += Σ_b ⟨u_b, W_dec[j]⟩ x_b   where f^aux_bj > 0

The gradient is clipped by its global norm, then Adam runs (`torch.optim.Adam`'s formula). An update may be made of
several micro-batches: selection and V are within each, the rest is over all of them. `torch_step` and `triton_step`
implement this; tests hold both against autograd.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSettings:
    """What does not change from step to step."""

    n_tokens: int  # B, tokens in a micro-batch
    n_micro: int  # micro-batches in an update
    k_max: int  # largest k of any step
    selection: Literal["batchtopk", "topk"]
    loss: Literal["l2norm", "mse"]
    auxk_coef: float  # α; 0 turns AuxK off
    dead_tokens: int
    clip: float  # largest gradient norm; 0 turns clipping off
    clip_mode: Literal["exact", "previous"]
    precision: Literal["float32", "bfloat16"]  # of factors: x, rows and residual on triton, the encoder's on torch
    moments: Literal["float32", "bfloat16"]
    seed: int  # of the stochastic rounding of bfloat16 moments
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def max_tokens(self) -> int:
        """Tokens in a full update."""
        return self.n_tokens * self.n_micro


class StepTensors(NamedTuple):
    """What a step changes, in place, and the input scaling it reads."""

    W_enc: Tensor  # [F, M, D] float32
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, M, D]
    b_dec: Tensor  # [M, D]
    moments: dict[str, tuple[Tensor, Tensor]]  # of each of the four, exp_avg and exp_avg_sq
    gradient_norm: Tensor  # [] float32, of the last step, before clipping; 0 before the first
    threshold: Tensor  # [F] float32, one value repeated; follows the smallest selected score under BatchTopK
    tokens_since_fired: Tensor  # [F] int64
    input_mean: Tensor  # [M, D]
    input_scale: Tensor  # [M]

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, M, D."""
        F, M, D = self.W_enc.shape
        return F, M, D

    def check(self, settings: StepSettings) -> None:
        """Refuse what a kernel would misread.

        Raises:
            ValueError: A weight or moment is not contiguous, of another shape than it should be, or on another device;
                or k is out of range.
        """
        F, M, D = self.W_enc.shape
        if not 1 <= settings.k_max <= F:
            raise ValueError(f"k must lie in [1, F={F}], got {settings.k_max}")
        shapes = {"W_enc": (F, M, D), "b_enc": (F,), "W_dec": (F, M, D), "b_dec": (M, D)}
        for name, shape in shapes.items():
            for tensor in (getattr(self, name), *self.moments[name]):
                if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != self.W_enc.device:
                    raise ValueError(
                        f"{name} and its moments must be contiguous {shape} on {self.W_enc.device}, "
                        f"got {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
                    )


class StepRates(NamedTuple):
    """What changes from step to step."""

    number: int  # t, from 0
    k: int
    lr: float
    threshold_memory: float  # the threshold becomes memory · threshold + (1 - memory) · smallest selected score


class Figures(NamedTuple):
    """Sums over the steps since they were last asked for, before each update."""

    n_steps: int
    n_tokens: int
    loss: float  # summed over steps
    squared_error: Tensor  # [M] float64, Σ‖r‖²
    spread: Tensor  # [M] float64, Σ‖x - batch mean‖²
    n_active: int
    n_dead: int  # of the last step


class NotFinite(NamedTuple):
    """Where a number was not finite; nothing was updated from that step on."""

    step: int
    token: int | None  # of the batch; None if it was the gradient


def check_batch(batch: Tensor, rates: StepRates, settings: StepSettings, tensors: StepTensors) -> None:
    """Refuse a batch [N, M, D] or a k that does not fit.

    Raises:
        ValueError: Its shape, type, device or number of tokens is wrong, or k is out of range.
    """
    _, M, D = tensors.shape
    if not 1 <= rates.k <= settings.k_max:
        raise ValueError(f"k must lie in [1, k_max={settings.k_max}], got {rates.k}")
    if batch.ndim != 3 or batch.shape[1:] != (M, D) or not 1 <= len(batch) <= settings.max_tokens:
        raise ValueError(f"a batch must be [1 to {settings.max_tokens} tokens, M={M}, D={D}], got {tuple(batch.shape)}")
    if not batch.dtype.is_floating_point or batch.dtype == torch.float64:
        raise ValueError(f"a batch must be float32, float16 or bfloat16, got {batch.dtype}")
    if batch.device != tensors.W_enc.device:
        raise ValueError(f"the batch is on {batch.device}, the weights on {tensors.W_enc.device}")
