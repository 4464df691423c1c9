"""The training step against a direct dense transcription of the published mathematics, with torch's own Adam."""

import pytest
import torch
from torch import nn

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import FastdiffError

B, M, D, F = 64, 2, 12, 96


def batches(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(20, M, D, generator=generator)
    drawn = []
    for _ in range(n):
        code = (torch.rand(B, 20, generator=generator) < 0.15) * torch.rand(B, 20, generator=generator) * 3
        noise = 0.1 * torch.randn(B, M, D, generator=generator)
        drawn.append(torch.einsum("bj,jmd->bmd", code, mixing) + noise)
    return drawn


def make(activation: str, **options) -> tuple[Trainer, TrainConfig]:
    config = TrainConfig(
        activation=activation,
        dict_size=F,
        k=4,
        k_start=12,
        k_anneal_steps=8,
        steps=30,
        batch_size=B,
        lr=3e-3,
        warmup_steps=5,
        decay_steps=4,
        clip=0.7,
        dead_tokens=3 * B,
        sparsity_warmup_steps=4,
        **options,
    )
    crosscoder = Crosscoder(F, M, D, activation=activation, k=config.k)
    crosscoder.input_scale.copy_(torch.tensor([0.8, 1.3]))
    crosscoder.input_mean.copy_(torch.linspace(-0.5, 0.5, M * D).view(M, D))
    crosscoder.initialize(crosscoder.normalize(batches(1)[0]), init="independent", seed=7)
    return Trainer(crosscoder, config), config


class Dense:
    """The same mathematics written out: every (B, F) and (B, M, F, D) product dense, plain autograd."""

    def __init__(self, crosscoder: Crosscoder, config: TrainConfig):
        self.config = config
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(p.detach().clone())
            for p in (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec)
        )
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.mean, self.scale = crosscoder.input_mean.clone(), crosscoder.input_scale.clone()
        self.adam = torch.optim.Adam(self.parameters, lr=config.lr, betas=(0.9, 0.999), foreach=False)
        self.since_fired = torch.zeros(F, dtype=torch.int64)
        self.theta, self.t, self.aux_steps = 0.0, 0, 0

    def step(self, batch: torch.Tensor) -> None:
        c, t = self.config, self.t
        x = (batch - self.mean) * self.scale[:, None]
        pre = torch.einsum("bmd,fmd->bf", x, self.W_enc) + self.b_enc
        f = pre.relu()
        s = self.W_dec.norm(dim=-1).sum(dim=1)
        k = round(12 + (4 - 12) * t / 8) if t < 8 else 4
        v = (f * s).detach()
        if c.activation == "batchtopk":
            kept = torch.zeros(B * F).scatter(0, v.flatten().topk(B * k).indices, 1.0).view(B, F) * (v > 0)
            lowest = float(v[kept.bool()].min())
        else:
            kept = torch.zeros(B, F).scatter(1, v.topk(k, dim=1).indices, 1.0) * (v > 0)
        error = x - torch.einsum("bf,fmd->bmd", f * kept, self.W_dec) - self.b_dec
        loss = error.norm(dim=-1).mean() if c.loss == "l2norm" else (error**2).mean()

        self.since_fired += B
        self.since_fired[kept.sum(0) > 0] = 0
        dead = self.since_fired >= c.dead_tokens
        if dead.any():
            self.aux_steps += 1
            k_aux = min(D // 2, int(dead.sum()))
            v_dead = torch.where(dead, v, -1.0)
            chosen = torch.zeros(B, F).scatter(1, v_dead.topk(k_aux, dim=1).indices, 1.0)
            target = error.detach().flatten(1)
            aux = (f * chosen) @ self.W_dec.flatten(1)
            variance = (target - target.mean(0)).pow(2).sum(1).mean()
            loss = loss + c.auxk_coef * (target - aux).pow(2).sum(1).mean() / variance
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, c.clip)
        rate = c.lr * (t + 1) / 5 if t < 5 else c.lr * (30 - t) / 5 if t >= 26 else c.lr
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        if c.activation == "batchtopk":
            memory = min(0.999, t / (t + 9))
            self.theta = memory * self.theta + (1 - memory) * lowest
        self.t += 1


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
@pytest.mark.parametrize("loss", ["l2norm", "mse"])
def test_twenty_steps_equal_the_dense_transcription(activation, loss):
    trainer, config = make(activation, loss=loss)
    dense = Dense(trainer.crosscoder, config)
    clipped = 0
    for batch in batches(20):
        trainer.step(batch)
        dense.step(batch)
        total = torch.stack([p.grad.norm() for p in dense.parameters]).norm()
        clipped += float(total) > config.clip * 0.999
    assert dense.aux_steps >= 10, "the comparison must cover AuxK"
    assert clipped >= 5 or loss == "mse", "the comparison must cover clipping"
    for name, want in zip(("W_enc", "b_enc", "W_dec", "b_dec"), dense.parameters, strict=True):
        got = getattr(trainer.crosscoder, name)
        assert ((got - want).norm() / want.norm()).item() <= 1e-5, name
    assert torch.equal(trainer.tokens_since_fired, dense.since_fired)
    if activation == "batchtopk":
        assert float(trainer.crosscoder.threshold[0]) == pytest.approx(dense.theta, rel=1e-5)
        assert len(trainer.crosscoder.threshold.unique()) == 1


def test_threshold_is_set_by_the_first_step():
    trainer, _ = make("batchtopk")
    trainer.step(batches(1)[0])
    assert float(trainer.crosscoder.threshold[0]) > 0


def test_inference_l0_matches_k_after_training():
    config = TrainConfig(dict_size=F, k=4, steps=250, batch_size=B, lr=3e-3)
    crosscoder = Crosscoder(F, M, D, activation="batchtopk", k=4)
    trainer = Trainer(crosscoder, config)
    data = batches(250)
    crosscoder.initialize(data[0], init="independent", seed=0)
    for batch in data:
        trainer.step(batch)
    values, _ = crosscoder.encode(torch.cat(data[-20:]))
    assert len(values) / (20 * B) == pytest.approx(4, rel=0.1)


def dense_penalty(trainer: Trainer, batch: torch.Tensor, weight: float) -> torch.Tensor:
    """Loss of relu and jumprelu written out densely, with gradients for all parameters."""
    c, config = trainer.crosscoder, trainer.config
    x = c.normalize(batch)
    pre = torch.einsum("bmd,fmd->bf", x, c.W_enc) + c.b_enc
    if config.activation == "relu":
        f = pre.relu()
        penalty = (f * c.W_dec.norm(dim=-1).sum(1)).sum(1).mean()
        loss_weight = config.l1_coef
    else:
        theta, width = c.threshold, config.bandwidth
        fires = (pre > theta).float()
        window = ((pre - theta).abs() < width / 2).float()
        # values of the forward pass, gradients of the straight-through estimator
        f = (pre * fires).detach() + fires * (pre - pre.detach())
        f = f - (theta - theta.detach()) * (theta.detach() / width) * window
        l0 = (fires.sum(1).mean()).detach() - ((theta - theta.detach()) / width * window).sum(1).mean()
        penalty = (l0 / 12 - 1) ** 2  # k at step 0 is k_start
        loss_weight = config.l0_coef
    error = x - torch.einsum("bf,fmd->bmd", f, c.W_dec) - c.b_dec
    return error.norm(dim=-1).mean() + loss_weight * weight * penalty


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_first_step_of_the_penalised_objectives_equals_the_dense_transcription(activation):
    trainer, _ = make(activation, bandwidth=0.3)
    twin, _ = make(activation, bandwidth=0.3)
    batch = batches(1)[0]
    loss = dense_penalty(twin, batch, weight=1 / 4)
    parameters = list(twin.crosscoder.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    result = trainer.step(batch)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    total = torch.stack([g.norm() for g in gradients]).norm()
    for (name, got), want in zip(trainer.crosscoder.named_parameters(), gradients, strict=True):
        clipped = want * min(1.0, 0.7 / float(total))
        torch.testing.assert_close(got.grad, clipped, rtol=1e-4, atol=1e-7, msg=name)


def test_jumprelu_approaches_its_l0_target():
    config = TrainConfig(activation="jumprelu", dict_size=F, k=5, steps=1200, batch_size=B, lr=3e-3)
    crosscoder = Crosscoder(F, M, D, activation="jumprelu", k=5)
    trainer = Trainer(crosscoder, config)
    data = batches(1200)
    crosscoder.initialize(data[0], init="independent", seed=0)
    active = [trainer.step(batch).n_active / B for batch in data]
    assert sum(active[-20:]) / 20 == pytest.approx(5, rel=0.25)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights():
    trainer, _ = make("batchtopk")
    good = batches(2)
    trainer.step(good[0])
    before = {name: p.detach().clone() for name, p in trainer.crosscoder.named_parameters()}
    bad = good[1].clone()
    bad[3, 1, 2] = torch.nan
    with pytest.raises(FastdiffError, match="step 1: the loss is nan"):
        trainer.step(bad)
    for name, parameter in trainer.crosscoder.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_a_gradient_that_is_not_finite_stops_before_the_update(clip, monkeypatch):
    trainer, _ = make("batchtopk")
    trainer.config = trainer.config.model_copy(update={"clip": clip})
    before = trainer.crosscoder.W_dec.detach().clone()

    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, error):
            return error.square().mean()

        @staticmethod
        def backward(ctx, d_loss):
            return torch.full((B, M, D), torch.inf)

    monkeypatch.setattr("fastdiff.crosscoder.losses.reconstruction", lambda error, _: Overflows.apply(error))
    with pytest.raises(FastdiffError, match="step 0: the gradient is"):
        trainer.step(batches(1)[0])
    assert torch.equal(trainer.crosscoder.W_dec, before)


def test_state_carries_everything_to_another_trainer():
    trainer, config = make("batchtopk")
    data = batches(12)
    for batch in data[:6]:
        trainer.step(batch)
    copy = Crosscoder(F, M, D, activation="batchtopk", k=config.k)
    copy.load_state_dict(trainer.crosscoder.state_dict())
    other = Trainer(copy, config)
    other.load_state({k: v.clone() for k, v in trainer.state().items()}, trainer.step_number)
    for batch in data[6:]:
        trainer.step(batch)
        other.step(batch)
    for (name, a), (_, b) in zip(copy.state_dict().items(), trainer.crosscoder.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(other.tokens_since_fired, trainer.tokens_since_fired)
