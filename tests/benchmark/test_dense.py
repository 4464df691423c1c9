"""The dense step is what published trainers compute, and fastdiff's step agrees with it."""

import copy

import pytest
import torch

from fastdiff.benchmark.data import synthetic
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.steps import fused_steps, step_config

SHAPE = Shape("small", 48, 2, 20, 128, 6)
CPU = torch.device("cpu")


def batches(n=4, dead_share=0.25):
    return synthetic(SHAPE, CPU, dead_share=dead_share, n_batches=n, dtype=torch.float32)


def run(trainer, data):
    losses = [trainer.step(batch) for batch in data.batches]
    trainer.window()
    return losses


def moved(found, expected, start):
    """Largest difference of a weight tensor, over how far it moved."""
    return max(
        float((found[name] - expected[name]).detach().norm() / (expected[name] - start[name]).detach().norm())
        for name in expected
    )


@pytest.mark.parametrize("loss", ["l2norm", "mse"])
@pytest.mark.parametrize("options", [{"published": False}, {"published": False, "fused": True}])
def test_leaving_passes_out_changes_nothing(loss, options):
    data = batches()
    config = step_config(SHAPE, lr=1e-3, clip=0.2, loss=loss)
    trainers = [DenseTrainer(data.crosscoder, config), DenseTrainer(data.crosscoder, config, **options)]
    for trainer in trainers:
        trainer.tokens_since_fired[data.dead] = config.dead_tokens
    first, second = (run(trainer, data) for trainer in trainers)
    assert first == pytest.approx(second, rel=1e-5)
    start = dict(data.crosscoder.named_parameters())
    assert moved(trainers[1].weights(), trainers[0].weights(), start) < 1e-4
    assert torch.equal(trainers[0].tokens_since_fired, trainers[1].tokens_since_fired)
    torch.testing.assert_close(trainers[0].threshold, trainers[1].threshold)


def test_its_objective_by_hand():
    data = batches(n=1)
    config = step_config(SHAPE, auxk_coef=0.0)
    loss = DenseTrainer(data.crosscoder, config).step(data.batches[0])
    c = copy.deepcopy(data.crosscoder).double().requires_grad_(False)
    x = data.batches[0].double()
    f = (x.flatten(1) @ c.W_enc.flatten(1).T + c.b_enc).relu()
    score = f * c.W_dec.norm(dim=-1).sum(dim=1)
    kept = f * (score >= score.flatten().sort(descending=True).values[SHAPE.n_pairs - 1])
    error = x - torch.einsum("bf,fmd->bmd", kept, c.W_dec) - c.b_dec
    assert loss == pytest.approx(float(error.norm(dim=-1).mean()), rel=1e-5)


@pytest.mark.parametrize("dead_share", [0.0, 0.25])
def test_fastdiff_agrees_with_it(dead_share):
    data = batches(n=5, dead_share=dead_share)
    config = step_config(SHAPE, lr=1e-3, clip=0.2, precision="float32")
    start = {name: p.detach().clone() for name, p in data.crosscoder.named_parameters()}
    dense = DenseTrainer(data.crosscoder, config)
    dense.tokens_since_fired[data.dead] = config.dead_tokens
    ours = fused_steps(data, config)
    run(dense, data)
    run(ours, data)
    assert moved(dict(data.crosscoder.named_parameters()), dense.weights(), start) < 1e-4
    assert torch.equal(ours.tokens_since_fired, dense.tokens_since_fired)


def test_auxk_moves_the_dead_only_when_there_are_any():
    # 0.25 · 128 latents are dead, D / 2 = 10 of them are taken for each token
    data = batches(n=2)
    found = []
    for coef in (0.0, 1.0):
        config = step_config(SHAPE, lr=1e-3, auxk_coef=coef)
        trainer = DenseTrainer(data.crosscoder, config)
        trainer.tokens_since_fired[data.dead] = config.dead_tokens
        run(trainer, data)
        found.append(trainer.weights()["W_dec"][data.dead].detach())
    still = data.crosscoder.W_dec.detach()[data.dead]
    assert torch.equal(found[0], still) and not torch.equal(found[1], still)


def test_autocast_computes_the_products_in_less():
    data = batches(n=1)
    plain, low = (
        DenseTrainer(data.crosscoder, step_config(SHAPE), autocast=kind).step(data.batches[0])
        for kind in (None, torch.bfloat16)
    )
    assert plain != low and plain == pytest.approx(low, rel=0.02)


def test_it_refuses_what_it_does_not_compute():
    with pytest.raises(ValueError, match="batchtopk, got topk"):
        DenseTrainer(batches(1).crosscoder, step_config(SHAPE, activation="topk"))


def test_it_does_not_touch_the_weights_it_started_from():
    data = batches(n=2)
    before = copy.deepcopy(data.crosscoder.state_dict())
    run(DenseTrainer(data.crosscoder, step_config(SHAPE, lr=1e-2)), data)
    assert all(torch.equal(before[name], tensor) for name, tensor in data.crosscoder.state_dict().items())
