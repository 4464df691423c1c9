"""The published training step written out: every (B, F) and (B, M, F, D) product dense, plain autograd, torch's Adam.

The oracle of the fused steps. Shares no code with them; float64 unless told otherwise.
"""

import torch
from torch import nn

from fastdiff.kernels.step import StepRates, StepSettings, StepTensors

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_settings(**changed) -> StepSettings:
    values = {
        "n_tokens": 12,
        "n_micro": 1,
        "k_max": 5,
        "selection": "batchtopk",
        "loss": "l2norm",
        "auxk_coef": 1 / 32,
        "dead_tokens": 22,
        "clip": 100.0,
        "clip_mode": "exact",
        "precision": "float32",
        "moments": "float32",
        "seed": 0,
    }
    return StepSettings(**(values | changed))


def make_tensors(F=26, M=2, D=12, seed=0, device="cpu", moments=torch.float32) -> StepTensors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    W = {
        "W_enc": random(F, M, D) * D**-0.5,
        "b_enc": random(F) * 0.1,
        "W_dec": random(F, M, D) * 0.4,
        "b_dec": random(M, D) * 0.1,
    }
    W["b_enc"][F // 3 :: 3] -= 3.0  # latents that do not fire
    kinds = {name: moments if w.ndim == 3 else torch.float32 for name, w in W.items()}
    return StepTensors(
        **W,
        moments={name: tuple(torch.zeros_like(w, dtype=kinds[name]) for _ in range(2)) for name, w in W.items()},
        gradient_norm=torch.zeros((), device=device),
        threshold=torch.zeros(F, device=device),
        tokens_since_fired=torch.zeros(F, dtype=torch.int64, device=device),
        input_mean=random(M, D) * 0.1,
        input_scale=torch.linspace(0.8, 1.3, M).to(device),
    )


def make_batches(n: int, N: int, M=2, D=12, seed=1, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(20, M, D, generator=generator)
    drawn = []
    for _ in range(n):
        code = (torch.rand(N, 20, generator=generator) < 0.2) * torch.rand(N, 20, generator=generator) * 3
        noise = 0.1 * torch.randn(N, M, D, generator=generator)
        drawn.append((torch.einsum("bj,jmd->bmd", code, mixing) + noise).to(device))
    return drawn


class DenseStep:
    """Same calls as a fused step; weights in `parameters`, by name."""

    def __init__(self, settings: StepSettings, tensors: StepTensors, dtype=torch.float64):
        self.settings = settings
        self.parameters = {
            name: nn.Parameter(getattr(tensors, name).detach().cpu().to(dtype, copy=True)) for name in NAMES
        }
        self.mean, self.scale = tensors.input_mean.cpu().to(dtype), tensors.input_scale.cpu().to(dtype)
        self.adam = torch.optim.Adam(self.parameters.values(), betas=settings.betas, eps=settings.eps, foreach=False)
        self.since_fired = torch.zeros(len(tensors.b_enc), dtype=torch.int64)
        self.threshold, self.last_norm = 0.0, None
        self.losses, self.squared_error, self.n_active = [], 0.0, 0
        self.aux_steps = self.clipped_steps = 0

    def step(self, batch: torch.Tensor, rates: StepRates) -> None:
        s, (W_enc, b_enc, W_dec, b_dec) = self.settings, self.parameters.values()
        x = (batch.cpu().to(W_enc) - self.mean) * self.scale[:, None]
        N, _, D = x.shape
        norm = W_dec.detach().norm(dim=-1).sum(dim=1)
        loss, lowest, parts = 0.0, [], []
        fired = torch.zeros(len(b_enc), dtype=torch.bool)
        for part in x.split(s.n_tokens):
            B = len(part)
            f = (torch.einsum("bmd,fmd->bf", part, W_enc) + b_enc).relu()
            v = f.detach() * norm
            flat = v if s.selection == "topk" else v.flatten()[None]
            n = rates.k if s.selection == "topk" else B * rates.k
            # stable: ties go to the lowest index
            chosen = flat.argsort(dim=1, descending=True, stable=True)[:, :n]
            kept = torch.zeros_like(flat).scatter(1, chosen, 1.0).view_as(v) * (v > 0)
            if kept.any():
                lowest.append(float(v[kept.bool()].min()))
            fired |= kept.sum(dim=0) > 0
            self.n_active += int(kept.sum())
            error = part - torch.einsum("bf,fmd->bmd", f * kept, W_dec) - b_dec
            self.squared_error = self.squared_error + error.detach().square().sum(dim=(0, 2))
            own = error.norm(dim=-1).mean() if s.loss == "l2norm" else error.square().mean()
            loss = loss + own * B / N
            parts.append((f, v, error.detach().flatten(1)))
        self.since_fired = torch.where(fired, 0, self.since_fired + N)
        dead = self.since_fired >= s.dead_tokens
        k_aux = min(D // 2, int(dead.sum()))
        if s.auxk_coef > 0 and k_aux:
            self.aux_steps += 1
            for f, v, target in parts:
                chosen = torch.where(dead, v, -1.0).topk(k_aux, dim=1).indices
                kept = torch.zeros_like(v).scatter(1, chosen, 1.0)
                guess = (f * kept) @ W_dec.flatten(1)
                spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
                if len(f) == 1:  # one token does not vary
                    continue
                loss = loss + s.auxk_coef * (target - guess).square().sum(dim=1).mean() / spread * len(f) / N
        self.adam.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.parameters.values()]).norm()
        if s.clip > 0:
            known = norm if s.clip_mode == "exact" or self.last_norm is None else self.last_norm
            scale = min(1.0, float(s.clip / (known + 1e-6)))
            self.clipped_steps += scale < 1
            for p in self.parameters.values():
                p.grad.mul_(scale)
        self.last_norm = norm
        self.adam.param_groups[0]["lr"] = rates.lr
        self.adam.step()
        if s.selection == "batchtopk" and lowest:
            memory = rates.threshold_memory
            self.threshold = memory * self.threshold + (1 - memory) * sum(lowest) / len(lowest)
        self.losses.append(loss.item())
