"""Interrupted training: killed at any moment, asked to stop, out of memory; and several seeds over one pass."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff import rundir
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.fused_trainer import FusedTrainer
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.train import directory_of, train, train_seeds
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import ResourceError
from fastdiff.kernels.torch_step import TorchStep
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "support" / "killed_training.py"
D = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "acts"
    generator = torch.Generator().manual_seed(0)
    n = 1500
    code = (torch.rand(n, 20, generator=generator) < 0.15) * torch.rand(n, 20, generator=generator)
    x = torch.einsum("nj,jmd->nmd", code, torch.randn(20, 2, D, generator=generator))
    x += 0.05 * torch.randn(n, 2, D, generator=generator)
    i = np.arange(n)
    meta = {"models": [{"name": "b"}, {"name": "t"}], "roles": ["text"], "sources": [{"dataset": "d"}]}
    with StoreWriter(path, n_rows=n, n_models=2, d_model=D, dtype="float32", shard_rows=n, meta=meta) as writer:
        writer.append(x, token_ids=i, sequence_ids=i // 10, positions=i % 10, roles=i * 0, sources=i * 0)
    return path


def options(**changes):
    return {
        "dict_size": 32,
        "k": 3,
        "steps": 60,
        "batch_size": 64,
        "lr": 3e-3,
        "checkpoint_every": 7,
        "log_every": 10,
        "dead_tokens": 512,
        "threads": 1,
        "holdout": 0.1,
        **changes,
    }


def weights(run: Path, seed: int = 0) -> dict[str, bytes]:
    return {name: (directory_of(run, seed) / name).read_bytes() for name in ("model.safetensors", "config.json")}


def events(run: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def killed(store, folder, kills, seed, settings):
    command = [sys.executable, "-P", str(SCRIPT), str(store), str(folder), str(kills), str(seed), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seeds": [0, 1], "eval_every": 9, "keep_checkpoints": 1},
        {"activation": "jumprelu", "micro_batch": 16, "delta_coef": 0.5, "exclusive": 0.1},
    ],
    ids=["fused", "two seeds and evaluations", "autograd"],
)
def test_seven_kills_change_no_byte(store, tmp_path, changes):
    found = killed(store, tmp_path, 7, 1, options(**changes))
    assert found["killed"] >= 7 and found["runs"] >= 1


@pytest.mark.long
def test_a_hundred_kills_change_no_byte(store, tmp_path):
    assert killed(store, tmp_path, 100, 2, options(seeds=[0, 1], eval_every=9))["killed"] >= 100


def test_seeds_together_equal_each_alone(store, tmp_path):
    together = TrainConfig(**options(seeds="2,0", eval_every=20))
    assert train_seeds(store, tmp_path / "both", together) == [directory_of(tmp_path / "both", s) for s in (2, 0)]
    for seed in (0, 2):
        train(store, tmp_path / f"alone-{seed}", TrainConfig(**options(seed=seed)))
        assert weights(tmp_path / "both", seed) == weights(tmp_path / f"alone-{seed}", seed), seed
    assert weights(tmp_path / "both", 0) != weights(tmp_path / "both", 2)
    assert {line["seed"] for line in events(tmp_path / "both", "train")} == {0, 2}


def test_only_what_is_missing_is_trained(store, tmp_path, capsys):
    from fastdiff.progress import Progress

    train(store, tmp_path, TrainConfig(**options()))
    before = (directory_of(tmp_path, 0) / "DONE.json").stat().st_mtime_ns
    train_seeds(store, tmp_path, TrainConfig(**options(seeds=(0, 1), log_every=5)), Progress("auto"))
    assert "seed-0 is up to date" in capsys.readouterr().err
    assert (directory_of(tmp_path, 0) / "DONE.json").stat().st_mtime_ns == before
    assert (directory_of(tmp_path, 1) / "DONE.json").exists()
    assert rundir.read_manifest(tmp_path)["stages"]["train"]["seeds"] == [1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_a_checkpoint(store, tmp_path, number, code):
    settings = options(steps=200_000, checkpoint_every=100_000)
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    command = [sys.executable, "-P", "-m", "fastdiff.cli", "train", str(store), "-o", str(tmp_path), *arguments]
    code_line = "import sys; from fastdiff.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code_line, *command[4:]], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (tmp_path / "events.jsonl").exists() and events(tmp_path, "train"):
            break
        time.sleep(0.05)
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert time.monotonic() - began < 10  # the promise of the manual, not a measurement
    kept = list((directory_of(tmp_path, 0) / "checkpoints").glob("step-*"))
    assert len(kept) == 1 and "Traceback" not in said
    assert "the same command continues from there" in said


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_out_of_memory_halves_what_is_held(store, tmp_path, monkeypatch, activation):
    kind, name = (TorchStep, "_forward") if activation == "topk" else (Trainer, "_choose")
    inner = getattr(kind, name)

    def limited(self, x, *arguments, **named):
        n = x.stop - x.start if isinstance(x, slice) else len(x)
        if n > 16:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return inner(self, x, *arguments, **named)

    settings = options(activation=activation, loss="mse", auxk_coef=0.0)
    train(store, tmp_path / "roomy", TrainConfig(**settings))
    monkeypatch.setattr(kind, name, limited)
    train(store, tmp_path / "tight", TrainConfig(**settings))
    assert [line["micro_batch"] for line in events(tmp_path / "tight", "back_off")] == [32, 16]
    assert rundir.read_json(directory_of(tmp_path / "tight", 0) / "config.json", 1)["micro_batch"] == 16
    roomy, tight = (load_crosscoder(directory_of(tmp_path / name, 0))[0] for name in ("roomy", "tight"))
    for key, value in roomy.state_dict().items():
        torch.testing.assert_close(tight.state_dict()[key], value, rtol=2e-3, atol=2e-4, msg=key)


def test_a_resumed_run_keeps_the_smaller_micro_batch(store, tmp_path, monkeypatch):
    inner, step = TorchStep._forward, FusedTrainer.step
    memory = {"tokens": 16}

    def limited(self, at, *arguments):
        if at.stop - at.start > memory["tokens"]:
            raise MemoryError
        return inner(self, at, *arguments)

    def dies(self, batch):
        if self.step_number == 30:
            raise KeyboardInterrupt
        return step(self, batch)

    settings = TrainConfig(**options())
    monkeypatch.setattr(TorchStep, "_forward", limited)
    train(store, tmp_path / "whole", settings)
    monkeypatch.setattr(FusedTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "cut", settings)
    monkeypatch.setattr(FusedTrainer, "step", step)
    memory["tokens"] = 64  # there is room again, but the order of sums and the selection must stay
    train(store, tmp_path / "cut", settings)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("place", ["make", "load"])
def test_memory_may_run_out_again_while_a_smaller_step_is_made(store, tmp_path, monkeypatch, place):
    forward, make = TorchStep._forward, TorchStep.__init__

    def limited(self, at, *arguments):
        if at.stop - at.start > 16:
            raise MemoryError
        return forward(self, at, *arguments)

    def refuses(self, settings, *arguments):
        if place == "make" and settings.n_tokens == 32:
            raise MemoryError
        make(self, settings, *arguments)
        self.carried = torch.zeros(1)

    def load(self, state):
        if place == "load" and not loaded:
            loaded.append(None)
            raise MemoryError
        self.carried = state["carried"]
        loaded.append(self.carried)

    monkeypatch.setattr(TorchStep, "_forward", limited)
    train(store, tmp_path / "one", TrainConfig(**options()))
    # a step of CUDA has a state that the weights do not hold
    loaded = []
    monkeypatch.setattr(TorchStep, "__init__", refuses)
    monkeypatch.setattr(TorchStep, "state", lambda self: {"carried": self.carried + 1})
    monkeypatch.setattr(TorchStep, "load_state", load)
    train(store, tmp_path / "two", TrainConfig(**options()))
    assert [line["micro_batch"] for line in events(tmp_path / "two", "back_off")] == [32, 16]
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    assert loaded[-1] == 1, "the state of the step that was given up, not of one that never ran"


def test_no_memory_at_all_is_one_line(store, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(TorchStep, "_forward", full)
    with pytest.raises(ResourceError, match="out of memory with one token at a time"):
        train(store, tmp_path, TrainConfig(**options()))


def test_other_errors_are_not_taken_for_memory(store, tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(TorchStep, "_forward", breaks)
    with pytest.raises(RuntimeError, match="something else"):
        train(store, tmp_path, TrainConfig(**options()))


def test_what_only_watches_may_change_when_continued(store, tmp_path, monkeypatch):
    step = FusedTrainer.step

    def dies(self, batch):
        if self.step_number == 30:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(FusedTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "cut", TrainConfig(**options()))
    monkeypatch.undo()
    watching = {"check_reads": True, "log_every": 3, "eval_every": 5, "checkpoint_every": 20}
    train(store, tmp_path / "cut", TrainConfig(**options(**watching)))
    train(store, tmp_path / "whole", TrainConfig(**options()))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert events(tmp_path / "cut", "evaluate")


def test_the_best_evaluation_is_kept_beside_the_last_weights(store, tmp_path):
    train(store, tmp_path, TrainConfig(**options(eval_every=10)))
    best, facts = load_crosscoder(directory_of(tmp_path, 0) / "best")
    found = [(line["fve_pooled"], line["step"]) for line in events(tmp_path, "evaluate")[:-1]]
    assert (facts["fve_pooled"], facts["steps"]) == max(found)
    assert best.dict_size == 32


def test_as_many_latents_fire_at_inference_as_training_selects(store, tmp_path):
    train(store, tmp_path, TrainConfig(**options()))
    threshold = events(tmp_path, "threshold")[0]
    crosscoder, facts = load_crosscoder(directory_of(tmp_path, 0))
    assert float(crosscoder.threshold[0]) == pytest.approx(threshold["calibrated"])
    with ActivationStore(store) as opened:
        rows = opened.rows(np.arange(facts["n_train"]))
    values, _ = crosscoder.encode(crosscoder.normalize(rows))
    assert len(values) / len(rows) == pytest.approx(3, rel=1e-3)
    assert events(tmp_path, "evaluate")[-1]["train_l0"] == pytest.approx(3, rel=0.02)
