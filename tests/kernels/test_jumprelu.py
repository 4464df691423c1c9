"""JumpReLU and the L0 step against their formulas, entry by entry."""

import torch

from fastdiff.kernels import ops

Z = torch.tensor([-0.2, 0.1, 0.31, 0.49, 0.5, 0.51, 0.69, 0.71, 3.0], dtype=torch.float64)
THETA, WIDTH = 0.5, 0.4  # the window is (0.3, 0.7)
FIRES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
IN_WINDOW = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)


def test_jumprelu_values_and_straight_through_gradients():
    z, theta = Z.clone().requires_grad_(), torch.full_like(Z, THETA, requires_grad=True)
    d_f = torch.arange(1.0, 10.0, dtype=torch.float64)
    f = ops.jumprelu(z, theta, WIDTH)
    d_z, d_theta = torch.autograd.grad(f, (z, theta), d_f)
    torch.testing.assert_close(f, Z * FIRES)
    torch.testing.assert_close(d_z, d_f * FIRES)
    torch.testing.assert_close(d_theta, -d_f * THETA / WIDTH * IN_WINDOW)


def test_step_counts_and_moves_only_the_threshold():
    z, theta = Z.clone().requires_grad_(), torch.full_like(Z, THETA, requires_grad=True)
    l0 = ops.step(z, theta, WIDTH).sum()
    d_z, d_theta = torch.autograd.grad(l0, (z, theta), allow_unused=True)
    assert l0.item() == 4.0
    assert d_z is None
    torch.testing.assert_close(d_theta, -IN_WINDOW / WIDTH)
