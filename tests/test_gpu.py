"""The same road on CUDA: run with `pytest -m gpu` on a machine that has it."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff.analyze.scaling import TARGETS, ScalingSums
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.trainer import Trainer
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


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_training_and_scaling_agree_with_the_cpu(activation):
    config = TrainConfig(activation=activation, dict_size=96, k=5, steps=10, batch_size=128, lr=1e-3, dead_tokens=256)
    data = batches(10)
    results = []
    for device in ("cpu", "cuda"):
        crosscoder = Crosscoder(96, 2, 16, activation=activation, k=5)
        crosscoder.initialize(data[0], init="independent", seed=0)
        crosscoder.to(device)
        trainer = Trainer(crosscoder, config)
        for batch in data:
            trainer.step(batch)
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
