"""AuxK's gradient rows against autograd on the definition: unused places, chunks, micro-batches, bfloat16."""

import pytest
import torch

from fastdiff.kernels import auxk
from fastdiff.kernels.auxk import DeadLatents
from fastdiff.kernels.reference import auxk_loss

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, M, D, F, COEF = 9, 2, 7, 30, 1 / 32
C = M * D


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


class Case:
    """Weights, one or more micro-batches, and what autograd makes of them."""

    def __init__(self, n_dead: int, n_micro: int = 1, n_valid: int = B):
        self.dead = torch.zeros(F, dtype=torch.bool, device=DEVICE)
        self.dead[torch.randperm(F, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
        self.W_enc, self.W_dec, self.b_enc = random(F, C, seed=1) / 3, random(F, C, seed=2), random(F, seed=4) / 5
        self.x = random(n_micro, B, C, seed=5)
        self.residual = random(n_micro, B, C, seed=6) + 0.3
        self.valid = [B] * (n_micro - 1) + [n_valid]
        self.x[-1, n_valid:] = self.residual[-1, n_valid:] = 0
        self.code_norm = self.W_dec.view(F, M, D).norm(dim=-1).sum(dim=1)
        self.total = sum(self.valid)

    def wanted(self, dtype: torch.dtype, k: int) -> tuple[list[torch.Tensor], float]:
        """Gradients [F, C], [F, C], [F] of the loss in float64, from numbers rounded to `dtype`."""
        W_enc, W_dec, x, residual = (t.to(dtype).double() for t in (self.W_enc, self.W_dec, self.x, self.residual))
        weights = [t.requires_grad_() for t in (W_dec, W_enc, self.b_enc.float().double())]
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for i, n in enumerate(self.valid):
            part = auxk_loss(-residual[i, :n], x[i, :n], *weights, self.code_norm.float().double(), self.dead, k)
            loss = loss + COEF * part * n / self.total
        if not loss.requires_grad:
            return [torch.zeros_like(w) for w in weights], 0.0
        return list(torch.autograd.grad(loss, weights)), loss.item()

    def got(self, dtype: torch.dtype, places: int, k: int, with_scores: bool) -> tuple[list[torch.Tensor], float]:
        lists = DeadLatents.allocate(places, B, F, C, dtype, torch.device(DEVICE))
        W_enc, W_dec, x, residual = (t.to(dtype) for t in (self.W_enc, self.W_dec, self.x, self.residual))
        lists.collect(self.dead, W_dec)
        loss = 0.0
        for i, n in enumerate(self.valid):
            r = residual[i, :n].double()
            spread = r.square().sum() / n - (r.sum(dim=0) / n).square().sum()
            loss += lists.add_gradients(
                x[i],
                residual[i],
                x[i].float() @ W_enc.float().T if with_scores else None,
                W_enc,
                self.b_enc.float(),
                self.code_norm.float(),
                spread=spread,
                n_valid=torch.tensor(n, device=DEVICE),
                n_total=torch.tensor(self.total, device=DEVICE),
                coef=COEF,
                k=k,
            ).item()
        index = lists.rows.place.long()
        assert torch.equal(index >= 0, self.dead)
        full = [torch.zeros(F, *rows.shape[1:], dtype=torch.float64, device=DEVICE) for rows in lists.rows[1:]]
        for whole, rows in zip(full, lists.rows[1:], strict=True):
            whole[self.dead] = rows[index[self.dead]].double()
            unused = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
            unused[index[self.dead]] = False
            assert not rows[unused].any(), "unused places must not gather gradient"
        return full, loss


@pytest.mark.parametrize(("n_dead", "places"), [(0, 4), (1, 1), (3, 8), (13, 13), (20, 24), (30, 30)])
@pytest.mark.parametrize("with_scores", [True, False])
def test_rows_are_the_gradient(n_dead, places, with_scores):
    case, k = Case(n_dead, n_valid=B - 2), D // 2
    (wanted, loss), (got, got_loss) = case.wanted(torch.float32, k), case.got(torch.float32, places, k, with_scores)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_several_micro_batches_add_up(monkeypatch):
    monkeypatch.setattr(auxk, "_CHUNK", 40)  # two tokens at a time
    case, k = Case(12, n_micro=3, n_valid=4), 3
    (wanted, loss), (got, got_loss) = case.wanted(torch.float32, k), case.got(torch.float32, 16, k, False)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bfloat16_products_are_off_by_their_rounding_only():
    case, k = Case(12), 40  # all of the dead: which are largest must not depend on the rounding
    (wanted, loss), (got, got_loss) = case.wanted(torch.bfloat16, k), case.got(torch.bfloat16, 16, k, True)
    assert got_loss == pytest.approx(loss, rel=0.02)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def test_one_residual_for_all_tokens_gives_no_gradient():
    case = Case(5)
    case.residual[:] = case.residual[0, 0].float().double()
    lists = DeadLatents.allocate(8, B, F, C, torch.float32, torch.device(DEVICE))
    lists.collect(case.dead, case.W_dec.float())
    loss = lists.add_gradients(
        case.x[0].float(),
        case.residual[0].float(),
        None,
        case.W_enc.float(),
        case.b_enc.float(),
        case.code_norm.float(),
        spread=torch.zeros((), dtype=torch.float64, device=DEVICE),
        n_valid=torch.tensor(B, device=DEVICE),
        n_total=torch.tensor(B, device=DEVICE),
        coef=COEF,
        k=3,
    )
    assert loss.item() == 0
    assert not any(rows.any() for rows in lists.rows[1:])
