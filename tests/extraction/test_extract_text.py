import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.chat import ChatTemplate
from fastdiff.extraction.text import Document, Message, open_corpus
from fastdiff.extraction.tokens import ROLES, Encoder, data_set_names, encode_corpus
from fastdiff.extraction.vocabulary import display_strings

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat", "user assistant system tool"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    made.chat_template = template
    return made


def config(*datasets: Path | str, **options) -> ExtractConfig:
    return ExtractConfig(base="base", tuned="tuned", dataset=[str(path) for path in datasets], **options)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(options: ExtractConfig, n_tokens=lambda document: 1) -> list[Document]:
    with open_corpus(options, n_tokens) as corpus:
        return [document for _, document in corpus]


def contents(options: ExtractConfig) -> list:
    return sorted(document.content for document in read(options))


def encode(*documents: str | list[tuple[str, str]], template: str | None = TEMPLATE, **options):
    encoder = Encoder(tokenizer(template), config("x.txt", **options))
    made = [
        Document(item if isinstance(item, str) else tuple(Message(*turn) for turn in item), None, f"x:{index}")
        for index, item in enumerate(documents)
    ]
    return encoder, encoder.encode(made)


def words_by_role(encoder: Encoder, sequence) -> list[tuple[str, str]]:
    """The text of each run of equal roles, decoded without any of the code under test."""
    runs: list[tuple[str, list[int]]] = []
    for index, role in zip(sequence.ids, sequence.roles, strict=True):
        if not runs or runs[-1][0] != ROLES[role]:
            runs.append((ROLES[role], []))
        runs[-1][1].append(int(index))
    return [(role, encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for role, ids in runs]


def test_jsonl_gives_texts_and_categories(tmp_path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"body": "eins", "kind": "de"}, {"body": "", "kind": "de"}, {"body": "two\nlines", "kind": 7}],
    )
    path.write_text(path.read_text() + "\n\n" + json.dumps({"body": "drei \u00fc", "kind": None}))
    found = read(config(path, text_field="body", category_field="kind"))
    assert {(document.content, document.category) for document in found} == {
        ("eins", "de"),
        ("two\nlines", "7"),
        ("drei \u00fc", None),
    }
    assert {document.where for document in found} == {f"{path}:1", f"{path}:3", f"{path}:6"}


def test_txt_is_one_document_per_line(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone line\r\n\n  indented\n \t\nl\u00e4st".encode())
    assert contents(config(path)) == ["  indented", "l\u00e4st", "one line"]


def test_parquet_gives_texts_chats_and_categories(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"text": ["a", "b", ""], "kind": ["x", "y", "x"], "turns": [chat, chat, chat]})
    pyarrow.parquet.write_table(table, path)
    found = read(config(path, category_field="kind"))
    assert {(document.content, document.category) for document in found} == {("a", "x"), ("b", "y")}
    assert {document.content for document in read(config(path, messages_field="turns"))} == {(Message("user", "hi"),)}


def test_hugging_face_data_set_is_read_as_far_as_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": f"text {n}"} for n in range(50)])
    found = read(config(str(folder), max_tokens=12), n_tokens=lambda document: 3)
    assert sorted(document.content for document in found) == [f"text {n}" for n in range(4)]


def test_unknown_split_of_a_hugging_face_data_set_is_named(tmp_path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"split 'dev'"):
        read(config(str(folder), split="dev"))


def test_chats_and_plain_texts_mix(tmp_path) -> None:
    chats = write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "plain"}])
    found = {document.content for document in read(config(chats, texts, messages_field="messages"))}
    assert found == {(Message("user", "hi"),), "plain"}


def test_order_is_the_permutation_of_the_seed(tmp_path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(20)])
    two = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(20)])
    everything = [f"a{n}" for n in range(20)] + [f"b{n}" for n in range(20)]
    for seed in (0, 5):
        order = np.random.Generator(np.random.PCG64(seed)).permutation(40)
        assert [d.content for d in read(config(one, two, seed=seed))] == [everything[i] for i in order]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"bad\.jsonl:2: not JSON"),
        ("[1]", r"bad\.jsonl:2: holds a value of type list, not a JSON object"),
        ('{"body": "a", "label": 1}', r"bad\.jsonl:2: no field 'text'.*'body', 'label'"),
        ('{"text": null}', r"bad\.jsonl:2: field 'text' holds null"),
        ('{"text": "half \\ud83d"}', r"bad\.jsonl:2: field 'text' holds half of a character \(\\ud83d, character 6"),
        ('{"text": ["a"]}', r"bad\.jsonl:2: field 'text' holds a value of type list.*--messages-field"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path, line, message) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(config(path))


def test_bytes_that_are_no_utf8_are_refused(tmp_path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"bad\.txt:2: not UTF-8"):
        read(config(path))


def test_wrong_category_field_names_the_fields(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "topic": "x"}])
    with pytest.raises(InputError, match=r"no field 'category' \(--category-field\).*'text', 'topic'"):
        read(config(path, category_field="category"))


def test_wrong_parquet_column_names_the_columns(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column 'text'; its columns are 'body'"):
        read(config(tmp_path / "a.parquet"))


@pytest.mark.parametrize("turns", ["hi", [{"from": "human", "value": "hi"}], [{"role": "user", "content": 3}]])
def test_messages_of_another_form_are_refused(tmp_path, turns) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*(not a list|needs 'role' and 'content'|must be text)"):
        read(config(path, messages_field="messages"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_data_set_is_refused(tmp_path, name) -> None:
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(InputError, match="holds no text"):
        read(config(tmp_path / name))


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "no.parquet", "no/such"])
def test_missing_file_is_named(tmp_path, name) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(config(tmp_path / name))


def test_damaged_parquet_is_refused(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not readable as parquet"):
        read(config(tmp_path / "a.parquet"))


def test_other_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(OptionError, match=r"\.jsonl, \.txt, \.parquet"):
        read(config(tmp_path / "a.csv"))


def test_data_sets_of_one_name_stay_apart() -> None:
    assert data_set_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_text_has_roles_bos_text_and_template() -> None:
    encoder, (sequence,) = encode("the cat")
    assert words_by_role(encoder, sequence) == [("bos", "<bos>"), ("text", "the cat"), ("template", "<eos>")]
    assert sequence.ids.tolist() == encoder.tokenizer("the cat")["input_ids"]


def test_chat_roles_follow_the_messages() -> None:
    chat = [
        ("system", "on the mat"),
        ("user", " the cat? "),
        ("assistant", "sat"),
        ("tool", "{}"),
        ("user", "ok"),
    ]
    encoder, (sequence,) = encode(chat)
    assert words_by_role(encoder, sequence) == [
        ("bos", "<bos>"),
        ("template", "<|system|>\n"),
        ("system", "on the mat"),
        ("template", "<|end|>\n<|user|>\n"),
        ("user", "the cat?"),
        ("template", "<|end|>\n<|assistant|>\n"),
        ("assistant", "sat"),
        ("template", "<|end|>\n<|tool|>\n"),
        ("tool", "{}"),
        ("template", "<|end|>\n<|user|>\n"),
        ("user", "ok"),
        ("template", "<|end|>\n"),
    ]
    # one bos, from the template
    assert (sequence.ids == 1).sum() == 1


def test_words_that_the_template_writes_too_are_not_mistaken_for_the_message() -> None:
    encoder, (sequence,) = encode([("user", "user"), ("assistant", "end"), ("user", "|")])
    words = [run for run in words_by_role(encoder, sequence) if run[0] not in ("bos", "template")]
    assert words == [("user", "user"), ("assistant", "end"), ("user", "|")]
    starts = np.flatnonzero(np.diff((sequence.roles == ROLES.index("user")).astype(int)) == 1) + 1
    # the header <|user|>\n comes first
    assert encoder.tokenizer.decode(sequence.ids[: starts[0]].tolist()) == "<bos><|user|>\n"


def test_system_prompt_folded_into_the_first_turn_keeps_its_role() -> None:
    folded = (
        "{{ bos_token }}{% for m in messages[1:] %}[{{ m['role'] }}] "
        "{% if loop.first %}{{ messages[0]['content'] }} // {% endif %}{{ m['content'] }};{% endfor %}"
    )
    encoder, (sequence,) = encode([("system", "the mat"), ("user", "the cat")], template=folded)
    assert words_by_role(encoder, sequence)[1:] == [
        ("template", "[user]"),
        ("system", " the mat"),
        ("template", " //"),
        ("user", " the cat"),
        ("template", ";"),
    ]


def test_template_that_looks_into_a_message_is_searched_in_order() -> None:
    # the part before </think> is dropped, and the marks have no such part
    thinking = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>"
        "{% if '?' in m['content'] %}[question] {% endif %}"
        "{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    )
    encoder, (sequence,) = encode(
        [("user", "sat?"), ("assistant", "hm</think>the cat"), ("user", "on")], template=thinking
    )
    words = [run for run in words_by_role(encoder, sequence) if run[0] not in ("bos", "template")]
    assert [(role, text.strip()) for role, text in words] == [("user", "sat?"), ("user", "on")]
    assert encoder.rewritten == 1


def test_date_in_a_template_is_fixed() -> None:
    dated = (
        "\n {{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    chat = ChatTemplate(tokenizer(dated), "tuned")
    rendered, spans = chat.render(Document((Message("user", "hi"),), None, "x"))
    assert rendered == "\n <bos>26 Jul 2024hi"
    assert [(rendered[span.start : span.stop], span.role) for span in spans] == [("hi", "user")]


def test_tokenizer_without_a_template_is_refused_for_chats() -> None:
    with pytest.raises(InputError, match=r"tuned: its tokenizer has no chat template"):
        encode([("user", "hi")], template=None)


def test_chat_that_the_template_refuses_is_named() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(InputError, match=r"x:0: the chat template of tuned refuses it: no system role"):
        encode([("system", "hi")], template=strict)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [1, 2, 3, 4]),
        ({"skip_first": 3}, [3, 4]),
        ({"keep_bos": True}, [0, 1, 2, 3, 4]),
        ({"keep_bos": True, "skip_first": 3}, [0, 3, 4]),
    ],
)
def test_bos_and_the_first_positions_are_run_but_not_stored(options, want) -> None:
    _, (sequence,) = encode("xyzxyzxyz", ctx_len=5, **options)
    assert len(sequence.ids) == 5
    assert np.flatnonzero(sequence.stored).tolist() == want


def test_rows_are_cut_at_max_tokens_inside_the_last_document(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "xyz" * n, "kind": str(n)} for n in range(1, 30)])
    options = config(path, category_field="kind", skip_first=2)
    encoder = Encoder(tokenizer(), options)
    with open_corpus(options, lambda document: 1) as corpus:
        whole = encode_corpus(encoder, corpus, 10**6)
        for limit in (1, 17, 40, whole.n_rows - 1):
            cut = encode_corpus(encoder, corpus, limit)
            assert cut.n_rows == limit == sum(sequence.n_rows for sequence in cut.sequences)
            for ours, theirs in zip(cut.sequences, whole.sequences, strict=False):
                assert ours.ids.tolist() == theirs.ids[: len(ours.ids)].tolist()
            assert all(len(a.ids) == len(b.ids) for a, b in zip(cut.sequences[:-1], whole.sequences, strict=False))
            # no token is run for nothing
            assert cut.sequences[-1].stored[-1]
            assert len(cut.sources) == len(cut.sequences)


def test_text_shorter_than_what_is_skipped_is_refused(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    options = config(path, skip_first=100)
    with (
        open_corpus(options, lambda document: 1) as corpus,
        pytest.raises(InputError, match="no token to store"),
    ):
        encode_corpus(Encoder(tokenizer(), options), corpus, 10)


def test_byte_level_pieces_are_shown_as_text() -> None:
    made = tokenizer()
    strings = display_strings(made)
    assert len(strings) == len(made)
    assert strings[made.convert_tokens_to_ids("\u0120the")] == " the"
    assert strings[:4] == ["<pad>", "<bos>", "<eos>", "<|end|>"]
    assert strings[made.convert_tokens_to_ids("\u010a")] == "\n"
    # the first byte of the two that make up u-umlaut is no character
    first, second = made("\u00fc", add_special_tokens=False)["input_ids"]
    assert (strings[first], strings[second]) == ("\\xc3", "\\xbc")
    text = "the cat sat on\nthe mat"
    assert "".join(strings[i] for i in made(text, add_special_tokens=False)["input_ids"]) == text


def test_sentencepiece_like_pieces_are_shown_as_text() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0x0A>": 2, "<0xE2>": 3, "\u2581": 4, "cat": 6}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert display_strings(made) == ["<unk>", " the", "\n", "\\xe2", " ", "", "cat"]


def test_answers_are_messages_of_the_assistant(tmp_path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"q": "the cat?", "a": "sat", "kind": "x"}, {"q": " ", "a": "no", "kind": "x"}]
    )
    (found,) = read(config(path, text_field="q", answer_field="a", category_field="kind"))
    assert found.content == (Message("user", "the cat?"), Message("assistant", "sat")) and found.category == "x"
    table = pyarrow.table({"q": ["the cat?"], "a": ["sat"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert contents(config(tmp_path / "a.parquet", text_field="q", answer_field="a")) == [found.content]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "b": "c"}, r"a\.jsonl:1: no field 'a' \(--answer-field\); its fields are 'text', 'b'"),
        ({"text": "a", "a": ["c"]}, r"a\.jsonl:1: field 'a' holds a value of type list, not the text of an answer"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path, record, message) -> None:
    with pytest.raises(InputError, match=message):
        read(config(write_jsonl(tmp_path / "a.jsonl", [record]), answer_field="a"))


def test_answers_belong_to_texts_and_not_to_chats() -> None:
    with pytest.raises(ValueError, match="--answer-field goes with --text-field"):
        config("x.jsonl", answer_field="a", messages_field="m")


def test_prompt_and_answer_are_joined_as_they_are_where_there_is_no_chat_template() -> None:
    encoder, (sequence,) = encode([("user", "the cat "), ("assistant", "sat")], template=None, answer_field="a")
    assert words_by_role(encoder, sequence) == [("bos", "<bos>"), ("user", "the cat"), ("assistant", " sat")]
    encoder, (sequence,) = encode([("user", "the cat "), ("assistant", "sat")], answer_field="a")
    assert ("template", "<|end|>\n<|assistant|>\n") in words_by_role(encoder, sequence)
