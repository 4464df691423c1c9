"""Documents to token ids, with the role of each token and whether its row is stored.

    text        the words of a plain text
    user, assistant, system, tool    the words of a chat's message
    template    what the chat template or the tokenizer writes around them
    bos         the beginning-of-sequence token at position 0

Documents are not packed: each is a sequence of its own, so positions count from 0 and a context is one
contiguous slice of the store. Position 0 with role bos and the first `skip_first` positions go through the
models and are not stored, for their norms swamp mean and scale; `keep_bos` stores the bos row after all.

A token of a chat has the role of the message with which it shares a character.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError
from fastdiff.extraction.chat import JOINED, ChatTemplate, Span
from fastdiff.extraction.models import one_line, quiet
from fastdiff.extraction.text import Corpus, Document
from fastdiff.progress import Progress
from fastdiff.rundir import canonical_json, sha256_text

ROLES = ["text", "user", "assistant", "system", "template", "bos", "tool"]
_ROLE = {name: index for index, name in enumerate(ROLES)}
# names that published chat data uses for the same parts
_ROLE |= {"human": _ROLE["user"], "gpt": _ROLE["assistant"], "model": _ROLE["assistant"]}
_ROLE |= {"developer": _ROLE["system"], "function": _ROLE["tool"], "ipython": _ROLE["tool"]}

# documents that both tokenizers must agree on
N_CHECKED = 100
# documents tokenized in one call
_CHUNK = 256
_MAX_SOURCES = 2**16
# files that hold a vocabulary, by the kinds of tokenizer that transformers reads
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True)
class TokenSequence:
    """One document as the models read it.

    Attributes:
        ids: (T,) int32 token ids.
        roles: (T,) uint8, index into ROLES.
        stored: (T,) bool, whether a position becomes a row of the store.
        source: Index into the sources.
    """

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    stored: NDArray[np.bool_]
    source: int = 0

    @property
    def n_rows(self) -> int:
        """Rows it gives."""
        return int(self.stored.sum())

    def cut(self, n_rows: int) -> "TokenSequence":
        """Its beginning, up to the n-th row."""
        stop = int(np.flatnonzero(self.stored)[n_rows - 1]) + 1
        return replace(self, ids=self.ids[:stop], roles=self.roles[:stop], stored=self.stored[:stop])


def load_tokenizers(base: str, tuned: str, progress: Progress) -> tuple[Any, Any]:
    """Load the tokenizers of base and tuned model; the tuned one stands in for a base model that has none.

    Raises:
        InputError: The tuned model has no tokenizer, or the two map tokens to ids differently.
    """
    tuned_tokenizer = _load_tokenizer(tuned)
    if not _has_vocabulary(base):
        progress.say(f"{base} has no tokenizer; the one of {tuned} is used for both")
        return tuned_tokenizer, tuned_tokenizer
    base_tokenizer = _load_tokenizer(base)
    ours, theirs = base_tokenizer.get_vocab(), tuned_tokenizer.get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise InputError(
            f"{base} and {tuned} have different tokenizers: token {token!r} is {_id(ours, token)} in {base} "
            f"and {_id(theirs, token)} in {tuned}; both models must read the same ids"
        )
    return base_tokenizer, tuned_tokenizer


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"


def _has_vocabulary(name_or_path: str) -> bool:
    """False for a local directory without a tokenizer's files."""
    path = Path(name_or_path)
    return not path.is_dir() or any(any(path.glob(name)) for name in _VOCABULARIES)


def _load_tokenizer(name_or_path: str) -> Any:
    absent = f"{name_or_path}: has no tokenizer; save the model's tokenizer beside its weights"
    if not _has_vocabulary(name_or_path):
        raise InputError(absent)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{name_or_path}: its tokenizer cannot be loaded ({one_line(error)})") from error
    # from an id without files transformers makes one of special tokens only, which reads any text as nothing
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise InputError(absent)
    return tokenizer


class Encoder:
    """Turns documents into sequences with the tuned model's tokenizer and chat template.

    Args:
        tokenizer: Tokenizer of the tuned model.
        config: Its ctx_len, skip_first and keep_bos are read.
    """

    def __init__(self, tokenizer: Any, config: ExtractConfig):
        self.tokenizer, self._config = tokenizer, config
        self._chat: ChatTemplate | None = None

    @property
    def rewritten(self) -> int:
        """Messages so far that the chat template changed so much that their tokens have role template."""
        return 0 if self._chat is None else len(self._chat.rewritten)

    def chat_template_sha256(self) -> str | None:
        """Hash of the chat template, if the tokenizer has one."""
        template = self.tokenizer.chat_template
        return None if template is None else sha256_text(canonical_json(template))

    def encode(self, documents: Sequence[Document]) -> list[TokenSequence]:
        """Tokenize documents.

        Args:
            documents: Texts and chats.

        Returns:
            One sequence per document, at most ctx_len long; one without tokens is possible.
        """
        texts = [document for document in documents if isinstance(document.content, str)]
        encoded_texts = iter(self._texts([str(document.content) for document in texts]))
        sequences = []
        for document in documents:
            ids, roles = next(encoded_texts) if isinstance(document.content, str) else self._encode_chat(document)
            ids, roles = ids[: self._config.ctx_len], roles[: self._config.ctx_len]
            stored = np.arange(len(ids)) >= self._config.skip_first
            bos = roles == _ROLE["bos"]
            stored[bos] = self._config.keep_bos
            sequences.append(TokenSequence(ids, roles, stored))
        return sequences

    def ids(self, tokenizer: Any, document: Document) -> list[int]:
        """Token ids that another tokenizer gives to the same rendered text."""
        if isinstance(document.content, str):
            return list(tokenizer(document.content, verbose=False)["input_ids"])
        return list(tokenizer(self._render(document)[0], add_special_tokens=False, verbose=False)["input_ids"])

    def _texts(self, texts: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        if not texts:
            return []
        batch = self.tokenizer(texts, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        result = []
        for ids, special in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
            roles = np.where(np.array(special, bool), _ROLE["template"], _ROLE["text"]).astype(np.uint8)
            if ids and special[0] and ids[0] == self.tokenizer.bos_token_id:
                roles[0] = _ROLE["bos"]
            result.append((np.array(ids, np.int32), roles))
        return result

    def _render(self, document: Document) -> tuple[str, list[Span]]:
        if self._chat is None:
            joined = self._joined() if self._config.answer_field else None
            self._chat = ChatTemplate(self.tokenizer, self._config.tuned, joined)
        return self._chat.render(document)

    def _joined(self) -> str:
        """The template of prompts and answers for a tokenizer without one: no more than it writes around a text."""
        added = self.tokenizer("", verbose=False)["input_ids"]
        begins = len(added) and added[0] == self.tokenizer.bos_token_id
        return ("{{ bos_token }}" if begins else "") + JOINED

    def _encode_chat(self, document: Document) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{self._config.tuned}: its tokenizer gives no character offsets, which the roles of chat "
                "messages need; convert it to tokenizer.json"
            )
        rendered, spans = self._render(document)
        # the template writes the special tokens itself
        encoding = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoding["input_ids"], np.int32)
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        # a token whose blanks were trimmed from its offsets is empty; it belongs where it begins
        starts, stops = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        roles = np.full(len(ids), _ROLE["template"], np.uint8)
        for span in spans:
            role = _ROLE.get(span.role, _ROLE["user"])
            roles[(starts < span.stop) & (stops > span.start)] = role
        if len(ids) and ids[0] == self.tokenizer.bos_token_id:
            roles[0] = _ROLE["bos"]
        return ids, roles


def check_same_ids(encoder: Encoder, base_tokenizer: Any, corpus: Corpus, *, base: str, tuned: str) -> None:
    """Refuse two tokenizers that split one of the first documents differently.

    Raises:
        InputError: They do.
    """
    if base_tokenizer is encoder.tokenizer:
        return
    for _, document in islice(corpus, N_CHECKED):
        if encoder.ids(base_tokenizer, document) != encoder.ids(encoder.tokenizer, document):
            raise InputError(
                f"{base} and {tuned} have different tokenizers: they split {document.where} into different "
                "ids; both models must read the same ids"
            )


@dataclass(frozen=True)
class Encoded:
    """What is extracted: the sequences in store order, cut to max_tokens rows in all."""

    sequences: list[TokenSequence]
    sources: list[dict[str, str | None]]
    n_rows: int


def encode_corpus(encoder: Encoder, corpus: Corpus, max_tokens: int) -> Encoded:
    """Tokenize documents in the corpus's order until they give max_tokens rows.

    Raises:
        InputError: They give no row at all, or have more than 65,536 different sources.
    """
    names = data_set_names([data_set.name for data_set in corpus.data_sets])
    table: dict[tuple[int, str | None], int] = {}
    sequences: list[TokenSequence] = []
    n_rows = 0
    documents = iter(corpus)
    while n_rows < max_tokens and (chunk := list(islice(documents, _CHUNK))):
        encoded = encoder.encode([document for _, document in chunk])
        for (which, document), sequence in zip(chunk, encoded, strict=True):
            left = max_tokens - n_rows
            if left == 0:
                break
            if sequence.n_rows == 0:
                continue
            source = table.setdefault((which, document.category), len(table))
            kept = sequence if sequence.n_rows <= left else sequence.cut(left)
            sequences.append(replace(kept, source=source))
            n_rows += kept.n_rows
        if len(table) > _MAX_SOURCES:
            raise InputError(f"--category-field: more than {_MAX_SOURCES:,} categories; name the field of a label")
    if not sequences:
        raise InputError(
            f"{', '.join(names)}: no token to store; no document is longer than what --skip-first leaves out"
        )
    facts = [{"dataset": names[which], "category": category} for which, category in table]
    return Encoded(sequences, facts, n_rows)


def data_set_names(names: list[str]) -> list[str]:
    """Make names unique: the second `a.jsonl` becomes `a.jsonl (2)`."""
    return [
        name if (nth := names[: index + 1].count(name)) == 1 else f"{name} ({nth})" for index, name in enumerate(names)
    ]
