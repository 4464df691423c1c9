"""Every figure against a dense float64 transcription; evaluation changes nothing."""

import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from score_cases import DEVICE

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import metrics
from fastdiff.crosscoder.fused_trainer import make_trainer
from fastdiff.crosscoder.metrics import evaluate, l0_gap
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError
from fastdiff.kernels import ops

NAMES = {"source": ["wiki", "code", "chat", "none"], "role": ["user", "model"]}
ACTIVATIONS = ["batchtopk", "topk", "jumprelu", "relu"]


def eighths(generator, *shape, most=16):
    """Numbers that float32 adds and multiplies without rounding, so that figures can be compared to 1e-12."""
    return torch.randint(-most, most + 1, shape, generator=generator).float() / 8


def crosscoder(activation, F=37, M=2, D=5, k=3, seed=0) -> Crosscoder:
    """Latent 0 fires everywhere unless others are stronger, latent 1 never."""
    generator = torch.Generator().manual_seed(seed)
    c = Crosscoder(F, M, D, activation=activation, k=k)
    with torch.no_grad():
        c.W_enc.copy_(eighths(generator, F, M, D))
        c.b_enc.copy_(eighths(generator, F) - 4)
        c.W_dec.copy_(eighths(generator, F, M, D, most=50) / 256)
        c.b_dec.copy_(eighths(generator, M, D))
        c.W_enc[0], c.b_enc[0], c.b_enc[1] = 0, 16, -100
        c.threshold.fill_({"batchtopk": 0.2303, "jumprelu": 2.53}.get(activation, 0.0))
    c.input_mean.copy_(eighths(generator, M, D))
    c.input_scale.copy_(2.0 ** torch.arange(M) / 2)
    return c.to(DEVICE)


def rows(n=100, M=2, D=5, seed=1):
    """Stored activations and the groups of each: the last source has none, the one before two."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 2, (n,), generator=generator).numpy().astype(np.uint16)
    source[[3, n - 4]] = 2
    return eighths(generator, n, M, D, most=24), {"source": source, "role": (np.arange(n) % 3 == 0).astype(np.uint8)}


def fve(x, out):
    if len(x) < 2:
        return [math.nan] * x.shape[1], math.nan
    errors, spread = ((x - out) ** 2).sum((0, 2)), ((x - x.mean(0)) ** 2).sum((0, 2))
    return (1 - errors / spread).tolist(), 1 - errors.sum() / spread.sum()


def transcribed(c, stored, codes, n_left_out=0):
    """The same facts, one dense numpy line each; the last rows are left out of use, and `codes` are of the others."""
    W_enc, b_enc, W_dec, b_dec, theta, mean, scale = (
        getattr(c, name).detach().double().cpu().numpy()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "input_mean", "input_scale")
    )
    x = (stored.double().numpy() - mean) * scale[:, None]
    pre = np.einsum("bmd,fmd->bf", x, W_enc) + b_enc
    score = np.maximum(pre, 0) * np.linalg.norm(W_dec, axis=2).sum(1)
    if c.activation == "topk":
        fires = np.zeros(pre.shape, bool)
        np.put_along_axis(fires, np.argsort(-score, axis=1, kind="stable")[:, : c.k], True, axis=1)
        fires &= score > 0
    else:
        fires = {"batchtopk": score > theta, "jumprelu": pre > theta, "relu": pre > 0}[c.activation]
    out = np.einsum("bf,fmd->bmd", pre * fires, W_dec) + b_dec
    fve_all = fve(x, out)[0]
    x, out, fires = (values[: len(values) - n_left_out] for values in (x, out, fires))
    l0, frequency = fires.sum(1), fires.mean(0)
    there = (x**2).sum(2) > 0
    norm, out_norm, overlap = np.linalg.norm(x, axis=2), np.linalg.norm(out, axis=2), (x * out).sum(2)
    cosine = np.divide(overlap, norm * out_norm, out=np.zeros_like(norm), where=norm * out_norm > 0)
    models, edges = range(x.shape[1]), np.arange(-8, 0.5, 0.5)
    groups = {}
    for grouping, names in NAMES.items() if codes else ():
        for number, name in enumerate(names):
            own = codes[grouping] == number
            of_models, pooled = fve(x[own], out[own])
            groups.setdefault(grouping, {})[name] = {
                "n_rows": int(own.sum()), "fve": of_models, "fve_pooled": pooled,
                "l0_mean": l0[own].mean() if own.any() else math.nan,
            }  # fmt: skip
    of_models, pooled = fve(x, out)
    return {
        "n_rows": len(x), "fve": of_models, "fve_all": fve_all, "fve_pooled": pooled, "l0_mean": l0.mean(),
        **{f"l0_p{p}": np.percentile(l0, p) for p in (5, 50, 95)},
        "train_l0": l0.mean(), "silent_fraction": (frequency == 0).mean(), "dense_fraction": (frequency > 0.1).mean(),
        "never_fired": int((frequency == 0).sum()),
        "frequency": {
            "edges": edges.tolist(), "counts": np.histogram(np.log10(frequency[frequency > 0]), edges)[0].tolist()
        },
        "cosine": [cosine[there[:, m], m].mean() for m in models],
        "norm_ratio": [(out_norm[there[:, m], m] / norm[there[:, m], m]).mean() for m in models],
        "bias": [(out_norm**2)[there[:, m], m].sum() / overlap[there[:, m], m].sum() for m in models],
        "groups": groups,
    }  # fmt: skip


def assert_same(found, expected):
    """Nested facts, floats to 1e-12, NaN being equal to NaN."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


def split(stored, codes, size):
    starts = range(0, len(stored), size)
    return [(stored[i : i + size], {grouping: of[i : i + size] for grouping, of in codes.items()}) for i in starts]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "M", "D", "F", "k"), [(100, 2, 5, 37, 3), (41, 1, 3, 8, 8), (67, 3, 1, 129, 1)])
def test_every_figure_is_the_dense_one(activation, n, M, D, F, k):
    c = crosscoder(activation, F, M, D, k)
    stored, codes = rows(n, M, D)
    found = asdict(evaluate(c, [(stored, codes)], NAMES))
    expected = transcribed(c, stored, codes)
    if activation == "batchtopk":
        expected["train_l0"] = found["train_l0"]
    assert 0 < expected["l0_mean"] < F and 0 < expected["silent_fraction"] < 1
    assert_same(found, expected)
    assert_same(asdict(evaluate(c, [stored])), expected | {"groups": {}})
    kept, apart = n - 11, {grouping: of[: n - 11] for grouping, of in codes.items()}
    found = asdict(evaluate(c, [(stored[:kept], apart)], NAMES, left_out=[stored[kept : kept + 4], stored[kept + 4 :]]))
    expected = transcribed(c, stored, apart, n_left_out=11)
    assert found["fve_all"] != found["fve"]
    assert_same(found, expected | ({"train_l0": found["train_l0"]} if activation == "batchtopk" else {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 7, 33, 99])
def test_figures_do_not_depend_on_the_batches(activation, size):
    c = crosscoder(activation)
    stored, codes = rows()
    whole = asdict(evaluate(c, [(stored, codes)], NAMES))
    parts = asdict(evaluate(c, split(stored, codes, size), NAMES))
    if activation == "batchtopk":
        assert parts.pop("train_l0") <= whole.pop("train_l0")
    assert_same(parts, whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_figures_do_not_depend_on_how_many_scores_are_held(activation, monkeypatch):
    c = crosscoder(activation)
    stored, codes = rows()
    whole = asdict(evaluate(c, [(stored, codes)], NAMES))
    monkeypatch.setattr(metrics, "_SCORES", 1)
    for step in (1, 9):
        monkeypatch.setattr(metrics, "_ROWS", step)
        assert_same(asdict(evaluate(c, [(stored, codes)], NAMES)), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [0.0, -9.0, -24.0, -1e3])
def test_training_takes_what_its_selection_would(bias):
    c = crosscoder("batchtopk")
    with torch.no_grad():
        c.b_enc[0] = 0
        c.b_enc += bias
    stored, _ = rows()
    for size in (100, 33, 1):
        n = 0
        for batch in stored.split(size):
            pre = c.pre_activations(c.normalize(batch))
            n += len(ops.batchtopk(pre, c.k, scale=c.code_norm())[0].col)
        quality = evaluate(c, stored.split(size))
        assert quality.train_l0 == n / 100
        if n:
            assert l0_gap(quality) == pytest.approx(quality.l0_mean * 100 / n - 1)
        else:
            assert math.isnan(l0_gap(quality))


def test_training_takes_no_score_that_is_not_positive_and_finite():
    c = crosscoder("batchtopk", k=37)
    with torch.no_grad():
        c.b_enc[:3] = torch.tensor([math.nan, math.inf, 10.0])
        c.W_dec[2] = 0
    stored, _ = rows()
    pre = c.pre_activations(c.normalize(stored))
    n = len(ops.batchtopk(pre, c.k, scale=c.code_norm())[0].col)
    assert evaluate(c, [stored]).train_l0 == n / 100 == int((pre[:, 3:] > 0).sum()) / 100


@pytest.mark.parametrize(
    ("inputs", "taken"), [("1", lambda x: x[:, 1:]), ("difference", lambda x: x[:, 1:] - x[:, :1])]
)
def test_a_crosscoder_of_some_inputs_is_measured_on_those(inputs, taken):
    c = crosscoder("batchtopk", M=1)
    stored, codes = rows()
    expected = asdict(evaluate(c, [(taken(stored), codes)], NAMES))
    c.inputs = inputs
    assert_same(asdict(evaluate(c, [(stored, codes)], NAMES)), expected)


@pytest.mark.parametrize("kind", ["sae", "none"])
def test_training_and_inference_rank_by_the_same_norm(kind):
    c = crosscoder("batchtopk")
    c.code_norm_kind = kind
    c.threshold.fill_(1.51 if kind == "none" else 0.17)
    stored, _ = rows()
    pre = c.pre_activations(c.normalize(stored))
    quality = evaluate(c, stored.split(40))
    assert quality.l0_mean == len(c.select(pre).col) / 100 > 0
    taken = [len(ops.batchtopk(part, c.k, scale=c.code_norm())[0].col) for part in pre.split(40)]
    assert quality.train_l0 == sum(taken) / 100


def test_frequencies_are_counted_in_decades_halved():
    c = crosscoder("relu", F=4, M=1, D=1)
    with torch.no_grad():
        c.W_enc.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1))
        # always, never, on one row of 1000, on 101 rows
        c.b_enc.copy_(torch.tensor([1.0, -1.0, -998.0, -898.0]))
    c.input_mean.zero_()
    c.input_scale.fill_(1.0)
    quality = evaluate(c, torch.arange(1000.0).view(1000, 1, 1).split(300))
    counts = dict(zip(quality.frequency.edges, quality.frequency.counts, strict=False))
    assert {edge: count for edge, count in counts.items() if count} == {-3.0: 1, -1.0: 1, -0.5: 1}
    assert len(quality.frequency.edges) == 17 and quality.frequency.edges[-1] == 0
    assert (quality.n_rows, quality.never_fired, quality.silent_fraction, quality.dense_fraction) == (
        1000,
        1,
        0.25,
        0.5,
    )
    # a tenth of the rows is not more than a tenth
    with torch.no_grad():
        c.b_enc[3] = -899.0
    assert evaluate(c, [torch.arange(1000.0).view(1000, 1, 1)]).dense_fraction == 0.25


def test_rows_at_the_mean_have_no_direction():
    c = crosscoder("relu")
    stored, _ = rows()
    stored[::4, 0] = c.input_mean[0].cpu()
    found = asdict(evaluate(c, [stored]))
    assert_same(found, transcribed(c, stored, {}))
    quality = evaluate(c, [c.input_mean.expand(3, 2, 5).cpu()])
    assert all(map(math.isnan, [*quality.fve, *quality.cosine, *quality.norm_ratio, *quality.bias]))


def test_a_reconstruction_of_zero_has_the_cosine_zero():
    c = crosscoder("relu")
    with torch.no_grad():
        c.b_enc.fill_(-1e3)
        c.b_dec.zero_()
    quality = evaluate(c, [rows()[0]])
    assert quality.cosine == [0, 0] and quality.norm_ratio == [0, 0] and all(map(math.isnan, quality.bias))
    assert quality.l0_mean == quality.l0_p95 == quality.frequency.counts[-1] == 0 and quality.never_fired == 37


def test_too_few_or_equal_rows_explain_nothing():
    c = crosscoder("batchtopk")
    stored, codes = rows()
    codes["source"][:] = 0
    codes["source"][5] = 1
    stored = stored / 3  # sums of which float64 must round
    codes["source"][20:60] = 2
    stored[20:60] = stored[20]
    groups = evaluate(c, split(stored, codes, 9), NAMES).groups["source"]
    assert [group.n_rows for group in groups.values()] == [59, 1, 40, 0]
    assert all(map(math.isfinite, [*groups["wiki"].fve, groups["wiki"].fve_pooled]))
    for name in ("code", "chat", "none"):
        assert all(map(math.isnan, [*groups[name].fve, groups[name].fve_pooled]))
    assert math.isfinite(groups["code"].l0_mean) and math.isnan(groups["none"].l0_mean)
    # a model that does not vary: the other one and both together are still explained
    stored[:, 1] = stored[0, 1]
    quality = evaluate(c, [stored])
    assert math.isfinite(quality.fve[0]) and math.isnan(quality.fve[1]) and math.isfinite(quality.fve_pooled)


def test_a_mean_far_from_zero_costs_no_digits():
    c = crosscoder("relu")
    c.input_mean.zero_()
    stored, codes = rows()
    stored += 2.0**12
    with torch.no_grad():
        c.b_enc.fill_(-(2.0**20))
        c.b_dec.copy_(2.0**12 * c.input_scale[:, None].expand(2, 5))
    found, expected = asdict(evaluate(c, split(stored, codes, 9), NAMES)), transcribed(c, stored, codes)
    for fact in ("fve", "fve_pooled", "cosine", "bias"):
        assert found[fact] == pytest.approx(expected[fact], abs=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows_give_nan(activation):
    c = crosscoder(activation)
    stored, codes = rows()
    empty = (stored[:0], {grouping: of[:0] for grouping, of in codes.items()})
    for batches, names in (([], None), ([stored[:0]], None), ([empty], NAMES), ([empty, (stored, codes)], NAMES)):
        quality = evaluate(c, batches, names)
        if quality.n_rows:
            assert_same(asdict(quality), asdict(evaluate(c, [(stored, codes)], NAMES)))
            continue
        facts = quality.facts()
        given = {name for name, fact in facts.items() if fact is not None and fact != [None, None]}
        assert given == {"n_rows", "never_fired", "frequency", "groups"} and sum(facts["frequency"]["counts"]) == 0
        assert math.isnan(quality.fve_pooled) and all(map(math.isnan, quality.fve)) and math.isnan(l0_gap(quality))
        for of in quality.groups.values():
            assert all(group.n_rows == 0 and math.isnan(group.fve_pooled) for group in of.values())


def test_what_is_rarer_than_the_edges_is_counted_at_the_first(monkeypatch):
    monkeypatch.setattr(metrics, "_EDGES", np.arange(-1, 0.5, 0.5))
    quality = evaluate(crosscoder("topk"), [rows()[0]])
    assert sum(quality.frequency.counts) + quality.never_fired == 37 and quality.frequency.counts[0] > 10


def test_facts_are_json_without_nan():
    stored, codes = rows()
    quality = evaluate(crosscoder("topk"), [(stored, codes)], NAMES)
    facts = json.loads(json.dumps(quality.facts(), allow_nan=False))
    none = {"n_rows": 0, "fve": [None, None], "fve_pooled": None, "l0_mean": None}
    assert facts["groups"]["source"]["none"] == none and facts["groups"]["source"]["wiki"]["n_rows"] > 2
    assert facts["fve"] == quality.fve and facts["train_l0"] == quality.train_l0 == quality.l0_mean
    assert facts["frequency"] == asdict(quality)["frequency"]
    assert replace(quality, bias=[math.inf, 0.5]).facts()["bias"] == [None, 0.5]


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_are_not_finite_are_refused(activation, dtype, bad):
    stored = rows()[0].to(dtype)
    stored[70, 1, 4] = bad
    for size in (100, 7):
        with pytest.raises(InputError, match="NaN or infinite"):
            evaluate(crosscoder(activation), stored.split(size))


def test_the_largest_finite_rows_are_accepted():
    stored = rows()[0]
    stored[3] = torch.finfo(torch.float32).max / 4
    c = crosscoder("relu")
    assert evaluate(c, [stored]).n_rows == 100


def test_wrong_groups_are_named():
    c, (stored, codes) = crosscoder("relu"), rows()
    with pytest.raises(InputError, match="has source 3, but there are 3; run fastdiff verify"):
        codes["source"][9] = 3
        evaluate(c, [(stored, codes)], NAMES | {"source": ["a", "b", "c"]})
    with pytest.raises(InputError, match="has role -1"):
        evaluate(c, [(stored, codes | {"role": np.full(100, -1)})], NAMES)
    with pytest.raises(ValueError, match=r"brings the groupings \['role', 'source'\], expected \['role'\]"):
        evaluate(c, [(stored, codes)], {"role": NAMES["role"]})
    with pytest.raises(ValueError, match=r"brings the groupings \[\], expected \['role', 'source'\]"):
        evaluate(c, [stored], NAMES)
    with pytest.raises(ValueError, match=r"role must be \(100,\), one for each row, got \(99,\)"):
        evaluate(c, [(stored, codes | {"role": codes["role"][1:]})], NAMES)
    with pytest.raises(ValueError, match="role must have different names"):
        evaluate(c, [(stored, codes)], NAMES | {"role": ["a", "a"]})


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_evaluation_leaves_no_trace_in_training(activation, backend):
    """Published trainers reset their counters of dead latents when they log."""
    config = TrainConfig(
        activation=activation, backend=backend, dict_size=37, k=3, steps=12, batch_size=20, lr=1e-2, dead_tokens=60,
        warmup_steps=0, sparsity_warmup_steps=0, calibrate_tokens=0,
    )  # fmt: skip
    stored, codes = rows()
    batches = stored.split(20)
    quiet = make_trainer(crosscoder(activation), config)
    watched = make_trainer(crosscoder(activation), config)
    for step in range(12):
        quiet.step(batches[step % 5])
        watched.step(batches[step % 5])
        before = copy.deepcopy((watched.crosscoder.state_dict(), watched.state()))
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in watched.crosscoder.named_parameters()}
        drawn = torch.get_rng_state()
        evaluate(watched.crosscoder, [(stored, codes)], NAMES)
        assert torch.equal(torch.get_rng_state(), drawn) and torch.is_grad_enabled()
        for old, new in zip(before, (watched.crosscoder.state_dict(), watched.state()), strict=True):
            assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        for name, parameter in watched.crosscoder.named_parameters():
            assert parameter.requires_grad
            assert gradients[name] is parameter.grad is None or torch.equal(gradients[name], parameter.grad)
    assert int((quiet.tokens_since_fired > 0).sum()) > 0
    for old, new in zip(
        (quiet.crosscoder.state_dict(), quiet.state()), (watched.crosscoder.state_dict(), watched.state()), strict=True
    ):
        assert all(torch.equal(old[name], new[name]) for name in old)
    ours, theirs = quiet.window(), watched.window()
    assert (ours.n_dead, ours.n_active, ours.loss) == (theirs.n_dead, theirs.n_active, theirs.loss)
