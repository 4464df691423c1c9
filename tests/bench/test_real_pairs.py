"""The benchmark on real pairs: its truth, its counts, and its patches are those of a plain computation."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastdiff import rundir
from fastdiff.config import ExtractConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import save_crosscoder
from fastdiff.extraction.harvest import extract

BENCH = Path(__file__).parents[2] / "bench"
WORDS = ["<bos>", *["the", "cat", "sat", "on", "a", "mat", "and", "dog", "lay", "rug"]]
D, LAYER = 8, 1
# V of 4 documents of category a, then 4 of b: exact in binary
THROUGH = np.array([[1.0, 2, 1, 2, -0.5, -0.5, -0.25, -0.25], [1.5, 1.5, 2, 2, -0.5, -0.25, -0.25, -0.5]])
OFFSET = np.full((2, 8), 0.25)
LAYER_NATS = np.array([2.0, 4, 2, 4, -1, -1, -0.5, -0.5])


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark; its folder is importable while they are loaded."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        import real_pairs
        import real_patch
        import real_tables
        import real_truth

        yield {"pairs": real_pairs, "patch": real_patch, "tables": real_tables, "truth": real_truth}
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny models, a tokenizer that adds BOS, text of two categories, laid out as the benchmark wants them."""
    root = tmp_path_factory.mktemp("pairs")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=D, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("A", "B")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    rng = np.random.default_rng(0)
    lines = [
        {"text": " ".join(rng.choice(WORDS[1:], int(rng.integers(2, 9)))), "category": "ab"[i % 2]} for i in range(12)
    ]
    (root / "data").mkdir()
    (root / "data" / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "pairs.txt").write_text("job.sh|X|m/A|m/B|1|-\njob_sm.sh|Y|m/A|m/GONE|1|-\n")
    return root


def load(root, name):
    return AutoModelForCausalLM.from_pretrained(root / "models" / name).eval()


def attribution(folder, document=None, **changes):
    """Files of the shape that `fastdiff attribute` writes; the last document has no nats."""
    n = len(LAYER_NATS)
    none = np.full(1, np.nan)
    both = np.full((2, 1), np.nan)
    error = LAYER_NATS - THROUGH - 0.125
    files = {
        "document": np.arange(n + 1) if document is None else np.append(document, 99),
        "category": np.array([0] * 4 + [1] * 4 + [0]),
        "held_out": np.array([1, 0] * 4 + [1], np.uint8),
        "has_nats": np.array([1] * n + [0], np.uint8),
        "layer": np.append(LAYER_NATS, none),
        "latents": np.append(THROUGH - OFFSET, both, axis=1),
        "offset": np.append(OFFSET, both, axis=1),
        "error": np.append(error, both, axis=1),
        "left_out": np.append(np.zeros(n), none),
        "bos": np.append(np.full(n, 0.125), none),
    }
    folder = folder / "attribution"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in (files | changes).items()},
              folder / "documents.safetensors")  # fmt: skip
    summary = {"state": "checked", "reason": None, "categories": ["a", "b"], "seeds": [0, 1], "tau": 0.05}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_cross_entropy_is_that_of_each_document_alone(bench, pair):
    model = load(pair, "A")
    documents = [[0, 1, 2], [0, 3], [0, *range(1, 11), 4, 4, 1], [0, 5, 5]]
    expected = []
    for ids in documents:
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        expected.append(-np.mean([logs[at, token].item() for at, token in enumerate(ids[1:])]))
    assert np.allclose(bench["truth"].cross_entropies(model, documents), expected, atol=1e-6)


def test_entropy_is_corrected_for_a_small_sample(bench):
    # three kinds among four tokens: the plain entropy is 1.5 ln 2, and (3 - 1) / (2 · 4) is added
    assert bench["truth"].entropy([7, 7, 1, 2]) == pytest.approx(1.5 * math.log(2) + 0.25)


@pytest.mark.parametrize(
    ("change", "low", "high", "level"),
    [
        (0.2, 0.01, 0.4, "clear"),
        (-0.2, -0.4, -0.01, "clear"),
        (0.3, -0.1, 0.7, "small"),
        (0.19, 0.1, 0.2, "small"),
        (0.05, 0.04, 0.06, "none"),
        (-0.051, -0.06, -0.04, "small"),
    ],
)
def test_levels_have_the_cuts_of_the_rule(bench, change, low, high, level):
    assert bench["truth"].level(change, low, high) == level


def test_a_cell_is_scorable_if_the_better_model_beats_unigrams(bench):
    tokens = [0, 1] * 500  # ln 2 and 1 / 2000
    chance = math.log(2) + 0.0005
    for better, scorable in ((chance - 0.051, True), (chance - 0.049, False)):
        found = bench["truth"].cell("a", np.array([[1.0, better], [1.0, better]]), tokens)
        assert found.scorable is scorable
        assert found.change == pytest.approx(1 - better) and found.level == "clear"


def test_truth_is_measured_by_category(bench, pair):
    truth = bench["truth"]
    documents = truth.read_documents(pair / "data" / "held.jsonl")
    cells = truth.measure(pair / "models" / "A", pair / "models" / "B", documents, 5, 4)
    assert [(cell.category, cell.documents) for cell in cells] == [("a", 4), ("b", 4)]
    ids = [[0, *(WORDS.index(word) for word in text.split())][:5] for text in documents["b"][:4]]
    base, tuned = (truth.cross_entropies(load(pair, name), ids).mean() for name in "AB")
    assert (cells[1].ce_base, cells[1].ce_tuned) == pytest.approx((base, tuned))
    assert cells[1].change == pytest.approx(base - tuned)
    assert cells[1].low <= cells[1].change <= cells[1].high


def test_shares_and_gap_of_an_attribution(bench, tmp_path):
    tables = bench["tables"]
    attribution(tmp_path)
    of = tables.read_attribution(tmp_path)
    # a: L 3, V 1.5 and 1.75; b: L -0.75, V -0.375 in both seeds
    assert tables.by_category(of, of.layer).tolist() == [3, -0.75]
    assert tables.share(of) == pytest.approx((1.625 + 0.375) / 3.75)
    assert tables.share(of, latents_alone=True) == pytest.approx((1.375 + 0.625) / 3.75)
    # documents 0, 2, 4, 6: L 2 and -0.75, V 1.375 and -0.375
    assert tables.share(of.only_held_out()) == pytest.approx((1.375 + 0.375) / 2.75)
    assert tables.largest_gap(of) == pytest.approx(0, abs=1e-12)


def test_parts_that_do_not_add_up_are_found(bench, tmp_path):
    tables = bench["tables"]
    attribution(tmp_path, bos=np.append(np.full(8, 0.2), np.nan))
    # 0.075 nats are too much; the smaller category has 0.75
    assert tables.largest_gap(tables.read_attribution(tmp_path)) == pytest.approx(0.1)


def test_what_was_not_checked_is_said(bench, tmp_path):
    attribution(tmp_path)
    path = tmp_path / "attribution" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "not checked", "reason": "no models"}))
    with pytest.raises(SystemExit, match="not checked: no models"):
        bench["tables"].read_attribution(tmp_path)


def test_shuffled_categories_claim_only_by_chance(bench):
    tables, rng = bench["tables"], np.random.default_rng(1)
    category = np.repeat(np.arange(4), 30)
    v = rng.standard_normal((1, 120)) + 3 * (category == 2)
    of = tables.Attribution(
        list("abcd"), [0], 0.05, category, category == 0, category, v[0], v, v, v
    )  # fmt: skip
    # the one that differs, and the others from a rest that holds it
    assert "c" in tables.contrast_claims(of, category)
    assert tables.shuffled_claims(of, 100) <= 12  # at most 5 of 100 expected
    flipped = tables.Attribution(
        of.categories, [0, 1], of.tau, category, of.held_out, of.document, of.layer, np.vstack([v, -v]), v, v
    )
    assert tables.contrast_claims(flipped, category) == []


def row(category, verdict, change="none", reason=None):
    return {"category": category, "verdict": verdict, "change": change, "reason": reason}


def cells(bench, **changes):
    Cell = bench["truth"].Cell
    return [
        vars(Cell(name, 9, 2.0, 2.0 - change, change, change, change, 3.0, level, scorable))
        for name, (change, level, scorable) in changes.items()
    ]


def test_the_tally_counts_right_opposite_and_false(bench):
    tables = bench["tables"]
    truth = cells(
        bench, up=(1.0, "clear", True), down=(-1.0, "clear", True), never=(1.0, "clear", False),
        little=(0.1, "small", True), still=(0.0, "none", True), weak=(1.0, "clear", True),
    )  # fmt: skip
    rows = [
        row("up", "confirmed", "gained"), row("down", "confirmed", "gained"), row("never", "neither has it"),
        row("little", "confirmed", "gained"), row("still", "confirmed", "lost"),
        row("weak", "suggestive", "gained", "by a mean shift"),
    ]  # fmt: skip
    null = {"pair": "N1", "truth": cells(bench, q=(0.1, "small", True)), "rows": [row("q", "confirmed", "gained")]}
    results = [{"pair": "P1", "truth": truth, "rows": rows, "gap": 0.01}, null | {"gap": 0.04}]
    found = tables.tally(results, {"N1"})
    clear = found["clear, scorable"]
    assert (clear.cells, clear.right, clear.opposite) == (3, 1, 1)
    assert clear.words() == "suggestive (by a mean shift) 1"
    assert found["clear, neither model has it"].words() == "neither has it 1"
    assert (found["small"].right, found["small"].cells) == (2, 2)
    assert found["none"].confirmed == 1 and found["all cells of null pairs"].confirmed == 1
    problems = "; ".join(tables.missed(found, results))
    assert "1 of 3 clear" in problems and "opposite" in problems and "confirmed in none" in problems
    assert "confirmed in all cells of null pairs" in problems and "N1: parts miss L by 4.0%" in problems


def test_a_verdict_of_other_categories_is_refused(bench):
    result = {"pair": "P1", "truth": cells(bench, a=(0.0, "none", True)), "rows": [row("b", "no change")]}
    with pytest.raises(SystemExit, match="the text has"):
        bench["tables"].tally([result], set())


def test_recipes_scale_a_jobs_options(bench):
    pairs = bench["pairs"]
    options = pairs.RECIPES["lr3-F4-delta2-steps4"].options(pairs.JOBS["job.sh"])
    assert options == {
        "dict_size": 2048, "k": 12, "steps": 2000, "batch_size": 1024, "lr": 0.003, "decay_steps": 800, "delta_coef": 2
    }  # fmt: skip
    assert pairs.RECIPES["baseline"].options(pairs.JOBS["job.sh"]) == pairs.JOBS["job.sh"].train


def test_pairs_are_read_and_a_model_that_is_gone_is_known(bench, pair, tmp_path):
    known = bench["pairs"].read_pairs(pair)
    assert known["X"].missing == [] and known["X"].layer == 1
    assert known["Y"].missing == [str(pair / "models" / "GONE")]
    (tmp_path / "pairs.txt").write_text("other.sh|X|a|b|1|-\n")
    with pytest.raises(SystemExit, match="expected job"):
        bench["pairs"].read_pairs(tmp_path)


def test_what_is_recorded_is_not_run_again(bench, pair, tmp_path, monkeypatch):
    pairs, ran = bench["pairs"], []

    def stage(arguments):
        ran.append(arguments[0])
        run = tmp_path / "runs" / "baseline" / "X"
        if arguments[0] == "train":
            run.mkdir(parents=True, exist_ok=True)
            events = [{"stage": "evaluate", "rows": "held-out", "seed": s, "fve_pooled": 0.5 + s / 8} for s in (0, 1)]
            (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if arguments[0] == "attribute":
            attribution(run)
        if arguments[0] == "compare":
            rows = [row("a", "confirmed", "gained"), row("b", "no change")]
            verdict = {"comparisons": [{"kind": "pair", "state": "checked", "reason": None, "rows": rows}]}
            (run / "compare").mkdir(exist_ok=True)
            (run / "compare" / "verdict.json").write_text(json.dumps(verdict))
        return {"arguments": arguments, "cost": {"cpu": 1.0, "seconds": 1.0}, "commit": "0", "date": "2000-01-01"}

    monkeypatch.setattr(pairs, "run_stage", stage)
    one = pairs.read_pairs(pair)["X"]
    bench_ = pairs.Bench(tmp_path, (0, 1), {}, {}, again=False)
    assert pairs.result_of(one, "baseline", "train", bench_)["fve"] == [0.5, 0.625]
    whole = pairs.result_of(one, "baseline", "compare", bench_)
    assert ran == list(pairs.STAGES)
    assert pairs.result_of(one, "baseline", "compare", bench_) == whole
    assert len(ran) == 6 and whole["share"] == pytest.approx(2 / 3.75)
    assert [cell["category"] for cell in whole["truth"]] == ["a", "b"] and whole["rows"][0]["verdict"] == "confirmed"
    # other training options: everything behind extraction anew
    pairs.result_of(one, "baseline", "compare", pairs.Bench(tmp_path, (0, 1), {"k": 3}, {}, again=False))
    assert ran[6:] == list(pairs.STAGES[1:])


def test_a_failing_stage_says_why_and_leaves_other_pairs_alone(bench, pair, tmp_path, monkeypatch):
    pairs = bench["pairs"]
    with pytest.raises(SystemExit, match=r"fastdiff analyze .*exit 3: .*"):
        pairs.run_stage(["analyze", str(tmp_path / "gone")])
    known = pairs.read_pairs(pair)

    def result(one, name, until, bench_):
        if one.name == "X":
            raise SystemExit("no")
        return {"pair": one.name}

    monkeypatch.setattr(pairs, "result_of", result)
    found = pairs.collect(list(known.values()), ["baseline"], "train", pairs.Bench(tmp_path, (0,), {}, {}, again=False))
    assert found == ([{"pair": "Y"}], ["X, baseline: no"])


@pytest.fixture(scope="module")
def patched(bench, pair, tmp_path_factory):
    """A store, and a crosscoder whose latents are the models' difference itself: f = relu(±(x_tuned - x_base))."""
    root = tmp_path_factory.mktemp("patched")
    config = ExtractConfig(
        base=str(pair / "models" / "A"), tuned=str(pair / "models" / "B"), layer=str(LAYER), device="cpu",
        dataset=[str(pair / "data" / "held.jsonl")], category_field="category", store_dtype="float32",
    )  # fmt: skip
    extract(config, root / "acts")
    crosscoder = Crosscoder(2 * D, 2, D, activation="batchtopk", k=D)
    eye = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        crosscoder.W_enc[:, 0], crosscoder.W_enc[:, 1] = -eye, eye
        # decoders that only differ by the direction; the shared part is of no effect
        crosscoder.W_dec[:, 0], crosscoder.W_dec[:, 1] = 0.5 * eye, 1.5 * eye
    run = root / "run"
    save_crosscoder(run / "crosscoder" / "seed-0", crosscoder, {"models": []})
    return root


def test_patching_all_latents_of_a_perfect_crosscoder_gives_the_layers_share(bench, pair, patched):
    patch, run = bench["patch"], patched / "run"
    attribution(run, document=np.array([0, 2, 4, 6, 1, 3, 5, 7]))
    nats = np.zeros((2, 8, 2 * D), np.float32)
    nats[:, :, 3] = 1  # the same latent in every document
    save_file({"nats": nats}, run / "attribution" / "latents.safetensors")
    labels = [
        {"latent": j, "label": "x", "category": "a" if j == 5 else "b", "confidence": 1.0, "annotator": "x",
         "top_tokens": []}
        for j in range(2 * D)
    ]  # fmt: skip
    (run / "annotate").mkdir(exist_ok=True)
    rundir.write_text(run / "annotate" / "labels.jsonl", "".join(json.dumps(label) + "\n" for label in labels))
    rundir.finish(run / "annotate", "annotate", {}, {}, ["labels.jsonl"])
    of = bench["tables"].read_attribution(run)
    paths = (pair / "models" / "A", pair / "models" / "B")
    (found,) = patch.patch("X", run, patched / "acts", paths, LAYER, of, ["a"], 1)

    base, tuned = load(pair, "A"), load(pair, "B")
    shares, single, changes = [], {3: [], 5: []}, []
    with patch.ActivationStore(patched / "acts") as store:
        numbers, tokens = store.column("sequence_ids"), store.column("token_ids")
    for number in (2, 6):  # the second half of category a: its documents are 0, 2, 4, 6
        ids = torch.tensor([[0, *tokens[numbers == number].tolist()]])
        with torch.no_grad():
            h = [model(ids, output_hidden_states=True).hidden_states[LAYER + 1] for model in (base, tuned)]
        own = [after(base, ids, None), after(tuned, ids, None)]
        changes.append(own[0] - own[1])

        def effect(difference, ids=ids, h=h, own=own):
            difference = difference.clone()
            difference[:, 0] = 0  # BOS is not patched
            return (own[0] - after(base, ids, h[0] + difference) + after(tuned, ids, h[1] - difference) - own[1]) / 2

        shares.append(effect(h[1] - h[0]))
        for j, effects in single.items():
            only = torch.zeros_like(h[0])
            only[..., j] = (h[1] - h[0])[..., j].relu()  # latents below D are the positive part of a coordinate
            effects.append(effect(only))
    assert found.documents == 2 and found.change == pytest.approx(np.mean(changes), abs=1e-5)
    assert found.effects["all"] == pytest.approx(np.mean(shares), abs=1e-5)
    assert abs(np.mean(shares)) > 1e-3
    assert found.effects["nats"] == pytest.approx(np.mean(single[3]), abs=1e-5)
    assert found.effects["own label"] == pytest.approx(np.mean(single[5]), abs=1e-5)
    assert found.predicted == 1


@torch.no_grad()
def after(model, ids, hidden):
    """Cross entropy where the layer behind LAYER gets other hidden states, by another hook than the benchmark's."""
    handle = None
    if hidden is not None:
        block = model.model.layers[LAYER + 1]
        handle = block.register_forward_pre_hook(lambda _module, inputs: (hidden, *inputs[1:]))
    logits = model(ids).logits[0, :-1]
    if handle is not None:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def test_aims_of_patching(bench):
    Patched = bench["patch"].Patched
    names = ("nats", "mass", "Δ_norm", "own label", "chance", "all")

    def one(category, *effects, predicted):
        return Patched("P", category, 20, 14, -1.0, dict(zip(names, effects, strict=True)), predicted)

    good = one("a", -0.3, -0.2, -0.15, 0.1, 0.0, -0.9, predicted=-0.36)
    assert good.leads and good.twice_delta and good.ratio == pytest.approx(1 / 1.2)
    assert bench["patch"].patch_missed([good]) == []
    beaten = one("b", 0.1, 0.2, 0.09, 0.0, 0.0, 0.9, predicted=0.2)
    problems = bench["patch"].patch_missed([beaten, beaten, beaten])
    assert problems.count("P b: others move more") == 3 and problems.count("P b: 0.50 of what was predicted") == 3
    assert "at least twice Δ_norm's effect in 0 of 3 cells" in problems


def test_sets_of_latents(bench):
    nats = np.array([0.5, -2.0, 1.0, 0.0])
    mass = np.array([1.0, 4.0, 3.0, 2.0])
    delta = np.array([1.0, 0.45, 0.6, 0.5])
    own = np.array([True, False, False, True])
    sets = bench["patch"].choose(nats, -1.0, mass, delta, own, 1, np.random.default_rng(0))
    # latents 1 and 2 are above the median mass
    assert {name: of[0].tolist() for name, of in sets.items() if name != "chance"} == {
        "nats": [1], "mass": [1], "Δ_norm": [2], "own label": [3], "all": [0, 1, 2, 3]
    }  # fmt: skip
    assert all(set(of.tolist()) <= {1, 2} for of in sets["chance"])


def test_the_page_is_printed_and_kept(bench, tmp_path, capsys):
    page = bench["pairs"].Page("Title", ["text"], ["something"], [{"share": float("nan")}])
    page.publish(tmp_path / "out" / "page", ["python", "x"])
    kept = (tmp_path / "out" / "page.md").read_text()
    assert capsys.readouterr().out == kept and "Missed: something" in kept and "commit" in kept
    facts = json.loads((tmp_path / "out" / "page.json").read_text())
    assert facts["results"] == [{"share": None}] and {"date", "commit", "machine", "missed"} <= set(facts)
    assert {"torch", "transformers", "fastdiff"} <= set(facts["machine"]["versions"])
