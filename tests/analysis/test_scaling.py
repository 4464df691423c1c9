"""Latent scaling against its definition: a dense least-squares fit per latent, direction, model and target."""

import math

import pytest
import torch

from fastdiff.analysis.classes import delta_norm
from fastdiff.analysis.scaling import TARGETS, ScalingSums, nu, unmatched_energy
from fastdiff.crosscoder.model import Crosscoder


def random_crosscoder(seed: int, activation: str, F=24, D=7) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)
    c = Crosscoder(F, 2, D, activation=activation, k=4)
    with torch.no_grad():
        for parameter in (c.W_enc, c.b_enc, c.W_dec, c.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        c.b_enc[3] = -1e6  # never fires
        c.W_dec[5, 0] = 0  # tuned only
        c.W_dec[6, 1] = 0  # base only
        c.threshold.copy_(torch.rand(F, generator=generator) * 2)
    return c


def brute_force(c: Crosscoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """β = argmin_β Σ‖β f d - y‖², one latent, direction, model and target at a time, dense in float64."""
    N, F = len(x), c.dict_size
    values, selection = c.encode(x)
    f = torch.zeros(N, F, dtype=torch.float64)
    f[selection.row, selection.col] = values.double()
    W, b = c.W_dec.detach().double(), c.b_dec.detach().double()
    x = x.double()
    reconstruction = torch.einsum("nf,fmd->nmd", f, W) + b
    betas = {target: torch.full((F, 2, 2), torch.nan, dtype=torch.float64) for target in TARGETS}
    for j in range(F):
        for direction in (0, 1):
            d = W[j, direction]
            design = (f[:, j, None] * d).reshape(-1, 1)
            if not bool((design != 0).any()):
                continue
            for m in (0, 1):
                without_j = reconstruction[:, m] - f[:, j, None] * W[j, m]
                targets = {
                    "error": x[:, m] - without_j,
                    "reconstruction": reconstruction[:, m],
                    "activation": x[:, m],
                }
                for name, y in targets.items():
                    betas[name][j, direction, m] = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution.item()
    return betas


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_brute_force(activation, seed):
    c = random_crosscoder(seed, activation)
    x = torch.randn(300, 2, 7, generator=torch.Generator().manual_seed(seed + 10))
    sums = ScalingSums.zeros(c.dict_size, 2)
    for batch in x.split(128):
        values, selection = c.encode(batch)
        sums.add(c.W_dec.detach().double(), c.b_dec.detach().double(), batch, values, selection)
    got, want = sums.betas(c.W_dec), brute_force(c, x)
    for target in TARGETS:
        torch.testing.assert_close(got[target], want[target], rtol=1e-6, atol=1e-9, equal_nan=True)
        assert got[target][3].isnan().all(), "a latent that never fires has no β"
        assert got[target][5, 0].isnan().all() and got[target][6, 1].isnan().all(), "nor has a zero direction"
        assert got[target].isfinite().sum() > 24


def test_a_weak_latent_beside_a_strong_one_keeps_its_beta():
    c = random_crosscoder(5, "relu")
    x = torch.randn(300, 2, 7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        c.W_enc[0] *= 1e5
        c.W_enc[1] *= 1e-6
        c.b_enc[:2] = 0
    sums = ScalingSums.zeros(c.dict_size, 2)
    values, selection = c.encode(x)
    sums.add(c.W_dec.detach().double(), c.b_dec.detach().double(), x, values, selection)
    got, want = sums.betas(c.W_dec), brute_force(c, x)
    for target in ("reconstruction", "activation"):
        torch.testing.assert_close(got[target][:2], want[target][:2], rtol=1e-6, atol=0)


def test_nu_takes_the_role_of_its_side():
    betas = torch.tensor([[[8.0, 2.0], [1.0, 4.0]]], dtype=torch.float64).repeat(3, 1, 1)
    ratio = nu(betas, torch.tensor([0.9, 0.5, 0.1]))
    torch.testing.assert_close(ratio, torch.tensor([0.25, 0.25, 0.25], dtype=torch.float64))
    other = torch.tensor([[[8.0, 4.0], [1.0, 4.0]]], dtype=torch.float64)
    assert nu(other, torch.tensor([0.9])).item() == 0.25 and nu(other, torch.tensor([0.1])).item() == 0.5


def test_rescaling_and_swapping():
    """f → c·f, W_dec → W_dec/c leaves ν and Δ_norm; swapping the models mirrors Δ_norm and keeps ν."""
    c = random_crosscoder(3, "relu")
    x = torch.randn(200, 2, 7, generator=torch.Generator().manual_seed(1))

    def measure(c, x):
        sums = ScalingSums.zeros(c.dict_size, 2)
        values, selection = c.encode(x)
        sums.add(c.W_dec.detach().double(), c.b_dec.detach().double(), x, values, selection)
        delta = delta_norm(c.W_dec)
        return delta, {t: nu(b, delta) for t, b in sums.betas(c.W_dec).items()}

    delta, ratio = measure(c, x)
    with torch.no_grad():
        c.W_enc *= 3
        c.b_enc *= 3
        c.W_dec /= 3
    delta_scaled, ratio_scaled = measure(c, x)
    torch.testing.assert_close(delta_scaled, delta, rtol=1e-5, atol=1e-6, equal_nan=True)
    with torch.no_grad():
        for parameter in (c.W_enc, c.W_dec):
            parameter.copy_(parameter.flip(1))
        c.b_dec.copy_(c.b_dec.flip(0))
    delta_swapped, ratio_swapped = measure(c, x.flip(1))
    torch.testing.assert_close(delta_swapped, 1 - delta, rtol=1e-5, atol=1e-6, equal_nan=True)
    for target in TARGETS:
        torch.testing.assert_close(ratio_scaled[target], ratio[target], rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(ratio_swapped[target], ratio[target], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_unmatched_energy_looks_both_ways():
    """Rows by hand: only tuned, only base, shared, turned by a right angle, never fired."""
    W_dec = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]],
                          [[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])  # fmt: skip
    nan = math.nan
    # [direction base: β in base, in tuned], [direction tuned: ...]
    betas = torch.tensor([[[nan, nan], [0.0, 1.0]], [[1.0, 0.0], [nan, nan]], [[1.0, 1.2], [0.9, 1.0]],
                          [[1.0, 0.0], [0.25, 1.0]], [[nan, nan], [nan, nan]]], dtype=torch.float64)  # fmt: skip
    found = unmatched_energy(betas, W_dec).tolist()
    assert found[:4] == pytest.approx([1.0, -1.0, (1 * 0.1 - 1 * 0.0) / 2, (4 * 0.75 - 1 * 1.0) / 5])
    assert math.isnan(found[4])
