"""Training steps by autograd: every objective, on sparse or dense products. `fused_trainer` is the fast way.

Runs what has no fused step (JumpReLU, ReLU with L1) and, with `backend="dense"`, everything by the definition.
"""

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import losses, schedule
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.kernels import ops
from fastdiff.kernels.backend import resolve_backend
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.step import Figures


class Trainer:
    """Steps a crosscoder; `state` and `load_state` carry it across processes, `window` says how it goes.

    AuxK counts a latent as dead once it has not fired for `dead_tokens` tokens. The inference threshold of
    BatchTopK is a running mean of the smallest selected f·s of each step, with the memory
    min(threshold_decay, t / (t + 9)) at step t = 1, 2, …: set from the first step on, and not held back by what
    the first steps saw.
    """

    def __init__(self, crosscoder: Crosscoder, config: TrainConfig):
        self.crosscoder, self.config = crosscoder, config
        self.step_number = 0
        self.tokens_since_fired = torch.zeros(crosscoder.dict_size, dtype=torch.int64, device=crosscoder.b_enc.device)
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
        """One update on stored activations [B, M, D].

        Raises:
            FastdiffError: The loss or its gradient is not finite; the weights are still those of the last good step.
        """
        c, config, t = self.crosscoder, self.config, self.step_number
        k = self.k
        x = c.normalize(batch)
        pre = c.pre_activations(x)
        selection, lowest = self._select(pre, k)
        backend = self._backend
        values = ops.sparse_encode(x.flatten(1), c.W_enc.flatten(1), c.b_enc, pre, selection, backend=backend)
        active = selection.col
        if config.activation == "jumprelu":
            theta = ops.at_entries(selection, c.threshold, backend=backend)
            active = selection.col[values.detach() > theta.detach()]
            l0 = ops.step(values, theta, config.bandwidth, backend=backend).sum() / len(x)
            values = ops.jumprelu(values, theta, config.bandwidth, backend=backend)
        error = x - c.decode(values, selection, backend=backend)
        loss = losses.reconstruction(error, config.loss)

        self.tokens_since_fired += len(x)
        self.tokens_since_fired[active] = 0
        dead = (self.tokens_since_fired >= config.dead_tokens).nonzero().squeeze(1)
        weight = schedule.ramp(t, config.sparsity_warmup_steps)
        if config.activation in ("batchtopk", "topk") and config.auxk_coef > 0 and len(dead):
            pre_dead = x.flatten(1) @ c.W_enc[dead].flatten(1).T + c.b_enc[dead]
            k_aux = min(x.shape[-1] // 2, len(dead))
            if k_aux:
                loss = loss + config.auxk_coef * losses.auxk(error, pre_dead, c.W_dec[dead], k_aux)
        elif config.activation == "relu":
            penalty = losses.l1(values, selection.col, c.code_norm(), len(x))
            loss = loss + config.l1_coef * weight * penalty
        elif config.activation == "jumprelu":
            loss = loss + config.l0_coef * weight * losses.l0_target(l0, k)

        if not bool(torch.isfinite(loss)):
            raise FastdiffError(f"step {t}: the loss is {loss.item()}; lower --lr or look at the activations")
        self._update(loss)
        if config.activation == "batchtopk" and bool(torch.isfinite(lowest)):
            self._follow_threshold(float(lowest))
        self.step_number += 1
        with torch.no_grad():
            centred = x - x.mean(dim=0)
            self._figures.append(
                Figures(
                    n_steps=1,
                    n_tokens=len(x),
                    loss=loss.item(),
                    squared_error=error.double().square().sum(dim=(0, 2)).cpu(),
                    spread=centred.double().square().sum(dim=(0, 2)).cpu(),
                    n_active=len(active),
                    n_dead=len(dead),
                )
            )

    def window(self) -> Figures:
        """What the steps since the last call measured.

        Raises:
            IndexError: There was none.
        """
        steps, self._figures = self._figures, []
        return Figures(
            n_steps=len(steps),
            n_tokens=sum(f.n_tokens for f in steps),
            loss=sum(f.loss for f in steps),
            squared_error=torch.stack([f.squared_error for f in steps]).sum(dim=0),
            spread=torch.stack([f.spread for f in steps]).sum(dim=0),
            n_active=sum(f.n_active for f in steps),
            n_dead=steps[-1].n_dead,
        )

    @torch.no_grad()
    def _select(self, pre: Tensor, k: int) -> tuple[Selection, Tensor]:
        """Which pairs take part, and the smallest selected score."""
        c, nothing, backend = self.crosscoder, pre.new_full((), torch.inf), self._backend
        if self.config.activation == "jumprelu":
            # entries just below the threshold do not fire, but move it
            return ops.above(pre, c.threshold - self.config.bandwidth / 2, backend=backend), nothing
        if self.config.activation == "relu":
            return ops.above(pre, torch.zeros_like(c.threshold), backend=backend), nothing
        if self.config.activation == "topk":
            return ops.topk(pre, k, scale=c.code_norm(), backend=backend), nothing
        return ops.batchtopk(pre, k, scale=c.code_norm(), backend=backend)

    def _update(self, loss: Tensor) -> None:
        config = self.config
        self._adam.zero_grad()
        loss.backward()
        largest = config.clip if config.clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.crosscoder.parameters(), largest)
        if not bool(torch.isfinite(norm)):
            raise FastdiffError(
                f"step {self.step_number}: the gradient is {norm.item()}; lower --lr or look at the activations"
            )
        self._adam.param_groups[0]["lr"] = schedule.rate_at(self.step_number, config)
        self._adam.step()
        if config.activation == "jumprelu":
            # a threshold below zero would let negative activations through
            self.crosscoder.threshold.data.clamp_(min=0.0)

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
