"""JumpReLU and the L0 step on selected entries, with straight-through gradients for the threshold.

    f = z · 1[z > θ]       ∂f/∂z = 1[z > θ]       ∂f/∂θ = -(θ/ε) · 1[|z - θ| < ε/2]
    l = 1[z > θ]           ∂l/∂z = 0              ∂l/∂θ = -(1/ε) · 1[|z - θ| < ε/2]

The window is taken on the pre-activation z, so entries just below θ, which do not fire, must be among the
selected ones: select z > θ - ε/2.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435, equations 11 and 12.
"""

import torch
from torch import Tensor


class JumpReLU(torch.autograd.Function):
    """Activations [nnz] from pre-activations [nnz] and their latents' thresholds [nnz]."""

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(ctx, d_f: Tensor):
        z, theta = ctx.saved_tensors
        in_window = (z - theta).abs() < ctx.bandwidth / 2
        return d_f * (z > theta), -d_f * theta / ctx.bandwidth * in_window, None


class Step(torch.autograd.Function):
    """1 where z > θ, else 0; only θ gets a gradient."""

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, d_l: Tensor):
        z, theta = ctx.saved_tensors
        in_window = (z - theta).abs() < ctx.bandwidth / 2
        return None, -d_l / ctx.bandwidth * in_window, None
