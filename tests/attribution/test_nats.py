"""Signed nats against their definition: document by document, latent by latent, in float64, with plain hooks."""

import math

import numpy as np
import pytest
import torch
from tiny_runs import LAYER, make_run, make_store, tokenizer
from transformers import AutoModelForCausalLM

from fastdiff.attribution import tracing as module
from fastdiff.attribution.attribute import attribute
from fastdiff.config import AttributeConfig
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.extraction.models import quiet
from fastdiff.results.attribution import read_attribution, text_number
from fastdiff.store.reader import ActivationStore

pytestmark = pytest.mark.slow
PLACES = {
    "resid_post": f"model.layers.{LAYER}",
    "mlp_out": f"model.layers.{LAYER}.mlp",
    "attn_out": f"model.layers.{LAYER}.self_attn",
}
CONFIG = AttributeConfig(device="cpu")


class Patched:
    """A model in float64 with a plain hook."""

    def __init__(self, path, hook):
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(path).double().eval().requires_grad_(False)
        self.given = self.seen = None
        self.model.get_submodule(PLACES[hook]).register_forward_hook(self._hook)

    def _hook(self, _module, _args, out):
        h = out[0] if isinstance(out, tuple) else out
        self.seen = h
        if self.given is None:
            return None
        return (self.given, *out[1:]) if isinstance(out, tuple) else self.given

    def ce(self, ids, scored, given=None):
        """Mean over the tokens that follow `scored` positions."""
        self.given = None if given is None else given[None]
        log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -torch.stack([log_p[t, ids[t + 1]] for t in scored]).mean()

    def read(self, ids):
        self.given = None
        self.model(torch.tensor([ids]))
        return self.seen[0].clone()


def codes(c, x):
    """f [T, F] of stored activations [T, M, D], densely, by the definition."""
    tilde = (c.take(x).double() - c.input_mean.double()) * c.input_scale.double()[:, None]
    pre = (torch.einsum("tmd,fmd->tf", tilde, c.W_enc.double()) + c.b_enc.double()).relu()
    return pre * (pre * c.W_dec.double().norm(dim=-1).sum(1) > c.threshold.double())


def decoded(c):
    """Decoder rows and constants of base and tuned in their own units: [F, 2, D], [2, D]; a difference has base 0."""
    rows = c.W_dec.double() / c.input_scale.double()[:, None]
    constants = c.input_mean.double() + c.b_dec.double() / c.input_scale.double()[:, None]
    if c.inputs == "difference":
        rows, constants = (torch.cat([torch.zeros_like(part), part], dim=-2) for part in (rows, constants))
    return rows.detach(), constants.detach()


def by_definition(base, tuned, crosscoders, ids, scored, used, steps):
    """All parts of one document; `used` are the positions in use."""
    h = [model.read(ids) for model in (base, tuned)]
    ce = [[float(model.ce(ids, scored, given)) for given in h] for model in (base, tuned)]
    layer = 0.5 * (ce[0][0] - ce[0][1] + ce[1][0] - ce[1][1])
    g = torch.zeros_like(h[0])
    for model in (base, tuned):
        for k in range(steps):
            given = (h[0] + (k + 0.5) / steps * (h[1] - h[0])).requires_grad_(True)
            g -= torch.autograd.grad(model.ce(ids, scored, given), given)[0] / (2 * steps)
    carried = ((h[1] - h[0]) * g).sum(-1)
    out = {"ce": [ce[0][0], ce[1][1]], "layer": layer, "bos": 0.0, "left_out": 0.0}
    for t in range(len(ids)):
        if t not in used:
            out["bos" if t == 0 else "left_out"] += float(carried[t])
    for s, c in enumerate(crosscoders):
        rows, constants = decoded(c)
        f = codes(c, torch.stack(h, dim=1))
        nats = torch.zeros(c.dict_size, dtype=torch.float64)
        offset = error = 0.0
        for t in used:
            left = h[1][t] - h[0][t]
            for j in f[t].nonzero()[:, 0]:
                turned = f[t, j] * (rows[j, 1] - rows[j, 0])
                nats[j] += turned @ g[t]
                left = left - turned
            shift = constants[1] - constants[0]
            offset += float(shift @ g[t])
            error += float((left - shift) @ g[t])
        out |= {f"nats{s}": nats.numpy(), f"offset{s}": offset, f"error{s}": error}
    return out, g, h


def documents_of(store):
    """Sequence id → (token ids with BOS, positions in use), from the columns alone."""
    numbers, positions, ids = (store.column(name) for name in ("sequence_ids", "positions", "token_ids"))
    usable = set(range(store.n_rows) if store.usable_rows() is None else store.usable_rows().tolist())
    found = {}
    for n in np.unique(numbers):
        rows = np.flatnonzero(numbers == n)
        tokens = [1] * (int(positions[rows].max()) + 1)
        for row in rows:
            tokens[positions[row]] = int(ids[row])
        found[int(n)] = tokens, [int(positions[row]) for row in rows if row in usable]
    return found


def check(inputs, run, store_path, hook="resid_post", scored_of=None, pair=("base", "tuned"), documents=24):
    """Hold a run's attribution against the definition."""
    found = read_attribution(run / "attribution")
    table, summary = found.documents, found.summary
    base, tuned = (Patched(inputs / name, hook) for name in pair)
    directories = [run / "crosscoder" / f"seed-{seed}" for seed in summary.seeds]
    crosscoders = [load_crosscoder(directory)[0].requires_grad_(False) for directory in directories]
    with ActivationStore(store_path) as store:
        of = documents_of(store)
    nth = np.cumsum(table.has_nats) - 1
    assert table.has_nats.sum() >= min(6, documents)
    sizes = []
    for i, number in enumerate(table.document):
        ids, used = of[int(number)]
        scored = list(range(len(ids) - 1)) if scored_of is None else scored_of(int(number), ids)
        assert (table.scored[i], table.text[i]) == (len(scored), text_number(np.array(ids)))
        assert (table.steps[i] > 0) == table.has_nats[i]
        want, _, _ = by_definition(base, tuned, crosscoders, ids, scored, used, max(1, table.steps[i]))
        close = {"rel": 2e-4, "abs": 2e-6}
        assert table.ce[i].tolist() == pytest.approx(want["ce"], **close)
        if not table.has_nats[i]:
            continue
        for name in ("layer", "bos", "left_out"):
            assert getattr(table, name)[i] == pytest.approx(want[name], **close), name
        for s in range(len(crosscoders)):
            nats = found.nats[s, nth[i]]
            assert nats == pytest.approx(want[f"nats{s}"], **close)
            assert table.latents[s, i] == pytest.approx(want[f"nats{s}"].sum(), **close)
            assert table.offset[s, i] == pytest.approx(want[f"offset{s}"], **close)
            assert table.error[s, i] == pytest.approx(want[f"error{s}"], **close)
            sizes.append(np.abs(nats).max())
    # it would be no check if there were nothing to see
    assert np.max(sizes) > 1e-3
    return found


@pytest.mark.parametrize(
    ("hook", "train"),
    [
        ("resid_post", {}),
        ("resid_post", {"inputs": "difference"}),
        ("mlp_out", {}),
        ("attn_out", {"inputs": "difference"}),
    ],
)
def test_every_part_is_what_the_definition_gives(inputs, runs, hook, train):
    store, run = runs(hook=hook, train=train)
    attribute(run, CONFIG)
    found = check(inputs, run, store, hook)
    assert (found.summary.state, found.summary.branch) == ("checked", None if hook == "resid_post" else hook)
    assert (found.summary.layer, found.summary.hook, found.summary.seeds) == (LAYER, hook, [0, 1])
    # BOS was run and not stored
    assert np.abs(found.documents.left_out).max() == 0 and (hook == "mlp_out" or np.abs(found.documents.bos).max() > 0)


def test_the_gradient_is_that_of_finite_differences(inputs, runs):
    store, _ = runs()
    base, tuned = (Patched(inputs / name, "resid_post") for name in ("base", "tuned"))
    with ActivationStore(store) as opened:
        ids, used = documents_of(opened)[3]
    scored = list(range(len(ids) - 1))
    _, g, h = by_definition(base, tuned, [], ids, scored, used, 3)
    generator = torch.Generator().manual_seed(0)
    # norms run in single precision in any model, so the steps are wide
    for _ in range(4):
        direction = torch.randn(h[0].shape, generator=generator, dtype=torch.float64)
        slope = 0.0
        for model in (base, tuned):
            for k in range(3):
                middle = h[0] + (k + 0.5) / 3 * (h[1] - h[0])
                ends = [float(model.ce(ids, scored, middle + e * direction)) for e in (1e-3, -1e-3)]
                slope -= (ends[0] - ends[1]) / 2e-3 / 6
        assert float((g * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_parts_sum_to_the_layers_share_within_the_gap(runs):
    _, run = runs()
    attribute(run, CONFIG)
    found = read_attribution(run / "attribution")
    table, gaps = found.documents, []
    for s in range(2):
        total = table.latents[s] + table.offset[s] + table.error[s] + table.left_out + table.bos
        for c in range(len(found.summary.categories)):
            mine = (table.category == c) & table.has_nats
            L = table.layer[mine].mean()
            gaps.append(abs(total[mine].mean() - L) / max(abs(L), 0.05))
    assert max(gaps) == pytest.approx(found.summary.largest_gap, rel=1e-6) and max(gaps) <= 0.03
    assert np.allclose(found.nats.astype(np.float64).sum(-1), table.latents[:, table.has_nats], atol=1e-5)


def gaps_of(found):
    """What the parts of each document lack of L, the documents of each category, and what 3 % of it is taken of."""
    table = found.documents
    total = table.latents[0] + table.offset[0] + table.error[0] + table.left_out + table.bos
    of = [np.flatnonzero((table.category == c) & table.has_nats) for c in range(len(found.summary.categories))]
    return total - table.layer, of, [max(abs(table.layer[mine].mean()), found.summary.tau) for mine in of]


def test_more_midpoints_for_the_documents_that_need_them(inputs, runs, monkeypatch, tmp_path):
    store, run = runs(fresh=tmp_path / "run")
    monkeypatch.setattr(module, "GAP_MOST", 10.0)
    attribute(run, CONFIG)
    first = read_attribution(run / "attribution")
    assert set(first.documents.steps) == {3}
    gap, of, whole = gaps_of(first)
    shares = [abs(gap[mine].mean()) / within for mine, within in zip(of, whole, strict=True)]
    worse, better = np.argsort(shares)[::-1]
    most = (shares[worse] + shares[better]) / 2
    assert shares[worse] > most > shares[better]
    monkeypatch.setattr(module, "GAP_MOST", most)
    attribute(run, AttributeConfig(device="cpu", tau=0.05000001))
    again = check(inputs, run, store)
    steps = again.documents.steps
    # those that were close enough by themselves stay as they were
    rough = np.abs(gap[of[worse]]) > most * whole[worse]
    assert 0 < rough.sum() < len(rough)
    assert (steps[of[worse]] > 3).tolist() == rough.tolist() and (steps[of[better]] == 3).all()
    assert again.summary.largest_gap < first.summary.largest_gap


def test_beyond_12_midpoints_only_the_documents_that_are_furthest_off_take_more(inputs, runs, monkeypatch, tmp_path):
    store, run = runs(fresh=tmp_path / "run")
    monkeypatch.setattr(module, "GAP_MOST", 1e-9)

    def up_to(most):
        monkeypatch.setattr(module, "_STEPS", tuple(k for k in (3, 6, 12, 24, 48, 96) if k <= most))
        attribute(run, AttributeConfig(device="cpu", tau=0.05 + most / 1e9))
        return check(inputs, run, store)

    at_12, at_24, at_96 = map(up_to, (12, 24, 96))
    gap, of, _ = gaps_of(at_12)
    for mine in of:
        assert (at_12.documents.steps[mine] == 12).all()
        more = at_24.documents.steps[mine] == 24
        assert more.sum() == math.ceil(len(mine) / 2)
        assert np.abs(gap[mine][more]).min() >= np.abs(gap[mine][~more]).max()
        assert (at_96.documents.steps[mine] == 96).sum() == math.ceil(len(mine) / 8)


def test_a_model_against_itself_gains_nothing(inputs, tmp_path):
    run = make_run(make_store(inputs, tmp_path / "acts", tuned="base"), tmp_path / "run")
    attribute(run, CONFIG)
    found = read_attribution(run / "attribution")
    table = found.documents
    assert (table.ce[:, 0] == table.ce[:, 1]).all()
    for part in (table.layer, table.latents, table.offset, table.error, table.left_out, table.bos):
        assert (part == 0).all()
    assert (found.nats == 0).all() and found.summary.largest_gap == 0


def test_neither_padding_nor_the_size_of_batches_matters(runs, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    together = read_attribution(run / "attribution")
    attribute(run, AttributeConfig(device="cpu", batch_tokens=1))
    alone = read_attribution(run / "attribution")
    for name in ("document", "text", "category", "held_out", "scored", "has_nats"):
        assert (getattr(together.documents, name) == getattr(alone.documents, name)).all()
    for name in ("ce", "layer", "latents", "offset", "error", "left_out", "bos"):
        assert np.allclose(getattr(together.documents, name), getattr(alone.documents, name), atol=3e-6), name
    assert np.allclose(together.nats, alone.nats, atol=3e-6)


def test_less_memory_halves_the_batch(runs, monkeypatch, tmp_path):
    _, run = runs(fresh=tmp_path / "run")
    attribute(run, CONFIG)
    whole = read_attribution(run / "attribution")
    real, sizes = module.measure, []

    def small(pair, crosscoders, batch, *args, **kwargs):
        sizes.append(len(batch.documents))
        if len(batch.documents) > 3:
            raise torch.OutOfMemoryError
        return real(pair, crosscoders, batch, *args, **kwargs)

    monkeypatch.setattr(module, "measure", small)
    attribute(run, AttributeConfig(device="cpu", tau=0.06))
    halved = read_attribution(run / "attribution")
    assert max(sizes) > 3 and np.allclose(whole.nats, halved.nats, atol=3e-6)


@pytest.mark.parametrize("resident", [True, False])
def test_seeds_do_not_depend_on_one_another(runs, monkeypatch, tmp_path, resident):
    _, run = runs()
    attribute(run, CONFIG)
    both = read_attribution(run / "attribution")
    _, alone = runs(fresh=tmp_path / "run")
    (alone / "crosscoder" / "seed-0" / "DONE.json").unlink()
    monkeypatch.setattr(module.Tracer, "_fit", lambda self, device: resident)
    attribute(alone, CONFIG)
    found = read_attribution(alone / "attribution")
    assert found.summary.seeds == [1] and (found.nats[0] == both.nats[1]).all()
    assert np.array_equal(found.documents.offset[0], both.documents.offset[1], equal_nan=True)


def test_only_answers_are_scored_where_there_are_some(inputs, runs):
    store, run = runs(texts="chats.jsonl")
    attribute(run, CONFIG)
    words = tokenizer().get_vocab()
    ask, tell, end = (words[word] for word in ("ask", "tell", "end"))

    def answered(_number, ids):
        return list(range(ids.index(tell), ids.index(end) - 1))

    found = check(inputs, run, store, scored_of=answered)
    assert found.summary.scored == "answers"
    # its answer is one word
    assert found.summary.too_short == 1 and len(found.documents.document) == 20
    with ActivationStore(store) as opened:
        tokens = [documents_of(opened)[int(n)][0] for n in found.documents.document]
    assert all(ids[-1] == end and ask in ids[:2] for ids in tokens)
    for c, name in enumerate(found.summary.categories):
        mine = [ids for ids, code in zip(tokens, found.documents.category, strict=True) if code == c]
        scored = np.concatenate([ids[ids.index(tell) + 1 : -1] for ids in mine])
        p = np.unique(scored, return_counts=True)[1] / len(scored)
        want = -(p * np.log(p)).sum() + (len(p) - 1) / (2 * len(scored))
        assert found.summary.unigram_entropy[name] == pytest.approx(want, rel=1e-12)


def test_rows_that_are_left_out_of_use_are_a_part_of_their_own(inputs, runs, monkeypatch):
    store, run = runs(base="plain-base", tuned="plain-tuned")
    with ActivationStore(store) as opened:
        positions = opened.column("positions")
    # as if every third had a norm too large, beside the first positions, which are left out without BOS
    in_use = np.flatnonzero((positions > 0) & (np.arange(len(positions)) % 3 != 0))
    monkeypatch.setattr(ActivationStore, "usable_rows", lambda self: in_use)
    attribute(run, CONFIG)
    found = check(inputs, run, store, pair=("plain-base", "plain-tuned"))
    assert np.abs(found.documents.left_out).max() > 1e-3 and np.abs(found.documents.bos).max() > 1e-3


def test_without_bos_the_first_position_is_a_part_of_its_own_too(inputs, runs, tmp_path):
    store, run = runs(base="plain-base", tuned="plain-tuned", fresh=tmp_path / "run")
    with ActivationStore(store) as opened:
        assert np.array_equal(opened.usable_rows(), np.flatnonzero(opened.column("positions")))
    attribute(run, CONFIG)
    found = check(inputs, run, store, pair=("plain-base", "plain-tuned"))
    assert (found.documents.bos != 0).all() and (found.documents.left_out == 0).all() and found.summary.too_short == 1
