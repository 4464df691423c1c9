"""Latents of two seeds: the matching is the best one, finds copies, and is what analyze writes down."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fastdiff.analysis import stability as module
from fastdiff.analysis.analyze import analyze
from fastdiff.analysis.stability import match, maximum_matching, stability
from fastdiff.config import AnalyzeConfig, TrainConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import save_crosscoder
from fastdiff.crosscoder.train import train
from fastdiff.demo.planted import planted_activations
from fastdiff.errors import FastdiffError, InputError
from fastdiff.progress import Progress
from fastdiff.results.analysis import LATENT_COLUMNS as COLUMNS
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

F, M, D = 40, 2, 16


def write_store(path, activations):
    n, M, d_model = activations.shape
    meta = {"models": [{"name": "base"}, {"name": "tuned"}], "roles": ["text", "bos"]}
    with StoreWriter(path, n_rows=n, n_models=M, d_model=d_model, dtype="float32", shard_rows=n, meta=meta) as w:
        i = np.arange(n)
        w.append(activations, token_ids=i % 97, sequence_ids=i // 20, positions=i % 20, roles=i * 0, sources=i * 0)
    return path


def crosscoder(seed, activation="batchtopk", dict_size=F) -> Crosscoder:
    """Tied random directions of random length, and thresholds at which about a tenth fires."""
    generator = torch.Generator().manual_seed(seed)
    c = Crosscoder(dict_size, M, D, activation=activation, k=4)
    rows = torch.randn(dict_size, M, D, generator=generator)
    rows /= rows.flatten(1).norm(dim=1)[:, None, None]
    length = 0.5 + torch.rand(dict_size, generator=generator)
    with torch.no_grad():
        c.W_enc.copy_(rows)
        c.W_dec.copy_(rows * length[:, None, None])
        c.threshold.copy_(1.3 * (c.code_norm() if activation == "batchtopk" else torch.ones(dict_size)))
        c.input_mean.fill_(0.1)
    return c


def changed(c, order, scale=None, swap=False) -> Crosscoder:
    """The same latents in another order, f → scale·f and d → d/scale."""
    scale = torch.ones(c.dict_size) if scale is None else scale
    other = Crosscoder(c.dict_size, M, D, activation=c.activation, k=c.k)
    with torch.no_grad():
        other.W_enc.copy_((c.W_enc * scale[:, None, None])[order])
        other.b_enc.copy_((c.b_enc * scale)[order])
        other.W_dec.copy_((c.W_dec / scale[:, None, None])[order])
        # what jumprelu compares is f, what batchtopk compares does not change
        other.threshold.copy_((c.threshold * (scale if c.activation == "jumprelu" else 1))[order])
        other.input_mean.copy_(c.input_mean)
    return other


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    x = torch.randn(600, M, D, generator=torch.Generator().manual_seed(7))
    with ActivationStore(write_store(tmp_path_factory.mktemp("store") / "acts", x)) as store:
        yield store


ALL = np.arange(600)


def dense(c, store):
    x = c.normalize(store.slice(0, 600))
    values, selection = c.encode(x)
    return torch.zeros(600, c.dict_size).index_put_((selection.row, selection.col), values).double().numpy()


def similar(c, seed, noise) -> Crosscoder:
    """Every latent a little off, in another order: true pairs and near misses."""
    generator = torch.Generator().manual_seed(seed)
    other = changed(c, torch.randperm(c.dict_size, generator=generator))
    with torch.no_grad():
        for weight in (other.W_enc, other.W_dec):
            weight += noise * torch.randn(weight.shape, generator=generator) / (M * D) ** 0.5
    return other


def best_by_definition(a, b, store, floor):
    """Dense similarities and the Hungarian method on all of them."""
    rows = [c.W_dec.detach().flatten(1).double().numpy() for c in (a, b)]
    rows = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]
    firings = [dense(c, store) for c in (a, b)]
    lengths = [np.linalg.norm(f, axis=0) for f in firings]
    cosine = rows[0] @ rows[1].T
    with np.errstate(invalid="ignore", divide="ignore"):
        coactivation = firings[0].T @ firings[1] / np.outer(*lengths)
    allowed = (cosine >= floor) & (np.outer(*lengths) > 0)
    weight = np.where(allowed, (cosine + np.nan_to_num(coactivation)) / 2, 0.0)
    i, j = linear_sum_assignment(weight, maximize=True)
    partner = np.full(len(cosine), -1)
    partner[i[allowed[i, j]]] = j[allowed[i, j]]
    return partner, cosine, coactivation, lengths[0] > 0


@pytest.mark.parametrize("floor", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_matching_is_that_of_the_hungarian_method_on_all_pairs(store, monkeypatch, floor, blocks):
    if blocks:
        monkeypatch.setattr(module, "_HELD", 3 * F)
        monkeypatch.setattr(module, "_SOLVED", 5)
    a, b = crosscoder(0), similar(crosscoder(0), 1, 0.7)
    found = match(a, b, store, ALL, batch_size=128, floor=floor)
    partner, cosine, coactivation, fired = best_by_definition(a, b, store, floor)
    assert found.partner.tolist() == partner.tolist() and found.fired.tolist() == fired.tolist()
    at = np.flatnonzero(partner >= 0)
    assert len(at) > F // 2
    np.testing.assert_allclose(found.cosine[at], cosine[at, partner[at]], rtol=1e-12)
    np.testing.assert_allclose(found.coactivation[at], coactivation[at, partner[at]], rtol=1e-12)
    assert not found.cosine[partner < 0].any() and not found.coactivation[partner < 0].any()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("solved", [1, 30, 4096])
def test_sparse_graphs_are_solved_as_dense_ones(monkeypatch, density, solved):
    monkeypatch.setattr(module, "_SOLVED", solved)
    rng = np.random.default_rng(0)
    for n, m in ((30, 30), (30, 50), (50, 30), (1, 9)):
        there = rng.random((n, m)) < density
        # weights with ties, and with zeros, for which any choice is as good
        for weight in (rng.random((n, m)), rng.integers(0, 4, (n, m)) / 4):
            i, j = np.nonzero(there)
            shuffled = rng.permutation(len(i))
            i, j = i[shuffled], j[shuffled]
            chosen = maximum_matching(i, j, weight[i, j])
            assert len(set(i[chosen])) == len(set(j[chosen])) == len(chosen)
            rows, columns = linear_sum_assignment(np.where(there, weight, 0), maximize=True)
            assert weight[i, j][chosen].sum() == pytest.approx(np.where(there, weight, 0)[rows, columns].sum())


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_copies_in_another_order_and_scale_match_perfectly(store, activation):
    a = crosscoder(0, activation)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(F, generator=generator)
    b = changed(a, order, scale=torch.exp(torch.randn(F, generator=generator)))
    found = match(a, b, store, ALL, batch_size=256)
    assert found.fired.all()
    assert order[found.partner].tolist() == list(range(F))
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-6)
    np.testing.assert_allclose(found.coactivation, 1, rtol=1e-4)


def test_unrelated_crosscoders_match_nothing(store):
    """Random directions in 32 dimensions, and those orthogonal to all of the other's."""
    a, b = crosscoder(0), crosscoder(1)
    assert (match(a, b, store, ALL, batch_size=256, floor=0.8).partner == -1).all()
    base = torch.linalg.qr(torch.randn(M * D, M * D, generator=torch.Generator().manual_seed(2)))[0].view(-1, M, D)
    with torch.no_grad():
        a.W_dec.copy_(base[torch.arange(F) % 16])
        b.W_dec.copy_(base[16 + torch.arange(F) % 16])
    found = match(a, b, store, ALL, batch_size=256, floor=0.01)
    assert (found.partner == -1).all() and found.fired.all()


def test_swapped_crosscoders_give_the_inverse_matching(store):
    a, b = crosscoder(0), similar(crosscoder(0), 1, 0.8)
    there, back = (match(*pair, store, ALL, batch_size=100, floor=0.1) for pair in ((a, b), (b, a)))
    at = np.flatnonzero(there.partner >= 0)
    assert 0 < len(at) == (back.partner >= 0).sum()
    assert back.partner[there.partner[at]].tolist() == at.tolist()
    assert there.cosine[at].tolist() == back.cosine[there.partner[at]].tolist()
    assert there.coactivation[at].tolist() == back.coactivation[there.partner[at]].tolist()


def test_it_repeats_bit_for_bit_and_depends_on_no_batch(store):
    a, b = crosscoder(0), similar(crosscoder(0), 1, 0.5)
    first, again, other = (match(a, b, store, ALL, batch_size=size) for size in (128, 128, 77))
    for name in ("partner", "cosine", "coactivation", "fired"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.partner.tolist() == other.partner.tolist()
    np.testing.assert_allclose(first.coactivation, other.coactivation, rtol=1e-12)


def test_what_never_fires_is_no_match_even_for_its_own_copy(store):
    a = crosscoder(0)
    a.threshold[:10] = 1e9
    b = changed(a, torch.arange(F))
    b.threshold[:20] = 1e9
    found = match(a, b, store, ALL, batch_size=256)
    assert found.partner.tolist() == [-1] * 20 + list(range(20, F))
    assert found.fired.tolist() == [False] * 10 + [True] * 30


def test_dictionaries_may_differ_in_size_and_hold_empty_rows(store):
    a, b = crosscoder(0), crosscoder(1, dict_size=F + 7)
    with torch.no_grad():
        b.W_enc[7:], b.W_dec[7:], b.threshold[7:] = a.W_enc, a.W_dec, a.threshold
        b.W_dec[:7] = 0
    found = match(a, b, store, ALL, batch_size=256, floor=0.9)
    assert found.partner.tolist() == list(range(7, F + 7))
    assert match(a, b, store, ALL[:0], batch_size=256).partner.tolist() == [-1] * F


def test_other_inputs_and_latents_that_are_all_alike_are_refused(store, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 16\) and \(1, 16\)"):
        match(crosscoder(0), Crosscoder(F, 1, D, activation="topk", k=2), store, ALL, batch_size=256)
    monkeypatch.setattr(module, "_MOST_PAIRS", 30)
    save_crosscoder(tmp_path, crosscoder(0), {})
    with pytest.raises(FastdiffError, match=r"more than 30 pairs .* move it out of the run"):
        stability(crosscoder(0), [tmp_path], store, ALL, batch_size=256, min_cosine=0.7, min_coactivation=0.5)


def test_stability_is_the_share_of_seeds_with_a_good_match(store, tmp_path):
    a = crosscoder(0)
    a.threshold[0] = 1e9
    same, rare, turned = (changed(a, torch.arange(F)) for _ in range(3))
    strongest = np.sort(dense(a, store)[:, 1])[::-1]
    with torch.no_grad():
        # points the same way, but fires on three tokens only
        rare.threshold[1] = float(strongest[2:4].mean() * a.code_norm()[1])
        # fires alike, but points elsewhere: cosine about 0.6
        other = torch.randn(M, D, generator=torch.Generator().manual_seed(3))
        turned.W_dec[2] = a.W_dec[2] / a.W_dec[2].norm() + 1.3 * other / other.norm()
        turned.threshold[2] *= turned.code_norm()[2] / a.code_norm()[2]
    low = match(a, rare, store, ALL, batch_size=256), match(a, turned, store, ALL, batch_size=256)
    assert low[0].partner[1] == 1 and 0 < low[0].coactivation[1] < 0.5 and low[0].cosine[1] > 0.99
    assert low[1].partner[2] == 2 and 0.5 < low[1].cosine[2] < 0.7 and low[1].coactivation[2] > 0.99
    for name, c in (("same", same), ("rare", rare), ("turned", turned)):
        save_crosscoder(tmp_path / name, c, {})
    directories = [tmp_path / name for name in ("same", "rare", "turned")]
    share = stability(a, directories, store, ALL, batch_size=256, min_cosine=0.7, min_coactivation=0.5)
    assert np.isnan(share[0])
    assert share[1:3].tolist() == [2 / 3, 2 / 3] and (share[3:] == 1).all()
    loose = stability(a, directories, store, ALL, batch_size=256, min_cosine=0.4, min_coactivation=0.01)
    assert (loose[1:] == 1).all()


def small_config(**changes) -> TrainConfig:
    values = {"dict_size": 48, "k": 1, "steps": 600, "batch_size": 256, "lr": 3e-3, "dead_tokens": 20_000, "threads": 1}
    return TrainConfig(**(values | changes))


CONFIG = AnalyzeConfig(batch_size=1024, examples=0)


class Lines(Progress):
    def __init__(self):
        super().__init__("off")
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def table(run):
    with (run / "analysis" / "latents.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def summary(run):
    return json.loads((run / "analysis" / "summary.json").read_text())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A store, and a run with two seeds on it."""
    folder = tmp_path_factory.mktemp("seeds")
    often = {"shared_frequency": (0.03, 0.06), "exclusive": {0.05: 4}}
    planted = planted_activations(0, n_tokens=5000, d_model=24, shared=20, **often)
    acts = write_store(folder / "acts", planted.activations)
    for seed in (0, 1):
        train(acts, folder / "run", small_config(seed=seed))
    return folder


@pytest.mark.slow
def test_a_second_seed_makes_analyze_run_again_and_fills_the_column(seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    (run / "crosscoder" / "seed-1").rename(tmp_path / "seed-1")
    analyze(run, CONFIG)
    assert {row["stability"] for row in table(run)} == {""} and summary(run)["stability"] is None
    before = {path.name: path.read_bytes() for path in (run / "analysis").iterdir()}
    (tmp_path / "seed-1").rename(run / "crosscoder" / "seed-1")
    said = Lines()
    analyze(run, CONFIG, said)
    rows, facts = table(run), summary(run)["stability"]
    assert list(rows[0]) == list(COLUMNS) and list(COLUMNS)[-2:] == ["stability", "concept"]
    for row in rows:
        assert (row["stability"] == "") == (row["count"] == "0")  # every token was compared
    stable = [row for row in rows if row["stability"] == "1"]
    fired = [row for row in rows if row["count"] != "0"]
    exclusive = [row for row in fired if row["specific"] or row["class"] in ("base_only", "tuned_only")]
    assert facts["seeds"] == [1] and facts["tokens"] == 5000
    assert (facts["min_cosine"], facts["min_coactivation"]) == (CONFIG.stable_cosine, CONFIG.stable_coactivation)
    # 28 directions are planted
    assert facts["observed"] == len(fired) < 48 and facts["stable"] == len(stable) > 20
    assert facts["exclusive"] == len(exclusive)
    assert facts["exclusive_stable"] == sum(row["stability"] == "1" for row in exclusive) > 0
    assert any(
        f"{facts['exclusive_stable']} of {facts['exclusive']} latents of one model" in line for line in said.lines
    )
    for row, cells in zip(rows, csv.DictReader(before["latents.csv"].decode().splitlines()), strict=True):
        assert row | {"stability": ""} == cells
    stamp = (run / "analysis" / "latents.csv").stat().st_mtime_ns
    analyze(run, CONFIG)
    assert (run / "analysis" / "latents.csv").stat().st_mtime_ns == stamp
    after = {path.name: path.read_bytes() for path in (run / "analysis").iterdir()}
    (run / "analysis" / "DONE.json").unlink()
    analyze(run, CONFIG)
    assert {path.name: path.read_bytes() for path in (run / "analysis").iterdir()} == after


@pytest.mark.slow
def test_both_sides_find_the_same_pairs(seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    counts = []
    for seed in (0, 1):
        analyze(run, CONFIG.model_copy(update={"train_seed": seed}))
        assert summary(run)["stability"]["seeds"] == [1 - seed]
        counts.append(summary(run)["stability"]["stable"])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("other", "word"), [({"normalize": "none"}, "--normalize"), ({}, "store")], ids=["normalize", "store"]
)
@pytest.mark.slow
def test_a_seed_in_another_space_is_left_out_and_said(seeds, tmp_path, other, word):
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    acts = seeds / "acts"
    if word == "store":
        x = torch.randn(600, 2, 24, generator=torch.Generator().manual_seed(0))
        acts = write_store(tmp_path / "others", x)
    train(acts, run, small_config(seed=2, steps=2, **other))
    said = Lines()
    analyze(run, CONFIG, said, store_path=seeds / "acts")
    assert summary(run)["stability"]["seeds"] == [1]
    assert [line for line in said.lines if f"seed-2: of another {word}," in line]


@pytest.mark.slow
def test_a_damaged_seed_is_refused(seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    (run / "crosscoder" / "seed-1" / "config.json").unlink()
    with pytest.raises(InputError, match=r"seed-1/config.json: gone or changed .* --seed 1` again"):
        analyze(run, CONFIG)
