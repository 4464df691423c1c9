"""Extractions that are cut off: they continue, to the same bytes, and only with the same options and inputs."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.extraction import harvest
from fastdiff.extraction.harvest import extract
from fastdiff.progress import Progress
from fastdiff.store import writer as writer_module
from fastdiff.store.journal import JOURNAL, read_journal

pytestmark = pytest.mark.slow

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_extract_harvest.py"))))
pairs, configured, files, Heard = shared.pairs, shared.configured, shared.files, shared.Heard


def cut_off(
    config: ExtractConfig, out: Path, batches: int = 2, error: type[BaseException] = KeyboardInterrupt, **raised: Any
) -> int:
    """Fail in the forward pass after some batches; returns the rows that were kept."""
    forward, calls = harvest._forward, 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise error
        return forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "_forward", failing)
        with pytest.raises(**(raised or {"expected_exception": error})):
            extract(config, out)
    journal = read_journal(out)
    return 0 if journal is None else journal.n_rows


@pytest.fixture(scope="module")
def config(pairs, tmp_path_factory) -> ExtractConfig:
    """11 documents, two to a batch."""
    texts = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = ["the cat", "sat on", "the mat and the", "dog lay on the rug", "and"]
    texts.write_text("".join(json.dumps({"text": " ".join(words[: 1 + n % 5])}) + "\n" for n in range(11)))
    return configured(pairs["llama"], texts, batch_size=2, shard_rows=20)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> dict[str, bytes]:
    return files(extract(config, tmp_path_factory.mktemp("whole") / "acts"))


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_continues_with_the_first_batch_that_is_not_kept(config, whole, tmp_path, monkeypatch, batches) -> None:
    out, heard = tmp_path / "acts", Heard()
    n = cut_off(config, out, batches=batches)
    forward, calls = harvest._forward, []
    monkeypatch.setattr(harvest, "_forward", lambda *args: (calls.append(1), forward(*args))[1])
    assert extract(config, out, heard) == out
    assert files(out) == whole
    assert len(calls) == 6 - batches
    assert any(f"continues at token {n} of " in line for line in heard.lines)


def test_an_extraction_cut_off_at_every_batch_is_the_same(config, whole, tmp_path) -> None:
    out = tmp_path / "acts"
    kept = [cut_off(config, out, batches=1) for _ in range(5)]
    assert kept == sorted(set(kept))
    extract(config, out)
    assert files(out) == whole


def test_progress_begins_where_the_rows_do(config, tmp_path) -> None:
    out = tmp_path / "acts"
    n = cut_off(config, out)
    starts = []

    class Watched(Progress):
        def task(self, name: str, total: int, unit: str, start: int = 0):
            starts.append((name, start))
            return super().task(name, total, unit, start)

    extract(config, out, Watched("off"))
    assert starts == [("extract", n)]


def test_interrupted_before_a_row_was_kept_leaves_nothing(config, tmp_path) -> None:
    assert cut_off(config, tmp_path / "acts", batches=0) == 0
    assert files(tmp_path / "acts") == {}


def test_killed_before_its_mark_stood_starts_again(config, whole, tmp_path) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "..extracting.tmp").write_text("half")
    assert files(extract(config, tmp_path / "acts")) == whole


def test_killed_before_a_row_was_kept_starts_again(config, whole, tmp_path, monkeypatch) -> None:
    out, heard = tmp_path / "acts", Heard()
    with monkeypatch.context() as patch:
        # a killed process runs no clean-up
        patch.setattr(harvest, "clear", lambda _: None)
        patch.setattr(harvest.StoreWriter, "__exit__", lambda writer, *_: writer._release())
        cut_off(config, out, batches=1)
    assert any(name.endswith(".tmp") for name in files(out))
    extract(config, out, heard)
    assert any("interrupted here before it had kept a row; it starts again" in line for line in heard.lines)
    assert files(out) == whole


def changed_to(**options: Any) -> Callable[..., ExtractConfig]:
    return lambda config, _: config.model_copy(update=options)


def changed_text(config: ExtractConfig, tmp_path: Path) -> ExtractConfig:
    with Path(config.dataset[0]).open("a") as file:
        file.write('{"text": "the dog"}\n')
    return config


def changed_weights(config: ExtractConfig, tmp_path: Path) -> ExtractConfig:
    weights = Path(config.tuned) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.model_copy(update={"layer": "0"}), r"made with --layer 1, not 0; .*--overwrite"),
        (
            lambda config, _: config.model_copy(update={"batch_size": 3}),
            r"made with --batch-size 2, not 3; .*--overwrite",
        ),
        (changed_text, r"texts\.jsonl has changed since.*--overwrite"),
        (changed_weights, r"tuned has changed since.*--overwrite"),
    ],
    ids=["layer", "batch size", "text", "weights"],
)
def test_other_options_or_inputs_are_refused_like_those_of_a_complete_store(
    pairs, config, tmp_path, change: Callable[..., ExtractConfig], message: str
) -> None:
    tuned, texts = tmp_path / "tuned", tmp_path / "texts.jsonl"
    shutil.copytree(config.tuned, tuned)
    shutil.copy(config.dataset[0], texts)
    config = config.model_copy(update={"tuned": str(tuned), "dataset": [str(texts)]})
    half, complete = tmp_path / "half", extract(config, tmp_path / "complete")
    assert cut_off(config, half) > 0
    before = files(half)
    other = change(config, tmp_path)
    for out in (half, complete):
        with pytest.raises(OptionError, match=message):
            extract(other, out)
    assert files(half) == before
    assert files(extract(other, half, overwrite=True)) == files(extract(other, tmp_path / "fresh"))


def test_other_versions_are_refused_by_name(config, tmp_path, monkeypatch) -> None:
    out = tmp_path / "acts"
    cut_off(config, out)
    before = files(out)
    versions = harvest.versions
    monkeypatch.setattr(harvest, "versions", lambda: {**versions(), "torch": "1.0"})
    with pytest.raises(OptionError, match=r"had other versions: torch 2\S+, not 1\.0; .*--overwrite"):
        extract(config, out)
    assert files(out) == before


def test_no_resume_refuses_and_overwrite_starts_again(config, whole, tmp_path) -> None:
    out = tmp_path / "acts"
    cut_off(config, out)
    with pytest.raises(OptionError, match="interrupted extraction; leave out --no-resume to continue it"):
        extract(config, out, resume=False)
    heard = Heard()
    extract(config, out, heard, overwrite=True)
    assert files(out) == whole
    assert not any("continues" in line for line in heard.lines)


@pytest.mark.parametrize("name", [JOURNAL, ".extracting", ".shard-00001.h5.tmp"])
def test_damage_in_what_was_kept_is_refused_until_overwritten(config, whole, tmp_path, name) -> None:
    out = tmp_path / "acts"
    cut_off(config, out)
    (out / name).write_bytes((out / name).read_bytes()[:-9])
    before = files(out)
    with pytest.raises(InputError, match=rf"{name}: .*--overwrite"):
        extract(config, out)
    assert files(out) == before
    extract(config, out, overwrite=True)
    assert files(out) == whole


def test_running_out_of_memory_keeps_the_rows_before(config, whole, tmp_path) -> None:
    out, cure = tmp_path / "acts", r"--batch-size 2.*halve one of them"
    failing: dict[str, Any] = {"error": torch.OutOfMemoryError, "expected_exception": ResourceError}
    assert cut_off(config, out, match=r"--batch-size 2.*run again to continue, or halve one .*--overwrite", **failing)
    assert cut_off(config, tmp_path / "other", 0, match=cure + "$", **failing) == 0
    assert files(tmp_path / "other") == {}
    extract(config, out)
    assert files(out) == whole


def test_a_value_that_is_not_finite_clears_even_what_was_kept(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "_COMMIT_SECONDS", 0.0)
    forward, kept = harvest._forward, []

    def failing(*args: Any) -> torch.Tensor:
        rows = forward(*args).clone()
        journal = read_journal(tmp_path / "acts")
        if journal is not None:
            kept.append(journal.n_rows)
            rows[0, 1, 2] = float("nan")
        return rows

    monkeypatch.setattr(harvest, "_forward", failing)
    with pytest.raises(InputError, match="activation is nan"):
        extract(config, tmp_path / "acts")
    assert kept[0] > 0
    assert files(tmp_path / "acts") == {}


def test_a_full_disk_keeps_the_rows_before(config, whole, tmp_path, monkeypatch) -> None:
    out = tmp_path / "acts"
    monkeypatch.setattr(writer_module, "_COMMIT_SECONDS", 0.0)
    fdatasync, calls = os.fdatasync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fdatasync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(ResourceError, match="free some"):
            extract(config, out)
    journal = read_journal(out)
    assert journal is not None and journal.n_rows > 0
    extract(config, out)
    assert files(out) == whole


def test_marks_left_beside_a_complete_store_are_taken_away(config, whole, tmp_path, monkeypatch) -> None:
    out, heard = tmp_path / "acts", Heard()
    extract(config, out)
    (out / ".extracting").write_text("{}")
    (out / JOURNAL).write_text("{}")
    monkeypatch.setattr(harvest, "_harvest", lambda *_, **__: pytest.fail("extracted again"))
    extract(config, out, heard)
    assert heard.lines == [f"{out}: complete, made with the same options; skipped"]
    assert files(out) == whole


# each command is a process forked from one that has imported everything
COMMANDS = """
import json, os, sys
import torch
import fastdiff.extraction.harvest
from fastdiff import cli
from fastdiff.store import writer

torch.set_num_threads(1)
writer._COMMIT_SECONDS = 0.0
append = writer.StoreWriter.append

def run(arguments, number, at):
    pid = os.fork()
    if pid == 0:
        def killed(self, rows, **columns):
            if self.n_appended >= at:
                os.kill(os.getpid(), number)
            append(self, rows, **columns)
        writer.StoreWriter.append = killed if number else append
        try:
            cli.main(arguments)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

print(json.dumps([run(*command) for command in json.load(sys.stdin)]))
"""


def test_commands_that_are_killed_continue_to_the_same_bytes(config, whole, tmp_path) -> None:
    arguments = [*shared.command(config)[1:], "--json", "-q", "-o"]
    commands, expected = [], []
    for number, code in [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        out = str(tmp_path / number.name)
        for at in (1, 25, 60):
            commands.append(([*arguments, out], number, at))
            expected.append(code)
        commands += [([*arguments, out, "--layer", "0"], 0, 0), ([*arguments, out], 0, 0), ([*arguments, out], 0, 0)]
        expected += [2, 0, 0]
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMANDS], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected, done.stderr
    assert done.stderr.count("made with --layer 1, not 0") == 3
    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        assert files(tmp_path / name) == whole
