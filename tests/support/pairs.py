"""Selections for tests of kernels: ragged, with an empty token, an empty latent and a full one."""

import torch

from fastdiff.kernels.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# B, F, C, density: single, odd, ragged blocks, only one latent, everything
CASES = [(1, 1, 1, 1.0), (5, 17, 3, 0.3), (12, 64, 33, 0.1), (7, 40, 128, 0.0), (13, 9, 5, 1.0)]


def random_selection(B: int, F: int, density: float, seed: int) -> Selection:
    """About density·B·F pairs on DEVICE; none at all if the density is negative."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, F, generator=generator) < density
    if density >= 0:
        if F > 2:
            mask[:, F // 3] = True
            mask[:, F // 2] = False
        if B > 2:
            mask[B // 2] = False
    return Selection.from_flat(mask.flatten().nonzero().squeeze(1).to(DEVICE), B, F)


def fresh(selection: Selection) -> Selection:
    """The same without the cached grouping by latent."""
    return Selection(selection.crow, selection.col, selection.row, selection.dict_size)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers on DEVICE."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def assert_no_worse(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, tol: float) -> None:
    """The largest error is that of plain low precision, or within tol of it."""
    assert got.shape == truth.shape
    if got.numel():
        error, allowed = ((t.double() - truth).abs().max().item() for t in (got, plain))
        assert error <= allowed + tol, f"error {error}, plain {allowed}, tolerance {tol}"
