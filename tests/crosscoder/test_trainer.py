"""Both trainers against a direct dense transcription of the published mathematics, with torch's own Adam."""

import pytest
import torch
from dense_step import NAMES, DenseStep

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.kernels.step import StepRates, StepSettings

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


def make(activation: str, kind=make_trainer, **options) -> tuple[Trainer | FusedTrainer, TrainConfig]:
    values = {
        "activation": activation,
        "dict_size": F,
        "k": 4,
        "k_start": 12,
        "k_anneal_steps": 8,
        "steps": 30,
        "batch_size": B,
        "lr": 3e-3,
        "warmup_steps": 5,
        "decay_steps": 4,
        "clip": 0.7,
        "dead_tokens": 3 * B,
        "sparsity_warmup_steps": 4,
    }
    config = TrainConfig(**values | options)
    crosscoder = Crosscoder(F, M, D, activation=activation, k=config.k)
    crosscoder.input_scale.copy_(torch.tensor([0.8, 1.3]))
    crosscoder.input_mean.copy_(torch.linspace(-0.5, 0.5, M * D).view(M, D))
    crosscoder.initialize(crosscoder.normalize(batches(1)[0]), init="independent", seed=7)
    return kind(crosscoder, config), config


def dense_twin(trainer: Trainer | FusedTrainer, config: TrainConfig) -> DenseStep:
    crosscoder = trainer.crosscoder
    settings = StepSettings(
        n_tokens=config.micro_batch or config.batch_size,
        n_micro=config.batch_size // (config.micro_batch or config.batch_size),
        k_max=config.k_start,
        selection=config.activation,
        loss=config.loss,
        auxk_coef=config.auxk_coef,
        dead_tokens=config.dead_tokens,
        clip=config.clip,
        clip_mode=config.clip_mode,
        precision="float32",
        moments="float32",
        seed=0,
    )
    return DenseStep(settings, crosscoder)


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
@pytest.mark.parametrize("loss", ["l2norm", "mse"])
@pytest.mark.parametrize("options", [{}, {"backend": "dense"}, {"micro_batch": 16}, {"clip_mode": "previous"}], ids=str)
def test_twenty_steps_equal_the_dense_transcription(activation, loss, options):
    trainer, config = make(activation, loss=loss, clip=0.7 if loss == "l2norm" else 0.05, **options)
    dense = dense_twin(trainer, config)
    for number, batch in enumerate(batches(20)):
        trainer.step(batch)
        k = round(12 + (4 - 12) * number / 8) if number < 8 else 4
        rate = config.lr * (number + 1) / 5 if number < 5 else config.lr
        dense.step(batch, StepRates(number, k, rate, min(0.999, number / (number + 9))))
    assert dense.aux_steps >= 10, "the comparison must cover AuxK"
    assert dense.clipped_steps >= 5, "the comparison must cover clipping"
    for name in NAMES:
        got, want = getattr(trainer.crosscoder, name), dense.parameters[name]
        assert ((got - want).norm() / want.norm()).item() <= 1e-5, name
    assert torch.equal(trainer.tokens_since_fired, dense.since_fired)
    if activation == "batchtopk":
        assert float(trainer.crosscoder.threshold[0]) == pytest.approx(dense.threshold, rel=1e-5)
        assert len(trainer.crosscoder.threshold.unique()) == 1
    figures = trainer.window()
    assert figures.loss == pytest.approx(sum(dense.losses), rel=1e-5)
    assert (figures.n_steps, figures.n_tokens, figures.n_active) == (20, 20 * B, dense.n_active)


@pytest.mark.parametrize(
    ("activation", "options", "kind"),
    [
        ("batchtopk", {}, FusedTrainer),
        ("topk", {"backend": "torch"}, FusedTrainer),
        ("batchtopk", {"backend": "dense"}, Trainer),
        ("jumprelu", {}, Trainer),
        ("relu", {"micro_batch": 16}, Trainer),
        ("topk", {"multi_topk_coef": 0.1}, Trainer),
        ("batchtopk", {"matryoshka": (0.5,)}, Trainer),
        ("topk", {"delta_coef": 0.1}, Trainer),
        ("batchtopk", {"shared_latents": 4}, Trainer),
        ("batchtopk", {"exclusive": 0.1}, Trainer),
        ("topk", {"code_norm": "sae"}, Trainer),
    ],
)
def test_a_fused_step_runs_what_it_can(activation, options, kind):
    assert type(make(activation, **options)[0]) is kind


@pytest.mark.parametrize(
    ("activation", "options", "message"),
    [
        ("relu", {"multi_topk_coef": 0.1}, "--multi-topk-coef does not go with --activation relu"),
        ("relu", {"sparsity": "tanh"}, "--sparsity go with --activation jumprelu"),
        ("topk", {"clip_mode": "previous", "clip": 0.0}, "--clip-mode previous does not go with --clip 0"),
        ("topk", {"clip_mode": "previous", "delta_coef": 1.0}, "--clip-mode previous does not go with --delta-coef"),
        ("relu", {"clip_mode": "previous"}, "--clip-mode previous does not go with --activation relu"),
        ("relu", {"moments": "bfloat16"}, "--moments bfloat16 does not go with --activation relu"),
        ("topk", {"moments": "bfloat16", "matryoshka": (0.5,)}, "--moments bfloat16 does not go with --matryoshka"),
        ("topk", {"clip_mode": "previous", "code_norm": "sae"}, "--clip-mode previous .* --code-norm sae"),
        ("batchtopk", {"preact_coef": 0.1}, "--preact-coef and --sparsity go with --activation jumprelu"),
        ("batchtopk", {"backend": "dense", "precision": "bfloat16"}, "--precision bfloat16 .*--backend dense"),
        ("jumprelu", {"clip_mode": "previous"}, "--clip-mode previous does not go with --activation jumprelu"),
        ("batchtopk", {"backend": "torch", "moments": "bfloat16"}, "needs the triton backend"),
    ],
)
def test_options_that_do_not_go_together_are_refused(activation, options, message):
    with pytest.raises(OptionError, match=message):
        make(activation, **options)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(OptionError, match="needs CUDA tensors, got cpu"):
        make("batchtopk", backend="triton")


def test_threshold_is_set_by_the_first_step():
    trainer, _ = make("batchtopk")
    trainer.step(batches(1)[0])
    assert float(trainer.crosscoder.threshold[0]) > 0


def test_inference_l0_matches_k_after_training():
    config = TrainConfig(dict_size=F, k=4, steps=250, batch_size=B, lr=3e-3)
    crosscoder = Crosscoder(F, M, D, activation="batchtopk", k=4)
    trainer = make_trainer(crosscoder, config)
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
        off = (l0 / 12 - 1).abs()  # k at step 0 is k_start
        penalty = torch.where(off <= 1 / 16, off**2, (2 * off - 1 / 16) / 16)
        loss_weight = config.l0_coef * x.norm(dim=-1).mean()
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
    trainer.step(batch)
    assert trainer.window().loss == pytest.approx(loss.item(), rel=1e-5)
    total = torch.stack([g.norm() for g in gradients]).norm()
    for (name, got), want in zip(trainer.crosscoder.named_parameters(), gradients, strict=True):
        clipped = want * min(1.0, 0.7 / float(total))
        torch.testing.assert_close(got.grad, clipped, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_jumprelu_approaches_its_l0_target():
    config = TrainConfig(activation="jumprelu", dict_size=F, k=5, steps=1200, batch_size=B, lr=3e-3)
    crosscoder = Crosscoder(F, M, D, activation="jumprelu", k=5)
    trainer = make_trainer(crosscoder, config)
    data = batches(1200)
    crosscoder.initialize(data[0], init="independent", seed=0)
    for batch in data[:-20]:
        trainer.step(batch)
    trainer.window()
    for batch in data[-20:]:
        trainer.step(batch)
    assert trainer.window().n_active / (20 * B) == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "message"), [(Trainer, "step 1: the loss is nan"), (FusedTrainer, "step 1: the activations .* of token 3")]
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(kind, message):
    trainer, _ = make("batchtopk", kind)
    good = batches(2)
    trainer.step(good[0])
    before = {name: p.detach().clone() for name, p in trainer.crosscoder.named_parameters()}
    bad = good[1].clone()
    bad[3, 1, 2] = torch.nan
    with pytest.raises(FastdiffError, match=message):
        trainer.step(bad)
    for name, parameter in trainer.crosscoder.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_a_gradient_that_is_not_finite_stops_before_the_update(clip, monkeypatch):
    trainer, _ = make("batchtopk", Trainer)
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Trainer, {}), (FusedTrainer, {}), (FusedTrainer, {"clip_mode": "previous"}), (FusedTrainer, {"micro_batch": 16})],
)
def test_state_carries_everything_to_another_trainer(kind, options):
    trainer, config = make("batchtopk", kind, **options)
    data = batches(12)
    for batch in data[:6]:
        trainer.step(batch)
    copy = Crosscoder(F, M, D, activation="batchtopk", k=config.k)
    copy.load_state_dict(trainer.crosscoder.state_dict())
    other = kind(copy, config)
    other.load_state({k: v.clone() for k, v in trainer.state().items()}, trainer.step_number)
    for batch in data[6:]:
        trainer.step(batch)
        other.step(batch)
    for (name, a), (_, b) in zip(copy.state_dict().items(), trainer.crosscoder.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(other.tokens_since_fired, trainer.tokens_since_fired)
