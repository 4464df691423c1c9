"""The documents of a store as the models read them, to run the models on them again.

A row says which document it is of, where in it, and which token stood there. What extraction ran and did not store
stands only at the beginning of a document: the beginning-of-sequence token, which the tokenizer still has, or the first
`--skip-first` positions, for which the text is tokenized again and held against the tokens that are stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import ExtractConfig, validated
from fastdiff.crosscoder.rows import spread_rows
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.models import quiet
from fastdiff.extraction.text import open_corpus
from fastdiff.extraction.tokens import Encoder, encode_corpus, load_tokenizers
from fastdiff.patching.refusal import CannotRun
from fastdiff.progress import SILENT
from fastdiff.rundir import canonical_json, sha256_text
from fastdiff.store.reader import ActivationStore

_COLUMNS = ("token_ids", "sequence_ids", "positions")
_UNKNOWN = -1
_AGAIN = "extract it again"


@dataclass(frozen=True)
class Document:
    """One document from its first position on.

    Attributes:
        number: Its sequence id.
        ids: (T,) int64 token ids.
        rows: (T,) int64 row of each position that is in use (`ActivationStore.usable_rows`), else -1.
        roles: (T,) int16 index into the store's roles, -1 for a position that has no row.
        source: Index into the store's sources, 0 where it has none.
    """

    number: int
    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    roles: NDArray[np.int16]
    source: int


class DocumentIndex:
    """Which rows of a store make up which document; made once, since it reads columns of the whole store.

    Attributes:
        numbers: (n,) sequence id of each document, ascending.
        lengths: (n,) its positions: the last one stored, plus 1.
        sources: (n,) index into the store's sources, 0 where it has none.

    Args:
        store: An open store.
        caller: The option or command that needs the documents, for messages.
        first: The first row that counts; no document may have rows on both sides of it.

    Raises:
        CannotRun: The store does not say what the models read.
    """

    def __init__(self, store: ActivationStore, caller: str, first: int = 0):
        self._store, self._caller = store, caller
        columns = [store.column(name) for name in _COLUMNS]
        for name, column in zip(_COLUMNS, columns, strict=True):
            if column is None:
                raise CannotRun(
                    f"{store.path}: has no {name}, which {caller} needs to run the models on its documents",
                    "make the store with fastdiff extract",
                )
        ids, numbers, positions = columns
        assert ids is not None and numbers is not None and positions is not None
        self._ids, self._positions = ids, positions
        step = np.diff(numbers[first:])
        in_order = (step > 0) | ((step == 0) & (np.diff(positions[first:]) > 0))
        # a foreign store may have interleaved its documents
        self._order = first + (
            np.arange(len(numbers) - first) if in_order.all() else np.lexsort((positions[first:], numbers[first:]))
        )
        ordered = numbers[self._order]
        self._begins = np.flatnonzero(np.r_[True, np.diff(ordered) != 0])
        self._ends = np.append(self._begins[1:], len(ordered))
        self.numbers: NDArray[np.int64] = ordered[self._begins].astype(np.int64)
        self.lengths: NDArray[np.int64] = positions[self._order[self._ends - 1]].astype(np.int64) + 1
        sources = store.column("sources") if store.meta.sources else None
        self._roles = store.column("roles") if store.meta.roles else None
        leading = self._order[self._begins]
        self.sources: NDArray[np.int64] = (
            np.zeros(len(leading), np.int64) if sources is None else sources[leading].astype(np.int64)
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def n_rows(self) -> int:
        """Rows of all documents together."""
        return len(self._order)

    def held_out(self, holdout: float) -> NDArray[np.bool_]:
        """(n,) whether training with this share of documents held out left a document alone."""
        held: NDArray[np.bool_] = self._order[self._begins] >= self._store.n_train(holdout)
        return held

    def roles_present(self) -> set[str]:
        """The roles that some row has."""
        names = self._store.meta.roles or []
        if self._roles is None:
            return set()
        return {names[code] for code in np.unique(self._roles[self._order]) if code < len(names)}

    def following(self, role: str) -> NDArray[np.int64]:
        """(n,) rows of a role in each document that have a position before them."""
        names = self._store.meta.roles or []
        if self._roles is None or role not in names:
            return np.zeros(len(self), np.int64)
        hit = (self._roles[self._order] == names.index(role)) & (self._positions[self._order] > 0)
        counts: NDArray[np.int64] = np.add.reduceat(hit.astype(np.int64), self._begins)
        return counts

    def build(self, chosen: NDArray[np.int64]) -> list[Document]:
        """Documents by their place in the index, complete from their first position on.

        Raises:
            CannotRun: What was not stored can no longer be had: text, tokenizer or chat template have changed.
            InputError: A document is damaged.
        """
        store = self._store
        usable = np.ones(store.n_rows, bool)
        if (in_use := store.usable_rows()) is not None:
            usable[:] = False
            usable[in_use] = True
        config = _extracted_with(store)
        documents = [self._document(config, int(i), usable) for i in chosen]
        if config is not None and any((document.ids == _UNKNOWN).any() for document in documents):
            complete = _tokenized_again if config.skip_first else _with_bos
            documents = complete(store, config, documents)
        return documents

    def _document(self, config: ExtractConfig | None, i: int, usable: NDArray[np.bool_]) -> Document:
        """A document by its rows in the order of their positions.

        Raises:
            CannotRun: It lacks more than extraction leaves out.
            InputError: It is damaged.
        """
        rows = self._order[self._begins[i] : self._ends[i]]
        number, ids, positions = int(self.numbers[i]), self._ids[rows], self._positions[rows]
        if ids.min() < 0 or positions[0] < 0 or (np.diff(positions) == 0).any():
            raise InputError(
                f"{self._store.path}: document {number} has a negative token or position, or one position twice; "
                "run fastdiff verify on the store"
            )
        length = int(positions[-1]) + 1
        missing = length - len(positions)
        left_out = 0 if config is None else config.skip_first or int(not config.keep_bos)
        if missing > left_out:
            raise CannotRun(
                f"{self._store.path}: document {number} has {len(positions)} of {length} positions",
                f"{self._caller} needs all of them; make the store with fastdiff extract",
            )
        document = Document(
            number,
            np.full(length, _UNKNOWN, np.int64),
            np.full(length, -1, np.int64),
            np.full(length, -1, np.int16),
            int(self.sources[i]),
        )
        document.ids[positions] = ids
        document.rows[positions[usable[rows]]] = rows[usable[rows]]
        if self._roles is not None:
            document.roles[positions] = self._roles[rows]
        return document


def held_out_documents(
    store: ActivationStore, holdout: float, tokens: int, caller: str
) -> tuple[list[Document], Literal["held out", "all"]]:
    """Whole documents, evenly spread over the held-out ones, or over all where none are held out.

    Args:
        store: Where they were stored.
        holdout: Share of the documents that is held out.
        tokens: About how many rows they have together; at least one document is given.
        caller: The option or command that needs them, for messages.

    Raises:
        InputError: The store does not say what the models read, or what it was made from has changed.
    """
    start = store.n_train(holdout)
    held_out = start < store.n_rows
    index = DocumentIndex(store, caller, start if held_out else 0)
    chosen = spread_rows(len(index), max(1, len(index) * tokens // index.n_rows))
    return index.build(chosen), "held out" if held_out else "all"


class Batch(NamedTuple):
    """Documents, padded on the right.

    Attributes:
        documents: B of them.
        ids: [B, T] token ids, 0 on padding.
        mask: [B, T] attention mask.
        rows: [B, T] row of each position that is in use, else -1.
    """

    documents: list[Document]
    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    rows: NDArray[np.int64]


def batches(documents: Sequence[Document], positions: int) -> Iterator[Batch]:
    """Documents of about one length together, the shortest first.

    Args:
        documents: In any order.
        positions: Most positions of a batch, padding included; a longer document is a batch of its own.
    """
    ordered = sorted(documents, key=lambda document: len(document.ids))
    start = 0
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and (stop + 1 - start) * len(ordered[stop].ids) <= positions:
            stop += 1
        part, shape = ordered[start:stop], (stop - start, len(ordered[stop - 1].ids))
        batch = Batch(part, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int64))
        for i, document in enumerate(part):
            length = len(document.ids)
            batch.ids[i, :length], batch.mask[i, :length], batch.rows[i, :length] = document.ids, 1, document.rows
        yield batch
        start = stop


def _with_bos(store: ActivationStore, config: ExtractConfig, documents: Sequence[Document]) -> list[Document]:
    bos = _tokenizer(store, config).bos_token_id
    if bos is None:
        raise CannotRun(
            f"{store.path}: BOS was run and not stored, but the tokenizer of {config.tuned} has none", _AGAIN
        )
    return [replace(document, ids=np.where(document.ids == _UNKNOWN, bos, document.ids)) for document in documents]


def _tokenized_again(store: ActivationStore, config: ExtractConfig, documents: Sequence[Document]) -> list[Document]:
    encoder = Encoder(_tokenizer(store, config), config)
    if encoder.chat_template_sha256() != (store.meta.tokenizer or {}).get("chat_template_sha256"):
        raise CannotRun(f"{store.path}: the chat template of {config.tuned} has changed since", _AGAIN)
    with open_corpus(config, lambda document: encoder.encode([document])[0].n_rows) as corpus:
        for recorded, data_set in zip(store.meta.datasets or [], corpus.data_sets, strict=False):
            # the recorded name tells two files of one name apart
            if any(recorded.get(key) != value for key, value in data_set.facts().items() if key != "name"):
                raise CannotRun(f"{data_set.name}: has changed since {store.path} was made from it", _AGAIN)
        sequences = encode_corpus(encoder, corpus, config.max_tokens).sequences
    completed = []
    for document in documents:
        again = (
            sequences[document.number].ids.astype(np.int64) if document.number < len(sequences) else document.ids[:0]
        )
        known = document.ids != _UNKNOWN
        if len(again) != len(known) or (again[known] != document.ids[known]).any():
            raise CannotRun(
                f"{store.path}: tokenized again, document {document.number} has other tokens than stored", _AGAIN
            )
        completed.append(replace(document, ids=again))
    return completed


def _extracted_with(store: ActivationStore) -> ExtractConfig | None:
    """The options of `fastdiff extract`, or None for a store that it did not make."""
    if store.meta.config is None:
        return None
    try:
        return validated(ExtractConfig, store.meta.config)
    except OptionError as error:
        raise CannotRun(f"{store.path}: made with options this version does not have ({error})", _AGAIN) from error


def _tokenizer(store: ActivationStore, config: ExtractConfig) -> Any:
    """The tokenizer that extraction used.

    Raises:
        CannotRun: It is gone, or maps tokens to other ids.
    """
    try:
        with quiet():
            _, tokenizer = load_tokenizers(config.base, config.tuned, SILENT)
    except InputError as error:
        raise CannotRun(str(error), f"put back the tokenizer that {store.path} was made with") from error
    recorded = (store.meta.tokenizer or {}).get("sha256")
    if sha256_text(canonical_json(tokenizer.get_vocab())) != recorded:
        raise CannotRun(f"{config.tuned}: its tokenizer has changed since {store.path} was made", _AGAIN)
    return tokenizer
