"""Checkpoints: the same bits back, whole or not at all, written in the background, and what is refused."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from fastdiff.crosscoder import checkpoint, saved
from fastdiff.crosscoder.checkpoint import Checkpoints, common_step
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.errors import FastdiffError, InputError, ResourceError
from fastdiff.rundir import fsync_directory, versions

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def make(value: float = 0.75) -> Crosscoder:
    c = Crosscoder(10, 2, 4, activation="batchtopk", k=3)
    c.initialize(torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(0)), init="independent", seed=0)
    c.threshold.fill_(value)
    return c


def moments(step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "exp_avg": torch.randn(6, 5, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "tokens": torch.arange(3) + 2**60 + step,
        "norm": torch.tensor(float("nan")),
        "none": torch.empty(0, 4),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save(directory: Path, *steps: int, keep: int = 2) -> Checkpoints:
    with Checkpoints(directory, keep) as kept:
        for step in steps:
            kept.save(step, make(step), moments(step), {"threads": 1})
    return kept


def check(kept: Checkpoints, step: int) -> None:
    """The checkpoint of a step is the one that `save` above wrote."""
    c = make()
    tensors, state = kept.load(step, c)
    assert state["step"] == step and float(c.threshold[0]) == step
    assert {name: bits(t) for name, t in tensors.items()} == {name: bits(t) for name, t in moments(step).items()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """Thousands of fsyncs take half a minute, and only a power cut would show them."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def held(monkeypatch):
    """Writing waits until the test lets it go on."""
    go = threading.Event()
    real = saved.save_file

    def save_file(*arguments, **options):
        assert go.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(saved, "save_file", save_file)
    yield go
    go.set()


class TestRoundTrip:
    def test_every_bit_comes_back(self, tmp_path):
        c = make()
        state = {"threads": 3, "best": 0.1 + 0.2, "names": ["ä"], "nothing": None, "config": {"k": 3}}
        with Checkpoints(tmp_path / "seed-0" / "checkpoints", 2) as kept:
            kept.save(500, c, moments(), state)
        other = make(0)
        for parameter in other.parameters():
            parameter.data.zero_()
        tensors, loaded = kept.load(500, other)
        for name, tensor in c.state_dict().items():
            assert bits(tensor) == bits(other.state_dict()[name]), name
        assert tensors.keys() == moments().keys()
        for name, tensor in moments().items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(tensors[name]) == bits(tensor), name
        assert {name: loaded[name] for name in state} == state
        assert (loaded["schema"], loaded["step"], loaded["versions"]) == (1, 500, versions())

    def test_what_is_in_it(self, tmp_path):
        save(tmp_path, 500)
        directory = tmp_path / "step-000500"
        assert names(tmp_path) == ["step-000500"] and names(directory) == FILES
        state = json.loads((directory / "state.json").read_text())
        for name in FILES[:2]:
            assert state["sha256"][name] == hashlib.sha256((directory / name).read_bytes()).hexdigest()
            with safe_open(directory / name, "pt") as f:
                assert list(f.metadata()) == ["fastdiff"]

    def test_equal_states_give_equal_bytes(self, tmp_path):
        save(tmp_path / "a", 5)
        save(tmp_path / "b", 5)
        for name in FILES:
            a, b = ((tmp_path / run / "step-000005" / name).read_bytes() for run in "ab")
            assert a == b, name

    def test_steps_of_many_digits(self, tmp_path):
        kept = save(tmp_path, 999_999, 1_000_000, 2_000_000)
        assert kept.steps() == [1_000_000, 2_000_000]
        check(kept, 1_000_000)

    def test_nothing_there(self, tmp_path):
        kept = Checkpoints(tmp_path / "none", 2)
        assert kept.steps() == []
        with pytest.raises(InputError, match=r"step-000005: no such checkpoint$"):
            kept.load(5, make())

    def test_names_that_are_no_checkpoints(self, tmp_path):
        kept = save(tmp_path, 5)
        for name in ("step-x", "step-000007.bak", "step-12", "other", ".step-000009.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / "step-000010").write_text("a file")
        assert kept.steps() == [5]

    def test_a_state_that_cannot_be_written_as_it_is(self, tmp_path):
        with Checkpoints(tmp_path, 2) as kept:
            with pytest.raises(ValueError, match="must not have sha256, step"):
                kept.save(5, make(), {}, {"step": 4, "sha256": {}})
            with pytest.raises(ValueError, match="JSON"):
                kept.save(5, make(), {}, {"loss": float("nan")})
        assert kept.steps() == []

    def test_nothing_kept_is_a_mistake(self, tmp_path):
        with pytest.raises(ValueError, match="at least 1"):
            Checkpoints(tmp_path, 0)


@pytest.mark.slow
class TestBackground:
    def test_what_changes_after_save_is_not_written(self, tmp_path, held):
        c, tensors, state = make(5), moments(5), {"threads": 1, "config": {"k": [3]}}
        with Checkpoints(tmp_path, 2) as kept:
            kept.save(5, c, tensors, state)
            for tensor in [*c.state_dict().values(), *tensors.values()]:
                tensor.zero_()
            state["config"]["k"].append(4)
            assert kept.steps() == [], "save must not wait for the disk"
            held.set()
        check(kept, 5)
        assert kept.load(5, make())[1]["config"] == {"k": [3]}

    def test_the_best_of_a_step_is_what_it_was_then(self, tmp_path, held):
        c, facts = make(5), {"train": {"k": [3]}}
        with Checkpoints(tmp_path / "checkpoints", 2) as kept:
            kept.save_best(c, facts)
            c.threshold.fill_(6.0)
            facts["train"]["k"].append(4)
            held.set()
        loaded, config = load_crosscoder(tmp_path / "best")
        assert loaded.threshold[0] == 5.0 and config["train"] == {"k": [3]}
        assert names(tmp_path / "best") == ["config.json", "model.safetensors"]

    def test_a_second_save_waits_for_the_first(self, tmp_path, held):
        with Checkpoints(tmp_path / "checkpoints", 2) as kept:
            kept.save(5, make(5), moments(5), {})
            # a best does not wait for a checkpoint
            kept.save_best(make(), {})
            threading.Timer(0.2, held.set).start()
            kept.save(10, make(10), moments(10), {})
            assert 5 in kept.steps()
            assert threading.active_count() <= 3  # this one, the timer's and one that writes
        assert kept.steps() == [5, 10]
        load_crosscoder(tmp_path / "best")

    def test_wait_returns_when_all_is_there(self, tmp_path):
        with Checkpoints(tmp_path / "checkpoints", 2) as kept:
            kept.save_best(make(), {})
            kept.save(5, make(5), moments(5), {})
            kept.wait()
            check(kept, 5)
            load_crosscoder(kept.best)

    def test_waiting_for_the_checkpoint_does_not_wait_for_the_best(self, tmp_path, held):
        with Checkpoints(tmp_path / "checkpoints", 2) as kept:
            kept.save_best(make(), {})
            kept.wait(best=False)
            assert not kept.best.joinpath("config.json").exists()
            held.set()
            kept.wait()
            load_crosscoder(kept.best)

    def test_an_exception_in_the_block_lets_the_write_end(self, tmp_path, held):
        kept = Checkpoints(tmp_path, 2)
        with pytest.raises(KeyboardInterrupt), kept:
            kept.save(5, make(5), moments(5), {})
            threading.Timer(0.2, held.set).start()
            raise KeyboardInterrupt
        check(kept, 5)

    def test_a_signal_while_waiting_does_not_cut_the_write_off(self, tmp_path):
        script = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from fastdiff.crosscoder import saved
from fastdiff.crosscoder.checkpoint import Checkpoints
from fastdiff.crosscoder.model import Crosscoder
signal.signal(signal.SIGINT, signal.default_int_handler)
go, real = threading.Event(), saved.save_file
def save_file(*arguments, **options):
    go.wait(30)
    real(*arguments, **options)
saved.save_file = save_file
def interrupt():
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    go.set()
with Checkpoints(Path(sys.argv[1]), 2) as kept:
    kept.save(5, Crosscoder(10, 2, 4, activation="topk", k=3), {"a": torch.zeros(3)}, {})
    threading.Thread(target=interrupt).start()
"""
        done = subprocess.run([sys.executable, "-P", "-c", script, tmp_path], capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGINT
        kept = Checkpoints(tmp_path, 2)
        assert kept.steps() == [5] and names(tmp_path) == ["step-000005"]
        kept.load(5, make())


class TestErrors:
    @pytest.fixture
    def full(self, monkeypatch):
        def save_file(*_, **__):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(saved, "save_file", save_file)
            yield patch

    @pytest.mark.parametrize("then", ["save", "save_best", "wait", "exit"])
    def test_a_full_disk_is_told_by_the_next_call(self, tmp_path, full, then):
        with pytest.raises(ResourceError, match="no space left"), Checkpoints(tmp_path, 2) as kept:
            kept.save(5, make(), moments(), {})
            next(iter(kept._pending.values())).exception()
            if then == "save":
                kept.save(10, make(), moments(), {})
            elif then == "save_best":
                kept.save_best(make(), {})
            elif then == "wait":
                kept.wait()
            if then != "exit":
                pytest.fail(f"{then} did not tell")
        assert names(tmp_path) == []

    def test_what_was_told_is_told_once_and_the_next_save_works(self, tmp_path, full):
        with Checkpoints(tmp_path, 2) as kept:
            kept.save(5, make(), moments(), {})
            with pytest.raises(ResourceError):
                kept.wait()
            full.undo()
            kept.save(10, make(10), moments(10), {})
        assert kept.steps() == [10]

    def test_a_best_that_fails_is_told_too(self, tmp_path, full):
        with pytest.raises(ResourceError, match=r"best/model\.safetensors"), Checkpoints(tmp_path / "c", 2) as kept:
            kept.save_best(make(), {})

    def test_the_exception_of_the_block_wins_and_has_a_note_of_the_other(self, tmp_path, full):
        with pytest.raises(KeyError, match="mine") as raised, Checkpoints(tmp_path, 2) as kept:
            kept.save(5, make(), moments(), {})
            raise KeyError("mine")
        assert "no space left" in raised.value.__notes__[0]

    def test_two_failures_are_one_exception_with_a_note(self, tmp_path, full):
        both, fails = threading.Event(), saved.save_file

        def save_file(*arguments, **named):
            both.wait(10)
            fails(*arguments, **named)

        full.setattr(saved, "save_file", save_file)
        with pytest.raises(ResourceError) as raised, Checkpoints(tmp_path / "c", 2) as kept:
            kept.save(5, make(), moments(), {})
            kept.save_best(make(), {})  # would tell of the first, had it failed already
            both.set()
        assert "step-000005" in str(raised.value) and "best" in raised.value.__notes__[0]

    def test_any_other_error_comes_through(self, tmp_path, monkeypatch):
        def broken(*_, **__):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(saved, "save_file", broken)
        with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, 2) as kept:
            kept.save(5, make(), moments(), {})

    def test_a_best_that_is_not_finite_is_refused_at_once(self, tmp_path):
        c = make()
        c.b_dec.data[0, 1] = float("inf")
        kept = Checkpoints(tmp_path / "checkpoints", 2)
        with kept, pytest.raises(FastdiffError, match="b_dec holds NaN or infinity"):
            kept.save_best(c, {})
        assert not kept.best.exists()


class TestPruning:
    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_stay(self, tmp_path, keep):
        kept = save(tmp_path, 5, 10, 15, 20, keep=keep)
        assert names(tmp_path) == [f"step-{step:06d}" for step in (5, 10, 15, 20)[-keep:]]
        for step in kept.steps():
            check(kept, step)

    def test_the_old_ones_are_there_until_the_new_one_is_durable(self, tmp_path, monkeypatch):
        save(tmp_path, 5, 10)
        seen = []

        def fsync(directory):
            fsync_directory(directory)
            if directory == tmp_path:
                seen.append(names(tmp_path))

        monkeypatch.setattr(checkpoint, "fsync_directory", fsync)
        save(tmp_path, 15)
        assert seen == [
            ["step-000005", "step-000010", "step-000015"],
            [".step-000005.tmp", "step-000010", "step-000015"],
        ]

    def test_later_steps_go_when_training_went_back(self, tmp_path):
        save(tmp_path, 500, 1000, keep=2)
        kept = save(tmp_path, 600, keep=2)
        assert kept.steps() == [500, 600]

    def test_a_step_may_be_saved_again(self, tmp_path):
        save(tmp_path, 5, 10)
        with Checkpoints(tmp_path, 2) as kept:
            kept.save(10, make(11), moments(10), {})
        c = make()
        kept.load(10, c)
        assert c.threshold[0] == 11.0 and names(tmp_path) == ["step-000005", "step-000010"]

    def test_clear(self, tmp_path):
        kept = save(tmp_path, 5, 10)
        kept.clear()
        assert names(tmp_path) == []
        Checkpoints(tmp_path / "none", 2).clear()

    def test_leftovers_of_a_killed_process_are_removed(self, tmp_path):
        save(tmp_path, 5)
        for name in (".step-000007.tmp", ".step-000010.tmp", ".step-000001.old.tmp"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(b"half")
        kept = Checkpoints(tmp_path, 2)
        assert kept.steps() == [5]
        check(kept, 5)
        assert save(tmp_path, 10).steps() == [5, 10]
        assert names(tmp_path) == ["step-000005", "step-000010"]

    @pytest.mark.parametrize("both", [False, True])
    def test_a_step_set_aside_counts_until_it_is_there_again(self, tmp_path, both):
        kept = save(tmp_path, 5, 10)
        shutil.copytree(tmp_path / "step-000010", tmp_path / "step-000010.old")
        if not both:
            shutil.rmtree(tmp_path / "step-000010")
        assert kept.steps() == [5, 10]
        check(kept, 10)
        save(tmp_path, 15)
        assert names(tmp_path) == ["step-000010", "step-000015"]
        check(kept, 10)


class TestCommonStep:
    @pytest.mark.parametrize(
        ("steps", "common"),
        [
            ([], None),
            ([[]], None),
            ([[5, 10]], 10),
            ([[5, 10], [5, 10]], 10),
            ([[5, 10], [10, 15], [10]], 10),
            ([[5, 10], [5]], 5),
            ([[5], [10]], None),
            ([[5], []], None),
        ],
    )
    def test_is_the_newest_that_all_have(self, tmp_path, steps, common):
        seeds = []
        for number, own in enumerate(steps):
            seeds.append(Checkpoints(tmp_path / str(number), 2))
            for step in own:
                (tmp_path / str(number) / f"step-{step:06d}").mkdir(parents=True)
        assert common_step(seeds) == common


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    def test_every_flipped_byte_is_found(self, tmp_path, name):
        kept = save(tmp_path, 5, 10)
        path = tmp_path / "step-000010" / name
        data = path.read_bytes()
        places = random.Random(0).sample(range(len(data)), 40)
        for place in places:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            c = make(3)
            with pytest.raises(InputError, match=rf"step-000010/{name}: .*; delete .*step-000010, .*from step 5$"):
                kept.load(10, c)
            assert c.threshold[0] == 3.0, "nothing may be changed"
        path.write_bytes(data)
        check(kept, 10)

    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file_is_named(self, tmp_path, name):
        kept = save(tmp_path, 5)
        (tmp_path / "step-000005" / name).unlink()
        with pytest.raises(
            InputError, match=rf"step-000005/{name}: .*; delete .*step-000005, and training starts anew"
        ):
            kept.load(5, make())

    def test_the_advice_works(self, tmp_path):
        kept = save(tmp_path, 5, 10)
        (tmp_path / "step-000010" / "model.safetensors").write_bytes(b"")
        with pytest.raises(InputError):
            kept.load(10, make())
        shutil.rmtree(tmp_path / "step-000010")
        assert kept.steps() == [5]
        check(kept, 5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, r"state\.json: schema 2, but this fastdiff .* reads 1"),
            ({"sha256": None}, r"state\.json: has no sha256"),
            ({"sha256": {}}, r"state\.json: changed"),
            ({"threads": 2}, r"state\.json: changed"),
            ({"threads": float("nan")}, r"state\.json: changed"),
            ({"more": "\ud800"}, r"state\.json: changed"),
        ],
    )
    def test_another_state_is_refused(self, tmp_path, change, message):
        kept = save(tmp_path, 5)
        path = tmp_path / "step-000005" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=message):
            kept.load(5, make())

    def test_another_shape_is_refused(self, tmp_path):
        kept = save(tmp_path, 5)
        with pytest.raises(InputError, match=r"model\.safetensors: tensor \w+ is \(10.*the configuration says \(11"):
            kept.load(5, Crosscoder(11, 2, 4, activation="batchtopk", k=3))


class Disk:
    """Counts what changes the disk; the call of number `at` fails, and with `ended` all after it: nobody cleans up."""

    def __init__(self, monkeypatch, error, *, ended):
        self.calls, self.at, self.error, self.ended = 0, 0, error, ended
        for owner, name in [
            *((os, name) for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")),
            (saved, "save_file"),
            (Path, "write_text"),
        ]:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.at and (self.calls == self.at or (self.ended and self.calls > self.at)):
                raise self.error
            return real(*arguments, **options)

        return call

    def failing(self, at, function):
        """Whether the call of this number was reached, and what was raised."""
        self.calls, self.at = 0, at
        raised = None
        try:
            function()
        except (ResourceError, Ended) as error:
            raised = error
        self.at = 0
        return self.calls >= at, raised


class Ended(BaseException):
    """The process is no more."""


@pytest.mark.slow
class TestAtomicity:
    # saved again: killed when 10 was about to take the place of 10
    @pytest.mark.parametrize(("step", "keep"), [(15, 2), (10, 1)], ids=["new step", "step saved again"])
    @pytest.mark.parametrize("ended", [False, True], ids=["disk full", "process ended"])
    def test_a_failure_anywhere_leaves_the_old_or_the_new(self, tmp_path, monkeypatch, step, keep, ended):
        error = Ended() if ended else OSError(28, "No space left on device")
        disk = Disk(monkeypatch, error, ended=ended)
        n_raised = 0
        for at in range(1, 1000):
            kept = save(tmp_path / str(at), 5, 10, keep=keep)
            old = kept.steps()
            reached, raised = disk.failing(at, lambda kept=kept: save(kept.directory, step, keep=keep))
            if not reached:
                break
            n_raised += raised is not None
            found = kept.steps()
            assert set(old) <= set(found) or step in found, at
            for one in found:
                check(kept, one)
            if not ended and step not in found:
                assert names(kept.directory) == [f"step-{one:06d}" for one in old], "a failure cleans up"
            save(kept.directory, 20, keep=keep)
            assert len(names(kept.directory)) == keep and kept.steps()[-1] == 20
        assert n_raised > 15

    def test_a_best_is_whole_file_by_file(self, tmp_path, monkeypatch):
        disk = Disk(monkeypatch, Ended(), ended=True)

        def best(value):
            with Checkpoints(tmp_path / "checkpoints", 2) as kept:
                kept.save_best(make(value), {"steps": value})

        best(1)
        for at in range(1, 1000):
            reached, _ = disk.failing(at, lambda: best(2))
            loaded, config = load_crosscoder(tmp_path / "best")
            assert (loaded.threshold[0], config["steps"]) in [(1, 1), (2, 1), (2, 2)]
            if not reached:
                break
            best(1)
        assert at > 6 and config["steps"] == 2

    def test_kills(self, tmp_path):
        script = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fastdiff.crosscoder.checkpoint import Checkpoints
from fastdiff.crosscoder.model import Crosscoder

torch.set_num_threads(1)
os.fsync = lambda _: None  # a kill loses nothing that was written
chance = random.Random(0)
directory = Path(sys.argv[1])

def crosscoder():
    return Crosscoder(100, 2, 50, activation="topk", k=3)

def save_in_a_loop(start, tell):
    c = crosscoder()
    with Checkpoints(directory, 2) as kept:
        for step in range(start, 10**6):
            # once more, as if another seed had not got so far
            for step in {step, max(step - step % 3, 1)}:
                c.threshold.fill_(step)
                kept.save(step, c, {"a": torch.full((1000,), step)}, {"threads": 1})
                kept.wait()
            os.write(tell, step.to_bytes(4, "big"))

newest = n = 0
for kill in range(20):
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        save_in_a_loop(newest + 1, tell)
    os.close(tell)
    told = os.read(hear, 4)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(hear, "rb") as f:
        told += f.read()
    kept = Checkpoints(directory, 2)
    steps = kept.steps()
    acknowledged = int.from_bytes(told[-4:], "big")
    # the one after may have been on its way back by up to two steps
    assert acknowledged and steps and steps[-1] >= acknowledged - 2, (kill, steps, acknowledged)
    for step in steps:
        c = crosscoder()
        tensors, state = kept.load(step, c)
        assert (state["step"], float(c.threshold[0]), int(tensors["a"][7])) == (step, step, step)
    newest = steps[-1]
    n += len(told) // 4
print(n)
"""
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, tmp_path], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 20
