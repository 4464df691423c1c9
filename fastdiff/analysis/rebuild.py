"""The documents of a store as the models read them, to run the models on them again.

A row says which document it is of, where in it, and which token stood there. What extraction ran and did not store
stands only at the beginning of a document: the beginning-of-sequence token, which the tokenizer still has, or the first
`--skip-first` positions, for which the text is tokenized again and held against the tokens that are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import ExtractConfig, validated
from fastdiff.crosscoder.rows import spread_rows
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.models import quiet
from fastdiff.extraction.text import open_corpus
from fastdiff.extraction.tokens import Encoder, encode_corpus, load_tokenizers
from fastdiff.progress import SILENT
from fastdiff.rundir import canonical_json, sha256_text
from fastdiff.store.reader import ActivationStore

_COLUMNS = ("token_ids", "sequence_ids", "positions")
_UNKNOWN = -1


@dataclass(frozen=True)
class Document:
    """One document from its first position on.

    Attributes:
        number: Its sequence id.
        ids: (T,) int64 token ids; -1 where the store does not know.
        rows: (T,) int64 row of each position, -1 for a position without a row and for rows that are left out of use
            (BOS, sinks).
    """

    number: int
    ids: NDArray[np.int64]
    rows: NDArray[np.int64]


def held_out_documents(
    store: ActivationStore, holdout: float, tokens: int
) -> tuple[list[Document], Literal["held out", "all"]]:
    """Whole documents, evenly spread over the held-out ones, or over all where none are held out.

    Args:
        store: Where they were stored.
        holdout: Share of the documents that is held out.
        tokens: About how many rows they have together; at least one document is given.

    Raises:
        InputError: The store does not say what the models read, or what it was made from has changed.
    """
    columns = [store.column(name) for name in _COLUMNS]
    for name, column in zip(_COLUMNS, columns, strict=True):
        if column is None:
            raise InputError(f"{store.path}: has no {name}, which --splice needs to run the models on its documents")
    ids, numbers, positions = columns
    assert ids is not None and numbers is not None and positions is not None
    start = store.n_train(holdout)
    held_out = start < store.n_rows
    first = start if held_out else 0
    # a foreign store may have interleaved its documents
    order = first + np.lexsort((positions[first:], numbers[first:]))
    begins = np.flatnonzero(np.r_[True, np.diff(numbers[order]) != 0])
    ends = np.append(begins[1:], len(order))
    usable = np.ones(store.n_rows, bool)
    if (of_text := store.usable_rows()) is not None:
        usable[:] = False
        usable[of_text] = True
    config = _extracted_with(store)
    documents = []
    for i in spread_rows(len(begins), max(1, len(begins) * tokens // len(order))):
        rows = order[begins[i] : ends[i]]
        number = int(numbers[rows[0]])
        documents.append(_document(store, config, number, rows, ids[rows], positions[rows], usable[rows]))
    if config is not None and any((document.ids == _UNKNOWN).any() for document in documents):
        complete = _tokenized_again if config.skip_first else _with_bos
        documents = complete(store, config, documents)
    return documents, "held out" if held_out else "all"


def _document(
    store: ActivationStore,
    config: ExtractConfig | None,
    number: int,
    rows: NDArray[np.int64],
    ids: NDArray[np.int32],
    positions: NDArray[np.int32],
    usable: NDArray[np.bool_],
) -> Document:
    """A document by its rows in the order of their positions.

    Raises:
        InputError: It is damaged, or lacks more than extraction leaves out.
    """
    if ids.min() < 0 or positions[0] < 0 or (np.diff(positions) == 0).any():
        raise InputError(
            f"{store.path}: document {number} has a negative token or position, or one position twice; "
            "run fastdiff verify on the store"
        )
    length = int(positions[-1]) + 1
    missing = length - len(positions)
    left_out = 0 if config is None else config.skip_first or int(not config.keep_bos)
    if missing > left_out:
        raise InputError(
            f"{store.path}: document {number} has {len(positions)} of {length} positions; --splice needs all of them"
        )
    document = Document(number, np.full(length, _UNKNOWN, np.int64), np.full(length, -1, np.int64))
    document.ids[positions] = ids
    document.rows[positions[usable]] = rows[usable]
    return document


def _with_bos(store: ActivationStore, config: ExtractConfig, documents: Sequence[Document]) -> list[Document]:
    bos = _tokenizer(store, config).bos_token_id
    if bos is None:
        raise InputError(f"{store.path}: BOS was run and not stored, but the tokenizer of {config.tuned} has none")
    return [replace(document, ids=np.where(document.ids == _UNKNOWN, bos, document.ids)) for document in documents]


def _tokenized_again(store: ActivationStore, config: ExtractConfig, documents: Sequence[Document]) -> list[Document]:
    encoder = Encoder(_tokenizer(store, config), config)
    if encoder.chat_template_sha256() != (store.meta.tokenizer or {}).get("chat_template_sha256"):
        raise InputError(f"{store.path}: the chat template of {config.tuned} has changed since; extract it again")
    with open_corpus(config, lambda document: encoder.encode([document])[0].n_rows) as corpus:
        for recorded, data_set in zip(store.meta.datasets or [], corpus.data_sets, strict=False):
            # the recorded name tells two files of one name apart
            if any(recorded.get(key) != value for key, value in data_set.facts().items() if key != "name"):
                raise InputError(f"{data_set.name}: has changed since {store.path} was made from it; extract it again")
        sequences = encode_corpus(encoder, corpus, config.max_tokens).sequences
    completed = []
    for document in documents:
        again = (
            sequences[document.number].ids.astype(np.int64) if document.number < len(sequences) else document.ids[:0]
        )
        known = document.ids != _UNKNOWN
        if len(again) != len(known) or (again[known] != document.ids[known]).any():
            raise InputError(f"{store.path}: tokenized again, document {document.number} has other tokens than stored")
        completed.append(replace(document, ids=again))
    return completed


def _extracted_with(store: ActivationStore) -> ExtractConfig | None:
    """The options of `fastdiff extract`, or None for a store that it did not make."""
    if store.meta.config is None:
        return None
    try:
        return validated(ExtractConfig, store.meta.config)
    except OptionError as error:
        raise InputError(f"{store.path}: made with options this version does not have ({error})") from error


def _tokenizer(store: ActivationStore, config: ExtractConfig) -> Any:
    """The tokenizer that extraction used.

    Raises:
        InputError: It is gone, or maps tokens to other ids.
    """
    with quiet():
        _, tokenizer = load_tokenizers(config.base, config.tuned, SILENT)
    recorded = (store.meta.tokenizer or {}).get("sha256")
    if sha256_text(canonical_json(tokenizer.get_vocab())) != recorded:
        raise InputError(f"{config.tuned}: its tokenizer has changed since {store.path} was made; extract it again")
    return tokenizer
