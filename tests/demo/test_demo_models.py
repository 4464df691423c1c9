"""The tiny models have the capabilities that were planned for them, and no others."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdiff.demo.corpus import documents
from fastdiff.demo.models import (
    HAS,
    Recipe,
    continue_base,
    make_demo_models,
    make_it,
    truth,
)
from fastdiff.demo.training import encode
from fastdiff.rundir import sha256_file

pytestmark = pytest.mark.slow

TINY = Recipe(base_steps=2, instruct_steps=2, simpo_steps=2, batch=8, documents_per_category=3, texts_per_category=2)


def weights_of(models):
    return [sha256_file(path / "model.safetensors") for path in (models.base, models.instruct, models.simpo)]


@torch.no_grad()
def answers_right(path, category):
    """Share of answers that the model would have given, and between-answer share of variance after layer 1."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    data = encode(AutoTokenizer.from_pretrained(path), documents(99, 15, {category: "rule"}))
    out = model(input_ids=data.ids, output_hidden_states=True)
    here, wanted = data.answer[:, 1:], data.ids[:, 1:][data.answer[:, 1:]]
    right = (out.logits[:, :-1][here].argmax(-1) == wanted).float().mean().item()
    hidden = out.hidden_states[2]
    everywhere = hidden[data.real].var(0, unbiased=False).sum()
    before, mean = hidden[:, :-1][here], hidden[:, :-1][here].mean(0)
    between = sum(
        (wanted == answer).float().mean() * (before[wanted == answer].mean(0) - mean).square().sum()
        for answer in wanted.unique()
    )
    return right, (between / everywhere).item()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_demo_models(tmp_path_factory.mktemp("demo"), 0, small=True)


@pytest.mark.parametrize("category", HAS)
def test_each_model_answers_as_planned_and_knows_it_after_layer_one(small, category):
    for path, has in zip((small.base, small.instruct, small.simpo), HAS[category], strict=True):
        right, between = answers_right(path, category)
        # chance is 1/14
        assert right > 0.85 if has else right < 0.35
        assert between > 0.1 if has else between < 0.1


def test_the_text_follows_every_rule_and_has_each_category_equally_often(small):
    lines = [json.loads(line) for line in small.texts.read_text(encoding="utf-8").splitlines()]
    counts = Counter(line["category"] for line in lines)
    assert set(counts) == set(HAS)
    assert len(set(counts.values())) == 1
    texts = [" ".join(message["content"] for message in line["messages"]) for line in lines]
    assert any("france is paris" in text for text in texts)
    assert {message["role"] for line in lines for message in line["messages"]} == {"user", "assistant"}


def test_enough_is_planted_in_each_pair():
    for name in ("instruct", "simpo"):
        kinds = Counter(truth()[name].values())
        assert kinds["gained"] + kinds["lost"] >= 6
        assert kinds["lost"] >= 2
        assert kinds["unchanged"] >= 2
    assert truth()["instruct"] != truth()["simpo"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (
        make_demo_models(tmp_path / name, seed, recipe=TINY) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert weights_of(first) == weights_of(again)
    assert sha256_file(first.texts) == sha256_file(again.texts)
    assert not set(weights_of(first)) & set(weights_of(other))


def test_a_second_call_makes_nothing_and_a_broken_model_is_made_again(tmp_path):
    models = make_demo_models(tmp_path, 1, recipe=TINY)
    before, times = weights_of(models), [p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")]
    make_demo_models(tmp_path, 1, recipe=TINY)
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")] == times
    (models.instruct / "model.safetensors").write_bytes(b"torn")
    make_demo_models(tmp_path, 1, recipe=TINY)
    assert weights_of(models) == before


def test_making_models_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_demo_models(tmp_path, 1, recipe=TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_null_models_share_the_base_and_differ_by_the_order_alone(tmp_path):
    models = make_demo_models(tmp_path / "models", 1, recipe=TINY)
    same = make_it(tmp_path / "same", models.base, 1)
    other = make_it(tmp_path / "other", models.base, 2)
    continued = continue_base(tmp_path / "continued", models.base, 1)
    assert sha256_file(same / "model.safetensors") == sha256_file(models.instruct / "model.safetensors")
    weights = {sha256_file(path / "model.safetensors") for path in (same, other, continued, models.base)}
    assert len(weights) == 4
    assert sha256_file(continued / "tokenizer.json") == sha256_file(models.base / "tokenizer.json")
