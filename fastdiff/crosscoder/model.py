"""The crosscoder: one dictionary over the activations of several models, one decoder per model.

    x̃_m  = (x_m - input_mean_m) · input_scale_m                       input space of everything below; see `inputs`
    pre_j = Σ_m ⟨x̃_m, W_enc[j, m]⟩ + b_enc[j]
    s_j   = Σ_m ‖W_dec[j, m]‖₂                                         decoder norms are free: they carry the result
            (code norm "crosscoder"; "sae": ‖W_dec[j]‖₂ over all models together; "none": 1)
    f_j   = pre_j where latent j fires, else 0
    x̂_m  = Σ_j f_j · W_dec[j, m] + b_dec[m]

When a latent fires at inference:  batchtopk  ReLU(pre_j)·s_j > threshold_j   ·   topk  among the k largest
ReLU(pre_j)·s_j   ·   jumprelu  pre_j > threshold_j   ·   relu  pre_j > 0.

Source: Lindsey et al. 2024 (crosscoders); Minder et al. 2025, arXiv:2504.02922 (BatchTopK).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.crosscoder import inputs as crosscoder_inputs
from fastdiff.crosscoder.structure import Structure
from fastdiff.kernels import ops
from fastdiff.kernels.backend import Backend
from fastdiff.kernels.selection import Selection

# every latent's threshold at the start of JumpReLU training; inputs have unit variance per dimension
_THETA_START = 0.1

CodeNorm = Literal["crosscoder", "sae", "none"]


def code_norm_of(W_dec: Tensor, kind: CodeNorm) -> Tensor:
    """S [F] of decoder rows [F, M, D], with gradient."""
    if kind == "crosscoder":
        return W_dec.norm(dim=-1).sum(dim=1)
    return W_dec.flatten(1).norm(dim=-1) if kind == "sae" else W_dec.new_ones(len(W_dec))


class Crosscoder(nn.Module):
    """Weights and inference. Training lives in `fastdiff.crosscoder.trainer`.

    Parameters: `W_enc` [F, M, D], `b_enc` [F], `W_dec` [F, M, D], `b_dec` [M, D].
    Buffers: `threshold` [F], `input_mean` [M, D], `input_scale` [M]. All float32.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        dict_size: int,
        n_models: int,
        d_model: int,
        *,
        activation: str,
        k: int,
        code_norm: CodeNorm = "crosscoder",
        inputs: str = "all",
    ):
        super().__init__()
        shape = (dict_size, n_models, d_model)
        self.activation, self.k, self.code_norm_kind, self.inputs = activation, k, code_norm, inputs
        self.W_enc = nn.Parameter(torch.zeros(shape))
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(torch.zeros(shape))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        theta = torch.full((dict_size,), _THETA_START if activation == "jumprelu" else 0.0)
        if activation == "jumprelu":
            self.threshold = nn.Parameter(theta)
        else:
            self.register_buffer("threshold", theta)
        self.register_buffer("input_mean", torch.zeros(n_models, d_model))
        self.register_buffer("input_scale", torch.ones(n_models))

    @property
    def dict_size(self) -> int:
        """F."""
        return self.W_enc.shape[0]

    def take(self, x: Tensor) -> Tensor:
        """What of stored activations [B, M_stored, D] is reconstructed, [B, M, D]; see `inputs`."""
        return crosscoder_inputs.take(x, self.inputs)

    def normalize(self, x: Tensor) -> Tensor:
        """x̃ [B, M, D] in float32 on the weights' device, from stored activations [B, M_stored, D] of any float type."""
        return (self.take(x).to(self.input_mean) - self.input_mean) * self.input_scale[:, None]

    def denormalize(self, x: Tensor) -> Tensor:
        """What `take` gave, in the models' own units, from x̃ [B, M, D]."""
        return x / self.input_scale[:, None] + self.input_mean

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations [B, F] of x̃ [B, M, D], without gradient."""
        return ops.encoder_scores(x.flatten(1), self.W_enc.flatten(1), self.b_enc)

    def code_norm(self) -> Tensor:
        """S [F]."""
        return code_norm_of(self.W_dec, self.code_norm_kind)

    def select(self, pre: Tensor) -> Selection:
        """Which latents fire at inference, from pre-activations [B, F]."""
        if self.activation == "jumprelu":
            return ops.above(pre, self.threshold)
        if self.activation == "relu":
            return ops.above(pre, torch.zeros_like(self.threshold))
        if self.activation == "topk":
            return ops.topk(pre, self.k, scale=self.code_norm())
        return ops.above(pre.relu() * self.code_norm(), self.threshold)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Selection]:
        """Activations at inference.

        Args:
            x: x̃ from `normalize`, [B, M, D].

        Returns:
            f of the latents that fire, [nnz], and which they are.
        """
        pre = self.pre_activations(x)
        selection = self.select(pre)
        return pre[selection.row, selection.col], selection

    def decode(self, values: Tensor, selection: Selection, backend: Backend = "auto") -> Tensor:
        """x̂ [B, M, D] from activations [nnz] of the latents that fire."""
        out = ops.sparse_decode(values, selection, self.W_dec.flatten(1), backend=backend)
        return out.view(-1, *self.b_dec.shape) + self.b_dec

    @torch.no_grad()
    def initialize(self, first_batch: Tensor, *, init: str, seed: int, structure: Structure | None = None) -> None:
        """Set the weights before the first step.

        Encoder rows are uniform in direction of a cube, each of norm 1 per model; the decoder starts as their
        copy (tied); b_dec is the geometric median of the first batch, per model.

        Args:
            first_batch: x̃, [B, M, D].
            init: "independent" draws each model's directions, "shared" draws once for all models. Neither is
                always better. Planted data (two seeds, bench/planted.py): recall by class at 0.2 % is 0.65 to
                0.85 independent, 0.90 to 1.00 shared; 1.00 by latent scaling with both. Demo, seed 0, before
                the fused step: 14 of 14 intervals exclude zero with independent draws, 9 with one.
            seed: Of the draw.
            structure: Latents that are not free.
        """
        generator = torch.Generator().manual_seed(seed)
        F, M, D = self.W_enc.shape
        draws = 1 if init == "shared" else M
        rows = torch.rand(draws, F, D, generator=generator) * 2 - 1
        rows = (rows / rows.norm(dim=-1, keepdim=True)).transpose(0, 1).expand(F, M, D)
        self.W_enc.copy_(rows)
        self.W_dec.copy_(rows)
        if structure is not None:
            structure.impose(self.W_enc, self.W_dec)
        self.b_enc.zero_()
        for m in range(M):
            self.b_dec[m] = geometric_median(first_batch[:, m])


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the smallest summed distance to others, by Weiszfeld's algorithm.

    Args:
        points: [B, D].
        iterations: At most this many.
        tolerance: Stop once the summed distance falls by less than this share.

    Returns:
        [D].
    """
    median = points.mean(dim=0)
    last = math.inf
    for _ in range(iterations):
        distance = (points - median).norm(dim=1).clamp(min=1e-8)
        total = float(distance.sum())
        if last - total < tolerance * total:
            break
        last = total
        weight = 1 / distance
        median = (points * weight[:, None]).sum(dim=0) / weight.sum()
    return median
