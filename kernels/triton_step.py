"""The fused training step on Triton kernels; see `step` for the formulas. What `fastdiff train` runs on CUDA.

    normalize → encoder product → selection → decode + loss + gradient of the activations          per micro-batch
    → pairs by latent → norm of the gradient → gradient and Adam of both weights, per latent, in registers

No step waits for itself or the one before: what changes from step to step is copied to the device in one piece, what a
step measures is added up there, and every large buffer is allocated once. So a CUDA graph can replay a step: the first
after a change of shape runs eagerly (kernels compile then), the next is captured, the rest are replayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.auxk import DeadLatents
from fastdiff.kernels.batchtopk import BatchTopKWork, batchtopk_slots
from fastdiff.kernels.column_sums import column_sums, column_sums_work
from fastdiff.kernels.decode_loss import decode_loss, slices, token_gradients
from fastdiff.kernels.fused_adam import RowState, adam_rates, finish_norms, update_flat, update_rows
from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.latent_order import LatentOrder, order_by_latent
from fastdiff.kernels.matmul import matmul_into
from fastdiff.kernels.normalize import normalize
from fastdiff.kernels.row_gradients import norm_rows, row_slices
from fastdiff.kernels.slots import ALL_FINITE, Slots
from fastdiff.kernels.step import Figures, NotFinite, StepRates, StepSettings, StepTensors, check_batch
from fastdiff.kernels.topk import group_size, topk_slots, topk_slots_radix

# in `bad` when it was no token's doing but the norm of the gradient
_GRADIENT = ALL_FINITE - 1
# gradients from here on overflow float32 when Adam squares them
_LARGEST = 1e18
# steps between two looks at how many latents may die before the next one
_PLAN_EVERY = 64
# lists of dead latents have at least this many places, and a multiple of it
_DEAD_UNIT = 256


class TritonStep:
    """Runs steps on `tensors`, two ahead of the device at most.

    `wait`, `figures` and, every 64 steps, a look at how many latents may die wait for all of them.
    """

    def __init__(self, settings: StepSettings, tensors: StepTensors):
        tensors.check(settings)
        self.settings, self.tensors = settings, tensors
        F, M, D = tensors.shape
        B, A, N, C = settings.n_tokens, settings.n_micro, settings.max_tokens, M * D
        device, low = tensors.W_enc.device, getattr(torch, settings.precision)
        self._device = device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._batch: Tensor | None = None  # [N, M, D] of the type that comes
        self._x, self._residual = empty(N, C, dtype=low), empty(N, C, dtype=low)
        self._scores = empty(B, F)
        self._x_squares, self._errors, self._c = empty(N, M), empty(N, M), empty(N, M)
        slots = Slots.allocate(N, settings.k_max, device)
        self._all, capacity = slots, B * settings.k_max
        self._slots = [
            Slots(
                *(t[i * B : (i + 1) * B] for t in slots[:2]), *(t[i * capacity : (i + 1) * capacity] for t in slots[2:])
            )
            for i in range(A)
        ]
        n_slices = slices(M, D)
        self._slice_squares, self._dots = empty(B, n_slices), empty(n_slices, capacity)
        self._delta = empty(A * capacity)
        self._order = LatentOrder.allocate(A * capacity, F, device)
        self._sums, self._sums_work = empty(A, 3, C), column_sums_work(B, C, device)
        self._g_b_dec = empty(C)
        self._lowest = empty(A)
        self._batch_work = self._maxima = None
        self._group = group_size(settings.k_max, F)
        if settings.selection == "batchtopk":
            self._batch_work = BatchTopKWork.allocate(B, F, settings.k_max, device)
        elif self._group is not None:
            self._maxima = empty(B, -(-F // self._group))

        n_rows = row_slices(M, D)
        self._norms, self._row_squares, self._code_norm = empty(F, n_rows, M), empty(F, n_rows), empty(F)
        rounded = settings.precision == "bfloat16"
        self._W_dec_low = empty(F, C, dtype=low) if rounded else tensors.W_dec.view(F, C)
        self._W_enc_low = empty(F, C, dtype=low) if rounded else tensors.W_enc.view(F, C)
        matrices: dict[str, Any] = {}
        for name, low in (("W_dec", self._W_dec_low), ("W_enc", self._W_enc_low)):
            m, v = tensors.moments[name]
            matrices |= {name: getattr(tensors, name).view(F, C), f"{name}_m": m.view(F, C), f"{name}_v": v.view(F, C)}
            matrices[f"{name}_shadow"] = low if rounded else None
        b_m, b_v = tensors.moments["b_enc"]
        self._rows = RowState(**matrices, b_enc=tensors.b_enc, b_enc_m=b_m, b_enc_v=b_v)
        # host's numbers of a step, and what the kernels read of them
        self._host = torch.zeros(6 + A, dtype=torch.float64, device=device)
        self._limits, self._total = empty(A, 2, dtype=torch.int32), empty(1, dtype=torch.int32)
        self._rates, self._counter = empty(2), empty(1, dtype=torch.int64)
        self._clip_scale = torch.ones(1, device=device)

        self._since = torch.empty_like(tensors.tokens_since_fired)
        self._dead: DeadLatents | None = None
        self._bad = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=device)
        self._totals = torch.zeros(5 + 2 * M, dtype=torch.float64, device=device)  # as `figures` reads them
        self._report = torch.full((2,), ALL_FINITE, dtype=torch.int64, device=device)  # bad, step it happened in
        # as the host sees it; of the last two steps on CUDA, further ahead of the device it does not run
        self._reports, self._done = [self._report], list[torch.cuda.Event]()
        if device.type == "cuda":
            self._reports = [torch.full((2,), ALL_FINITE, dtype=torch.int64).pin_memory() for _ in range(2)]
            self._done = [torch.cuda.Event() for _ in range(2)]
        self._n_enqueued = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._planned_at: int | None = None
        self._stale = True

    def step(self, batch: Tensor, rates: StepRates) -> None:
        """One update on stored activations [N, M, D]; writes nothing from a step on in which a number was not finite.

        Raises:
            ValueError: The batch does not fit.
        """
        check_batch(batch, rates, self.settings, self.tensors)
        if self._stale:
            self._round_weights()
        if self._planned_at is None or rates.number >= self._planned_at + _PLAN_EVERY:
            self._plan(rates.number)
        turn = self._n_enqueued % 2
        if self._done:
            self._done[turn].synchronize()
        self._load(batch, rates)
        # before there is a last norm, `previous` takes this step's
        exact = self.settings.clip_mode == "exact" or rates.number == 0
        with torch.no_grad(), _exact_products():
            self._run(exact)
        if self._done:
            self._reports[turn].copy_(self._report, non_blocking=True)
            self._done[turn].record()
        self._n_enqueued += 1

    def figures(self) -> Figures:
        """Sums since the last call."""
        M = self.tensors.shape[1]
        totals = self._totals.to("cpu", copy=True)
        self._totals.zero_()
        return Figures(
            n_steps=int(totals[0]),
            n_tokens=int(totals[1]),
            loss=float(totals[2]),
            n_active=int(totals[3]),
            n_dead=int(totals[4]),
            squared_error=totals[5 : 5 + M],
            spread=totals[5 + M :],
        )

    def not_finite(self) -> NotFinite | None:
        """The step in which a number was not finite, if one has come to light."""
        for i, report in enumerate(self._reports):
            bad, step = report.tolist() if not self._done or self._done[i].query() else (ALL_FINITE, 0)
            if bad != ALL_FINITE:
                return NotFinite(step, None if bad == _GRADIENT else bad)
        return None

    def wait(self) -> None:
        """Return once all steps are done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def state(self) -> dict[str, Tensor]:
        """What a step carries to the next besides its `tensors`, once all steps are done."""
        if self._stale:
            self._round_weights()
        return {"code_norm": self._code_norm}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`, or without it after the weights were written from outside."""
        self._round_weights()
        # computed anew it would differ in the last bit from what the update's kernel adds up
        if "code_norm" in state:
            self._code_norm.copy_(state["code_norm"])
        self._planned_at = None

    def _round_weights(self) -> None:
        t = self.tensors
        if self.settings.precision == "bfloat16":
            self._W_dec_low.copy_(t.W_dec.view_as(self._W_dec_low))
            self._W_enc_low.copy_(t.W_enc.view_as(self._W_enc_low))
        torch.sum(torch.linalg.vector_norm(t.W_dec, dim=-1), dim=1, out=self._code_norm)
        self._stale = False

    def _plan(self, number: int) -> None:
        """Make the list of the dead long enough for all that can die before the next look."""
        self._planned_at = number
        s, t = self.settings, self.tensors
        F, M, D = t.shape
        if s.auxk_coef == 0 or D < 2:
            return
        may_die = int((t.tokens_since_fired >= s.dead_tokens - _PLAN_EVERY * s.max_tokens).sum())
        n = min(F, places(may_die))
        if n != (0 if self._dead is None else len(self._dead.decoder)):
            self._graph, self._warm, self._dead = None, False, None
            if n:
                self._dead = DeadLatents.allocate(n, s.n_tokens, F, M * D, self._x.dtype, self._device)

    def _load(self, batch: Tensor, rates: StepRates) -> None:
        """Copy the batch and the host's numbers to their places on the device."""
        s, n = self.settings, len(batch)
        if self._batch is None or self._batch.dtype != batch.dtype:
            self._batch = batch.new_zeros(s.max_tokens, *batch.shape[1:])
            self._graph, self._warm = None, False
        self._batch[:n].copy_(batch)
        valid = [min(s.n_tokens, max(0, n - i * s.n_tokens)) for i in range(s.n_micro)]
        adam = adam_rates(rates.lr, s.betas, rates.number + 1)
        numbers = [n, rates.k, *adam, rates.number, rates.threshold_memory, *valid]
        # pinned memory comes from torch's allocator, which keeps it until the copy is done
        host = torch.tensor(numbers, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        self._host.copy_(host, non_blocking=True)

    def _run(self, exact: bool) -> None:
        if self._device.type != "cuda":
            self._launch(exact)
        elif self._graph is not None:
            self._graph.replay()
        elif not self._warm:
            self._launch(exact)
            # the first step under `previous` launches other kernels than the next; compiling is no work for a capture
            self._warm = exact == (self.settings.clip_mode == "exact")
        else:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._launch(exact)
            self._graph.replay()

    def _launch(self, exact: bool) -> None:
        """All kernels of a step."""
        s, t = self.settings, self.tensors
        M = t.shape[1]
        host = self._host
        self._total.copy_(host[:1])
        self._rates.copy_(host[2:4])
        self._counter.copy_(host[4:5])
        self._limits[:, 0].copy_(host[6:])
        self._limits[:, 1].copy_(host[1])
        for i in range(s.n_micro):
            self._forward(i)
        slots = self._all
        order_by_latent(slots.col, slots.row, slots.val, self._delta, self._order)
        fired = self._order.start.diff() > 0
        self._since.copy_(torch.where(fired, 0, t.tokens_since_fired + self._total))
        dead = self._since >= s.dead_tokens
        aux_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        if self._dead is not None:
            self._dead.collect(dead, self._W_dec_low)
            for i in range(s.n_micro):
                aux_loss = aux_loss + self._auxk(i, self._dead)
        aux = None if self._dead is None else self._dead.rows
        torch.sum(self._sums[:, 1], dim=0, out=self._g_b_dec)
        batch = (self._order, self._c, self._residual, self._x)
        if s.clip == 0 or not exact:
            self._bound_gradient()
        if s.clip > 0:
            if exact:
                norm_rows(*batch, aux, self._row_squares, n_models=M)
                self._take_norm()
            self._clip_scale.copy_((s.clip / (t.gradient_norm + 1e-6)).clamp(max=1))
        by_product = self._row_squares if s.clip > 0 and s.clip_mode == "previous" else None
        update_rows(
            *batch,
            self._rows,
            aux,
            self._rates,
            self._clip_scale,
            self._counter,
            self._bad,
            self._norms,
            by_product,
            n_models=M,
            betas=s.betas,
            eps=s.eps,
            seed=s.seed,
        )
        finish_norms(self._norms, self._code_norm, self._bad)
        update_flat(
            t.b_dec,
            self._g_b_dec,
            *t.moments["b_dec"],
            self._rates,
            self._clip_scale,
            self._bad,
            betas=s.betas,
            eps=s.eps,
        )
        if by_product is not None:
            self._take_norm()
        self._commit(dead, aux_loss)

    def _forward(self, i: int) -> None:
        """Micro-batch i up to the gradient of its activations."""
        s, t = self.settings, self.tensors
        _, M, D = t.shape
        at = slice(i * s.n_tokens, (i + 1) * s.n_tokens)
        x, slots, limits, offset = self._x[at], self._slots[i], self._limits[i], at.start
        delta = self._delta[i * len(slots.col) : (i + 1) * len(slots.col)]
        assert self._batch is not None
        normalize(
            self._batch[at],
            t.input_mean,
            t.input_scale,
            x,
            self._x_squares[at],
            limits,
            self._bad,
            row_offset=offset,
        )
        matmul_into(self._scores, x, self._W_enc_low.T)
        scored = (self._scores, t.b_enc, self._code_norm)
        if self._batch_work is not None:
            lowest = self._lowest[i : i + 1]
            batchtopk_slots(*scored, self._batch_work, limits, slots, lowest, bad=self._bad, row_offset=offset)
        elif self._maxima is not None and self._group is not None:
            group_max(*scored, self._maxima, limits, self._bad, group=self._group, row_offset=offset)
            topk_slots(*scored, self._maxima, limits, slots, k_max=s.k_max, group=self._group, row_offset=offset)
        else:
            topk_slots_radix(*scored, limits, self._bad, slots, k_max=s.k_max, row_offset=offset)
        decode_loss(
            slots,
            self._W_dec_low,
            t.b_dec.view(-1),
            x,
            self._residual[at],
            self._slice_squares,
            self._dots,
            limits,
            n_models=M,
        )
        token_gradients(
            slots,
            self._slice_squares,
            self._dots,
            limits,
            self._total,
            self._c[at],
            self._errors[at],
            delta,
            self._bad,
            n_models=M,
            d_model=D,
            loss=s.loss,
            row_offset=offset,
        )
        column_sums(self._residual[at], x, self._c[at], self._sums[i], self._sums_work, limits, n_models=M)

    def _auxk(self, i: int, dead: DeadLatents) -> Tensor:
        """Add AuxK's gradients of micro-batch i; its part of the loss."""
        s, t = self.settings, self.tensors
        at = slice(i * s.n_tokens, (i + 1) * s.n_tokens)
        n_valid = self._limits[i, 0]
        mean = self._sums[i, 0].double() / n_valid.clamp(min=1)
        spread = self._errors[at].double().sum() / n_valid.clamp(min=1) - mean.square().sum()
        # of one token nothing but rounding would be left
        spread = torch.where(n_valid > 1, spread, 0.0)
        return dead.add_gradients(
            self._x[at],
            self._residual[at],
            # the scores of earlier micro-batches are gone
            self._scores if s.n_micro == 1 else None,
            self._W_enc_low,
            t.b_enc,
            self._code_norm,
            spread=spread,
            n_valid=n_valid,
            n_total=self._total[0],
            coef=s.auxk_coef,
            k=t.shape[2] // 2,
        )

    def _take_norm(self) -> None:
        """The norm of the whole gradient, from that of each latent; a norm that is not finite stops the training."""
        norm = (self._row_squares.sum(dtype=torch.float64) + self._g_b_dec.double().square().sum()).sqrt()
        self.tensors.gradient_norm.copy_(norm)
        self._stop_unless(norm.isfinite())

    def _bound_gradient(self) -> None:
        """Stop the training before an update whose gradient could overflow when squared, if its norm is not known.

        |G_dec| ≤ max f · Σ_b max_m c‖r‖ and |G_enc| ≤ max |δ| · Σ_b ‖x‖; AuxK's rows are there to be looked at.
        """
        weight = (self._c * self._errors.sqrt()).amax(dim=1).sum(dtype=torch.float64)
        reach = self._x_squares.sum(dim=1).sqrt().sum(dtype=torch.float64)
        bound = self._all.val.amax() * weight + self._delta.abs().amax() * reach
        if self._dead is not None:
            bound = bound + self._dead.rows.dec.abs().amax() + self._dead.rows.enc.abs().amax()
        self._stop_unless(bound < _LARGEST)

    def _stop_unless(self, fine: Tensor) -> None:
        self._bad.copy_(torch.where(fine, self._bad, self._bad.clamp(max=_GRADIENT)))

    def _commit(self, dead: Tensor, aux_loss: Tensor) -> None:
        """Counters, threshold and sums of a good step; the report of a bad one."""
        s, t = self.settings, self.tensors
        _, M, D = t.shape
        good = self._bad[0] == ALL_FINITE
        n = self._total[0].double()
        errors = self._errors.double()
        loss = errors.sqrt().sum() / (n * M) if s.loss == "l2norm" else errors.sum() / (n * M * D)
        x_sums = self._sums[:, 2].double().sum(dim=0).view(M, D)
        spread = self._x_squares.double().sum(dim=0) - x_sums.square().sum(dim=1) / n
        active = (self._all.end - self._all.start).sum()
        dead_before = self._totals[4].clone()
        new = torch.cat(
            [torch.stack([torch.ones_like(n), n, loss + aux_loss, active.double(), dead.sum().double() - dead_before]),
             errors.sum(dim=0), spread]
        )  # fmt: skip
        self._totals += torch.where(good, new, 0.0)
        t.tokens_since_fired.copy_(torch.where(good, self._since, t.tokens_since_fired))
        if s.selection == "batchtopk":
            some = self._lowest.isfinite()
            lowest = torch.where(some, self._lowest, 0.0).sum() / some.sum()
            memory = self._host[5].float()
            followed = memory * t.threshold + (1 - memory) * lowest
            t.threshold.copy_(torch.where(good & some.any(), followed, t.threshold))
        report = torch.stack([self._bad[0].long(), self._counter[0]])
        self._report.copy_(torch.where(self._report[0] == ALL_FINITE, report, self._report))


def places(n: int) -> int:
    """Length of a list for n dead latents: an eighth too long at most, for the products grow with it."""
    unit = max(_DEAD_UNIT, 1 << max(0, n.bit_length() - 4))
    return -(-n // unit) * unit


@contextmanager
def _exact_products() -> Iterator[None]:
    """Partial sums of bfloat16 products stay float32 inside the block."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
