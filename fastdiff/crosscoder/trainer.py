"""One training step of a crosscoder, and all the state it carries from step to step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import losses, schedule
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import FastdiffError
from fastdiff.kernels import ops
from fastdiff.kernels.selection import Selection


@dataclass(frozen=True)
class StepResult:
    """What a step measured, before its update."""

    loss: float
    squared_error: Tensor  # [M] float64, summed over the batch
    spread: Tensor  # [M] float64, Σ‖x̃ - batch mean‖²
    n_active: int
    n_dead: int
    dict_size: int
    k: int


class Trainer:
    """Steps a crosscoder; `state` and `load_state` carry it across processes.

    AuxK counts a latent as dead once it has not fired for `dead_tokens` tokens. The inference threshold of
    BatchTopK is a running mean of the smallest selected f·s of each step, with the memory
    min(threshold_decay, t / (t + 9)) at step t = 1, 2, …: set from the first step on, and not held back by what
    the first steps saw.
    """

    def __init__(self, crosscoder: Crosscoder, config: TrainConfig):
        self.crosscoder, self.config = crosscoder, config
        self.step_number = 0
        self.tokens_since_fired = torch.zeros(crosscoder.dict_size, dtype=torch.int64, device=crosscoder.b_enc.device)
        self._names = [name for name, _ in crosscoder.named_parameters()]
        # lr comes from the schedule, before every step
        self._adam = torch.optim.Adam(crosscoder.parameters(), lr=0.0, fused=True)

    def step(self, batch: Tensor) -> StepResult:
        """One update on stored activations [B, M, D].

        Raises:
            FastdiffError: The loss or its gradient is not finite; the weights are still those of the last good step.
        """
        c, config, t = self.crosscoder, self.config, self.step_number
        k = schedule.active_latents(t, k=config.k, k_start=config.k_start, anneal=config.k_anneal_steps)
        x = c.normalize(batch)
        pre = c.pre_activations(x)
        selection, lowest = self._select(pre, k)
        values = ops.sparse_encode(x.flatten(1), c.W_enc.flatten(1), c.b_enc, pre, selection)
        active = selection.col
        if config.activation == "jumprelu":
            theta = c.threshold[selection.col]
            active = selection.col[values.detach() > theta.detach()]
            l0 = ops.step(values, theta, config.bandwidth).sum() / len(x)
            values = ops.jumprelu(values, theta, config.bandwidth)
        error = x - c.decode(values, selection)
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
            return StepResult(
                loss=loss.item(),
                squared_error=error.double().square().sum(dim=(0, 2)).cpu(),
                spread=centred.double().square().sum(dim=(0, 2)).cpu(),
                n_active=len(active),
                n_dead=len(dead),
                dict_size=c.dict_size,
                k=k,
            )

    @torch.no_grad()
    def _select(self, pre: Tensor, k: int) -> tuple[Selection, Tensor]:
        """Which pairs take part, and the smallest selected score."""
        c, nothing = self.crosscoder, pre.new_full((), torch.inf)
        if self.config.activation == "jumprelu":
            # entries just below the threshold do not fire, but move it
            return ops.above(pre, c.threshold - self.config.bandwidth / 2), nothing
        if self.config.activation == "relu":
            return ops.above(pre, torch.zeros_like(c.threshold)), nothing
        score = pre.relu() * c.code_norm()
        if self.config.activation == "topk":
            return ops.topk(score, k), nothing
        return ops.batchtopk(score, k)

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
        self._adam.param_groups[0]["lr"] = schedule.learning_rate(
            self.step_number,
            base=config.lr,
            steps=config.steps,
            warmup=config.warmup_steps,
            decay=config.decay_steps,
        )
        self._adam.step()
        if config.activation == "jumprelu":
            # a threshold below zero would let negative activations through
            self.crosscoder.threshold.data.clamp_(min=0.0)

    def _follow_threshold(self, lowest: float) -> None:
        t = self.step_number
        memory = min(self.config.threshold_decay, t / (t + 9))
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
