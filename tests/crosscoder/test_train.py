"""The training stage: exact resume, skipping by hash, and what is refused."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import train as stage
from fastdiff.crosscoder.checkpoint import Checkpoints
from fastdiff.crosscoder.fused_trainer import FusedTrainer
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import InputError, LockedError, OptionError, ResourceError
from fastdiff.store.writer import StoreWriter

D = 6


def make_store(path, n=1200, bad_row=None, seed=0, constant=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.ones(n, 2, D) if constant else torch.randn(n, 2, D, generator=generator) @ torch.randn(D, D)
    i = np.arange(n)
    meta = {"models": [{"name": "b"}, {"name": "t"}], "roles": ["text"], "sources": [{"dataset": "d"}]}
    with StoreWriter(path, n_rows=n, n_models=2, d_model=D, dtype="float32", shard_rows=500, meta=meta) as w:
        w.append(x, token_ids=i, sequence_ids=i // 10, positions=i % 10, roles=i * 0, sources=i * 0)
    if bad_row is not None:
        import h5py

        with h5py.File(path / "shard-00000.h5", "r+") as f:
            f["activations"][bad_row, 1, 2] = np.nan
    return path


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{
            "dict_size": 32,
            "k": 4,
            "steps": 40,
            "batch_size": 64,
            "lr": 1e-3,
            "checkpoint_every": 10,
            "log_every": 10,
            "dead_tokens": 256,
            "threads": 1,
            **changes,
        }
    )


def weights(run):
    return (run / "crosscoder" / "seed-0" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FusedTrainer, {}),
        (FusedTrainer, {"clip_mode": "previous", "clip": 0.1, "micro_batch": 32}),
        (Trainer, {"activation": "jumprelu"}),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch, kind, options):
    store = make_store(tmp_path / "acts")
    stage.train(store, tmp_path / "whole", config(**options))
    step = kind.step

    def dies(self, batch):
        if self.step_number == 27:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(kind, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.train(store, tmp_path / "cut", config(**options))
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "crosscoder" / "seed-0" / "DONE.json").exists()
    steps = []
    monkeypatch.setattr(kind, "step", lambda self, b: steps.append(self.step_number) or step(self, b))
    stage.train(store, tmp_path / "cut", config(**options))
    assert steps[0] == 20, "training must continue at the newest checkpoint"
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_no_resume_starts_anew_and_gives_the_same_bytes(tmp_path, monkeypatch):
    store = make_store(tmp_path / "acts")
    stage.train(store, tmp_path / "run", config())
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "crosscoder" / "seed-0" / "DONE.json").unlink()
    steps = []
    step = FusedTrainer.step
    monkeypatch.setattr(FusedTrainer, "step", lambda self, b: steps.append(self.step_number) or step(self, b))
    stage.train(store, tmp_path / "run", config(), resume=False)
    assert steps[0] == 0 and weights(tmp_path / "run") == before


def test_a_finished_run_is_skipped_and_a_touched_one_is_not(tmp_path, monkeypatch):
    store = make_store(tmp_path / "acts")
    target = stage.train(store, tmp_path / "run", config())
    monkeypatch.setattr(FusedTrainer, "step", lambda *_: pytest.fail("trained again"))
    stage.train(store, tmp_path / "run", config())
    (target / "config.json").write_text("{}")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        stage.train(store, tmp_path / "run", config())


def test_a_run_that_is_killed_while_it_is_recorded_is_trained_to_its_end_again(tmp_path, monkeypatch):
    store, run = make_store(tmp_path / "acts"), tmp_path / "run"

    def killed(*_args, **_facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage.rundir, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.train(store, run, config())
    assert not (run / "crosscoder" / "seed-0" / "DONE.json").exists()
    stage.train(store, run, config())
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["stages"]["train"]["store"] == str(store.resolve())


def test_another_configuration_is_refused_and_overwrite_replaces_it(tmp_path):
    store = make_store(tmp_path / "acts")
    stage.train(store, tmp_path / "run", config())
    with pytest.raises(OptionError, match=r"was trained with --k 4, not 5.*--overwrite"):
        stage.train(store, tmp_path / "run", config(k=5))
    stage.train(store, tmp_path / "run", config(k=5), overwrite=True)
    assert load_crosscoder(tmp_path / "run" / "crosscoder" / "seed-0")[1]["k"] == 5
    with pytest.raises(OptionError, match="another store"):
        stage.train(make_store(tmp_path / "other", seed=1), tmp_path / "run", config(k=5))


def curve(run, seed, tag):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard" / f"seed-{seed}"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def written(run, stage, seed):
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and line.get("seed") == seed]


def test_tracked_figures_are_those_of_events_and_cost_no_bit(tmp_path):
    store, run = make_store(tmp_path / "acts"), tmp_path / "run"
    stage.train(store, run, config(seeds=(0, 1), track=["tensorboard"], eval_every=20))
    for seed in (0, 1):
        lines = written(run, "train", seed)
        assert [step for step, _ in curve(run, seed, "train/loss")] == [10, 20, 30, 40]
        for i, model in enumerate("bt"):
            want = [(line["step"], np.float32(line["fve"][i])) for line in lines]
            assert curve(run, seed, f"train/fve/{model}") == want
        want = [(line["step"], np.float32(line["l0_mean"])) for line in written(run, "evaluate", seed)]
        assert curve(run, seed, "evaluate/l0_mean") == want and [step for step, _ in want] == [20, 40]
    stage.train(store, tmp_path / "alone", config())
    assert weights(run) == weights(tmp_path / "alone")
    assert not (tmp_path / "alone" / "tensorboard").exists()


def test_a_resumed_run_goes_on_with_its_curves(tmp_path, monkeypatch):
    store, run, step = make_store(tmp_path / "acts"), tmp_path / "run", FusedTrainer.step
    monkeypatch.setattr(
        FusedTrainer, "step", lambda self, b: step(self, b) if self.step_number < 35 else pytest.fail("killed")
    )
    with pytest.raises(pytest.fail.Exception):
        stage.train(store, run, config(track=["tensorboard"], checkpoint_every=20))
    monkeypatch.undo()
    stage.train(store, run, config(track=["tensorboard"], checkpoint_every=20))
    assert [at for at, _ in curve(run, 0, "train/loss")] == [10, 20, 30, 40], "step 30 is logged twice and kept once"


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(OptionError, match="--track wandb: not installed"):
        stage.train(make_store(tmp_path / "acts"), tmp_path / "run", config(track=["wandb"]))
    assert not (tmp_path / "run" / "crosscoder").exists()


def test_curves_stay_where_another_training_cannot_start(tmp_path):
    store, run = make_store(tmp_path / "acts"), tmp_path / "run"
    stage.train(store, run, config(track=["tensorboard"]))
    before = curve(run, 0, "train/loss")
    with pytest.raises(InputError, match="never vary"):
        stage.train(make_store(tmp_path / "flat", constant=True), run, config(track=["tensorboard"]), overwrite=True)
    assert curve(run, 0, "train/loss") == before and len(before) == 4


def test_a_finished_run_needs_no_tracker(tmp_path, monkeypatch):
    store = make_store(tmp_path / "acts")
    stage.train(store, tmp_path / "run", config())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    stage.train(store, tmp_path / "run", config(track=["wandb"]))


def test_seeds_share_a_run_and_differ(tmp_path):
    store = make_store(tmp_path / "acts")
    a, b = (stage.train(store, tmp_path / "run", config(seed=s)) for s in (0, 1))
    assert (a.name, b.name) == ("seed-0", "seed-1")
    assert (a / "model.safetensors").read_bytes() != (b / "model.safetensors").read_bytes()


def test_input_scaling_is_stored_and_right(tmp_path):
    store = make_store(tmp_path / "acts")
    crosscoder, _ = load_crosscoder(stage.train(store, tmp_path / "run", config(steps=2)))
    import h5py

    parts = []
    for shard in sorted(store.glob("shard-*.h5")):
        with h5py.File(shard) as f:
            parts.append(f["activations"][:])
    x = crosscoder.normalize(torch.from_numpy(np.concatenate(parts))).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(2, D).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(0, correction=0).sum(1), torch.full((2,), float(D)).double(), rtol=1e-5, atol=0)
    plain, _ = load_crosscoder(stage.train(store, tmp_path / "plain", config(steps=2, normalize="none")))
    assert torch.equal(plain.input_scale, torch.ones(2)) and not plain.input_mean.any()


def test_events_hold_the_loss_fve_l0_and_dead_share(tmp_path):
    stage.train(make_store(tmp_path / "acts"), tmp_path / "run", config())
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in trained] == [10, 20, 30, 40]
    assert trained[-1]["loss"] < trained[0]["loss"] and len(trained[-1]["fve"]) == 2
    assert all(0 < line["l0"] <= 4 and 0 <= line["dead"] <= 1 for line in trained)
    assert lines[-1]["stage"] == "evaluate" and lines[-1]["n_rows"] > 0


def test_nan_in_the_store_names_the_row(tmp_path):
    store = make_store(tmp_path / "acts", bad_row=123)
    with pytest.raises(InputError, match=r"row 123 of the store.*NaN"):
        stage.train(store, tmp_path / "run", config())
    assert not (tmp_path / "run" / "crosscoder" / "seed-0" / "DONE.json").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    store = make_store(tmp_path / "acts", n=100)
    with pytest.raises(OptionError, match=r"99 training rows|90 training rows"):
        stage.train(store, tmp_path / "run", config(batch_size=512))


def test_constant_activations_are_refused(tmp_path):
    store = make_store(tmp_path / "acts", constant=True)
    with pytest.raises(InputError, match="never vary"):
        stage.train(store, tmp_path / "run", config())


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    store = make_store(tmp_path / "acts")
    code = (
        "import sys; from pathlib import Path; from fastdiff.rundir import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError, match=f"process {other.pid}"):
            stage.train(store, tmp_path / "run", config())
        other.stdin.close()


def test_a_start_that_failed_does_not_stand_in_the_way(tmp_path):
    store = make_store(tmp_path / "acts", n=200)
    with pytest.raises(OptionError, match="--batch-size 512"):
        stage.train(store, tmp_path / "run", config(batch_size=512))
    with pytest.raises(OptionError, match="--device cuda:99"):
        stage.train(store, tmp_path / "run", config(device="cuda:99"))
    bad = make_store(tmp_path / "bad", n=200, bad_row=3)
    with pytest.raises(InputError, match="NaN"):
        stage.train(bad, tmp_path / "run", config())
    stage.train(store, tmp_path / "run", config())


@pytest.mark.parametrize("normalize", ["rms", "none"])
def test_nan_among_the_held_out_rows_is_refused(tmp_path, normalize):
    store = make_store(tmp_path / "acts", n=500, bad_row=498)
    with pytest.raises(InputError, match="NaN"):
        stage.train(store, tmp_path / "run", config(normalize=normalize))


def test_one_token_of_dead_latents_leaves_finite_weights(tmp_path):
    """AuxK divides by the spread of the error, which one token does not have."""
    store = make_store(tmp_path / "acts")
    directory = stage.train(store, tmp_path / "run", config(batch_size=1, dead_tokens=1, steps=5))
    crosscoder, _ = load_crosscoder(directory)
    for name, tensor in crosscoder.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), name


def test_a_store_without_recorded_hashes_is_known_by_its_data(tmp_path, monkeypatch):
    import h5py

    store = make_store(tmp_path / "acts", n=500)
    (store / "store.json").write_text('{"schema": 1, "models": [{"name": "b"}, {"name": "t"}]}')
    stage.train(store, tmp_path / "run", config())
    with h5py.File(store / "shard-00000.h5", "r+") as f:
        f["activations"][7] = 3.0
    with pytest.raises(OptionError, match="another store"):
        stage.train(store, tmp_path / "run", config())


def test_a_full_disk_is_a_resource_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    store = make_store(tmp_path / "acts", n=500)
    monkeypatch.setattr("fastdiff.crosscoder.saved.save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        stage.train(store, tmp_path / "run", config())


def test_checked_reads_reach_training_and_held_out_rows(tmp_path):
    import h5py

    for row in (3, 1190):  # in the first document, and in one of the last
        store = make_store(tmp_path / f"acts-{row}")
        stage.train(store, tmp_path / f"sound-{row}", config(check_reads=True, holdout=0.1))
        with h5py.File(store / f"shard-0000{row // 500}.h5", "r+") as f:
            f["activations"][row % 500, 1, 2] += 1
        with pytest.raises(InputError, match="are not what was written"):
            stage.train(store, tmp_path / f"spoilt-{row}", config(check_reads=True, holdout=0.1))
        stage.train(store, tmp_path / f"unchecked-{row}", config(holdout=0.1))


def test_the_shuffle_of_a_resumed_run_is_the_one_it_began_with(tmp_path, monkeypatch):
    store = make_store(tmp_path / "acts")
    small = config(pool_gb=1e-5, k_start=8, k_anneal_steps=10)  # 10 kB: windows of 96 rows
    stage.train(store, tmp_path / "whole", small)
    assert "pool_rows" in (tmp_path / "whole" / "crosscoder" / "seed-0" / "config.json").read_text()
    saved = Checkpoints.save

    def die(*args):
        saved(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", die)
        stage.train(store, tmp_path / "cut", small)
    # what would fit now does not matter
    monkeypatch.setattr("fastdiff.store.shuffler.default_memory", lambda: 10**6)
    stage.train(store, tmp_path / "cut", small)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
