"""The analysis stage on planted activations: right answers, right files, skipped when done."""

import json
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from attributions import write_nats
from planted_runs import LENGTH, small_config, table, write_store
from safetensors.numpy import load_file

from fastdiff import rundir
from fastdiff.analysis.analyze import analyze
from fastdiff.config import AnalyzeConfig
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.train import train
from fastdiff.demo.planted import planted_activations, recovered
from fastdiff.errors import InputError
from fastdiff.results.analysis import LATENT_COLUMNS as COLUMNS
from fastdiff.store.reader import ActivationStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run, analysed; the store has been taken in by the run."""
    folder = tmp_path_factory.mktemp("analysed")
    planted = planted_activations(0, n_tokens=6000, d_model=12, shared=20, exclusive={0.05: 4})
    store = write_store(folder / "acts", planted.activations)
    (folder / "acts" / "vocabulary.json").unlink(missing_ok=True)
    train(store, folder / "run", small_config())
    analyze(folder / "run", AnalyzeConfig(batch_size=512, examples=3, context=4))
    return folder


def test_the_table_has_one_row_per_latent_and_the_promised_columns(finished):
    rows = table(finished / "run")
    assert len(rows) == 64 and [int(r["latent"]) for r in rows] == list(range(64))
    first = "latent,class,delta_norm,cosine,nu_error,nu_reconstruction,nu_activation,norm_base,norm_tuned,frequency,"
    first += "count,max_activation,label,category,specific"
    header = (finished / "run" / "analysis" / "latents.csv").read_text().splitlines()[0]
    assert header.startswith(first) and header.split(",") == list(COLUMNS)
    assert all(row["label"] == row["category"] == "" for row in rows)


def test_counts_and_maxima_are_those_of_a_dense_pass(finished):
    crosscoder, _ = load_crosscoder(finished / "run" / "crosscoder" / "seed-0")
    with ActivationStore(finished / "acts") as store:
        x = crosscoder.normalize(store.slice(0, store.n_rows))
    values, selection = crosscoder.encode(x)
    f = torch.zeros(len(x), 64).index_put_((selection.row, selection.col), values)
    strength = (f * crosscoder.code_norm()).detach()
    fired = load_file(finished / "run" / "analysis" / "firing.safetensors")
    source = np.arange(6000) // LENGTH % 2
    for j, row in enumerate(table(finished / "run")):
        active = strength[:, j] > 0
        assert int(row["count"]) == int(active.sum())
        assert float(row["frequency"]) == pytest.approx(int(active.sum()) / 6000, rel=1e-6)
        assert float(row["max_activation"]) == pytest.approx(float(strength[:, j].max()), rel=1e-5)
        assert fired["count_by_source"][j].tolist() == np.bincount(source[active.numpy()], minlength=2).tolist()
        documents = np.unique(np.flatnonzero(active.numpy()) // LENGTH)
        assert fired["documents_by_source"][j].tolist() == np.bincount(documents % 2, minlength=2).tolist()


def test_the_summary_adds_up(finished):
    summary = json.loads((finished / "run" / "analysis" / "summary.json").read_text())
    rows = table(finished / "run")
    fired = [row for row in rows if int(row["count"])]
    assert sum(summary["classes"].values()) + summary["never_fired"] == 64
    assert summary["classes"]["shared"] == sum(row["class"] == "shared" for row in fired)
    assert summary["specific"]["tuned"] == sum(row["specific"] == "tuned" for row in rows)
    assert sum(summary["delta_norm_histogram"]["counts"]) == len(fired)
    assert summary["n_tokens"] == 6000 and summary["tokens_by_source"] == [3000, 3000]
    assert summary["documents_by_source"] == [150, 150]
    assert summary["quality"]["rows"] == "held out" and summary["quality"]["n_rows"] == 60
    assert min(summary["quality"]["fve"]) > 0.5


def test_examples_show_the_strongest_places_with_their_context(finished):
    db = sqlite3.connect(finished / "run" / "analysis" / "examples.sqlite")
    chosen = dict(db.execute("SELECT latent, why FROM latents"))
    rows = table(finished / "run")
    for latent, why in chosen.items():
        exclusive = rows[latent]["specific"] or rows[latent]["class"].removesuffix("_only")
        assert why == exclusive
    assert {"tuned", "base", "shared"} <= set(chosen.values())
    crosscoder, _ = load_crosscoder(finished / "run" / "crosscoder" / "seed-0")
    norm = crosscoder.code_norm().detach()
    store = ActivationStore(finished / "acts")
    seen = 0
    columns = "latent, rank, sequence_id, row, position, category, activation, peak, tokens, activations"
    for latent, rank, sequence, row, position, category, activation, peak, tokens, heat in db.execute(
        f"SELECT {columns} FROM examples"
    ):
        tokens, heat = json.loads(tokens), json.loads(heat)
        assert sequence == row // LENGTH and position == row % LENGTH and category == "xy"[sequence % 2]
        first = max(row // LENGTH * LENGTH, row - 4)
        assert tokens == [f"#{i % 97}" for i in range(first, min(first // LENGTH * LENGTH + LENGTH, row + 5))]
        assert len(heat) == len(tokens) and peak == row - first
        values, selection = crosscoder.encode(crosscoder.normalize(store.slice(first, first + len(tokens))))
        mine = selection.col == latent
        want = torch.zeros(len(tokens)).index_put_((selection.row[mine],), values[mine] * norm[latent])
        assert heat == pytest.approx(want.tolist(), rel=1e-3, abs=1e-6)
        assert max(heat) == pytest.approx(activation, rel=1e-3) and heat[peak] == max(heat)
        if rank == 0:
            assert activation == pytest.approx(float(rows[latent]["max_activation"]), rel=1e-3)
        seen += 1
    assert seen >= len(chosen)
    assert not db.execute("SELECT 1 FROM examples GROUP BY latent, sequence_id HAVING COUNT(*) > 1").fetchall(), (
        "one example per document"
    )


def test_it_is_skipped_when_done_and_repeats_byte_for_byte(finished):
    folder = finished / "run" / "analysis"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = AnalyzeConfig(batch_size=512, examples=3, context=4)
    stamp = (folder / "latents.csv").stat().st_mtime_ns
    analyze(finished / "run", config)
    assert (folder / "latents.csv").stat().st_mtime_ns == stamp
    (folder / "DONE.json").unlink()
    analyze(finished / "run", config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_swapping_the_models_mirrors_the_result(tmp_path):
    """Same draws, swapped too: Δ → 1 - Δ, and what was specific to one model is specific to the other."""
    planted = planted_activations(1, n_tokens=6000, d_model=12, shared=20, exclusive={0.05: 4})
    results = []
    for name, x in (("ab", planted.activations), ("ba", planted.activations.flip(1).contiguous())):
        store = write_store(tmp_path / f"acts-{name}", x)
        run = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            if name == "ba":
                patch.setattr("fastdiff.crosscoder.model.Crosscoder.initialize", swapped_initialize)
            train(store, run, small_config(steps=60))
        analyze(run, AnalyzeConfig(examples=0))
        results.append(table(run))
    opposite = {"tuned": "base", "base": "tuned", "": ""}
    moved = 0
    for a, b in zip(*results, strict=True):
        assert float(b["delta_norm"]) == pytest.approx(1 - float(a["delta_norm"]), abs=1e-4)
        assert int(b["count"]) == pytest.approx(int(a["count"]), abs=3)
        if min(abs(float(a["delta_norm"]) - 0.5), 1) > 1e-3 and a["specific"]:
            moved += 1
            assert b["specific"] == opposite[a["specific"]]
    assert moved > 0


def swapped_initialize(self, first_batch, *, init, seed, structure):
    from fastdiff.crosscoder.model import geometric_median

    F, M, D = self.W_enc.shape
    rows = torch.rand(M, F, D, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    rows = (rows / rows.norm(dim=-1, keepdim=True)).transpose(0, 1).flip(1)
    with torch.no_grad():
        self.W_enc.copy_(rows)
        self.W_dec.copy_(rows)
        for m in range(M):
            self.b_dec[m] = geometric_median(first_batch[:, m])


@pytest.mark.slow
def test_planted_differences_are_found(tmp_path):
    """Common ones by decoder norms, rare ones by latent scaling; 20 per side and frequency."""
    planted = planted_activations(0, n_tokens=120_000, d_model=48, shared=80, exclusive={0.01: 20, 0.002: 20})
    store = write_store(tmp_path / "acts", planted.activations)
    config = small_config(
        dict_size=256, k=4, steps=2500, batch_size=2048, lr=4e-3, decay_steps=500, dead_tokens=200_000
    )
    train(store, tmp_path / "run", config)
    analyze(tmp_path / "run", AnalyzeConfig(examples=0))
    crosscoder, _ = load_crosscoder(tmp_path / "run" / "crosscoder" / "seed-0")
    rows = table(tmp_path / "run")
    for column, name, frequency, recall in (("class", "{}_only", 0.01, 0.9), ("specific", "{}", 0.002, 0.7)):
        flagged = {side: torch.tensor([row[column] == name.format(side) for row in rows]) for side in ("base", "tuned")}
        found = recovered(planted, crosscoder.W_dec.detach(), flagged)
        for side in ("base", "tuned"):
            assert found[side][frequency] >= recall, (column, side, found)
            assert found[side][0.0] >= 0.8, (column, side, found)


def test_a_run_without_a_crosscoder_names_the_command(tmp_path):
    with pytest.raises(InputError, match=r"run `fastdiff train STORE -o .* --seed 0` first"):
        analyze(tmp_path, AnalyzeConfig())


def test_a_changed_store_is_refused(finished, tmp_path):
    other = write_store(tmp_path / "other", torch.randn(600, 2, 12, generator=torch.Generator().manual_seed(0)))
    (finished / "run" / "analysis" / "DONE.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="not the store this crosscoder was trained on"):
        analyze(finished / "run", AnalyzeConfig(), store_path=other)


def test_a_store_that_has_moved_is_found_with_the_option(finished, tmp_path):
    run = tmp_path / "run"
    config = AnalyzeConfig(batch_size=512, examples=3, context=4)
    shutil.copytree(finished / "run", run)
    manifest = rundir.read_manifest(run)
    manifest["stages"]["train"]["store"] = str(tmp_path / "gone")
    rundir.write_json(run / "manifest.json", manifest)
    (run / "analysis" / "DONE.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"gone.*--store"):
        analyze(run, config)
    analyze(run, config, store_path=finished / "acts")
    assert (run / "analysis" / "DONE.json").exists()


def test_the_latents_with_most_nats_get_examples_whatever_their_class(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    model = rundir.read_json(run / "crosscoder" / "seed-0" / "DONE.json", 1)["outputs"]["model.safetensors"]
    config = AnalyzeConfig(batch_size=512, examples=3, context=4, cards=5)
    analyze(run, config)
    before, rows = shown(run), table(run)
    assert rundir.read_json(run / "analysis" / "summary.json", 1)["by_nats"] == []
    # of two latents that fire and have no card yet, and of one that has
    fired = [int(row["latent"]) for row in rows if int(row["count"]) > 50]
    first, second = [latent for latent in fired if latent not in before][:2]
    third = next(latent for latent, why in before.items() if why == "tuned")
    nats = np.zeros((1, 2, 64), np.float32)
    nats[0, 0, first], nats[0, 1, second], nats[0, 1, third] = 0.5, -0.25, 0.125
    write_nats(run, nats, [0, 1], ["x", "y"], model=model)
    analyze(run, config)
    assert rundir.read_json(run / "analysis" / "summary.json", 1)["by_nats"] == sorted([first, second, third])
    after = shown(run)
    assert {latent: why for latent, why in after.items() if latent not in (first, second)} == before
    for latent in (first, second):
        exclusive = rows[latent]["specific"] or {"tuned_only": "tuned", "base_only": "base"}.get(rows[latent]["class"])
        assert after[latent] == (exclusive or "nats")
    db = sqlite3.connect(run / "analysis" / "examples.sqlite")
    assert {latent for (latent,) in db.execute("SELECT DISTINCT latent FROM examples")} >= {first, second}
    # nats of another crosscoder choose nothing
    write_nats(run, nats, [0, 1], ["x", "y"], model="0" * 64)
    analyze(run, config)
    assert shown(run) == before


def shown(run):
    return dict(sqlite3.connect(run / "analysis" / "examples.sqlite").execute("SELECT latent, why FROM latents"))
