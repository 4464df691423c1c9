"""JumpReLU and the L0 step against their formulas, entry by entry."""

import pytest
import torch
from pairs import DEVICE, assert_no_worse, randn

from fastdiff.kernels import jumprelu, ops

pytestmark = pytest.mark.gpu

Z = torch.tensor([-0.2, 0.1, 0.31, 0.49, 0.5, 0.51, 0.69, 0.71, 3.0], dtype=torch.float64, device=DEVICE)
THETA, WIDTH = 0.5, 0.4  # the window is (0.3, 0.7)
FIRES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64, device=DEVICE)
IN_WINDOW = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64, device=DEVICE)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton", "dense"])


@BACKENDS
def test_jumprelu_values_and_straight_through_gradients(backend):
    z, theta = Z.clone().requires_grad_(), torch.full_like(Z, THETA, requires_grad=True)
    d_f = torch.arange(1.0, 10.0, dtype=torch.float64, device=DEVICE)
    f = ops.jumprelu(z, theta, WIDTH, backend=backend)
    d_z, d_theta = torch.autograd.grad(f, (z, theta), d_f)
    torch.testing.assert_close(f, Z * FIRES)
    torch.testing.assert_close(d_z, d_f * FIRES)
    torch.testing.assert_close(d_theta, -d_f * THETA / WIDTH * IN_WINDOW)


@BACKENDS
def test_step_counts_and_moves_only_the_threshold(backend):
    z, theta = Z.clone().requires_grad_(), torch.full_like(Z, THETA, requires_grad=True)
    l0 = ops.step(z, theta, WIDTH, backend=backend).sum()
    d_z, d_theta = torch.autograd.grad(l0, (z, theta), allow_unused=True)
    assert l0.item() == 4.0
    assert d_z is None or not bool(d_z.any())
    torch.testing.assert_close(d_theta, -IN_WINDOW / WIDTH)


@BACKENDS
def test_nothing_selected(backend):
    z, theta = Z[:0].clone().requires_grad_(), Z[:0].clone().requires_grad_()
    out = ops.jumprelu(z, theta, WIDTH, backend=backend).sum() + ops.step(z, theta, WIDTH, backend=backend).sum()
    out.backward()
    assert len(z.grad) == len(theta.grad) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_rounds_no_worse_than_torch(dtype):
    n = 1030  # a block and a bit
    theta = randn(n, seed=1, dtype=dtype).abs()
    z, d_out = theta + randn(n, seed=2, dtype=dtype) / 4, randn(n, seed=3, dtype=dtype)
    z64, theta64, d64 = z.double(), theta.double(), d_out.double()
    # where the window ends is decided in float32 by the kernel and in dtype by torch
    clear = ((z64 - theta64).abs() - 0.125).abs() > 0.01
    truth = jumprelu.jumprelu_backward(d64, z64, theta64, 0.25, "torch")
    got = jumprelu.jumprelu_backward(d_out, z, theta, 0.25, "triton")
    plain = jumprelu.jumprelu_backward(d_out, z, theta, 0.25, "torch")
    assert 100 < int((truth[1] != 0).sum()) < 900
    for mine, simple, true in zip(got, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine[clear], simple[clear], true[clear], tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend):
    z, theta = Z.clone().requires_grad_(), torch.full_like(Z, THETA, requires_grad=True)

    def loss(z, theta):
        f = ops.jumprelu(z, theta, WIDTH, backend=backend)
        return f.square().sum() + ops.step(z, theta, WIDTH, backend=backend).sum()

    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(z, theta), (z, theta))
    for one, other in zip(got, torch.autograd.grad(loss(z, theta), (z, theta)), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"\(9,\) and \(8,\)"):
        ops.jumprelu(Z, Z[:8], WIDTH)
    with pytest.raises(ValueError, match=r"above 0, got 0\.0"):
        ops.step(Z, Z, 0.0)
