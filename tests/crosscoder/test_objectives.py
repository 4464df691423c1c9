"""Every objective against a dense float64 transcription that shares no code with the trainer; batches in parts."""

import pytest
import torch
from objectives import B, F, K, batch, dense_loss, leaves, make, selected

from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer

OBJECTIVES = [
    *[(M, {"activation": activation}) for M in (1, 2, 3) for activation in ("batchtopk", "topk", "relu", "jumprelu")],
    (3, {"loss": "mse"}),
    (1, {"activation": "topk", "multi_topk_coef": 0.125}),
    (2, {"multi_topk_coef": 0.5, "code_norm": "sae"}),
    (2, {"code_norm": "none", "loss": "mse"}),
    (3, {"activation": "topk", "code_norm": "sae"}),
    (2, {"delta_coef": 0.7}),
    (3, {"delta_coef": 0.7, "loss": "mse"}),
    (1, {"activation": "topk", "matryoshka": (0.125, 0.5)}),
    (2, {"matryoshka": (0.25, 0.5), "delta_coef": 0.3}),
    (2, {"activation": "relu", "matryoshka": (0.3,), "loss": "mse"}),
    (3, {"shared_latents": 8}),
    (2, {"exclusive": 0.1, "delta_coef": 1.0}),
    (3, {"exclusive": 0.1, "shared_latents": 5, "activation": "topk", "matryoshka": (0.5,), "multi_topk_coef": 0.1}),
    (2, {"activation": "relu", "shared_latents": 8, "shared_penalty": 0.2}),
    (2, {"activation": "relu", "code_norm": "none", "delta_coef": 0.5}),
    (3, {"activation": "relu", "code_norm": "sae", "exclusive": 0.1, "l1_coef": 0.3, "loss": "mse"}),
    (2, {"activation": "jumprelu", "sparsity": "l0", "l0_coef": 0.02, "shared_latents": 8}),
    (2, {"activation": "jumprelu", "sparsity": "l0", "l0_coef": 0.02, "exclusive": 0.1, "delta_coef": 0.5}),
    (2, {"activation": "jumprelu", "sparsity": "tanh", "l0_coef": 0.1, "preact_coef": 0.01, "shared_latents": 8}),
    (1, {"activation": "jumprelu", "sparsity": "tanh", "tanh_scale": 2.0, "code_norm": "sae"}),
    (3, {"activation": "jumprelu", "preact_coef": 0.05, "code_norm": "none", "loss": "mse"}),
]  # fmt: skip


def assert_gradients(trainer, loss, p, *, rtol, atol) -> None:
    """The parameters' gradients against those of the transcription's free weights."""
    n = trainer.config.shared_latents
    gradients = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    # every copy of a tied row has the gradient of the one row that the transcription reads
    gradients["W_dec"][:n] = gradients["W_dec"][:n, :1].clone()
    for name, parameter in trainer.crosscoder.named_parameters():
        assert bool(gradients[name].any()), name
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(("M", "options"), OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "rtol", "atol"),
    [("torch", torch.float64, 1e-9, 1e-12), ("dense", torch.float64, 1e-6, 1e-9), ("torch", torch.float32, 2e-4, 2e-6)],
    ids=["torch-64", "dense-64", "torch-32"],
)  # fmt: skip
def test_loss_and_every_gradient_equal_the_dense_transcription(M, options, backend, dtype, rtol, atol):
    trainer = make(M, backend=backend, dtype=dtype, **options)
    p = leaves(trainer.crosscoder)
    loss = dense_loss(trainer.config, p, batch(M).double())
    trainer.step(batch(M))
    assert trainer.window().loss == pytest.approx(loss.item(), rel=max(rtol, 1e-9))
    assert_gradients(trainer, loss, p, rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
@pytest.mark.parametrize(
    ("M", "options"),
    [
        (1, {}),
        (2, {"code_norm": "sae"}),
        (3, {"code_norm": "none", "loss": "mse"}),
        (2, {"exclusive": 0.1, "shared_latents": 6, "delta_coef": 0.5}),
        (2, {"matryoshka": (0.5,), "multi_topk_coef": 0.2}),
    ],
    ids=str,
)
def test_auxk_on_top_of_every_objective(M, options, activation):
    trainer = make(M, activation=activation, auxk_coef=0.3, dead_tokens=100, dtype=torch.float64, **options)
    silent = torch.arange(F) % 3 > 0
    trainer.tokens_since_fired[silent] = 100
    p, x = leaves(trainer.crosscoder), batch(M).double()
    dead = silent & ~selected(trainer.config, p, x).any(dim=0)
    assert 5 < int(dead.sum()) < int(silent.sum()), "some must choose among dead latents, and some must have fired"
    loss = dense_loss(trainer.config, p, x, dead)
    trainer.step(batch(M))
    figures = trainer.window()
    assert figures.n_dead == int(dead.sum())
    assert figures.loss == pytest.approx(loss.item(), rel=1e-9)
    assert_gradients(trainer, loss, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
@pytest.mark.parametrize("M", [1, 3])
def test_one_model_or_three_through_the_fused_step(M, activation):
    options = {"activation": activation, "auxk_coef": 1 / 32, "dead_tokens": 3 * B, "clip": 0.5}
    fused, plain = make(M, kind=make_trainer, **options), make(M, backend="dense", **options)
    assert type(fused) is FusedTrainer
    for step in range(8):
        fused.step(batch(M, step))
        plain.step(batch(M, step))
    assert plain.window().loss == pytest.approx(fused.window().loss, rel=1e-5)
    for (name, a), b in zip(fused.crosscoder.named_parameters(), plain.crosscoder.parameters(), strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5, name


@pytest.mark.parametrize("loss", ["l2norm", "mse"])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "topk"},
        {"activation": "topk", "multi_topk_coef": 0.2, "matryoshka": (0.5,), "code_norm": "none"},
        {"activation": "relu", "delta_coef": 0.5, "shared_latents": 6},
        {"activation": "jumprelu"},
        {"activation": "jumprelu", "sparsity": "l0", "l0_coef": 0.02, "exclusive": 0.1},
        {"activation": "jumprelu", "sparsity": "tanh", "l0_coef": 0.1, "preact_coef": 0.01},
    ],
    ids=str,
)
def test_parts_of_a_batch_add_up_to_it(options, loss):
    options = {"loss": loss, "dtype": torch.float64, "clip": 0.5, "sparsity_warmup_steps": 3, **options}
    whole, parts = make(**options), make(micro_batch=B // 4, **options)
    for step in range(6):
        whole.step(batch(seed=step))
        parts.step(batch(seed=step))
        a, b = whole.window(), parts.window()
        assert b.loss == pytest.approx(a.loss, rel=1e-9)
        assert (b.n_active, b.n_tokens) == (a.n_active, a.n_tokens)
        torch.testing.assert_close(b.squared_error, a.squared_error, rtol=1e-9, atol=0)
    for (name, a), b in zip(whole.crosscoder.named_parameters(), parts.crosscoder.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9, msg=name)
    assert torch.equal(whole.tokens_since_fired, parts.tokens_since_fired)


@pytest.mark.parametrize("options", [{}, {"loss": "mse", "code_norm": "sae", "delta_coef": 0.4}], ids=str)
def test_batchtopk_selects_and_auxk_normalises_within_the_part(options):
    n = B // 4
    trainer = make(micro_batch=n, auxk_coef=0.3, dead_tokens=50, dtype=torch.float64, **options)
    silent = torch.arange(F) % 3 > 0
    trainer.tokens_since_fired[silent] = 100
    p, x = leaves(trainer.crosscoder), batch().double()
    masks = [selected(trainer.config, p, part) for part in x.split(n)]
    assert [int(mask.sum()) for mask in masks] == 4 * [n * K]
    assert not torch.equal(torch.cat(masks), selected(trainer.config, p, x)), "a part must select other pairs"
    # who is dead is a matter of the whole batch
    dead = silent & ~torch.cat(masks).any(dim=0)
    loss = sum(dense_loss(trainer.config, p, part, dead) for part in x.split(n)) / 4
    trainer.step(batch())
    assert trainer.window().loss == pytest.approx(loss.item(), rel=1e-9)
    assert_gradients(trainer, loss, p, rtol=1e-9, atol=1e-12)
