"""The same road on CUDA: run with `pytest -m gpu` on a machine that has it."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff.analysis.scaling import TARGETS, ScalingSums
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import FastdiffError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # embedding_bag and index_add have no deterministic CUDA backward, and are not asked for one
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]


def batches(n):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(30, 2, 16, generator=generator)
    code = (torch.rand(n, 128, 30, generator=generator) < 0.1) * torch.rand(n, 128, 30, generator=generator)
    return torch.einsum("nbj,jmd->nbmd", code, mixing)


def config(**changed) -> TrainConfig:
    values = {
        "dict_size": 96,
        "k": 5,
        "steps": 40,
        "batch_size": 128,
        "lr": 1e-3,
        "dead_tokens": 256,
        "warmup_steps": 2,
    }
    return TrainConfig(**values | changed)


def trained(config: TrainConfig, n_steps: int, device: str = "cuda", capture: bool = True) -> FusedTrainer:
    data = batches(n_steps)
    crosscoder = Crosscoder(config.dict_size, 2, 16, activation=config.activation, k=config.k)
    crosscoder.initialize(data[0], init="independent", seed=0)
    trainer = FusedTrainer(crosscoder.to(device), config)
    for batch in data:
        if not capture:
            trainer._step._graph, trainer._step._warm = None, False
        trainer.step(batch.to(device))
    return trainer


def weights(trainer: FusedTrainer) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in (trainer.crosscoder.state_dict() | trainer.state()).items()}


@pytest.mark.parametrize(
    "options", [{}, {"clip_mode": "previous"}, {"moments": "bfloat16"}, {"micro_batch": 32}], ids=str
)
def test_a_replayed_graph_gives_the_bits_of_eager_steps(options):
    replayed, eager, again = (trained(config(**options), 12, capture=capture) for capture in (True, False, True))
    assert replayed._step._graph is not None
    for name, value in weights(replayed).items():
        assert torch.equal(value, weights(eager)[name]), name
        assert torch.equal(value, weights(again)[name]), name


def test_steps_do_not_wait_for_the_device():
    trainer = trained(config(), 3)
    more = [batch.to("cuda") for batch in batches(20)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in more:
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.window().n_steps == 23


def test_bfloat16_encoder_explains_as_much_as_float32():
    # same seed and batches; 0.0005 is what the kernels promise
    explained = []
    for precision in ("float32", "bfloat16"):
        trainer = trained(config(precision=precision, steps=400), 300)
        trainer.window()
        for batch in batches(20):
            trainer.step(batch.to("cuda"))
        figures = trainer.window()
        explained.append(float(1 - figures.squared_error.sum() / figures.spread.sum()))
    assert abs(explained[0] - explained[1]) <= 0.0005


def test_a_token_that_is_not_finite_stops_training_and_keeps_the_weights():
    trainer = trained(config(), 5)
    before = weights(trainer)
    bad = batches(6)[5].clone()
    bad[77, 1, 3] = torch.nan
    with pytest.raises(FastdiffError, match="step 5: the activations or scores of token 77"):
        for batch in (bad, *batches(3)):
            trainer.step(batch.to("cuda"))
            trainer._step.wait()
    for name, value in trainer.crosscoder.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name
    for name, moments in trainer._tensors.moments.items():
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            assert torch.equal(value.cpu(), before[f"{name}.{key}"]), name
    assert torch.equal(trainer.tokens_since_fired.cpu(), before["tokens_since_fired"])


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_training_and_scaling_agree_with_the_cpu(activation):
    options = config(activation=activation, precision="float32")
    data = batches(10)
    results = []
    for device in ("cpu", "cuda"):
        crosscoder = Crosscoder(96, 2, 16, activation=activation, k=5)
        crosscoder.initialize(data[0], init="independent", seed=0)
        crosscoder.to(device)
        trainer = make_trainer(crosscoder, options)
        for batch in data:
            trainer.step(batch.to(device))
        sums = ScalingSums.zeros(96, 2)
        x = crosscoder.normalize(data[0])
        values, selection = crosscoder.encode(x)
        sums.add(crosscoder.W_dec.detach().double(), crosscoder.b_dec.detach().double(), x, values, selection)
        betas = sums.betas(crosscoder.W_dec.detach().cpu())
        results.append((crosscoder.cpu().state_dict(), trainer.tokens_since_fired.cpu(), betas))
    (cpu, fired_cpu, betas_cpu), (gpu, fired_gpu, betas_gpu) = results
    for name in cpu:
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-3, atol=1e-4, msg=name)
    assert float((fired_cpu == fired_gpu).double().mean()) > 0.95
    for target in TARGETS:
        torch.testing.assert_close(betas_gpu[target], betas_cpu[target], rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("mode", ["exact", "block"])
def test_batches_on_the_device_are_those_of_the_cpu(tmp_path: Path, mode: str):
    values = np.random.default_rng(0).standard_normal((3000, 2, 256)).astype(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("activations", data=values)
    with ActivationStore(tmp_path / "a.h5") as store:
        shuffler = Shuffler(store, batch_size=100, seed=0, mode=mode, pool_rows=None if mode == "exact" else 512)
        device = torch.device("cuda")
        # used late and all kept: a batch must not be what was read after it into the same place
        there = list(shuffler.stream(0, 60, device))
        assert all(batch.device.type == "cuda" for batch in there)
        for step, batch in enumerate(there):
            assert torch.equal(batch.cpu(), shuffler.batch(step))
