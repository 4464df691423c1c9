"""Defects found in published trainers, one test each: what they do wrong is in the docstring."""

import json

import numpy as np
import pytest
import torch
from objectives import B, D, F, K, batch, make

from fastdiff.config import TrainConfig, validated
from fastdiff.crosscoder import train as stage
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.inputs import input_stats
from fastdiff.crosscoder.metrics import evaluate
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import OptionError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

both = pytest.mark.parametrize("kind", [Trainer, FusedTrainer])


def step_from(trainer) -> dict[str, torch.Tensor]:
    """By how much one step moves each parameter; Adam does not move what has no gradient."""
    c = trainer.crosscoder
    before = {name: p.detach().clone() for name, p in c.named_parameters()}
    trainer.step(batch())
    return {name: (p.detach() - before[name]).abs() for name, p in c.named_parameters()}


def make_store(path, n=600, mean=0.0, dtype="float32"):
    x = mean + torch.randn(n, 2, D, generator=torch.Generator().manual_seed(0))
    i = np.arange(n)
    meta = {"models": [{"name": "b"}, {"name": "t"}], "roles": ["text"], "sources": [{"dataset": "d"}]}
    with StoreWriter(path, n_rows=n, n_models=2, d_model=D, dtype=dtype, shard_rows=n, meta=meta) as w:
        w.append(x.to(getattr(torch, dtype)), token_ids=i, sequence_ids=i // 10, positions=i % 10, roles=i * 0,
                 sources=i * 0)  # fmt: skip
    return path


@both
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_auxk_reaches_the_encoder_of_dead_latents(kind, activation):
    """sparsify 1.3: AuxK moves the decoder, but its gradient for the encoder is exactly 0."""
    trainer = make(kind=kind, activation=activation, auxk_coef=1.0, dead_tokens=1)
    moved = step_from(trainer)
    silent = trainer.tokens_since_fired > 0
    assert 5 < int(silent.sum()) < F
    for name in ("W_enc", "b_enc", "W_dec"):
        assert bool(moved[name][silent].any()), name
    still = make(kind=kind, activation=activation, auxk_coef=0.0, dead_tokens=1)
    assert not step_from(still)["W_enc"][silent].any()


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_multi_topk_reaches_the_encoder(activation):
    """sparsify 1.3: Multi-TopK moves the decoder, but its gradient for the encoder is exactly 0."""
    plain = make(activation=activation, k=1)
    more = make(activation=activation, k=1, multi_topk_coef=0.1)
    unmoved = step_from(plain)["W_enc"].amax(dim=(1, 2)) == 0
    assert unmoved.any() and bool(step_from(more)["W_enc"][unmoved].any())


@both
def test_negative_pre_activations_have_no_gradient(kind):
    """sparsify 1.3: the encoder's backward pass has no ReLU mask, so values of 0 still move it."""
    trainer = make(kind=kind, auxk_coef=1.0, dead_tokens=1)
    trainer.crosscoder.b_enc.data[::2] = -100.0
    moved = step_from(trainer)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not moved[name][::2].any(), name
        assert bool(moved[name][1::2].any()), name


def test_auxk_explains_the_error_without_the_decoder_bias():
    """sparsify 1.3: the dead latents' guess has b_dec added, which the error has already lost."""
    plain, aux = make(), make(auxk_coef=1.0, dead_tokens=1)
    for trainer in (plain, aux):
        trainer.crosscoder.b_dec.data += 3.0
        trainer.step(batch())
    assert torch.equal(plain.crosscoder.b_dec.grad, aux.crosscoder.b_dec.grad)
    assert not torch.equal(plain.crosscoder.W_dec.grad, aux.crosscoder.W_dec.grad)


@both
def test_the_auxiliary_loss_is_trained_and_reported(kind):
    """crosscode: the trainer computes the sum, but returns the reconstruction alone: weight 0 and 1000 train alike."""
    trained = []
    for coef in (0.0, 1000.0):
        trainer = make(kind=kind, auxk_coef=coef, dead_tokens=1)
        trainer.step(batch())
        trained.append((trainer.crosscoder.W_dec.detach().clone(), trainer.window().loss))
    assert trained[1][1] > 10 * trained[0][1]
    assert (trained[1][0] - trained[0][0]).abs().max() > 1e-3


def test_the_pre_activation_loss_reaches_dead_latents():
    """crosscode: it is fed activations after JumpReLU, so dead latents get no gradient."""
    trainer = make(activation="jumprelu", l0_coef=0.0, preact_coef=0.1)
    trainer.crosscoder.b_enc.data[0] = -50.0
    trainer.step(batch())
    s = trainer.crosscoder.code_norm()[0].item()
    assert trainer.tokens_since_fired[0] == B
    assert float(trainer.crosscoder.b_enc.grad[0]) == pytest.approx(-0.1 * s, rel=1e-2)
    assert bool(trainer.crosscoder.W_enc.grad[0].any())


@both
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_selected_activations_are_never_negative(kind, activation):
    """crosscode: TopK takes the k largest pre-activations even where they are negative."""
    trainer = make(kind=kind, activation=activation, k=F)
    trainer.crosscoder.k = F
    pre = trainer.crosscoder.pre_activations(trainer.crosscoder.normalize(batch()))
    assert bool((pre < 0).any())
    trainer.step(batch())
    assert trainer.window().n_active == int((pre > 0).sum())
    values, _ = trainer.crosscoder.encode(trainer.crosscoder.normalize(batch()))
    assert len(values) and bool((values > 0).all())


@both
def test_inputs_are_normalised_once(kind):
    """dictionary_learning (jkminder): with decoupled code normalisation they are normalised twice."""
    stored, given = make(kind=kind), make(kind=kind)
    c = stored.crosscoder
    c.input_mean.fill_(5.0)
    c.input_scale.copy_(torch.tensor([0.5, 2.0]))
    for step in range(3):
        stored.step(5 + batch(seed=step) / c.input_scale[:, None])
        given.step(batch(seed=step))
    assert stored.window().loss == pytest.approx(given.window().loss, rel=1e-5)
    x = batch(seed=9)
    torch.testing.assert_close(c.normalize(5 + x / c.input_scale[:, None]), x, rtol=1e-4, atol=1e-5)


@both
def test_a_short_run_has_a_threshold(kind):
    """dictionary_learning (jkminder): it stays -1 before step 1000, and inference is a plain ReLU with L0 of 111."""
    trainer = make(kind=kind)
    for step in range(10):
        trainer.step(batch(seed=step))
    values, _ = trainer.crosscoder.encode(torch.cat([batch(seed=step) for step in range(10, 20)]))
    assert len(values) / (10 * B) == pytest.approx(K, rel=0.35)


@pytest.mark.parametrize("inputs", ["all", "difference"])
def test_statistics_of_a_bfloat16_store_are_those_of_float64(tmp_path, inputs):
    """dictionary_learning (jkminder): mean and deviation accumulate in the storage type, 0.035 off at a mean of 5."""
    with ActivationStore(make_store(tmp_path / "acts", n=5000, mean=5.0, dtype="bfloat16")) as store:
        mean, variance = input_stats(store, inputs)
        x = store.rows(np.arange(5000)).double()
    want = x if inputs == "all" else x[:, 1:] - x[:, :1]
    torch.testing.assert_close(mean, want.mean(dim=0), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(variance, want.var(dim=0, correction=0).sum(dim=1), rtol=1e-11, atol=0)


@both
def test_measuring_changes_no_counter_and_no_threshold(kind):
    """dictionary_learning (jkminder): a step that only logs resets dead counters."""
    trainer = make(kind=kind, auxk_coef=1 / 32, dead_tokens=2 * B)
    for step in range(4):
        trainer.step(batch(seed=step))
    assert bool((trainer.tokens_since_fired > 0).any())
    tensors = trainer.state() | trainer.crosscoder.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    evaluate(trainer.crosscoder, [batch(seed=7), batch(seed=8)])
    trainer.window()
    after = trainer.state() | trainer.crosscoder.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("normalize", ["rms", "none"])
def test_the_input_scale_is_kept_with_the_weights(tmp_path, normalize):
    """dictionary_learning (saprmarks): without normalisation checkpoints fail, with it the factor is not saved."""
    store = make_store(tmp_path / "acts", mean=2.0)
    config = TrainConfig(dict_size=F, k=K, steps=3, batch_size=B, checkpoint_every=1, normalize=normalize, device="cpu")
    crosscoder, _ = load_crosscoder(stage.train(store, tmp_path / "run", config))
    with ActivationStore(store) as opened:
        mean, variance = input_stats(opened, "all")
    if normalize == "none":
        mean, variance = torch.zeros(2, D), torch.full((2,), float(D))
    torch.testing.assert_close(crosscoder.input_mean, mean.float())
    torch.testing.assert_close(crosscoder.input_scale, (D / variance).sqrt().float())


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_the_l0_gradient_has_the_whole_window(backend):
    """dictionary_learning (both): the window is taken on activations, which halves it and the gradient."""
    trainer = make(activation="jumprelu", sparsity="l0", l0_coef=1.0, bandwidth=0.4, backend=backend)
    c = trainer.crosscoder
    c.W_dec.data.zero_()  # only the penalty moves thresholds
    pre = c.pre_activations(c.normalize(batch()))
    inside = (pre - c.threshold).abs() < 0.2
    below = inside & (pre <= c.threshold)
    assert 0.3 < below.sum() / inside.sum() < 0.7
    trainer.step(batch())
    torch.testing.assert_close(c.threshold.grad, -inside.sum(dim=0) / 0.4 / B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "relu", "jumprelu"])
def test_every_activation_trains_all_the_steps_asked_for(tmp_path, activation):
    """diffing-toolkit: relu passes an argument its trainer does not have, and the number of steps never arrives."""
    store = make_store(tmp_path / "acts")
    config = TrainConfig(activation=activation, dict_size=F, k=K, steps=50, batch_size=B, log_every=1, device="cpu")
    directory = stage.train(store, tmp_path / "run", config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "train"] == list(range(1, 51))
    assert load_crosscoder(directory)[1]["steps"] == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 10}, "--max-steps: no such option"),
        ({"activation": "gated"}, "--activation: "),
        ({"sparsity": "l1"}, "--sparsity: "),
        ({"code_norm": "decoupled"}, "--code-norm: "),
        ({"matryoshka": (0.5, 0.25)}, "matryoshka must rise"),
        ({"matryoshka": (0.5, 1.0)}, "--matryoshka: must be less than 1"),
        (
            {"matryoshka": (0.25, 0.26), "dict_size": 16, "k": 4},
            "matryoshka must give different numbers of latents, got 4,4,16",
        ),
        ({"delta_coef": -1.0}, "--delta-coef: "),
        ({"shared_latents": 41, "dict_size": 40, "k": 4}, "shared_latents must not exceed dict_size=40"),
    ],
)
def test_unknown_options_are_refused(options, message):
    """Several: a key that no code reads is taken and does nothing."""
    with pytest.raises(OptionError, match=message):
        validated(TrainConfig, options)


@pytest.mark.parametrize(
    ("M", "options", "message"),
    [
        (2, {"activation": "relu", "multi_topk_coef": 0.1}, "--multi-topk-coef does not go with"),
        (2, {"activation": "jumprelu", "multi_topk_coef": 0.1}, "--multi-topk-coef does not go with"),
        (2, {"activation": "relu", "sparsity": "l0"}, "go with --activation jumprelu"),
        (2, {"activation": "topk", "preact_coef": 0.1}, "go with --activation jumprelu"),
        (1, {"delta_coef": 0.1}, "--delta-coef 0.1 needs two models"),
        (1, {"exclusive": 0.1}, "--exclusive 0.1 needs two models"),
        (1, {"shared_latents": 4}, "--shared-latents 4 needs two models"),
    ],
)
def test_options_that_would_do_nothing_are_refused(M, options, message):
    """Several: an option that the chosen trainer does not read is taken and does nothing."""
    config = TrainConfig(dict_size=F, k=K, **options)
    with pytest.raises(OptionError, match=message):
        make_trainer(Crosscoder(F, M, D, activation=config.activation, k=K), config)


@both
def test_gradients_do_not_add_up_across_steps(kind):
    """openai/sparse_autoencoder: the training loop has no zero_grad."""
    trainer = make(kind=kind, lr=1e-30, warmup_steps=0)  # too small to move a weight
    trainer.step(batch())
    first = trainer.state()["W_dec.exp_avg"].clone()
    trainer.step(batch())
    # 0.1·g, then 0.9·0.1·g + 0.1·g
    torch.testing.assert_close(trainer.state()["W_dec.exp_avg"], 1.9 * first, rtol=1e-5, atol=1e-9)


@both
def test_bias_gradients_belong_to_their_latents(kind):
    """clt-training: the bias gradient of a sparse matrix is added up by row instead of latent."""
    trainer = make(kind=kind, activation="topk")
    trainer.step(batch())
    fired = trainer.tokens_since_fired == 0
    assert 5 < int(fired.sum()) < F
    assert torch.equal(trainer.state()["b_enc.exp_avg"] != 0, fired)
