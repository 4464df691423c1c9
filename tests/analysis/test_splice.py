"""Models that go on from a reconstruction: the figures are those of plain hooks, and nothing else is replaced."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from fastdiff.analysis import splice as module
from fastdiff.analysis.splice import ModelFigures, SpliceFigures, splice
from fastdiff.config import ExtractConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.harvest import extract
from fastdiff.extraction.models import quiet
from fastdiff.patching import halves as halves_module
from fastdiff.patching.documents import held_out_documents
from fastdiff.patching.halves import Halves
from fastdiff.rundir import read_json, write_json
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

D, VOCAB, LAYER = 32, 300, 1
_GROUPED = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_GROUPED, sliding_window=6, final_logit_softcapping=2.0),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=3, n_head=4, n_positions=64, bos_token_id=1),
}
_OTHERS = {**_GROUPED, "num_key_value_heads": 4}
del _OTHERS["head_dim"]
HEADS = {
    **CONFIGS,
    "granite": lambda: GraniteConfig(**_OTHERS, logits_scaling=3.0),
    "neox": lambda: GPTNeoXConfig(**{k: v for k, v in _OTHERS.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
}
# where a plain hook finds the activation
PLACES = {
    ("llama", "resid_post"): f"model.layers.{LAYER}",
    ("llama", "mlp_out"): f"model.layers.{LAYER}.mlp",
    ("gemma2", "resid_post"): f"model.layers.{LAYER}",
    ("gemma2", "attn_out"): f"model.layers.{LAYER}.post_attention_layernorm",
    ("gpt2", "resid_post"): f"transformer.h.{LAYER}",
    ("gpt2", "attn_out"): f"transformer.h.{LAYER}.attn.resid_dropout",
}
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "on", "the", "rug"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on the mat and the dog lay on the rug"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>")


def make_model(path: Path, config, seed: int, texts: list[str]) -> None:
    torch.manual_seed(seed)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # away from the small and the all-one values of the initialisation, which hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
        learn(model, texts)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)


def learn(model, texts: list[str]) -> None:
    """A little, so that taking an activation away does harm."""
    batch = make_tokenizer()(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("splice")
    generator = np.random.Generator(np.random.PCG64(3))
    texts = [" ".join(generator.choice(WORDS, int(generator.integers(1, 14)))) for _ in range(11)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for kind, config in CONFIGS.items():
        for seed, name in enumerate(("base", "tuned")):
            make_model(root / kind / name, config(), seed, texts)
    return root


@pytest.fixture(scope="module")
def stores(root):
    """Extracts a store once for each set of options."""
    opened = {}

    def of(kind: str = "llama", **options) -> ActivationStore:
        key = "-".join([kind, *(f"{name}={value}" for name, value in options.items())])
        if key not in opened:
            base = {"store_dtype": "float32", "dtype": "float32", "batch_size": 3, "device": "cpu", "layer": str(LAYER)}
            pair = {"base": str(root / kind / "base"), "tuned": str(root / kind / "tuned")}
            config = ExtractConfig(**pair, dataset=[str(root / "texts.jsonl")], **{**base, **options})
            opened[key] = ActivationStore(extract(config, root / f"acts-{key}"))
        return opened[key]

    yield of
    for store in opened.values():
        store.close()


class Identity(Crosscoder):
    """Reconstructs what it is given."""

    def __init__(self, n_models: int = 2):
        super().__init__(4, n_models, D, activation="relu", k=1)

    def encode(self, x):
        return x, None

    def decode(self, values, selection, backend="auto"):
        return values


class Zero(Identity):
    def decode(self, values, selection, backend="auto"):
        return torch.zeros_like(values)


def crosscoder(store: ActivationStore, inputs: str = "all") -> Crosscoder:
    """A random one in the store's scale."""
    stats = store.stats()
    chosen = [int(part) for part in inputs.split(",")] if inputs != "all" else [0, 1]
    generator = torch.Generator().manual_seed(0)
    c = Crosscoder(24, len(chosen), D, activation="topk", k=4, inputs=inputs)
    with torch.no_grad():
        c.W_enc.copy_(torch.randn(c.W_enc.shape, generator=generator) / D**0.5)
        c.W_dec.copy_(c.W_enc)
        c.b_dec.copy_(0.1 * torch.randn(c.b_dec.shape, generator=generator))
        c.input_mean.copy_(torch.tensor(stats.mean)[chosen])
        c.input_scale.copy_((D / torch.tensor(stats.variance)[chosen]).sqrt())
    return c


def run(store: ActivationStore, c: Crosscoder, holdout: float = 0.0, tokens: int = 10**6) -> SpliceFigures:
    return splice(store, c, holdout=holdout, tokens=tokens)


def texts_in_order(root: Path) -> list[list[int]]:
    """Token ids of the documents as extract orders them, without any of the code under test."""
    texts = [json.loads(line)["text"] for line in (root / "texts.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    return [tokenizer(texts[i])["input_ids"] for i in order]


def dense(c: Crosscoder, x: torch.Tensor) -> torch.Tensor:
    """x̂ of stored activations [n, M, D] in float64, by the definition."""
    tilde = (x.double() - c.input_mean.double()) * c.input_scale.double()[:, None]
    pre = (tilde.flatten(1) @ c.W_enc.double().flatten(1).T + c.b_enc.double()).relu()
    score = pre * c.W_dec.double().norm(dim=-1).sum(dim=1)
    kept = torch.zeros_like(pre).scatter(1, score.topk(c.k).indices, 1.0)
    out = torch.einsum("nf,fmd->nmd", pre * kept, c.W_dec.double()) + c.b_dec.double()
    return out / c.input_scale.double()[:, None] + c.input_mean.double()


@torch.no_grad()
def brute_force(root, kind, hook, documents, skip, rows_of, c, chosen=(0, 1)) -> list[dict[str, float]]:
    """Document by document, unpadded, in float64; `rows_of` gives the stored activations of a document."""
    found = []
    for index, number in enumerate(chosen):
        path = root / kind / ("base", "tuned")[number]
        with quiet():
            attention = "eager" if kind == "gemma2" else None
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).double().eval()
        mean = torch.cat([rows_of(i) for i in range(len(texts_in_order(root)))])[:, number].double().mean(dim=0)
        sums = dict.fromkeys(("original", "spliced", "zero", "mean", "kl"), 0.0)
        n = 0
        for i, ids in documents:
            if len(ids) <= skip + 1:
                continue
            new = {
                "original": None,
                "spliced": dense(c, rows_of(i)[:, list(chosen)])[:, index],
                "zero": torch.zeros(D).double(),
                "mean": mean,
            }
            logits = {}
            for name, value in new.items():

                def hook_in(_module, _args, out, value=value):
                    changed = (out[0] if isinstance(out, tuple) else out).clone()
                    changed[0, skip:] = value
                    return (changed, *out[1:]) if isinstance(out, tuple) else changed

                target = model.get_submodule(PLACES[kind, hook])
                handle = target.register_forward_hook(hook_in) if value is not None else None
                logits[name] = model(torch.tensor([ids])).logits[0, skip:-1]
                if handle is not None:
                    handle.remove()
            targets = torch.tensor(ids[skip + 1 :])
            for name in new:
                sums[name] += float(torch.nn.functional.cross_entropy(logits[name], targets, reduction="sum"))
            p, q = logits["original"].log_softmax(-1), logits["spliced"].log_softmax(-1)
            sums["kl"] += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
            n += len(targets)
        found.append({name: value / n for name, value in sums.items()} | {"n": n})
    return found


def assert_same(figures: SpliceFigures, want: list[dict[str, float]]) -> None:
    assert len(figures.models) == len(want)
    for got, expected in zip(figures.models, want, strict=True):
        values = {"original": got.ce, "spliced": got.ce_spliced, "zero": got.ce_zero, "mean": got.ce_mean, "kl": got.kl}
        assert values == pytest.approx({name: expected[name] for name in values}, rel=2e-5, abs=2e-6)
        assert figures.tokens == expected["n"]
        assert got.kl > 1e-3 and abs(got.ce_spliced - got.ce) > 1e-4


def stored_rows(store: ActivationStore):
    numbers = store.column("sequence_ids")
    usable = np.arange(store.n_rows) if store.usable_rows() is None else store.usable_rows()
    return lambda i: store.rows(usable[numbers[usable] == i])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hook"), PLACES)
def test_figures_are_those_of_a_plain_hook_in_float64(root, stores, kind, hook):
    store = stores(kind, hook=hook)
    c = crosscoder(store)
    want = brute_force(root, kind, hook, list(enumerate(texts_in_order(root))), 1, stored_rows(store), c)
    figures = run(store, c)
    assert_same(figures, want)
    for of, name in zip(figures.models, ("base", "tuned"), strict=True):
        assert (Path(of.name).name, of.layer, of.hook) == (name, LAYER, hook)
        recovered = (of.ce_zero - of.ce_spliced) / (of.ce_zero - of.ce)
        assert of.loss_recovered == recovered if of.ce_zero > of.ce else math.isnan(of.loss_recovered)
        assert of.ce_zero > of.ce or hook != "resid_post"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_perfect_reconstruction_changes_nothing(stores, kind):
    for of in run(stores(kind), Identity()).models:
        assert of.ce_spliced == pytest.approx(of.ce, rel=1e-6)
        assert of.kl == pytest.approx(0, abs=1e-6) and of.loss_recovered == pytest.approx(1, abs=1e-5)
        assert abs(of.ce_zero - of.ce) > 1e-2


def test_a_reconstruction_of_zeros_is_the_zero_ablation(stores):
    for of in run(stores("gemma2"), Zero()).models:
        assert of.ce_spliced == of.ce_zero > of.ce and of.loss_recovered == 0


def test_only_held_out_documents_count_where_there_are_any(root, stores):
    store = stores()
    c, documents = crosscoder(store), list(enumerate(texts_in_order(root)))
    figures = run(store, c, holdout=0.3)
    assert_same(figures, brute_force(root, "llama", "resid_post", documents[-3:], 1, stored_rows(store), c))
    assert (figures.rows, figures.documents) == ("held out", 3)
    assert run(store, c).rows == "all"


def test_some_documents_are_taken_evenly(stores):
    store = stores()
    documents, _ = held_out_documents(store, 0.0, store.n_rows // 3, "--splice")
    assert [document.number for document in documents] == [0, 5, 10]
    documents, _ = held_out_documents(store, 0.0, 1, "--splice")
    assert len(documents) == 1


def test_bos_that_was_stored_keeps_its_activation(stores):
    plain, kept = stores(), stores(keep_bos=True)
    assert kept.n_rows > plain.n_rows
    assert run(kept, crosscoder(plain)) == run(plain, crosscoder(plain))


@pytest.mark.parametrize("keep_bos", [False, True])
def test_skipped_positions_keep_their_activation(root, stores, keep_bos):
    store = stores(skip_first=3, keep_bos=keep_bos)
    c = crosscoder(stores())
    # a document that is no longer than what is left out is none of the store's
    documents = [(i, ids) for i, ids in enumerate([ids for ids in texts_in_order(root) if len(ids) > 3 or keep_bos])]
    rows_of = stored_rows(store)
    assert_same(run(store, c), brute_force(root, "llama", "resid_post", documents, 3, rows_of, c))


def test_the_text_must_be_what_it_was_where_it_is_tokenized_again(root, stores, tmp_path):
    text = root / "texts.jsonl"
    store, before = stores(skip_first=3), text.read_text()
    try:
        text.write_text(before.replace("cat", "dog"))
        with pytest.raises(InputError, match=r"texts\.jsonl: has changed since"):
            run(store, crosscoder(store))
        text.unlink()
        with pytest.raises(InputError, match=r"texts\.jsonl: no such file"):
            run(store, crosscoder(store))
    finally:
        text.write_text(before)


def test_one_of_two_models_alone(root, stores):
    store = stores()
    c = crosscoder(store, "1")
    documents = list(enumerate(texts_in_order(root)))
    want = brute_force(root, "llama", "resid_post", documents, 1, stored_rows(store), c, chosen=(1,))
    assert_same(run(store, c), want)


def test_it_repeats_and_does_not_depend_on_how_tokens_are_grouped(stores, monkeypatch):
    store = stores("gemma2")
    first = run(store, crosscoder(store))
    assert run(store, crosscoder(store)) == first
    monkeypatch.setattr(module, "_POSITIONS", 20)
    monkeypatch.setattr(halves_module, "LOGIT_BYTES", 3 * 4 * VOCAB)
    again = run(store, crosscoder(store))
    assert again.tokens == first.tokens
    for a, b in zip(first.models, again.models, strict=True):
        assert [b.ce, b.ce_spliced, b.ce_zero, b.kl] == pytest.approx([a.ce, a.ce_spliced, a.ce_zero, a.kl], rel=1e-5)


def test_logits_of_few_tokens_at_a_time(stores, monkeypatch):
    sizes = []
    real = Halves.logits
    monkeypatch.setattr(halves_module, "LOGIT_BYTES", 5 * 4 * VOCAB)
    monkeypatch.setattr(Halves, "logits", lambda self, hidden: sizes.append(len(hidden)) or real(self, hidden))
    run(stores(), Identity())
    assert max(sizes) == 5


def test_models_run_in_the_precision_of_the_extraction(stores):
    store = stores(dtype="bfloat16", store_dtype="bfloat16")
    for of, exact in zip(run(store, Identity()).models, run(stores(), Identity()).models, strict=True):
        assert of.ce != exact.ce and of.ce == pytest.approx(exact.ce, rel=0.02)
        assert of.ce_spliced == pytest.approx(of.ce, rel=0.01)


@pytest.mark.parametrize("kind", HEADS)
@torch.inference_mode()
def test_the_head_alone_gives_the_models_own_logits(kind):
    with quiet():
        model = AutoModelForCausalLM.from_config(HEADS[kind]()).eval()
    halves = Halves(model, "--splice")
    ids = torch.arange(12).view(2, 6) + 5
    hidden = halves.hidden(ids, torch.ones_like(ids))
    assert torch.allclose(halves.logits(hidden.flatten(0, 1)), model(ids).logits.flatten(0, 1), atol=1e-5)


@torch.inference_mode()
def test_a_head_that_looks_elsewhere_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    halves = Halves(model, "--splice")
    ids = torch.arange(6)[None]
    hidden = halves.hidden(ids, torch.ones_like(ids))
    forward, inner = model.forward, model.model

    def twice(*args, **kwargs):
        inner(input_ids=kwargs["input_ids"])
        return forward(*args, **kwargs)

    model.forward = twice
    with pytest.raises(OptionError, match="LlamaForCausalLM does not compute its logits"):
        halves.logits(hidden[0])
    assert "forward" not in vars(inner)


def foreign(path: Path, store: ActivationStore, *, without=(), rows=None, activations=None, **meta) -> ActivationStore:
    """The same rows, or some of them, as another tool might have written them."""
    rows = np.arange(store.n_rows) if rows is None else rows
    names = [name for name in ("token_ids", "sequence_ids", "positions", "roles", "sources") if name not in without]
    facts = {"models": [info.model_dump() for info in store.meta.models], "roles": store.meta.roles, **meta}
    shape = {"n_rows": len(rows), "n_models": store.n_models, "d_model": D, "shard_rows": len(rows)}
    with StoreWriter(path, **shape, dtype="float32", meta=facts, columns=names) as writer:
        x = store.rows(rows) if activations is None else activations
        writer.append(x, **{name: store.column(name)[rows] for name in names})
    return ActivationStore(path)


def test_a_foreign_store_with_whole_documents_is_run(stores, tmp_path):
    kept = stores(keep_bos=True)
    models = [{"name": info.name, "layer": LAYER, "hook": "resid_post"} for info in kept.meta.models]
    store = foreign(tmp_path / "acts", kept, models=models)
    assert run(store, crosscoder(stores())) == run(kept, crosscoder(stores()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": ("token_ids",)}, "has no token_ids, which --splice needs"),
        ({"without": ("positions",)}, "has no positions, which --splice needs"),
        ({"without": ("sequence_ids",)}, "has no sequence_ids, which --splice needs"),
        ({"models": ["base", "tuned"]}, "does not say at which layer and hook base was read"),
        ({"layer": 7}, "has 3 layers of width 32, but .* layer 7"),
        ({"weights_sha256": "0" * 64}, "has changed since"),
        ({"name": "nowhere/base"}, "nowhere/base: no such directory, .* run where fastdiff extract was run"),
        ({"name": "/nowhere/base", "weights_sha256": None}, "/nowhere/base: no such directory"),
        ({"rows": np.delete(np.arange(40), 1)}, r"document 0 has .* of .* positions"),
        ({"shuffled": True}, r"does not compute what .* holds \(squared distance .* of the variance\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_store_that_cannot_be_run_again_says_why(stores, tmp_path, change, message):
    kept = stores(keep_bos=True)
    facts = {name: change.pop(name) for name in ("layer", "weights_sha256", "name") if name in change}
    if facts:
        change["models"] = [{**info.model_dump(), **facts} for info in kept.meta.models]
    if change.pop("shuffled", False):
        change["activations"] = kept.rows(np.random.Generator(np.random.PCG64(0)).permutation(kept.n_rows))
    store = foreign(tmp_path / "acts", kept, **change)
    with pytest.raises(InputError, match=message) as caught:
        run(store, Identity())
    assert "\n" not in str(caught.value)


def test_a_changed_model_or_tokenizer_is_refused(root, stores, tmp_path):
    store = stores("gpt2")
    weights = root / "gpt2" / "tuned" / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"abcd")
        with pytest.raises(InputError, match=r"gpt2/tuned: has changed since"):
            run(store, Identity())
    finally:
        weights.write_bytes(before)
    store_json = tmp_path / "acts" / "store.json"
    copied = foreign(tmp_path / "acts", store, config=store.meta.config, tokenizer={"name": "x", "sha256": "0" * 64})
    copied.close()
    assert read_json(store_json, 1)["tokenizer"]["name"] == "x"
    with pytest.raises(InputError, match="its tokenizer has changed"):
        run(ActivationStore(tmp_path / "acts"), Identity())
    facts = read_json(store_json, 1)
    facts["config"]["dry_run"] = True
    write_json(store_json, facts)
    with pytest.raises(InputError, match=r"options this version does not have .*dry-run"):
        run(ActivationStore(tmp_path / "acts"), Identity())


def test_weights_without_a_head_are_refused(root, stores, tmp_path):
    kept = stores("llama", keep_bos=True)
    with quiet():
        AutoModelForCausalLM.from_pretrained(root / "llama" / "base").model.save_pretrained(tmp_path / "base")
    models = [{"name": str(tmp_path / "base"), "layer": LAYER, "hook": "resid_post"}, kept.meta.models[1].model_dump()]
    with pytest.raises(InputError, match=r"base: its weights lack lm_head\.weight"):
        run(foreign(tmp_path / "acts", kept, models=models), Identity())


def test_documents_of_one_token_predict_nothing(stores, tmp_path):
    kept = stores(keep_bos=True)
    alone = np.flatnonzero(kept.column("positions") == 0)
    with pytest.raises(InputError, match="no token to predict in 11 documents"):
        run(foreign(tmp_path / "acts", kept, rows=alone), Identity())


def test_a_difference_is_no_activation(stores):
    c = Crosscoder(4, 1, D, activation="relu", k=1, inputs="difference")
    with pytest.raises(OptionError, match="reconstructs the difference of two models"):
        run(stores(), c)


def test_facts_are_json_and_lines_are_sentences():
    model = ModelFigures("a/base", 3, "mlp_out", 2.0, 2.5, 1.5, 2.25, math.nan, 0.25)
    figures = SpliceFigures(1234, 5, "held out", [model, replace(model, loss_recovered=0.98765)])
    facts = json.loads(json.dumps(figures.facts(), allow_nan=False))
    assert facts["models"][0]["loss_recovered"] is None and facts["models"][0]["kl"] == 0.25
    assert (facts["tokens"], facts["documents"], facts["rows"]) == (1234, 5, "held out")
    start = (
        "with its reconstruction a/base has cross entropy 2.5000 instead of 2.0000 (2.2500 with the mean, 1.5000 with "
    )
    end = ", KL 0.2500; 1,234 tokens, held out"
    assert figures.lines() == [
        f"{start}zeros): zeros do no harm{end}",
        f"{start}zeros): 98.77% of the loss recovered{end}",
    ]
