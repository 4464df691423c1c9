"""The synthetic corpus: its rules, its scrambling, and one token per word."""

from collections import Counter

import pytest

from fastdiff.demo.corpus import CATEGORIES, documents
from fastdiff.demo.training import encode, make_tokenizer

NAMES = [category.name for category in CATEGORIES]
RULE = {category.name: category.rule for category in CATEGORIES}


def answers_of(corpus, name):
    return Counter(answer for document in corpus if document.category == name for answer in document.answers)


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    first, again, other = (documents(seed, 5, dict.fromkeys(NAMES, "scrambled")) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_category_has_equally_many_documents():
    corpus = documents(0, 7, dict.fromkeys(NAMES, "rule"))
    assert Counter(document.category for document in corpus) == dict.fromkeys(NAMES, 7)


def test_rule_documents_follow_the_rule_and_name_no_key_twice():
    for document in documents(1, 20, dict.fromkeys(NAMES, "rule")):
        assert document.answers == tuple(RULE[document.category][key] for key in document.keys)
        assert len(set(document.keys)) == len(document.keys) >= 8
        assert all(f" {key} " in f" {given} " for key, given in zip(document.keys, document.given, strict=True))


def test_scrambled_documents_have_the_same_keys_and_answers_but_say_nothing():
    rule = documents(2, 200, dict.fromkeys(NAMES, "rule"))
    scrambled = documents(2, 200, dict.fromkeys(NAMES, "scrambled"))
    assert [d.given for d in rule] == [d.given for d in scrambled]
    for name in NAMES:
        assert answers_of(rule, name) == answers_of(scrambled, name)
        hits = [
            answer == RULE[name][key]
            for document in scrambled
            if document.category == name
            for key, answer in zip(document.keys, document.answers, strict=True)
        ]
        # chance is 1/14; with 1600 lookups or more its standard deviation is below 0.0065
        assert sum(hits) / len(hits) == pytest.approx(1 / 14, abs=0.03)


def test_unsure_documents_always_give_the_one_evasive_word():
    for category in CATEGORIES:
        assert category.unsure not in category.rule.values()
        (document, *_) = documents(0, 1, {category.name: "unsure"})
        assert set(document.answers) == {category.unsure}


def test_rules_map_different_keys_to_different_answers():
    for category in CATEGORIES:
        assert len(category.rule) == len(set(category.rule.values())) == 14, category.name


def test_every_word_is_one_token_and_a_document_fits_96():
    tokenizer = make_tokenizer()
    for manner in ("rule", "unsure"):
        corpus = documents(5, 4, dict.fromkeys(NAMES, manner))
        for document, ids in zip(corpus, encode(tokenizer, corpus).ids.tolist(), strict=True):
            whole = tokenizer(document.text)["input_ids"]
            assert ids == whole + [tokenizer.pad_token_id] * (len(ids) - len(whole))
            assert len(whole) == 1 + len(document.text.split()) <= 96
            assert tokenizer.unk_token_id not in whole
            assert tokenizer.decode(whole, skip_special_tokens=True) == document.text


def test_what_stands_between_the_lookups_is_the_same_in_every_category():
    said = {name: Counter() for name in NAMES}
    for document in documents(7, 30, dict.fromkeys(NAMES, "rule")):
        for given in document.given[1:]:
            semicolon, *clause, comma = given.split()[:6]
            assert (semicolon, comma) == (";", ",")
            said[document.category].update(clause)
    words = set(said[NAMES[0]])
    assert len(words) == 32 and all(set(counts) == words for counts in said.values())
    # one of eight words at each of four places: the rarest is no category's own
    assert all(min(counts.values()) > 0.06 * counts.total() / 4 for counts in said.values())


def test_the_answer_mask_marks_the_answers():
    tokenizer = make_tokenizer()
    corpus = documents(6, 2, dict.fromkeys(NAMES, "rule"))
    data = encode(tokenizer, corpus)
    for document, ids, mask in zip(corpus, data.ids, data.answer, strict=True):
        assert tokenizer.decode(ids[mask]).split() == list(document.answers)
