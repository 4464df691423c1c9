"""JumpReLU and the L0 step on selected entries, with straight-through gradients for the threshold.

    f = z · 1[z > θ]       ∂f/∂z = 1[z > θ]       ∂f/∂θ = -(θ/ε) · 1[|z - θ| < ε/2]
    l = 1[z > θ]           ∂l/∂z = 0              ∂l/∂θ = -(1/ε) · 1[|z - θ| < ε/2]

The window is taken on the pre-activation z, so entries just below θ, which do not fire, must be among the
selected ones: select z > θ - ε/2. θ is that of each entry's latent, from `ops.at_entries`, which also adds up
its gradient.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435, equations 11 and 12.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.weighted_rows import sum_dtype

_BLOCK = 1024


@triton.jit
def _backward_kernel(
    d_out_ptr,  # [nnz]
    z_ptr,  # [nnz]
    theta_ptr,  # [nnz]
    d_z_ptr,  # [nnz], not read or written where STEP
    d_theta_ptr,  # [nnz]
    nnz,
    BANDWIDTH: tl.constexpr,  # as a constant it keeps its float64 digits
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    # one program: BLOCK entries
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = place < nnz
    d_out = tl.load(d_out_ptr + place, mask=used, other=0.0).to(SUM)
    z = tl.load(z_ptr + place, mask=used, other=0.0).to(SUM)
    theta = tl.load(theta_ptr + place, mask=used, other=0.0).to(SUM)
    slope = d_out if STEP else d_out * theta
    d_theta = tl.where(tl.abs(z - theta) < BANDWIDTH / 2, -slope / BANDWIDTH, 0.0)
    tl.store(d_theta_ptr + place, d_theta.to(d_theta_ptr.dtype.element_ty), mask=used)
    if not STEP:
        d_z = tl.where(z > theta, d_out, 0.0)
        tl.store(d_z_ptr + place, d_z.to(d_z_ptr.dtype.element_ty), mask=used)


def jumprelu_backward_into(
    d_out: Tensor, z: Tensor, theta: Tensor, d_z: Tensor | None, d_theta: Tensor, *, bandwidth: float
) -> None:
    """Launch the kernel; nothing is allocated and nothing waits for the device.

    Args:
        d_out: Gradient of the activations, or of the step's values where d_z is None, [nnz] like all others.
        z: Pre-activations.
        theta: Thresholds.
        d_z: Written; None for the step, which has no such gradient.
        d_theta: Written.
        bandwidth: ε.
    """
    nnz = len(z)
    # CUDA launches no empty grid
    _backward_kernel[(max(1, triton.cdiv(nnz, _BLOCK)),)](
        d_out,
        z,
        theta,
        d_z,
        d_theta,
        nnz,
        BANDWIDTH=bandwidth,
        STEP=d_z is None,
        BLOCK=_BLOCK,
        SUM=tl.float64 if sum_dtype(z.dtype, theta.dtype) == torch.float64 else tl.float32,
        num_warps=4,
        enable_fp_fusion=False,
    )


@torch.library.custom_op("fastdiff::jumprelu", mutates_args=())
def jumprelu(z: Tensor, theta: Tensor, bandwidth: float, backend: str) -> Tensor:
    """Activations [nnz] from pre-activations [nnz] and their latents' thresholds [nnz]."""
    return z * (z > theta)


@torch.library.custom_op("fastdiff::jumprelu_backward", mutates_args=())
def jumprelu_backward(d_f: Tensor, z: Tensor, theta: Tensor, bandwidth: float, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of z and θ, [nnz] each."""
    if backend == "torch":
        return d_f * (z > theta), (-d_f * theta / bandwidth * _in_window(z, theta, bandwidth)).to(theta.dtype)
    d_z, d_theta = torch.empty_like(z), torch.empty_like(theta)
    jumprelu_backward_into(d_f, z, theta, d_z, d_theta, bandwidth=bandwidth)
    return d_z, d_theta


@torch.library.custom_op("fastdiff::step", mutates_args=())
def step(z: Tensor, theta: Tensor, bandwidth: float, backend: str) -> Tensor:
    """1 where z > θ, else 0; only θ gets a gradient."""
    return (z > theta).to(z.dtype)


@torch.library.custom_op("fastdiff::step_backward", mutates_args=())
def step_backward(d_l: Tensor, z: Tensor, theta: Tensor, bandwidth: float, backend: str) -> Tensor:
    """Gradient of θ, [nnz]."""
    if backend == "torch":
        return (-d_l / bandwidth * _in_window(z, theta, bandwidth)).to(theta.dtype)
    d_theta = torch.empty_like(theta)
    jumprelu_backward_into(d_l, z, theta, None, d_theta, bandwidth=bandwidth)
    return d_theta


@jumprelu.register_fake
@step.register_fake
def _(z, theta, bandwidth, backend):
    return torch.empty_like(z)


@jumprelu_backward.register_fake
def _(d_f, z, theta, bandwidth, backend):
    return torch.empty_like(z), torch.empty_like(theta)


@step_backward.register_fake
def _(d_l, z, theta, bandwidth, backend):
    return torch.empty_like(theta)


def _setup(ctx, inputs, output):
    z, theta, ctx.bandwidth, ctx.backend = inputs
    ctx.save_for_backward(z, theta)


def _backward(ctx, d_f):
    z, theta = ctx.saved_tensors
    return *jumprelu_backward(d_f.contiguous(), z, theta, ctx.bandwidth, ctx.backend), None, None


def _step_backward(ctx, d_l):
    z, theta = ctx.saved_tensors
    d_theta = None
    if ctx.needs_input_grad[1]:
        d_theta = step_backward(d_l.contiguous(), z, theta, ctx.bandwidth, ctx.backend)
    return None, d_theta, None, None


def _in_window(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < bandwidth / 2


jumprelu.register_autograd(_backward, setup_context=_setup)
step.register_autograd(_step_backward, setup_context=_setup)
