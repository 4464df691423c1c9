"""The stage: what it chooses, what it says, what it refuses, and what a kill leaves."""

import errno
import json
import math
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_runs import LAYER, Said, make_run, make_store, save_model, tokenizer

from fastdiff import rundir
from fastdiff.analysis.analyze import analyze
from fastdiff.attribution import attribute as attribute_module
from fastdiff.attribution import tracing as module
from fastdiff.attribution.attribute import attribute
from fastdiff.attribution.choose import Choice, unigram_entropy
from fastdiff.cli import cli
from fastdiff.config import AnalyzeConfig, AttributeConfig, TrainConfig
from fastdiff.crosscoder.train import train, train_seeds
from fastdiff.errors import FastdiffError, InputError, OptionError, ResourceError
from fastdiff.patching.halves import UpperHalf
from fastdiff.results import attribution as results
from fastdiff.results.attribution import category_means, read_attribution, read_summary
from fastdiff.rundir import read_json, sha256_file, write_json
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

CONFIG = AttributeConfig(device="cpu")


def hashes(run):
    return {path.name: sha256_file(path) for path in (run / "attribution").iterdir()}


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def test_it_is_done_once_and_repeats_to_the_same_bytes(runs, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    said = Said()
    attribute(run, CONFIG, said)
    first = hashes(run)
    assert set(first) == {"summary.json", "documents.safetensors", "latents.safetensors", "DONE.json"}
    assert said.lines[0].startswith("attribute: about ") and "GB for the nats of 24 documents" in said.lines[0]
    again = Said()
    attribute(run, CONFIG, again)
    assert again.lines == [f"attribute: {run / 'attribution'} is up to date"]
    shutil.rmtree(run / "attribution")
    attribute(run, CONFIG)
    assert hashes(run) == first
    # whether `run` takes the stage is nothing that its result depends on
    attribute(run, AttributeConfig(device="cpu", enabled=False), again)
    assert again.lines[-1].endswith("is up to date")
    assert "enabled" not in read_json(run / "attribution" / "DONE.json", 1)["config"]


@pytest.mark.parametrize("at", ["write_attribution", "record", "finish"])
def test_a_kill_at_any_step_leaves_nothing_that_counts(runs, monkeypatch, tmp_path, at):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    whole = hashes(run)
    (run / "attribution" / "documents.safetensors").write_bytes(b"changed")

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attribute_module if at == "write_attribution" else rundir, at, killed)
        with pytest.raises(KeyboardInterrupt):
            attribute(run, CONFIG)
    assert not (run / "attribution" / "DONE.json").exists()
    attribute(run, CONFIG)
    assert hashes(run) == whole


def test_documents_of_a_category_are_spread_and_the_held_out_ones_come_first(runs, tmp_path):
    store, run = runs(fresh=tmp_path / "run")
    attribute(run, AttributeConfig(device="cpu", documents=5, behaviour_documents=9))
    found = read_attribution(run / "attribution")
    table = found.documents
    with ActivationStore(store) as opened:
        numbers, start = opened.column("sequence_ids"), opened.n_train(0.2)
        sources = [opened.meta.sources[i].category for i in opened.column("sources")]
    held_out = set(numbers[start:].tolist())
    category = dict(zip(numbers.tolist(), sources, strict=True))
    assert len(held_out) == 5 and found.summary.categories == ["pets", "sums"]
    for c, name in enumerate(found.summary.categories):
        mine = table.category == c
        assert mine.sum() == 9 and (mine & table.has_nats).sum() == 5
        documents = table.document[mine]
        assert all(category[int(n)] == name for n in documents)
        wanted = {n for n in held_out if category[n] == name}
        assert wanted <= set(documents.tolist()) and wanted <= set(table.document[mine & table.has_nats].tolist())
    assert {int(n) for n in table.document[table.held_out]} == held_out
    assert np.isnan(table.layer[~table.has_nats]).all() and np.isfinite(table.ce).all()
    assert (np.diff(table.document) > 0).all()
    assert found.summary.few_documents == ["pets", "sums"]


def test_taking_from_a_category():
    held_out = np.zeros(20, bool)
    held_out[[3, 18, 19]] = True
    eligible = np.ones(20, bool)
    eligible[[0, 19]] = False
    choice = Choice("all text", ["a"], np.zeros(20, np.int64), held_out, eligible, True)
    assert choice.take(2).tolist() == [3, 18] and choice.take(1).tolist() == [3]
    assert choice.take(4).tolist() == [1, 3, 17, 18]
    assert choice.take(99).tolist() == list(range(1, 19))
    assert choice.take(3, choice.take(4)).tolist() == [1, 3, 18]


def test_unigram_entropy_of_known_samples():
    assert unigram_entropy(np.array([5, 5, 5])) == 0
    assert unigram_entropy(np.array([1, 2, 3, 4])) == pytest.approx(math.log(4) + 3 / 8)
    generator = np.random.Generator(np.random.PCG64(0))
    found = [unigram_entropy(generator.integers(0, 16, 200)) for _ in range(200)]
    assert np.mean(found) == pytest.approx(math.log(16), abs=0.003)


def test_no_categories_are_data_sets_and_that_is_said(inputs, tmp_path):
    run = make_run(make_store(inputs, tmp_path / "acts", category_field=None), tmp_path / "run")
    said = Said()
    attribute(run, CONFIG, said)
    assert read_summary(run / "attribution").categories == ["texts.jsonl"]
    assert any("see --category-field" in line for line in said.lines)


def test_a_category_of_which_no_document_is_long_enough_is_named(inputs, tmp_path):
    pets = [line for line in (inputs / "texts.jsonl").read_text().splitlines() if '"pets"' in line]
    text = "\n".join([*pets, *['{"text": "ten", "topic": "sums"}'] * 3]) + "\n"
    (inputs / "short.jsonl").write_text(text)
    store = make_store(inputs, tmp_path / "acts", texts="short.jsonl", messages_field=None)
    run, said = make_run(store, tmp_path / "run"), Said()
    attribute(run, CONFIG, said)
    # the text of pets has a document of one token too
    assert any("4 documents have fewer than two scored tokens and are left out, so that none is left of sums" in line
               for line in said.lines)  # fmt: skip
    assert read_summary(run / "attribution").categories == ["pets"]


def test_a_long_prediction_takes_fewer_documents(runs, monkeypatch, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    monkeypatch.setattr(module, "_FEWER_DOCUMENTS", 3)
    said = Said()
    attribute(run, CONFIG.model_copy(update={"minutes": 1e-9}), said)
    found = read_attribution(run / "attribution")
    assert found.summary.documents_with_nats == {"pets": 3, "sums": 3}
    assert found.summary.documents == {"pets": 12, "sums": 12} and found.summary.too_short == 1
    assert "with 3 documents a category instead of 40, which would take" in said.lines[0]
    # 0 never takes fewer
    attribute(run, CONFIG.model_copy(update={"minutes": 0}), said)
    assert read_attribution(run / "attribution").summary.documents_with_nats == {"pets": 12, "sums": 12}


def refusals():
    return {
        "an SAE": ({"train": {"inputs": "1"}}, None, "reads one model only", "--inputs difference"),
        "no answer": ({"texts": "asks.jsonl"}, None, "no answer", "assistant"),
        "gone": ({}, lambda root: shutil.rmtree(root / "tuned"), "no such directory", "put it back"),
        "changed": ({}, lambda root: save_model(root / "tuned", 9), "has changed since", "put it back"),
        "no config": ({}, lambda root: (root / "base" / "config.json").unlink(), "not a model directory", "put back"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_checked_is_said_and_the_rest_stands(inputs, tmp_path, case):
    options, harm, reason, remedy = refusals()[case]
    root, run = tmp_path / "inputs", tmp_path / "run"
    shutil.copytree(inputs, root)
    train = options.pop("train", {})
    make_run(make_store(root, tmp_path / "acts", **options), run, **train)
    if harm is not None:
        harm(root)
    result = invoke("attribute", run, "--device", "cpu", "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["state"], facts["means"]) == (0, "not checked", {})
    assert reason in facts["reason"] and remedy in facts["remedy"]
    lines = [line for line in result.stderr.splitlines() if line.startswith("attribute: not checked")]
    assert len(lines) == 1 and reason in lines[0] and remedy in lines[0]
    assert set(hashes(run)) == {"summary.json", "DONE.json"}
    assert read_attribution(run / "attribution").documents is None
    if case == "gone":
        shutil.copytree(inputs / "tuned", root / "tuned")
        assert invoke("attribute", run, "--device", "cpu").exit_code == 0
        assert read_summary(run / "attribution").state == "checked"


def foreign(path, store, *, without=(), **meta):
    """The same rows as another tool might have written them."""
    names = [name for name in ("token_ids", "sequence_ids", "positions", "roles", "sources") if name not in without]
    facts = {"roles": store.meta.roles, "sources": [s.model_dump() for s in store.meta.sources], **meta}
    shape = {"n_rows": store.n_rows, "n_models": store.n_models, "d_model": store.d_model, "shard_rows": store.n_rows}
    facts.setdefault("models", [info.model_dump() for info in store.meta.models])
    with StoreWriter(path, **shape, dtype="float32", meta=facts, columns=names) as writer:
        writer.append(store.slice(0, store.n_rows), **{name: store.column(name) for name in names})
    return path


def swapped(store):
    models = [info.model_dump() for info in store.meta.models]
    models[0]["layer"] += 1
    return models


def test_a_result_that_was_checked_stands_where_the_models_are_gone(inputs, tmp_path):
    pair = tmp_path / "pair"
    shutil.copytree(inputs, pair)
    run = make_run(make_store(pair, tmp_path / "acts"), tmp_path / "run")
    attribute(run, CONFIG)
    before = hashes(run)
    (pair / "tuned").rename(pair / "away")
    with pytest.raises(
        InputError, match=r"no such directory.*put it back.*; the earlier result in .*attribution stands"
    ):
        attribute(run, CONFIG.model_copy(update={"documents": 5}))
    assert hashes(run) == before
    # of other crosscoders it would say nothing true, so it goes
    shutil.rmtree(run / "crosscoder" / "seed-1")
    attribute(run, CONFIG)
    assert read_summary(run / "attribution").state == "not checked" and set(hashes(run)) == {
        "DONE.json",
        "summary.json",
    }


def test_a_full_disk_leaves_the_result_that_was_there(runs, monkeypatch, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    before, save = hashes(run), results.save_file

    def full(tensors, path, **options):
        if "latents" in str(path):
            raise OSError(errno.ENOSPC, "full")
        save(tensors, path, **options)

    monkeypatch.setattr(results, "save_file", full)
    with pytest.raises(ResourceError, match=r"latents\.safetensors: no space left"):
        attribute(run, CONFIG.model_copy(update={"documents": 5}))
    assert hashes(run) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda store: {"models": ["base", "tuned"]}, "does not say at which layer and hook base was read"),
        (lambda store: {"without": ("token_ids",)}, "has no token_ids, which fastdiff attribute needs"),
        (lambda store: {"without": ("positions",)}, "has no positions, which fastdiff attribute needs"),
        (lambda store: {}, "of .* positions"),
        (lambda store: {"models": swapped(store)}, "between which there is no path"),
    ],
)
def test_stores_of_other_tools_may_not_say_enough(runs, tmp_path, change, reason):
    path, _ = runs()
    with ActivationStore(path) as store:
        made = foreign(tmp_path / "acts", store, **change(store))
    run = make_run(made, tmp_path / "run", seeds=(0,))
    attribute(run, CONFIG)
    summary = read_summary(run / "attribution")
    assert summary.state == "not checked"

    assert re.search(reason, summary.reason)


def test_a_store_of_one_model_is_not_checked(runs, tmp_path):
    path, _ = runs()
    with ActivationStore(path) as store:
        shape = {"n_rows": store.n_rows, "n_models": 1, "d_model": store.d_model, "shard_rows": store.n_rows}
        meta = {"models": [store.meta.models[0].model_dump()]}
        with StoreWriter(tmp_path / "acts", **shape, dtype="float32", meta=meta, columns=["sequence_ids"]) as writer:
            writer.append(store.slice(0, store.n_rows)[:, :1], sequence_ids=store.column("sequence_ids"))
    run = make_run(tmp_path / "acts", tmp_path / "run", seeds=(0,))
    attribute(run, CONFIG)
    assert "holds one model only" in read_summary(run / "attribution").reason


def test_half_precision_comes_close(runs, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    exact = read_attribution(run / "attribution").documents
    attribute(run, AttributeConfig(device="cpu", dtype="bfloat16"))
    half = read_attribution(run / "attribution").documents
    for name in ("ce", "layer", "latents", "offset", "error"):
        ours, theirs = getattr(half, name), getattr(exact, name)
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max() + 0.02, name
        assert (ours != theirs).any()


def test_a_model_that_computes_something_else_is_not_checked(inputs, runs, tmp_path):
    path, _ = runs(keep_bos=True)
    with ActivationStore(path) as store:
        # nothing is recorded that could tell them from others
        models = [{"name": str(inputs / name), "layer": LAYER, "hook": "resid_post"} for name in ("base", "base")]
        made = foreign(tmp_path / "acts", store, models=models)
    run = make_run(made, tmp_path / "run", seeds=(0,))
    attribute(run, CONFIG)
    assert "does not compute what" in read_summary(run / "attribution").reason


def test_a_model_without_a_gradient_is_not_checked(runs, monkeypatch, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    real = UpperHalf.go_on
    monkeypatch.setattr(UpperHalf, "go_on", lambda self, h: real(self, h).detach())
    attribute(run, CONFIG)
    summary = read_summary(run / "attribution")
    assert "tuned: has no gradient" in summary.reason or "base: has no gradient" in summary.reason


class Broken(torch.autograd.Function):
    """What it is given; NaN as the gradient of some documents."""

    @staticmethod
    def forward(ctx, h, bad):
        ctx.save_for_backward(bad)
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.saved_tensors[0][:, None, None], math.nan), None


def test_a_gradient_that_is_not_finite_is_an_error_that_names_model_and_category(runs, monkeypatch, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    before = hashes(run)
    real, one = UpperHalf.go_on, tokenizer().get_vocab()["one"]

    def broken(self, h):
        return Broken.apply(real(self, h), (self._inputs[0] == one).any(dim=1))

    monkeypatch.setattr(UpperHalf, "go_on", broken)
    message = r"base: a gradient is NaN or infinite in a document of category 'sums'; try .* --no-attribute"
    with pytest.raises(FastdiffError, match=message) as caught:
        attribute(run, AttributeConfig(device="cpu", tau=0.1))
    assert type(caught.value) is FastdiffError and caught.value.exit_code == 1
    # the result of before is whole
    assert hashes(run) == before


@pytest.mark.slow
def test_three_models_and_which_of_them_is_tuned(inputs, runs, tmp_path):
    pair, _ = runs(keep_bos=True)
    other = make_store(inputs, tmp_path / "third", tuned="third", keep_bos=True)
    with ActivationStore(pair) as a, ActivationStore(other) as b:
        x = torch.cat([a.slice(0, a.n_rows), b.slice(0, b.n_rows)[:, 1:]], dim=1)
        names = ("token_ids", "sequence_ids", "positions", "roles", "sources")
        facts = {
            "roles": a.meta.roles,
            "sources": [s.model_dump() for s in a.meta.sources],
            "models": [info.model_dump() for info in (*a.meta.models, b.meta.models[1])],
        }
        shape = {"n_rows": a.n_rows, "n_models": 3, "d_model": a.d_model, "shard_rows": a.n_rows}
        with StoreWriter(tmp_path / "acts", **shape, dtype="float32", meta=facts, columns=names) as writer:
            writer.append(x, **{name: a.column(name) for name in names})
    run = make_run(tmp_path / "acts", tmp_path / "run")
    said = Said()
    attribute(run, AttributeConfig(device="cpu", tuned="third"), said)
    found = read_attribution(run / "attribution")
    table = found.documents
    assert found.summary.models[1].endswith("third") and any("model 2" in line for line in said.lines)
    total = table.latents + table.offset + table.error + table.left_out + table.bos
    assert np.allclose(total[0], total[1]) and found.summary.largest_gap <= 0.03
    # B and L are those of the pair alone
    alone = make_run(other, tmp_path / "alone")
    attribute(alone, CONFIG)
    want = read_attribution(alone / "attribution").documents
    assert np.allclose(table.ce, want.ce, atol=1e-6) and np.allclose(table.layer, want.layer, atol=1e-6)
    attribute(run, AttributeConfig(device="cpu", tuned="1"))
    assert read_summary(run / "attribution").models[1].endswith("tuned")
    for wrong in ("0", "3", "base", "nobody"):
        with pytest.raises(OptionError, match=f"--tuned {wrong}: name one model"):
            attribute(run, AttributeConfig(device="cpu", tuned=wrong))
    some = tmp_path / "some"
    make_run(tmp_path / "acts", some, inputs="0,1", seeds=(0,))
    attribute(some, AttributeConfig(device="cpu", tuned="2"))
    assert "does not read models 0 and 2" in read_summary(some / "attribution").reason


def test_seeds_that_differ_are_left_out_and_named(runs, tmp_path):
    store, run = runs(fresh=tmp_path / "run")
    config = TrainConfig(dict_size=12, k=3, steps=5, batch_size=64, seed=7, threads=1, device="cpu", holdout=0.5)
    train_seeds(store, run, config)
    said = Said()
    attribute(run, CONFIG, said)
    assert read_summary(run / "attribution").seeds == [0, 1]
    assert any("seed-7: has 12 latents, not 20, left out" in line for line in said.lines)


def test_a_run_without_crosscoders_and_a_wrong_store(runs, inputs, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    with pytest.raises(InputError, match="has no finished crosscoder; run `fastdiff train STORE"):
        attribute(tmp_path / "empty", CONFIG)
    other = make_store(inputs, tmp_path / "acts", keep_bos=True)
    with pytest.raises(InputError, match="not the store these crosscoders were trained on"):
        attribute(run, CONFIG, store_path=other)
    assert not (run / "attribution").exists()


def test_the_command_prints_what_it_found(runs, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    result = invoke("attribute", run, "--device", "cpu", "--json")
    facts = json.loads(result.stdout)
    found = read_attribution(run / "attribution")
    assert facts["state"] == "checked" and facts["means"] == category_means(found)
    table = found.documents
    mine = table.category == 0
    means = facts["means"]["pets"]
    assert means["B"] == pytest.approx(float((table.ce[mine, 0] - table.ce[mine, 1]).mean()))
    assert means["V"] == pytest.approx([a + b for a, b in zip(means["latents"], means["offset"], strict=True)])
    assert "--enabled" not in invoke("attribute", "--help").output
    summary = run / "attribution" / "summary.json"
    write_json(summary, {**read_json(summary, 2), "state": "perhaps"})
    assert invoke("attribute", run, "--device", "cpu").exit_code == 0
    assert read_summary(run / "attribution").state == "checked"


def test_every_stage_says_that_it_measures_a_store_without_norms(inputs, tmp_path):
    store = make_store(inputs, tmp_path / "acts", base="plain-base", tuned="plain-tuned")
    with ActivationStore(store) as opened:
        usable = opened.usable_rows()
    # as versions before the column left it
    for shard in store.glob("*.h5"):
        with h5py.File(shard, "a") as file:
            del file["norms"]
    told = read_json(store / "store.json", 1)
    del told["left_out"], told["stats"], told["config"]["max_norm"], told["shards"]
    write_json(store / "store.json", told)
    with ActivationStore(store) as opened:
        assert np.array_equal(opened.usable_rows(), usable) and len(usable) < opened.n_rows
    run, config, said = tmp_path / "run", TrainConfig(dict_size=16, k=4, steps=5, batch_size=32, threads=1), Said()
    train(store, run, config, said)
    analyze(run, AnalyzeConfig(device="cpu"), said)
    attribute(run, CONFIG, said)
    for stage in ("train", "analyze", "attribute"):
        assert said.lines.count(f"{stage}: {store} has no column norms; its rows are measured") == 1
