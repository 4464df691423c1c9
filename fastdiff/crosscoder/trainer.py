"""Training steps by autograd: every objective, on sparse or dense products. `fused_trainer` is the fast way.

Runs what has no fused step (see `fused_trainer.why_not_fused`) and, with `backend="dense"`, everything by the
definition.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import losses, schedule
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.structure import structure_of
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.kernels import ops
from fastdiff.kernels.backend import resolve_backend
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.step import Figures

_TOPK = ("batchtopk", "topk")
# a second reconstruction by this many times k latents (Gao et al. 2024, arXiv:2406.04093, section 5.3)
_MULTI_TOPK = 4


class _Chosen(NamedTuple):
    """Which pairs of a micro-batch take part."""

    pre: Tensor | None  # [B, F]; None where it is computed anew for the loss, to hold one micro-batch's at a time
    pairs: Selection
    more: Selection | None  # those of Multi-TopK
    active: Tensor  # latents of the pairs that fire, [n_active]
    lowest: Tensor  # smallest selected score, infinite where there is none


class _Batch(NamedTuple):
    """What the parts of a batch must know of the whole."""

    l0: float
    scale: Tensor  # the loss of reconstructing nothing, []


class Trainer:
    """Steps a crosscoder; `state` and `load_state` carry it across processes, `window` says how it goes.

    AuxK counts a latent as dead once it has not fired for `dead_tokens` tokens. The inference threshold of
    BatchTopK is a running mean of the smallest selected f·s of each step, with the memory
    min(threshold_decay, t / (t + 9)) at step t = 1, 2, …: set from the first step on, and not held back by what
    the first steps saw.

    A batch larger than `micro_batch` goes through in parts, whose gradients add up to those of the whole, but for
    BatchTopK, which selects, and AuxK, which normalises, within the part.
    """

    def __init__(self, crosscoder: Crosscoder, config: TrainConfig):
        F, M, _ = crosscoder.W_enc.shape
        self.crosscoder, self.config = crosscoder, config
        self.micro_batch = config.micro_batch or config.batch_size
        self.step_number = 0
        self.tokens_since_fired = torch.zeros(F, dtype=torch.int64, device=crosscoder.b_enc.device)
        self._structure = structure_of(config, M)
        self._figures: list[Figures] = []
        try:
            self._backend = resolve_backend(config.backend, crosscoder.b_enc.device)
        except ValueError as error:
            raise OptionError(str(error)) from error
        # lr comes from the schedule, before every step
        self._adam = torch.optim.Adam(crosscoder.parameters(), lr=0.0, fused=True)

    @property
    def k(self) -> int:
        """Active latents per token that the next step aims at."""
        return schedule.k_at(self.step_number, self.config)

    def step(self, batch: Tensor) -> None:
        """One update on stored activations [B, M_stored, D].

        Raises:
            FastdiffError: The loss or its gradient is not finite; the weights are still those of the last good step.
        """
        c, config, t = self.crosscoder, self.config, self.step_number
        k = self.k
        x = c.normalize(batch)
        parts = x.split(self.micro_batch)
        chosen = [self._choose(part, k, keep=len(parts) == 1) for part in parts]
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        for one in chosen:
            fired[one.active] = True
        since = torch.where(fired, 0, self.tokens_since_fired + len(x))
        dead = (since >= config.dead_tokens).nonzero().squeeze(1)
        n_active = sum(len(one.active) for one in chosen)
        drawn = config.activation == "jumprelu" and config.sparsity == "target"
        whole = _Batch(n_active / len(x), losses.reconstruction(x, config.loss) if drawn else x.new_zeros(()))

        self._adam.zero_grad()
        total, squared_error = 0.0, torch.zeros(x.shape[1], dtype=torch.float64)
        for part, one in zip(parts, chosen, strict=True):
            loss, error = self._loss(part, one, k, dead, share=len(part) / len(x), whole=whole)
            if not bool(torch.isfinite(loss)):
                raise FastdiffError(f"step {t}: the loss is {loss.item()}; lower --lr or look at the activations")
            loss.backward()
            total += loss.item()
            squared_error += error.detach().double().square().sum(dim=(0, 2)).cpu()
        self._update()
        self.tokens_since_fired = since
        lowest = torch.stack([one.lowest for one in chosen])
        lowest = lowest[lowest.isfinite()]
        if config.activation == "batchtopk" and len(lowest):
            self._follow_threshold(float(lowest.mean()))
        self.step_number += 1
        if drawn:
            # every part's loss holds the penalty of the whole batch
            weight = config.l0_coef * schedule.ramp(t, config.sparsity_warmup_steps) * float(whole.scale)
            l0 = torch.tensor(whole.l0, dtype=torch.float64)
            total -= (len(parts) - 1) * weight * float(losses.l0_target(l0, k))
        centred = x - x.mean(dim=0)
        self._figures.append(
            Figures(
                n_steps=1,
                n_tokens=len(x),
                loss=total,
                squared_error=squared_error,
                spread=centred.double().square().sum(dim=(0, 2)).cpu(),
                n_active=n_active,
                n_dead=len(dead),
            )
        )

    def back_off(self, micro_batch: int) -> None:
        """From now on hold this many tokens at a time."""
        self.micro_batch = micro_batch
        self._adam.zero_grad()

    def window(self) -> Figures:
        """What the steps since the last call measured.

        Raises:
            IndexError: There was none.
        """
        steps, self._figures = self._figures, []
        return add_figures(steps)

    @torch.no_grad()
    def _choose(self, x: Tensor, k: int, *, keep: bool) -> _Chosen:
        """Which pairs of x̃ [B, M, D] take part."""
        c, config, backend = self.crosscoder, self.config, self._backend
        pre = c.pre_activations(x)
        nothing, more, lowest = pre.new_full((), torch.inf), None, None
        if config.activation == "jumprelu":
            # entries just below the threshold do not fire, but move it
            pairs = ops.above(pre, c.threshold - config.bandwidth / 2, backend=backend)
            active = pairs.col[pre[pairs.row, pairs.col] > c.threshold[pairs.col]]
        elif config.activation == "relu":
            pairs = ops.above(pre, torch.zeros_like(c.threshold), backend=backend)
            active = pairs.col
        else:
            pairs, lowest = self._largest(pre, k)
            active = pairs.col
            if config.multi_topk_coef:
                more, _ = self._largest(pre, min(_MULTI_TOPK * k, c.dict_size))
        return _Chosen(pre if keep else None, pairs, more, active, nothing if lowest is None else lowest)

    def _largest(self, pre: Tensor, k: int) -> tuple[Selection, Tensor | None]:
        scale = self.crosscoder.code_norm()
        if self.config.activation == "topk":
            return ops.topk(pre, k, scale=scale, backend=self._backend), None
        return ops.batchtopk(pre, k, scale=scale, backend=self._backend)

    def _loss(
        self, x: Tensor, chosen: _Chosen, k: int, dead: Tensor, *, share: float, whole: _Batch
    ) -> tuple[Tensor, Tensor]:
        """What a micro-batch x̃ [B, M, D] adds to the loss, and its errors [B, M, D].

        Args:
            x: Its inputs.
            chosen: Its pairs.
            k: Of this step.
            dead: Latents that count as dead.
            share: Its share of the tokens.
            whole: Of the batch it is a part of.
        """
        c, config, backend = self.crosscoder, self.config, self._backend
        pairs, flat = chosen.pairs, x.flatten(1)
        pre = c.pre_activations(x).detach() if chosen.pre is None else chosen.pre
        values = ops.sparse_encode(flat, c.W_enc.flatten(1), c.b_enc, pre, pairs, backend=backend)
        weight = schedule.ramp(self.step_number, config.sparsity_warmup_steps)
        extra = x.new_zeros(())
        if config.activation == "jumprelu":
            theta = ops.at_entries(pairs, c.threshold, backend=backend)
            extra = config.l0_coef * weight * self._jumprelu_penalty(x, values, theta, pairs, k, share, whole)
            values = ops.jumprelu(values, theta, config.bandwidth, backend=backend)
            if config.preact_coef:
                dense = torch.addmm(c.b_enc, flat, c.W_enc.flatten(1).T)
                extra = extra + share * config.preact_coef * losses.pre_activation(dense, c.threshold, c.code_norm())
        elif config.activation == "relu":
            penalty = losses.l1(values, pairs.col, c.code_norm() * self._penalty_weight(), len(x))
            extra = share * config.l1_coef * weight * penalty
        errors = self._errors(x, values, pairs)
        error = errors[-1]
        loss = losses.prefixes(errors, config.loss)
        if config.delta_coef:
            loss = loss + config.delta_coef * losses.difference(error, config.loss)
        if chosen.more is not None:
            more = ops.sparse_encode(flat, c.W_enc.flatten(1), c.b_enc, pre, chosen.more, backend=backend)
            missed = x - c.decode(more, chosen.more, backend=backend)
            loss = loss + config.multi_topk_coef * losses.reconstruction(missed, config.loss)
        k_aux = min(x.shape[-1] // 2, len(dead))
        if config.activation in _TOPK and config.auxk_coef > 0 and k_aux:
            pre_dead = flat @ c.W_enc[dead].flatten(1).T + c.b_enc[dead]
            norm = c.code_norm()[dead]
            loss = loss + config.auxk_coef * losses.auxk(error, pre_dead, c.W_dec[dead], norm, k_aux)
        return share * loss + extra, error

    def _errors(self, x: Tensor, values: Tensor, pairs: Selection) -> list[Tensor]:
        """x̃ - x̂ [B, M, D], of every prefix of the dictionary and last of all of it."""
        c, F = self.crosscoder, self.crosscoder.dict_size
        ends = self.config.prefix_ends()
        if not ends:
            return [x - c.decode(values, pairs, backend=self._backend)]
        errors, left = [], x - c.b_dec
        for start, end in zip([0, *ends], [*ends, F], strict=True):
            at = ((pairs.col >= start) & (pairs.col < end)).nonzero().squeeze(1)
            group = Selection.from_flat(pairs.row[at] * F + pairs.col[at], pairs.n_tokens, F)
            out = ops.sparse_decode(values[at], group, c.W_dec.flatten(1), backend=self._backend)
            left = left - out.view_as(left)
            errors.append(left)
        return errors

    def _jumprelu_penalty(
        self, x: Tensor, values: Tensor, theta: Tensor, pairs: Selection, k: int, share: float, whole: _Batch
    ) -> Tensor:
        """What the penalty of jumprelu is before its weight; x̃ is `share` of the tokens of `whole`."""
        c, config, backend = self.crosscoder, self.config, self._backend
        if config.sparsity == "tanh":
            f = ops.jumprelu(values, theta, config.bandwidth, backend=backend)
            weight = self._penalty_weight()
            return share * losses.tanh_penalty(f, pairs.col, c.code_norm(), weight, len(x), config.tanh_scale)
        steps = ops.step(values, theta, config.bandwidth, backend=backend)
        if config.sparsity == "l0":
            return share * (steps * self._penalty_weight()[pairs.col]).sum() / len(x)
        own = share * steps.sum() / len(x)
        return whole.scale * losses.l0_target(own + (whole.l0 - own).detach(), k)

    def _penalty_weight(self) -> Tensor:
        """W [F]: less than 1 for designated shared latents."""
        weight = torch.ones_like(self.crosscoder.b_enc)
        weight[: self._structure.shared] = self.config.shared_penalty
        return weight

    def _update(self) -> None:
        c, config = self.crosscoder, self.config
        assert c.W_enc.grad is not None and c.W_dec.grad is not None
        self._structure.project(c.W_enc.grad, c.W_dec.grad)
        largest = config.clip if config.clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(c.parameters(), largest)
        if not bool(torch.isfinite(norm)):
            raise FastdiffError(
                f"step {self.step_number}: the gradient is {norm.item()}; lower --lr or look at the activations"
            )
        self._adam.param_groups[0]["lr"] = schedule.rate_at(self.step_number, config)
        self._adam.step()
        self._structure.tie(c.W_dec)
        if config.activation == "jumprelu":
            # a threshold below zero would let negative activations through
            c.threshold.data.clamp_(min=0.0)

    def _follow_threshold(self, lowest: float) -> None:
        memory = schedule.threshold_memory(self.step_number, self.config)
        theta = float(self.crosscoder.threshold[0])
        self.crosscoder.threshold.fill_(memory * theta + (1 - memory) * lowest)

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights and the step number."""
        tensors = {"tokens_since_fired": self.tokens_since_fired}
        for name, parameter in self.crosscoder.named_parameters():
            for key, value in self._adam.state[parameter].items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor], step_number: int) -> None:
        """Continue from what `state` gave after `step_number` steps; the weights must be loaded already."""
        self.step_number = step_number
        device = self.tokens_since_fired.device
        self.tokens_since_fired = tensors["tokens_since_fired"].to(device, copy=True)
        for name, parameter in self.crosscoder.named_parameters():
            self._adam.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq")
            }


def add_figures(parts: list[Figures]) -> Figures:
    """The figures of consecutive steps, at least one of them."""
    return Figures(
        n_steps=sum(f.n_steps for f in parts),
        n_tokens=sum(f.n_tokens for f in parts),
        loss=sum(f.loss for f in parts),
        squared_error=torch.stack([f.squared_error for f in parts]).sum(dim=0),
        spread=torch.stack([f.spread for f in parts]).sum(dim=0),
        n_active=sum(f.n_active for f in parts),
        n_dead=parts[-1].n_dead,
    )
