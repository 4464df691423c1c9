"""Tiny trainers of any objective, and the objective written out: float64, every product dense, plain autograd.

`dense_loss` is the oracle of `fastdiff.crosscoder.trainer`. Shares no code with it.
"""

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.structure import structure_of
from fastdiff.crosscoder.trainer import Trainer

B, D, F, K = 24, 10, 40, 3


def batch(M: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    code = (torch.rand(B, 12, generator=generator) < 0.3) * torch.rand(B, 12, generator=generator) * 2
    mixing = torch.randn(12, M, D, generator=torch.Generator().manual_seed(99))
    return torch.einsum("bj,jmd->bmd", code, mixing) + 0.1 * torch.randn(B, M, D, generator=generator)


def make(M: int = 2, *, dtype: torch.dtype = torch.float32, kind=Trainer, **options):
    """A trainer with spread biases and thresholds; nothing clips, warms up or revives unless asked for."""
    values = {"dict_size": F, "k": K, "steps": 40, "batch_size": B, "lr": 2e-3, "warmup_steps": 0, "clip": 0.0,
              "sparsity_warmup_steps": 0, "auxk_coef": 0.0}  # fmt: skip
    config = TrainConfig(**values | options)
    crosscoder = Crosscoder(F, M, D, activation=config.activation, k=K, code_norm=config.code_norm)
    crosscoder.initialize(batch(M), init="independent", seed=3, structure=structure_of(config, M))
    # decoder rows of different norms, or no code norm would matter
    crosscoder.W_dec.data *= torch.linspace(0.5, 1.5, F).roll(7)[:, None, None]
    crosscoder.b_enc.data.copy_(torch.linspace(-0.2, 0.2, F))
    if config.activation == "jumprelu":
        crosscoder.threshold.data.copy_(torch.linspace(0.05, 0.6, F))
    return kind(crosscoder.to(dtype), config)


def leaves(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """Copies of the parameters as free float64 tensors."""
    return {name: value.detach().clone().double().requires_grad_() for name, value in crosscoder.named_parameters()}


def obeying(config: TrainConfig, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Encoder and decoder as the structure makes them of free weights."""
    F, M, _ = p["W_enc"].shape
    own = round(config.exclusive * F)
    there = torch.ones(F, M, 1, dtype=torch.float64)
    for m in range(M):
        for j in range(F - (M - m) * own, F - (M - m - 1) * own):
            there[j] = 0
            there[j, m] = 1
    n = config.shared_latents
    W_dec = torch.cat([p["W_dec"][:n, :1].expand(-1, M, -1), p["W_dec"][n:]])
    return p["W_enc"] * there, W_dec * there


def reconstruction(error: Tensor, config: TrainConfig) -> Tensor:
    return error.norm(dim=-1).mean() if config.loss == "l2norm" else error.square().mean()


def dense_code_norm(W_dec: Tensor, kind: str) -> Tensor:
    if kind == "crosscoder":
        return sum(W_dec[:, m].norm(dim=1) for m in range(W_dec.shape[1]))
    return W_dec.flatten(1).norm(dim=1) if kind == "sae" else torch.ones(len(W_dec), dtype=W_dec.dtype)


def kept(config: TrainConfig, pre: Tensor, s: Tensor, k: int) -> Tensor:
    """Mask [B, F] of what TopK or BatchTopK selects."""
    score = (pre.relu() * s).detach()
    if config.activation == "topk":
        mask = torch.zeros_like(score).scatter(1, score.topk(k, dim=1).indices, 1.0)
    else:
        best = score.flatten().topk(len(score) * k).indices
        mask = torch.zeros_like(score).flatten().scatter(0, best, 1.0).view_as(score)
    return mask * (score > 0)


def selected(config: TrainConfig, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """`kept` of weights and inputs."""
    W_enc, W_dec = obeying(config, p)
    pre = torch.einsum("bmd,fmd->bf", x, W_enc) + p["b_enc"]
    return kept(config, pre, dense_code_norm(W_dec, config.code_norm), K)


def dense_loss(config: TrainConfig, p: dict[str, Tensor], x: Tensor, dead: Tensor | None = None) -> Tensor:
    """The whole objective at k = K.

    Args:
        config: Its options; no schedule.
        p: Weights from `leaves`.
        x: x̃, [B, M, D].
        dead: Which latents AuxK takes for dead, [F] of booleans.
    """
    W_enc, W_dec = obeying(config, p)
    pre = torch.einsum("bmd,fmd->bf", x, W_enc) + p["b_enc"]
    s = dense_code_norm(W_dec, config.code_norm)
    weight = torch.ones(F, dtype=torch.float64)
    weight[: config.shared_latents] = config.shared_penalty

    def decode(f):
        return torch.einsum("bf,fmd->bmd", f, W_dec) + p["b_dec"]

    extra = 0.0
    if config.activation == "relu":
        f = pre.relu()
        extra = config.l1_coef * (f * s * weight).sum(dim=1).mean()
    elif config.activation == "jumprelu":
        theta, width = p["threshold"], config.bandwidth
        fires = (pre > theta).double().detach()
        window = ((pre - theta).abs() < width / 2).double().detach()
        moved = (theta - theta.detach()) / width * window  # 0, with the gradient of the straight-through window
        f = pre * fires - theta.detach() * moved
        steps = fires - moved
        if config.sparsity == "target":
            off = (steps.sum(dim=1).mean() / K - 1).abs()
            penalty = torch.where(off <= 1 / 16, off**2, (2 * off - 1 / 16) / 16)
            extra = config.l0_coef * reconstruction(x, config) * penalty
        elif config.sparsity == "l0":
            extra = config.l0_coef * (steps * weight).sum(dim=1).mean()
        else:
            extra = config.l0_coef * (weight * torch.tanh(config.tanh_scale * f * s)).sum(dim=1).mean()
        extra = extra + config.preact_coef * ((theta - pre).relu() * s).sum(dim=1).mean()
    else:
        f = pre * kept(config, pre, s, K)
        if config.multi_topk_coef:
            more = decode(pre * kept(config, pre, s, 4 * K))
            extra = config.multi_topk_coef * reconstruction(x - more, config)
    error = x - decode(f)
    ends = [round(share * F) for share in config.matryoshka] + [F]
    alone = [reconstruction(x - decode(f * (torch.arange(F) < end)), config) for end in ends]
    loss = sum(alone) / len(alone) + extra
    if config.delta_coef:
        loss = loss + config.delta_coef * reconstruction(error[:, 1:] - error[:, :1], config)
    if config.auxk_coef and dead is not None and dead.any():
        target = error.detach().flatten(1)
        score = torch.where(dead, (pre.relu() * s).detach(), -1.0)
        chosen = score.topk(min(D // 2, int(dead.sum())), dim=1).indices
        guess = (pre.relu() * torch.zeros_like(pre).scatter(1, chosen, 1.0)) @ W_dec.flatten(1)
        spread = (target - target.mean(dim=0)).square().sum()
        loss = loss + config.auxk_coef * (target - guess).square().sum() / spread
    return loss
