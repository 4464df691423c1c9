import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastdiff import rundir
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify_run import is_run, verify_run
from fastdiff.store.writer import StoreWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store, run = tmp_path / "acts.h5", tmp_path / "run"
    with h5py.File(store, "w") as file:
        file["activations"] = np.ones((4, 2, 3), np.float32)
    with ActivationStore(store) as opened:
        inputs = {"store": opened.sha256()}
    for stage, name in (("train", "crosscoder/seed-0"), ("train", "crosscoder/seed-1"), ("analyze", "analysis")):
        (run / name).mkdir(parents=True)
        (run / name / "result.txt").write_text(name)
        (run / name / "more.txt").write_text("more")
        rundir.finish(run / name, stage, {"k": 1}, inputs, ["result.txt", "more.txt"])
    rundir.record(run, "train", {"k": 1}, store=str(store))
    return run


def test_a_sound_run(run: Path) -> None:
    assert is_run(run) and not is_run(run.parent)
    found = verify_run(run)
    assert found.problems == []
    assert found.facts == {"stages": 3, "files": 6}
    assert "only its identity was compared" in found.notes[0]


def test_changed_and_missing_outputs(run: Path) -> None:
    (run / "crosscoder/seed-0/result.txt").write_text("other")
    (run / "analysis/more.txt").unlink()
    assert verify_run(run).problems == [
        f"{run}/crosscoder/seed-0/result.txt: changed since it was written; run `fastdiff train` again",
        f"{run}/analysis/more.txt: gone; run `fastdiff analyze` again",
    ]


def test_unfinished_stage(run: Path) -> None:
    (run / "analysis/DONE.json").unlink()
    assert verify_run(run).problems == [f"{run}/analysis: no DONE.json, the stage was not finished; run it again"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "not readable as JSON"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1}', "stage: Field required"),
        ('{"schema": 1, "stage": "s", "key": "k", "config": {}, "inputs": {}, "outputs": []}', "outputs: "),
        ('{"schema": 1, "stage": "s", "key": "k", "config": {"a": NaN}, "inputs": {}, "outputs": {}}', "not what a"),
        ('{"schema": 1, "stage": "\\ud800", "key": "", "config": {}, "inputs": {}, "outputs": {}}', "stage"),
        ('{"schema": 1, "stage": "s", "key": "k", "config": {}, "inputs": {}, "outputs": {}}', "its key does not"),
    ],
)
def test_done_that_cannot_be(run: Path, text: str, wanted: str) -> None:
    (run / "analysis/DONE.json").write_text(text)
    (found,) = verify_run(run).problems
    assert found.startswith(f"{run}/analysis/DONE.json") and wanted in found


def test_another_store(run: Path) -> None:
    store = run.parent / "acts.h5"
    with h5py.File(store, "w") as file:
        file["activations"] = np.zeros((4, 2, 3), np.float32)
    found = verify_run(run).problems
    assert len(found) == 2
    assert f"{store}: not the store that {run}/crosscoder/seed-0 was trained on" in found[0]
    store.write_bytes(b"x")
    assert "cannot be opened as HDF5" in verify_run(run).problems[0]
    store.unlink()
    gone = verify_run(run)
    assert gone.problems == [] and "the store is no longer there" in gone.notes[0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1}', '{"schema": 1, "stages": {"train": {"store": 3}}}'])
def test_manifest_that_cannot_be(run: Path, text: str) -> None:
    (run / "manifest.json").write_text(text)
    (found,) = verify_run(run).problems
    assert str(run / "manifest.json") in found


def test_a_store_name_that_cannot_be_printed(run: Path) -> None:
    manifest = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(manifest.replace(str(run.parent / "acts.h5"), "\\ud800"))
    found = verify_run(run)
    assert found.problems == []
    assert found.notes == ["\\ud800: the store is no longer there, so it is not compared"]


def test_a_stage_that_the_manifest_names_is_gone(run: Path) -> None:
    rundir.record(run, "analyze", {"k": 1})
    assert verify_run(run).problems == []
    shutil.rmtree(run / "analysis")
    assert verify_run(run).problems == [
        f"{run}/analysis: gone, but manifest.json names it; run `fastdiff analyze` again"
    ]
    shutil.rmtree(run / "crosscoder")
    assert [line.partition(": ")[0] for line in verify_run(run).problems] == [
        f"{run}/crosscoder/seed-*",
        f"{run}/analysis",
    ]


def test_a_run_without_stages(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 1, "stages": {}}')
    assert is_run(tmp_path)
    assert verify_run(tmp_path).problems == [
        f"{tmp_path}: no stages in it; run `fastdiff train`, or copy the run again"
    ]


def test_a_store_with_a_run_in_it_is_checked_as_both(run: Path) -> None:
    meta = {"models": ["a", "b"]}
    with StoreWriter(
        run, n_rows=40, n_models=2, d_model=3, dtype="float32", shard_rows=40, meta=meta, columns=()
    ) as writer:
        writer.append(torch.randn(40, 2, 3))
    found = verify_run(run)
    assert found.problems == []
    assert found.facts["rows"] == 40 and found.facts["stages"] == 3
    assert "40 rows of 2 × 3 float32" in found.summary()[0] and "6 files of 3 stages" in found.summary()[0]
    told = json.loads((run / "store.json").read_text())
    (run / "store.json").write_text(json.dumps(told | {"dtype": "float16"}))
    (run / "analysis/more.txt").write_text("other")
    store, stage = verify_run(run, quick=True).problems
    assert "store.json says float16" in store and "analysis/more.txt: changed" in stage
