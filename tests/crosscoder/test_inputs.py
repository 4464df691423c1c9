"""What a crosscoder reads: all models, some of them, a difference. Each trains as if it had been stored so."""

import h5py
import numpy as np
import pytest
import torch
from objectives import B, D, F, K, batch

from fastdiff.config import TrainConfig, validated
from fastdiff.crosscoder import train as stage
from fastdiff.crosscoder.fused_trainer import FusedTrainer, make_trainer
from fastdiff.crosscoder.inputs import chosen_models, input_stats, n_inputs, take
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.errors import InputError, OptionError
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter


def make_store(path, x: torch.Tensor, *, bos_every: int = 0):
    """A store of activations [n, M, D]; every so many rows are of role bos."""
    n, M, width = x.shape
    i = np.arange(n)
    roles = (i % bos_every > 0).astype(np.uint8) if bos_every else i * 0 + 1
    meta = {"models": [{"name": str(m)} for m in range(M)], "roles": ["bos", "text"], "sources": [{"dataset": "d"}]}
    dtype = str(x.dtype).removeprefix("torch.")
    with StoreWriter(path, n_rows=n, n_models=M, d_model=width, dtype=dtype, shard_rows=3000, meta=meta) as w:
        w.append(x, token_ids=i, sequence_ids=i // 10, positions=i % 10, roles=roles, sources=i * 0)
    return path


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_taken():
    x = random(5, 3, 4).bfloat16()
    assert take(x, "all") is x
    assert torch.equal(take(x, "1"), x[:, 1:2])
    assert torch.equal(take(x, "2,0"), torch.stack([x[:, 2], x[:, 0]], dim=1))
    assert take(x, "1").dtype == torch.bfloat16 and take(x, "2,0").is_contiguous()
    difference = take(x, "difference")
    assert difference.dtype == torch.float32 and torch.equal(difference[:, 0], x[:, 1].float() - x[:, 0].float())
    assert [n_inputs(inputs, 3) for inputs in ("all", "1", "2,0", "difference")] == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("inputs", "n_stored"), [("2", 2), ("0,2", 2), ("0,0", 2), ("difference", 1), ("", 2), (",", 2), ("9" * 30, 2)]
)
def test_models_that_are_not_there_are_refused(inputs, n_stored):
    with pytest.raises(OptionError, match=f"the store has {n_stored} models, numbered from 0"):
        chosen_models(inputs, n_stored)
    with pytest.raises(OptionError, match="--inputs"):
        n_inputs(inputs, n_stored)


@pytest.mark.parametrize("inputs", ["both", "-1", "0.5", "0 1", "all,1", "difference,2"])
def test_inputs_that_mean_nothing_are_refused(inputs):
    with pytest.raises(OptionError, match="inputs must be all, difference or numbers of models"):
        validated(TrainConfig, {"inputs": inputs})


def test_a_number_in_yaml_is_a_model():
    assert TrainConfig(inputs=1).inputs == "1"


@pytest.mark.parametrize("inputs", ["all", "1", "2,0", "difference"])
@pytest.mark.parametrize("bos_every", [0, 7])
def test_statistics_are_those_of_numpy_in_float64(tmp_path, inputs, bos_every):
    # large means, small differences: a sum in the storage type would be off in the second digit
    x = (5 + random(9000, 1, D) + 0.05 * random(9000, 3, D, seed=1)).bfloat16()
    with ActivationStore(make_store(tmp_path / "acts", x, bos_every=bos_every)) as store:
        mean, variance = input_stats(store, inputs)
    rows = np.arange(9000) % bos_every > 0 if bos_every else np.full(9000, True)
    taken = take(x, inputs).double().numpy()[rows]
    assert mean.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), taken.mean(axis=0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(variance.numpy(), taken.var(axis=0).sum(axis=1), rtol=1e-11)


def test_statistics_of_a_difference_refuse_nan_and_overflow(tmp_path):
    spoilt = make_store(tmp_path / "spoilt", random(100, 2, D))
    with h5py.File(spoilt / "shard-00000.h5", "r+") as f:
        f["activations"][50, 0, 3] = np.nan
    x = random(100, 2, D)
    x[50, :, 3] = torch.tensor([-3e38, 3e38])  # finite, but for their difference
    for store_path in (spoilt, make_store(tmp_path / "large", x)):
        with ActivationStore(store_path) as store, pytest.raises(InputError, match=r"difference .* NaN or infinite"):
            input_stats(store, "difference")


@pytest.mark.parametrize("inputs", ["all", "1", "2,0", "difference"])
def test_denormalize_undoes_normalize(inputs):
    stored = 3 + random(20, 3, D)
    M = n_inputs(inputs, 3)
    c = Crosscoder(F, M, D, activation="relu", k=K, inputs=inputs)
    c.input_mean.copy_(random(M, D, seed=2))
    c.input_scale.copy_(torch.linspace(0.5, 2.0, M))
    x = c.normalize(stored)
    assert x.shape == (20, M, D)
    torch.testing.assert_close(x, (take(stored, inputs) - c.input_mean) * c.input_scale[:, None])
    torch.testing.assert_close(c.denormalize(x), c.take(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"activation": "topk"}, {"activation": "relu"}, {"backend": "dense"}], ids=str)
@pytest.mark.parametrize("inputs", ["0", "1", "difference"])
def test_a_plain_or_difference_autoencoder_trains_as_if_its_input_had_been_stored(inputs, options):
    stored = [batch(2, step).bfloat16() for step in range(6)]
    taken = [x[:, 1:].float() - x[:, :1].float() for x in stored]
    if inputs != "difference":
        taken = [x[:, int(inputs) :][:, :1] for x in stored]
    trained = []
    for spec, data in ((inputs, stored), ("all", taken)):
        config = TrainConfig(**{"dict_size": F, "k": K, "steps": 10, "batch_size": B, "lr": 1e-3, "inputs": spec,
                                "dead_tokens": 2 * B, **options})  # fmt: skip
        c = Crosscoder(F, 1, D, activation=config.activation, k=K, inputs=spec)
        c.input_mean.fill_(0.1)
        c.input_scale.fill_(1.7)
        c.initialize(c.normalize(data[0]), init="independent", seed=0)
        trainer = make_trainer(c, config)
        assert isinstance(trainer, FusedTrainer) == (config.activation != "relu" and config.backend != "dense")
        for x in data:
            trainer.step(x)
        trained.append((c, trainer.state(), trainer.window().loss))
    (a, state, loss), (b, other, same) = trained
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert all(torch.equal(state[name], other[name]) for name in state) and loss == same


@pytest.mark.parametrize("inputs", ["1", "2,0", "difference"])
def test_the_stage_trains_on_the_inputs_asked_for(tmp_path, inputs):
    x = 2 + random(600, 3, D)
    stores = {inputs: make_store(tmp_path / "stored", x), "all": make_store(tmp_path / "taken", take(x, inputs))}
    found = []
    for spec, store in stores.items():
        config = TrainConfig(dict_size=F, k=K, steps=8, batch_size=B, inputs=spec, holdout=0.1, threads=1, device="cpu")
        crosscoder, facts = load_crosscoder(stage.train(store, tmp_path / f"run-{spec}", config))
        assert crosscoder.inputs == facts["inputs"] == spec
        found.append(crosscoder.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-6, atol=1e-7, msg=name)
