"""A BatchTopK crosscoder step as published trainers compute it: dense products, autograd, torch's Adam.

    f_bj = ReLU(Σ_m ⟨x_bm, W_enc[m, :, j]⟩ + b_j)        [B, F], all of it
    keep the B·k largest f·s of the flattened batch, zero elsewhere; decode densely
    loss = mean_bm ‖x_bm - x̂_bm‖₂ + α · AuxK

The mathematics is that of `BatchTopKCrossCoderTrainer` of dictionary_learning (jkminder, science-of-finetuning; MIT),
in its layout: encoder [M, D, F], decoder [M, F, D]. It is what fastdiff's step must agree with, and what it is
measured against. Selection and decoder norms get no gradient; everything else is autograd's.

Source: Minder et al. 2025, arXiv:2504.02922; Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import losses, schedule
from fastdiff.crosscoder.model import Crosscoder


class DenseTrainer:
    """Steps copies of a crosscoder's weights.

    Args:
        crosscoder: Where the weights start; not changed.
        config: activation "batchtopk", any loss of fastdiff's; `clip` 0 turns clipping off.
        published: Every pass of the published trainer: each model encoded into a tensor of its own, [B, M, F], then
            summed, and what it computes to log. Else the fewest passes that dense autograd can do with.
        autocast: Precision of the products; None is that of the weights.
        compiled: Forward and backward by torch.compile.
        fused: Adam in one kernel; else torch's default for the device.
        reads_loss: Wait for the loss and the number of dead latents, as the published trainer does.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        config: TrainConfig,
        *,
        published: bool = True,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        fused: bool | None = None,
        reads_loss: bool = True,
    ):
        if config.activation != "batchtopk":
            raise ValueError(f"activation must be batchtopk, got {config.activation}")
        self.config, self.published, self.reads_loss = config, published, reads_loss
        self._autocast = autocast
        self.step_number = 0
        self.W_enc = nn.Parameter(crosscoder.W_enc.detach().permute(1, 2, 0).contiguous())
        self.b_enc = nn.Parameter(crosscoder.b_enc.detach().clone())
        self.W_dec = nn.Parameter(crosscoder.W_dec.detach().transpose(0, 1).contiguous())
        self.b_dec = nn.Parameter(crosscoder.b_dec.detach().clone())
        self.input_mean = crosscoder.input_mean.detach().clone()
        self.input_scale = crosscoder.input_scale.detach().clone()
        self.threshold = crosscoder.threshold.detach()[0].clone()
        self.tokens_since_fired = torch.zeros(crosscoder.dict_size, dtype=torch.int64, device=self.b_enc.device)
        self._adam = torch.optim.Adam(self.parameters(), lr=0.0, fused=fused)
        loss = self._as_published if published else self._lean
        self._forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            torch.compile(loss, dynamic=False) if compiled else loss
        )

    def parameters(self) -> list[nn.Parameter]:
        """The four weights."""
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]

    def step(self, batch: Tensor) -> float | None:
        """One update on stored activations [B, M, D]; the loss where it was read."""
        config, t = self.config, self.step_number
        k = schedule.k_at(t, config)
        with torch.no_grad():
            x = (batch.to(self.input_mean) - self.input_mean) * self.input_scale[:, None]
            # whom this batch will wake is not known yet, so AuxK is decided on after selection, in `_auxk`
            may_die = self.tokens_since_fired + len(x) >= config.dead_tokens
            any_dead = config.auxk_coef > 0 and bool(may_die.any())
        device = self.b_enc.device.type
        with torch.autocast(device, dtype=self._autocast) if self._autocast else nullcontext():
            loss, lowest, fired = self._forward(x, k, any_dead)
        loss.backward()
        with torch.no_grad():
            self.tokens_since_fired += len(x)
            self.tokens_since_fired[fired] = 0
        if config.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters(), config.clip)
        self._adam.param_groups[0]["lr"] = schedule.rate_at(t, config)
        self._adam.step()
        self._adam.zero_grad()
        memory = schedule.threshold_memory(t, config)
        self.threshold.mul_(memory).add_(lowest, alpha=1 - memory)
        self.step_number += 1
        return loss.item() if self.reads_loss else None

    def _lean(self, x: Tensor, k: int, any_dead: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [], smallest selected score [], latents that fired [F] bool; no pass over [B, F] that can be spared."""
        pre = x.flatten(1) @ self.W_enc.view(-1, len(self.b_enc)) + self.b_enc
        f = pre.relu()
        with torch.no_grad():
            score = f * self.W_dec.norm(dim=2).sum(dim=0)
            top = score.flatten().topk(len(x) * k, sorted=False)
            lowest = torch.where(top.values > 0, top.values, torch.inf).amin()
        kept = torch.zeros_like(f).flatten().scatter_(0, top.indices, f.flatten()[top.indices]).view_as(f)
        fired = (kept.detach() > 0).any(dim=0)
        return self._objective(x, f, score, kept, fired, any_dead), lowest.float(), fired

    def _as_published(self, x: Tensor, k: int, any_dead: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with every pass of the published trainer: what it logs and keeps for autograd, too."""
        f = (torch.einsum("bmd,mdf->bmf", x, self.W_enc).sum(dim=1) + self.b_enc).relu()
        code_norm = self.W_dec.norm(dim=2).sum(dim=0)
        score = f * code_norm
        flat = score.flatten()
        top = flat.topk(len(x) * k, sorted=False)
        kept = torch.zeros_like(flat).scatter_(-1, top.indices, f.flatten()[top.indices]).view_as(f)
        kept_score = kept * code_norm
        fired = kept.sum(dim=0) > 0
        lowest = kept_score[kept_score > 0].min().detach()
        return self._objective(x, f, score.detach(), kept, fired, any_dead), lowest.float(), fired

    def _objective(self, x: Tensor, f: Tensor, score: Tensor, kept: Tensor, fired: Tensor, any_dead: bool) -> Tensor:
        error = (x - self._decode(kept) - self.b_dec).float()
        loss = losses.reconstruction(error, self.config.loss)
        if not any_dead:
            return loss
        return loss + self.config.auxk_coef * self._auxk(error.detach(), f, score, fired)

    def _decode(self, f: Tensor) -> Tensor:
        if self.published:
            return torch.einsum("bf,mfd->bmd", f, self.W_dec)
        # [B, M, D] from [M, B, D]: one product per model, nothing copied
        return torch.matmul(f, self.W_dec).transpose(0, 1)

    def _auxk(self, error: Tensor, f: Tensor, score: Tensor, fired: Tensor) -> Tensor:
        dead = (self.tokens_since_fired + len(error) >= self.config.dead_tokens) & ~fired
        k_aux = min(error.shape[-1] // 2, int(dead.sum()))
        if k_aux == 0:
            return error.new_zeros(())
        chosen = torch.where(dead, score, -torch.inf).topk(k_aux, dim=1, sorted=False).indices
        kept = torch.zeros_like(f).scatter_(1, chosen, f.gather(1, chosen))
        miss = (error - self._decode(kept)).float().square().sum(dim=(1, 2)).mean()
        spread = (error - error.mean(dim=0)).square().sum(dim=(1, 2)).mean()
        return (miss / spread).nan_to_num(0.0)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights in fastdiff's layout, as `Crosscoder` names them."""
        return {
            "W_enc": self.W_enc.permute(2, 0, 1),
            "b_enc": self.b_enc.data,
            "W_dec": self.W_dec.transpose(0, 1),
            "b_dec": self.b_dec.data,
        }

    def window(self) -> dict[str, Any]:
        """Wait until the steps are done, as `FusedTrainer.window` does."""
        if self.b_enc.device.type == "cuda":
            torch.cuda.synchronize(self.b_enc.device)
        return {}
