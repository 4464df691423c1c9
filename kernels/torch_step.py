"""The fused training step in plain torch; see `step` for the formulas. What `fastdiff train` runs on a CPU.

One dense product (the encoder's); everything else touches selected pairs only, as sums of gathered rows. Buffers of
B·F and N·C numbers are allocated once: fresh pages cost more than the arithmetic (26 ms instead of 4 for one pass over
2048 x 4096 scores on two cores).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastdiff.kernels.batchtopk import batchtopk
from fastdiff.kernels.dots import dots_torch
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.step import Figures, NotFinite, StepRates, StepSettings, StepTensors, check_batch
from fastdiff.kernels.topk import topk
from fastdiff.kernels.weighted_rows import weighted_rows_torch

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class _Forward(NamedTuple):
    """What the backward pass needs of a micro-batch."""

    pairs: Selection
    values: Tensor  # f, [nnz]
    delta: Tensor  # gradient of the pre-activations, [nnz]
    error: Tensor  # ‖r_bm‖, [B, M]
    lowest: Tensor  # smallest selected score, infinity where nothing is selected


class TorchStep:
    """Runs steps on `tensors`; synchronous, so that a number is known not to be finite before anything is written."""

    def __init__(self, settings: StepSettings, tensors: StepTensors):
        if settings.moments != "float32":
            raise ValueError(f"moments={settings.moments!r} needs the triton backend; torch keeps them in float32")
        tensors.check(settings)
        self.settings, self.tensors = settings, tensors
        self._bad: NotFinite | None = None
        F, M, D = tensors.shape
        like, n = tensors.W_enc, settings.max_tokens
        self._x, self._residual, self._weighted = (like.new_empty(n, M * D) for _ in range(3))
        self._scores = like.new_empty(settings.n_tokens, F)
        self._low = None
        if settings.precision == "bfloat16":
            self._low = (
                like.new_empty(settings.n_tokens, F, dtype=torch.bfloat16),
                like.new_empty(F, M * D, dtype=torch.bfloat16),
            )
        self._figures = self._no_figures()

    @torch.no_grad()
    def step(self, batch: Tensor, rates: StepRates) -> None:
        """One update on stored activations [N, M, D]; none once a number was not finite.

        Raises:
            ValueError: The batch does not fit.
        """
        s, t = self.settings, self.tensors
        check_batch(batch, rates, s, t)
        if self._bad is not None:
            return
        n = len(batch)
        _, M, D = t.shape
        x = self._x[:n]
        torch.mul(batch.to(t.input_mean) - t.input_mean, t.input_scale[:, None], out=x.view(n, M, D))
        if self._low is not None:
            self._low[1].copy_(t.W_enc.flatten(1))
        code_norm = t.W_dec.norm(dim=-1).sum(dim=1)
        micro = [slice(at, min(n, at + s.n_tokens)) for at in range(0, n, s.n_tokens)]
        parts = [self._forward(at, n, code_norm, rates) for at in micro]
        if self._bad is not None:
            return
        pairs = _join([part.pairs for part in parts])
        gradients = self._gradients(pairs, parts, n)
        fired = pairs.by_latent.start.diff() > 0
        since = torch.where(fired, 0, t.tokens_since_fired + n)
        dead = (since >= s.dead_tokens).nonzero().squeeze(1)
        aux_loss = 0.0
        if s.auxk_coef > 0 and len(dead) and D // 2:
            aux_loss = sum(self._auxk(at, n, code_norm, dead, gradients) for at in micro)
        self._update(gradients, rates)
        if self._bad is not None:
            return
        t.tokens_since_fired.copy_(since)
        lowest = torch.stack([part.lowest for part in parts])
        lowest = lowest[lowest.isfinite()]
        if s.selection == "batchtopk" and len(lowest):
            t.threshold.mul_(rates.threshold_memory).add_((1 - rates.threshold_memory) * lowest.mean())
        self._count(x, torch.cat([part.error for part in parts]), len(pairs.col), len(dead), aux_loss)

    def figures(self) -> Figures:
        """Sums since the last call."""
        figures, self._figures = self._figures, self._no_figures()
        return figures

    def not_finite(self) -> NotFinite | None:
        """The step that was not made because a number was not finite, if there was one."""
        return self._bad

    def wait(self) -> None:
        """Nothing to wait for."""

    def state(self) -> dict[str, Tensor]:
        """Nothing is carried to the next step besides `tensors`."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""

    def _forward(self, at: slice, n: int, code_norm: Tensor, rates: StepRates) -> _Forward:
        """Selection, reconstruction, loss and the gradient of the pre-activations of one micro-batch of n tokens."""
        s, t = self.settings, self.tensors
        _, M, D = t.shape
        x, residual, weighted = self._x[at], self._residual[at], self._weighted[at]
        W_dec = t.W_dec.flatten(1)
        pre = self._pre_activations(x)
        pairs, values, lowest = self._select(x, pre, code_norm, rates.k)
        reconstruction = _sums(pairs.col, W_dec, pairs.crow, values)
        torch.sub(reconstruction, x, out=residual)
        residual += t.b_dec.view(-1)
        error = torch.linalg.vector_norm(residual.view(-1, M, D), dim=-1)
        # a sum is finite only if all it adds up is, and costs one pass
        finite = error.isfinite().all(dim=1) & pre.sum(dim=1).isfinite()
        if not bool(finite.all()):
            self._bad = self._bad or NotFinite(rates.number, at.start + int((~finite).nonzero()[0]))
        if s.loss == "l2norm":
            c = torch.where(error > 0, 1 / (n * M * error), 0.0)
        else:
            c = torch.full_like(error, 2 / (n * M * D))
        torch.mul(residual.view(-1, M, D), c[:, :, None], out=weighted.view(-1, M, D))
        delta = _dots(pairs, weighted, W_dec).mul_(values > 0)
        return _Forward(pairs, values, delta, error, lowest)

    def _pre_activations(self, x: Tensor) -> Tensor:
        t = self.tensors
        if self._low is None:
            return torch.addmm(t.b_enc, x, t.W_enc.flatten(1).T, out=self._scores[: len(x)])
        scores, W_enc = self._low
        low = torch.bfloat16
        return torch.addmm(t.b_enc.to(low), x.to(low), W_enc.T, out=scores[: len(x)])

    def _select(self, x: Tensor, pre: Tensor, code_norm: Tensor, k: int) -> tuple[Selection, Tensor, Tensor]:
        """The pairs of one micro-batch, their activations, and the smallest selected score."""
        t = self.tensors
        if self._low is None:
            pairs, lowest = self._largest(pre, k, code_norm)
            return pairs, pre[pairs.row, pairs.col], lowest
        # scores of 8 bits only propose: of a quarter more pairs than are wanted, float32 picks
        proposed, nothing = self._largest(pre, min(len(code_norm), k + -(-k // 4)), code_norm)
        values = _dots(proposed, x, t.W_enc.flatten(1)) + t.b_enc[proposed.col]
        if not len(values):
            return proposed, values, nothing
        picked, lowest = self._pick(proposed, values * code_norm[proposed.col], k)
        flat = proposed.row[picked] * proposed.dict_size + proposed.col[picked]
        return Selection.from_flat(flat, len(x), proposed.dict_size), values[picked], lowest

    def _largest(self, score: Tensor, k: int, scale: Tensor | None) -> tuple[Selection, Tensor]:
        if self.settings.selection == "batchtopk":
            return batchtopk(score, k, scale)
        return topk(score, k, scale), self._scores.new_full((), torch.inf)

    def _pick(self, proposed: Selection, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Ascending places of the proposed pairs with the largest of these scores [nnz], and the smallest of those."""
        if self.settings.selection == "batchtopk":
            picked, lowest = self._largest(score[None], min(len(score), proposed.n_tokens * k), None)
            return picked.col, lowest
        counts = proposed.crow.diff()
        place = proposed.crow[:-1, None] + torch.arange(int(counts.max()), device=counts.device)
        table = torch.where(place < proposed.crow[1:, None], score[place.clamp(max=len(score) - 1)], -1.0)
        picked, lowest = self._largest(table, min(k, table.shape[1]), None)
        return place[picked.row, picked.col], lowest

    def _gradients(self, pairs: Selection, parts: list[_Forward], n: int) -> dict[str, Tensor]:
        """Of the reconstruction loss, [F, C] and so on."""
        by, weighted = pairs.by_latent, self._weighted[:n]
        values = torch.cat([part.values for part in parts])[by.order]
        delta = torch.cat([part.delta for part in parts])[by.order]
        return {
            "W_enc": _sums(by.row, self._x[:n], by.start, delta),
            "b_enc": _sums(torch.zeros_like(by.row), delta.new_ones(1, 1), by.start, delta).squeeze(1),
            "W_dec": _sums(by.row, weighted, by.start, values),
            "b_dec": weighted.sum(dim=0),
        }

    def _auxk(self, at: slice, n: int, code_norm: Tensor, dead: Tensor, gradients: dict[str, Tensor]) -> float:
        """Add AuxK's gradients of one micro-batch; its share of the loss."""
        s, t = self.settings, self.tensors
        x, residual = self._x[at], self._residual[at]
        B, d_model = len(x), t.shape[2]
        spread = float(residual.double().square().sum() / B - (residual.double().sum(dim=0) / B).square().sum())
        if B == 1 or spread <= 0:
            return 0.0
        W_dec = t.W_dec[dead].flatten(1)
        f = torch.addmm(t.b_enc[dead], x, t.W_enc[dead].flatten(1).T).relu_()
        if len(dead) > d_model // 2:
            chosen = (f * code_norm[dead]).topk(d_model // 2, dim=1, sorted=False).indices
            f = f * torch.zeros_like(f).scatter_(1, chosen, 1.0)
        miss = torch.addmm(residual, f, W_dec)
        u = miss * (2 * s.auxk_coef / (n * spread))
        d_pre = (u @ W_dec.T) * (f > 0)
        gradients["W_dec"].index_add_(0, dead, f.T @ u)
        gradients["W_enc"].index_add_(0, dead, d_pre.T @ x)
        gradients["b_enc"].index_add_(0, dead, d_pre.sum(dim=0))
        return s.auxk_coef * float(miss.double().square().sum()) / (n * spread)

    def _update(self, gradients: dict[str, Tensor], rates: StepRates) -> None:
        s, t = self.settings, self.tensors
        norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]).norm()
        if not bool(norm.isfinite()):
            self._bad = NotFinite(rates.number, None)
            return
        if s.clip > 0:
            known = norm if s.clip_mode == "exact" or rates.number == 0 else t.gradient_norm
            scale = float((s.clip / (known + 1e-6)).clamp(max=1))
            if scale < 1:
                for gradient in gradients.values():
                    gradient.mul_(scale)
        t.gradient_norm.copy_(norm)
        parameters = [getattr(t, name) for name in _NAMES]
        adam(
            parameters,
            [gradients[name].view_as(p) for name, p in zip(_NAMES, parameters, strict=True)],
            [t.moments[name][0] for name in _NAMES],
            [t.moments[name][1] for name in _NAMES],
            [],
            [torch.full((), float(rates.number), device=p.device) for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=s.betas[0],
            beta2=s.betas[1],
            lr=rates.lr,
            weight_decay=0.0,
            eps=s.eps,
            maximize=False,
        )

    def _no_figures(self) -> Figures:
        zeros = torch.zeros(self.tensors.shape[1], dtype=torch.float64)
        return Figures(0, 0, 0.0, zeros, zeros, 0, 0)

    def _count(self, x: Tensor, error: Tensor, n_active: int, n_dead: int, aux_loss: float) -> None:
        old, n = self._figures, len(x)
        _, M, D = self.tensors.shape
        squared = error.double().square().sum(dim=0).cpu()
        x = x.view(n, M, D)
        spread = (x - x.mean(dim=0)).double().square().sum(dim=(0, 2)).cpu()
        loss = (
            float(error.double().sum()) / (n * M)
            if self.settings.loss == "l2norm"
            else float(squared.sum()) / x.numel()
        )
        self._figures = Figures(
            n_steps=old.n_steps + 1,
            n_tokens=old.n_tokens + n,
            loss=old.loss + loss + aux_loss,
            squared_error=old.squared_error + squared,
            spread=old.spread + spread,
            n_active=old.n_active + n_active,
            n_dead=n_dead,
        )


def _join(parts: list[Selection]) -> Selection:
    """The pairs of consecutive micro-batches as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    crow, row, tokens, pairs = [parts[0].crow[:1]], [], 0, 0
    for part in parts:
        crow.append(part.crow[1:] + pairs)
        row.append(part.row + tokens)
        tokens, pairs = tokens + part.n_tokens, pairs + len(part.col)
    return Selection(torch.cat(crow), torch.cat([p.col for p in parts]), torch.cat(row), parts[0].dict_size)


# what `ops` wraps for autograd and torch.compile, which costs 50 µs a call and 2 s at the first
def _sums(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    return weighted_rows_torch(index, rows, start, weight, rows.dtype)


def _dots(pairs: Selection, left: Tensor, right: Tensor) -> Tensor:
    return dots_torch(pairs.crow, pairs.col, left, right, left.dtype)
