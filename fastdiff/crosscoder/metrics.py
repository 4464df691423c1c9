"""How good a crosscoder is on rows it may not have seen."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError


@dataclass(frozen=True)
class Quality:
    """Whole-set figures at inference."""

    n_rows: int
    fve: list[float]  # per model, 1 - Σ‖e‖² / Σ‖x̃ - mean‖²
    fve_pooled: float
    l0_mean: float
    dead_fraction: float  # share of latents that fired on none of the rows


def evaluate(crosscoder: Crosscoder, batches: Iterable[Tensor]) -> Quality:
    """Measure a crosscoder.

    Args:
        crosscoder: With its inference threshold.
        batches: Stored activations, [B, M, D] each.

    Returns:
        Quality; FVE is a ratio of sums over all rows in float64, not a mean of batches. NaN on no rows.

    Raises:
        InputError: A row holds NaN or infinity.
    """
    M, D = crosscoder.b_dec.shape
    n, active = 0, 0
    total, squares, errors = torch.zeros(M, D).double(), torch.zeros(M).double(), torch.zeros(M).double()
    fired = torch.zeros(crosscoder.dict_size, dtype=torch.bool)
    for batch in batches:
        x = crosscoder.normalize(batch)
        if not bool(torch.isfinite(x).all()):
            raise InputError("an activation to evaluate on is NaN or infinite; extract the store again")
        values, selection = crosscoder.encode(x)
        with torch.no_grad():
            error = (x - crosscoder.decode(values, selection)).double().cpu()
        x = x.double().cpu()
        n += len(x)
        total += x.sum(dim=0)
        squares += x.square().sum(dim=(0, 2))
        errors += error.square().sum(dim=(0, 2))
        active += len(values)
        fired[selection.col.cpu()] = True
    nan = float("nan")
    if n == 0:
        return Quality(0, [nan] * M, nan, nan, nan)
    spread = squares - total.square().sum(dim=1) / n
    return Quality(
        n_rows=n,
        fve=(1 - errors / spread).tolist(),
        fve_pooled=float(1 - errors.sum() / spread.sum()),
        l0_mean=active / n,
        dead_fraction=float((~fired).double().mean()),
    )
