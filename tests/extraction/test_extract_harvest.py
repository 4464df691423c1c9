import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from fastdiff.config import ExtractConfig
from fastdiff.errors import FastdiffError, InputError, LockedError, OptionError
from fastdiff.extraction import harvest
from fastdiff.extraction.harvest import batches, command, extract
from fastdiff.extraction.models import capture, quiet
from fastdiff.extraction.tokens import ROLES
from fastdiff.progress import Progress
from fastdiff.rundir import locked, read_json
from fastdiff.store.reader import ActivationStore

N_LAYERS = 3
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def make_tokenizer(extra: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog lay on the rug"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    if extra is not None:
        made.add_tokens([extra])
    return made


def make_model(path: Path, kind: str, seed: int, width: int = 32, tokenizer: object | None = None) -> str:
    sizes = {"vocab_size": 300, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "bos_token_id": 1}
    grouped = {
        **sizes,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    configs = {
        "llama": lambda: LlamaConfig(**grouped, max_position_embeddings=64),
        "gemma2": lambda: Gemma2Config(**grouped, sliding_window=6, max_position_embeddings=64),
        "gpt2": lambda: GPT2Config(
            vocab_size=300, n_embd=width, n_layer=N_LAYERS, n_head=4, n_positions=64, bos_token_id=1
        ),
    }
    torch.manual_seed(seed)
    with quiet():
        model = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
        if tokenizer is not False:
            (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    root = tmp_path_factory.mktemp("pairs")
    return {
        kind: (make_model(root / kind / "base", kind, 1), make_model(root / kind / "tuned", kind, 2))
        for kind in ("llama", "gemma2", "gpt2")
    }


WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "on", "the", "rug"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    generator = np.random.Generator(np.random.PCG64(3))
    path = tmp_path / "texts.jsonl"
    with path.open("w") as file:
        for number in range(11):
            words = generator.choice(WORDS, int(generator.integers(1, 14)))
            file.write(json.dumps({"text": " ".join(words), "kind": "ab"[number % 2]}) + "\n")
    return path


def configured(pair: tuple[str, str], *datasets: Path, **options) -> ExtractConfig:
    base = {"base": pair[0], "tuned": pair[1], "dataset": [str(path) for path in datasets], "layer": "1"}
    return ExtractConfig(
        **{**base, "batch_size": 3, "store_dtype": "float32", "dtype": "float32", "device": "cpu", **options}
    )


def expected(config: ExtractConfig, texts: list[dict]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Activations and (id, document, position) by the full models, without any of the code under test."""
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(texts))
    tokenizer = make_tokenizer()
    ids = [tokenizer(texts[i]["text"])["input_ids"][: config.ctx_len] for i in order]
    parts, facts = [], []
    for model_path in (config.base, config.tuned):
        with quiet():
            # transformers 5.17 runs Gemma 2 with sdpa, which leaves its attention cap out
            attention = "eager" if "gemma2" in model_path else None
            model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation=attention).eval()
        rows = []
        for start in range(0, len(ids), config.batch_size):
            batch = ids[start : start + config.batch_size]
            longest = max(map(len, batch))
            padded = torch.tensor([item + [0] * (longest - len(item)) for item in batch])
            mask = torch.tensor([[1] * len(item) + [0] * (longest - len(item)) for item in batch])
            with torch.inference_mode():
                out = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
            for offset, item in enumerate(batch):
                rows.append(out.hidden_states[int(config.layer) + 1][offset, 1 : len(item)])
                if model_path == config.base:
                    facts += [(item[t], start + offset, t) for t in range(1, len(item))]
        parts.append(torch.cat(rows))
    return torch.stack(parts, 1).numpy(), facts


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(store: ActivationStore, name: str) -> np.ndarray:
    values = store.column(name)
    assert values is not None
    return values


def files(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir() if item.name != ".lock"}


class Heard(Progress):
    def __init__(self) -> None:
        super().__init__("off")
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_store_equals_the_full_models_bit_for_bit_and_holds_no_padding(pairs, texts, tmp_path, kind) -> None:
    config = configured(pairs[kind], texts)
    store = ActivationStore(extract(config, tmp_path / "acts"))
    want, facts = expected(config, records(texts))
    assert store.slice(0, store.n_rows).numpy().tobytes() == want.tobytes()
    ids, documents, positions = zip(*facts, strict=True)
    assert column(store, "token_ids").tolist() == list(ids)
    assert column(store, "sequence_ids").tolist() == list(documents)
    assert column(store, "positions").tolist() == list(positions)
    assert set(column(store, "roles").tolist()) == {ROLES.index("text")}


def test_shards_are_plain_hdf5_of_the_wanted_type(pairs, texts, tmp_path) -> None:
    config = configured(pairs["llama"], texts, store_dtype="bfloat16", shard_rows=20)
    out = extract(config, tmp_path / "acts")
    want, _ = expected(config, records(texts))
    shards = sorted(out.glob("shard-*.h5"))
    assert len(shards) == -(-len(want) // 20)
    found = []
    for shard in shards:
        with h5py.File(shard) as file:
            found.append(file["activations"][:])
    rounded = torch.from_numpy(want).bfloat16().float().numpy()
    assert np.array_equal(np.concatenate(found).astype(np.float32), rounded)


def test_sources_are_the_pairs_of_data_set_and_category(pairs, texts, tmp_path) -> None:
    other = tmp_path / "more.txt"
    other.write_text("the rug\nthe mat\n")
    kinds = tmp_path / "kinds.jsonl"
    kinds.write_text('{"text": "dog on the rug", "kind": "a"}\n')
    config = configured(pairs["llama"], texts, kinds, category_field="kind")
    store = ActivationStore(extract(config, tmp_path / "acts"))
    sources = [(source.dataset, source.category) for source in store.meta.sources]
    assert set(sources) == {("texts.jsonl", "a"), ("texts.jsonl", "b"), ("kinds.jsonl", "a")}
    assert column(store, "sources").dtype == np.uint16
    everything = [*((r["text"], ("texts.jsonl", r["kind"])) for r in records(texts))]
    everything.append(("dog on the rug", ("kinds.jsonl", "a")))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(everything))
    tokenizer = make_tokenizer()
    want = []
    for index in order:
        text, source = everything[index]
        want += [source] * (len(tokenizer(text)["input_ids"]) - 1)
    assert [sources[i] for i in column(store, "sources")] == want


def test_chat_roles_reach_the_store_and_bos_only_on_request(pairs, tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]})
    )
    config = configured(pairs["llama"], path, messages_field="messages")
    with ActivationStore(extract(config, tmp_path / "a")) as store:
        roles = {ROLES[role] for role in column(store, "roles")}
        assert roles == {"user", "assistant", "template"}
        n_rows = store.n_rows
    with ActivationStore(extract(config.model_copy(update={"keep_bos": True}), tmp_path / "b")) as store:
        assert store.n_rows == n_rows + 1
        assert ROLES[column(store, "roles")[0]] == "bos"
        assert column(store, "token_ids")[0] == 1
        # statistics leave the row out
        assert store.stats().n_rows == n_rows


def test_skipped_positions_are_run_and_not_stored(pairs, texts, tmp_path) -> None:
    config = configured(pairs["llama"], texts)
    with ActivationStore(extract(config, tmp_path / "a")) as whole:
        keep = column(whole, "positions") >= 4
        want = whole.rows(np.flatnonzero(keep)).numpy()
        with ActivationStore(extract(config.model_copy(update={"skip_first": 4}), tmp_path / "b")) as store:
            assert np.array_equal(store.slice(0, store.n_rows).numpy(), want)
            assert column(store, "positions").tolist() == column(whole, "positions")[keep].tolist()


@pytest.mark.parametrize("limit", [1, 25])
def test_max_tokens_is_met_exactly(pairs, texts, tmp_path, limit) -> None:
    with ActivationStore(extract(configured(pairs["llama"], texts, max_tokens=limit), tmp_path / "acts")) as store:
        assert store.n_rows == limit
        assert [shard.n_rows for shard in store.meta.shards] == [limit]


def test_ctx_len_cuts_documents(pairs, texts, tmp_path) -> None:
    with ActivationStore(extract(configured(pairs["llama"], texts, ctx_len=5), tmp_path / "acts")) as store:
        assert column(store, "positions").max() == 4


def test_txt_and_parquet_give_what_jsonl_gives(pairs, texts, tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = [record["text"] for record in records(texts)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "texts.parquet")
    found = [
        extract(configured(pairs["llama"], tmp_path / name), tmp_path / f"acts-{name}")
        for name in ("texts.jsonl", "texts.txt", "texts.parquet")
    ]
    shards = [(out / "shard-00000.h5").read_bytes() for out in found]
    assert shards[0] == shards[1] == shards[2]


def test_two_extractions_are_byte_identical(pairs, texts, tmp_path) -> None:
    config = configured(pairs["gemma2"], texts, category_field="kind")
    one, two = (files(extract(config, tmp_path / name)) for name in "ab")
    assert set(one) == {"store.json", "vocabulary.json", "shard-00000.h5"}
    assert one == two


def test_metadata_says_what_was_extracted(pairs, texts, tmp_path) -> None:
    config = configured(pairs["llama"], texts, layer="0.99", hook="mlp_out")
    out = extract(config, tmp_path / "acts")
    with ActivationStore(out) as store:
        meta = store.meta
        assert [model.name for model in meta.models] == list(pairs["llama"])
        for model in meta.models:
            assert (model.layer, model.hook, model.d_model, model.n_layers) == (2, "mlp_out", 32, N_LAYERS)
            assert model.dtype == "float32"
            assert len(model.weights_sha256) == 64
        assert meta.models[0].weights_sha256 != meta.models[1].weights_sha256
        assert meta.roles == ROLES
        assert meta.datasets[0]["name"] == "texts.jsonl"
        assert meta.tokenizer["name"] == pairs["llama"][1]
        assert meta.config["hook"] == "mlp_out"
        assert "torch" in meta.versions
        assert store.vocabulary[1] == "<bos>"
        assert " the" in store.vocabulary
    line = command(config)
    assert line[:2] == ["fastdiff", "extract"]
    assert line[line.index("--hook") + 1] == "mlp_out"
    assert meta.command == line
    assert "--seed" not in line


def test_a_pair_saved_in_two_precisions_runs_in_one_and_says_so(pairs, texts, tmp_path) -> None:
    # one set of weights, saved in bfloat16 and widened: nothing differs, where each in its own type differed by 0.6 %
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(pairs["llama"][1], dtype=torch.bfloat16)
        for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
            model.to(dtype).save_pretrained(tmp_path / name)
            make_tokenizer().save_pretrained(tmp_path / name)
    heard = Heard()
    pair = (str(tmp_path / "half"), str(tmp_path / "whole"))
    with ActivationStore(extract(configured(pair, texts, dtype="auto"), tmp_path / "acts", heard)) as store:
        assert [model.dtype for model in store.meta.models] == ["float32", "float32"]
        rows = store.slice(0, store.n_rows)
        assert torch.equal(rows[:, 0], rows[:, 1]) and not torch.equal(rows, rows.bfloat16().float())
    said = f"both models run in float32; {pair[0]} was saved in bfloat16, {pair[1]} was saved in float32"
    assert any(said in line for line in heard.lines)
    heard = Heard()
    extract(configured(pairs["llama"], texts, dtype="auto"), tmp_path / "alike", heard)
    assert not any("both models run" in line for line in heard.lines)


def test_base_without_a_tokenizer_borrows_the_tuned_one_and_says_so(pairs, texts, tmp_path) -> None:
    base = make_model(tmp_path / "base", "llama", 1, tokenizer=False)
    heard = Heard()
    one = extract(configured((base, pairs["llama"][1]), texts), tmp_path / "a", heard)
    two = extract(configured(pairs["llama"], texts), tmp_path / "b")
    assert (one / "shard-00000.h5").read_bytes() == (two / "shard-00000.h5").read_bytes()
    assert any("has no tokenizer" in line for line in heard.lines)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tuned_model_without_a_tokenizer_is_refused(pairs, texts, tmp_path, kind) -> None:
    tuned = make_model(tmp_path / "tuned", kind, 2, tokenizer=False)
    config = configured((pairs[kind][0], tuned), texts)
    refused(config, tmp_path / "acts", InputError, r"tuned: has no tokenizer")


def refused(config: ExtractConfig, out: Path, error: type[FastdiffError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        extract(config, out)
    assert "\n" not in str(caught.value)
    assert not (out / "store.json").exists()
    assert not list(out.glob("*shard*"))


def test_tokenizers_with_other_ids_are_refused_with_both_names(pairs, texts, tmp_path) -> None:
    other = make_model(tmp_path / "other", "llama", 2, tokenizer=make_tokenizer(extra="zebra"))
    config = configured((pairs["llama"][0], other), texts)
    refused(config, tmp_path / "acts", InputError, f"{pairs['llama'][0]} and {other}.*'zebra' is absent")


def test_tokenizers_that_split_alike_maps_differently_are_refused(pairs, texts, tmp_path) -> None:
    other = make_tokenizer()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[("<bos>", 1)])
    path = make_model(tmp_path / "other", "llama", 2, tokenizer=other)
    config = configured((pairs["llama"][0], path), texts)
    refused(config, tmp_path / "acts", InputError, r"they split .*texts\.jsonl:\d+ into different ids")


def test_other_width_is_refused_with_both_widths(pairs, texts, tmp_path) -> None:
    wide = make_model(tmp_path / "wide", "llama", 2, width=64)
    config = configured((pairs["llama"][0], wide), texts)
    refused(config, tmp_path / "acts", InputError, "base has width 32 and .*wide has width 64")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": "3"}, OptionError, "--layer 3: out of range for a model of 3 layers.* 0 to 2"),
        ({"text_field": "body"}, InputError, r"texts\.jsonl:1: no field 'body'.*'text', 'kind'"),
        ({"device": "cuda:99"}, OptionError, "--device cuda:99"),
        ({"device": "gpu"}, OptionError, "--device gpu: not a device"),
        ({"base": "/no/such"}, InputError, "/no/such: no such directory"),
        ({"dataset": ["/no/such.jsonl"]}, InputError, r"/no/such\.jsonl: no such file"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    pairs, texts, tmp_path, options, error, match
) -> None:
    refused(configured(pairs["llama"], texts, **options), tmp_path / "acts", error, match)


def test_longer_context_than_the_model_has_is_refused(pairs, tmp_path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("the cat " * 200)
    refused(
        configured(pairs["gpt2"], path),
        tmp_path / "acts",
        OptionError,
        r"reads 64 positions; use --ctx-len 64",
    )


def test_token_id_without_an_embedding_is_refused(pairs, tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(20)])
    both = [make_model(tmp_path / name, "llama", 1, tokenizer=tokenizer) for name in ("base", "tuned")]
    path = tmp_path / "a.txt"
    path.write_text("word19")
    refused(configured((both[0], both[1]), path), tmp_path / "acts", InputError, "embeds 300 tokens")


def test_weights_that_give_nan_are_refused_and_leave_nothing(pairs, texts, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pairs["llama"][1], broken)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(broken)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
        model.save_pretrained(broken)
    config = configured((pairs["llama"][0], str(broken)), texts)
    out = tmp_path / "acts"
    refused(config, out, InputError, r"broken, sequence 0, position 1: activation is nan")
    assert files(out) == {}


def test_same_options_are_skipped_and_say_so(pairs, texts, tmp_path, monkeypatch) -> None:
    config, out, heard = configured(pairs["llama"], texts), tmp_path / "acts", Heard()
    extract(config, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(harvest, "_harvest", lambda *_: pytest.fail("extracted again"))
    assert extract(config, out, heard) == out
    assert heard.lines == [f"{out}: complete, made with the same options; skipped"]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_options_are_refused_by_name_and_overwrite_replaces(pairs, texts, tmp_path) -> None:
    config, out = configured(pairs["llama"], texts), tmp_path / "acts"
    extract(config, out)
    before = files(out)
    other = config.model_copy(update={"layer": "0", "ctx_len": 5})
    with pytest.raises(OptionError, match=r"made with --layer 1, not 0; .*--overwrite"):
        extract(other, out)
    with pytest.raises(OptionError, match="--overwrite"):
        extract(config, out, resume=False)
    assert files(out) == before
    extract(other, out, overwrite=True)
    assert files(out) == files(extract(other, tmp_path / "fresh"))


def test_inputs_that_changed_since_are_noticed(pairs, texts, tmp_path) -> None:
    config, out = configured(pairs["llama"], texts), tmp_path / "acts"
    extract(config, out)
    with texts.open("a") as file:
        file.write('{"text": "the dog"}\n')
    with pytest.raises(OptionError, match=r"texts\.jsonl has changed since.*--overwrite"):
        extract(config, out)


def test_failing_overwrite_keeps_the_old_store_until_weights_are_loaded(pairs, texts, tmp_path) -> None:
    config, out = configured(pairs["llama"], texts), tmp_path / "acts"
    before = files(extract(config, out))
    with pytest.raises(OptionError):
        extract(config.model_copy(update={"layer": "9"}), out, overwrite=True)
    assert files(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_of_something_else_is_left_alone(pairs, texts, tmp_path, overwrite) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(OptionError, match=r"holds thesis\.tex but no store"):
        extract(configured(pairs["llama"], texts), out, overwrite=overwrite)
    assert files(out) == {"thesis.tex": b"precious"}
    assert not (out / ".lock").exists()


def test_damaged_store_is_not_taken_for_complete(pairs, texts, tmp_path) -> None:
    config, out = configured(pairs["llama"], texts), tmp_path / "acts"
    extract(config, out)
    (out / "shard-00000.h5").unlink()
    with pytest.raises(InputError, match=r"shard-00000\.h5"):
        extract(config, out)
    extract(config, out, overwrite=True)
    with ActivationStore(out) as store:
        assert store.n_rows > 0


def test_changed_vocabulary_is_noticed(pairs, texts, tmp_path) -> None:
    config, out = configured(pairs["llama"], texts), tmp_path / "acts"
    extract(config, out)
    (out / "vocabulary.json").write_text("[]")
    with pytest.raises(InputError, match=r"vocabulary\.json: changed since"):
        extract(config, out)


def test_both_models_read_the_same_ids_and_mask_and_only_up_to_their_layer(pairs, texts, tmp_path, monkeypatch) -> None:
    read: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    load = harvest._load

    def watched(source, *rest):
        model = load(source, *rest)
        assert len(model.layers) == 2
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs: read.append(
                (source.name, kwargs["input_ids"].clone(), kwargs["attention_mask"].clone())
            ),
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(harvest, "_load", watched)
    extract(configured(pairs["llama"], texts), tmp_path / "acts")
    assert [name for name, _, _ in read] == list(pairs["llama"]) * 4
    for (_, ids, mask), (_, other_ids, other_mask) in zip(read[::2], read[1::2], strict=True):
        assert torch.equal(ids, other_ids)
        assert torch.equal(mask, other_mask)
        # 0 pads, and no text has it
        assert torch.equal(mask, (ids != 0).long())


def test_second_writer_is_refused(pairs, texts, tmp_path) -> None:
    out = tmp_path / "acts"
    with locked(out), pytest.raises(LockedError):
        extract(configured(pairs["llama"], texts), out)


def test_hook_is_taken_from_the_options(pairs, texts, tmp_path) -> None:
    config = configured(pairs["gemma2"], texts, hook="attn_out", layer="0")
    with ActivationStore(extract(config, tmp_path / "acts")) as store:
        found = store.slice(0, store.n_rows)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(pairs["gemma2"][0]).eval()
    order = np.random.Generator(np.random.PCG64(0)).permutation(11)
    first = make_tokenizer()(records(texts)[order[0]]["text"], return_tensors="pt")
    with capture(model, 0, "attn_out") as captured, torch.inference_mode():
        model(**first)
        want = captured.take()[0, 1:]
    # another padding, so equal only to rounding
    torch.testing.assert_close(found[: len(want), 0], want, rtol=1e-4, atol=1e-5)


def test_batches_pad_on_the_right_in_document_order() -> None:
    from fastdiff.extraction.tokens import TokenSequence

    def sequence(*ids: int) -> TokenSequence:
        return TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), np.uint8), np.ones(len(ids), np.bool_))

    found = list(batches([sequence(5, 6, 7), sequence(8), sequence(9, 9)], 2, 0))
    assert [(ids.tolist(), mask.tolist()) for _, ids, mask in found] == [
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ([[9, 9]], [[1, 1]]),
    ]


def test_store_does_not_depend_on_where_it_is_written(pairs, texts, tmp_path) -> None:
    text = json.dumps(read_json(extract(configured(pairs["llama"], texts), tmp_path / "acts") / "store.json", 1))
    assert str(tmp_path / "acts") not in text


class Said(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    ("records", "options", "wanted"),
    [
        ([{"text": "cat dog"}] * 9, {}, ["have no categories", "--category-field"]),
        ([{"text": "cat dog", "c": "a"}] * 9, {"category_field": "c"}, []),
        (
            [{"text": "cat dog", "c": "ab"[i < 3]} for i in range(12)],
            {"category_field": "c"},
            ["fewer than 8 documents, too few for a verdict: b (3)"],
        ),
        (
            [{"messages": [{"role": "user", "content": "cat"}], "c": "a"}] * 9,
            {"category_field": "c", "messages_field": "messages"},
            ["no document has an answer", "--answer-field"],
        ),
    ],
)
def test_what_keeps_a_verdict_from_being_reached_is_said_at_once(pairs, tmp_path, records, options, wanted):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = Said()
    extract(configured(pairs["llama"], path, **options), tmp_path / "a", said)
    text = "\n".join(line for line in said.lines if "tokens to store" not in line and "the text ends" not in line)
    assert all(part in text for part in wanted)
    assert bool(wanted) == any(word in text for word in ("verdict", "answer"))
