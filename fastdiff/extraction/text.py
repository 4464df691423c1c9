"""Data sets: where documents come from.

    *.jsonl     one JSON object per line, the text or the chat messages in a named field
    *.txt       UTF-8, one document per line
    *.parquet   one document per row (needs the extra `fastdiff[data]`)
    otherwise   a Hugging Face data set id, or id:subset, streamed (needs the extra `fastdiff[data]`)

Blank lines and empty texts are no documents. A file is read through once, so that every line is checked,
and its documents are read again one by one in the order they are wanted. Of a Hugging Face data set only the
beginning is read, as far as `--max-tokens` can use it.

A chat is a list of messages {"role": ..., "content": ...}, both text. With `--messages-field`, a record that
has no such field but a text field is a text, so chats and plain texts can be mixed. With `--answer-field`, a record is
a chat of two messages: its text by the user, its answer by the assistant.
"""

import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.rundir import sha256_file

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text or a chat.

    Attributes:
        content: The text, or the messages of a chat.
        category: The label its data set gives it.
        where: File and line, for error messages.
    """

    content: str | tuple[Message, ...]
    category: str | None
    where: str


@dataclass(frozen=True)
class Fields:
    """Which fields of a record to read."""

    text: str
    messages: str | None
    category: str | None
    answer: str | None = None

    @classmethod
    def of(cls, config: ExtractConfig) -> "Fields":
        """The fields that the options name."""
        return cls(config.text_field, config.messages_field, config.category_field, config.answer_field)

    def wanted(self, have: Collection[str]) -> list[str]:
        """All fields to read of records with these fields."""
        return [name for name in (self.content(have), self.answer, self.category) if name is not None]

    def content(self, have: Collection[str]) -> str:
        """The field that holds the document in a record with these fields."""
        chat = self.messages is not None and (self.messages in have or self.text not in have)
        return self.messages if chat and self.messages is not None else self.text

    def document(self, record: Mapping[str, Any], where: str) -> Document | None:
        """Read a record; None if its text is empty.

        Raises:
            InputError: A field is missing or of another type.
        """
        category = None if self.category is None else _field(record, self.category, "--category-field", where)
        if category is not None and not isinstance(category, str | int | float | bool):
            raise InputError(f"{where}: category field {self.category!r} holds {_kind(category)}, not a label")
        label = None if category is None else str(category)
        if self.category is not None and label is not None:
            _check_whole(label, self.category, where)
        name = self.content(record)
        if name == self.messages:
            messages = _messages(_field(record, name, "--messages-field", where), name, where)
            return Document(messages, label, where) if messages else None
        text = _field(record, name, "--text-field", where)
        if not isinstance(text, str):
            hint = "; for chats use --messages-field" if isinstance(text, list) else ""
            raise InputError(f"{where}: field {name!r} holds {_kind(text)}, not text{hint}")
        _check_whole(text, name, where)
        if not text.strip():
            return None
        if self.answer is None:
            return Document(text, label, where)
        answer = _field(record, self.answer, "--answer-field", where)
        if not isinstance(answer, str):
            raise InputError(f"{where}: field {self.answer!r} holds {_kind(answer)}, not the text of an answer")
        _check_whole(answer, self.answer, where)
        return Document((Message("user", text), Message("assistant", answer)), label, where)


def _field(record: Mapping[str, Any], name: str, option: str, where: str) -> Any:
    if name not in record:
        have = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where}: no field {name!r} ({option}); its fields are {have}")
    return record[name]


def _check_whole(text: str, field: str, where: str) -> None:
    """That a text has no half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(
            f"{where}: field {field!r} holds half of a character ({half}, character {error.start + 1}); mend the record"
        ) from error


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise InputError(f"{where}: field {field!r} holds {_kind(value)}, not a list of messages")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            found = ", ".join(map(repr, item)) if isinstance(item, Mapping) else _kind(item)
            raise InputError(f"{where}: message {index} of {field!r} needs 'role' and 'content', it has {found}")
        # a turn that only calls a tool has no text
        role, content = item["role"], "" if item["content"] is None else item["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: role and content of message {index} of {field!r} must be text")
        for part in (role, content):
            _check_whole(part, field, where)
        messages.append(Message(role, content))
    return tuple(messages)


class DataSet(Protocol):
    """Documents that can be read in any order."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def facts(self) -> dict[str, Any]:
        """What identifies it, for store.json."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> Document:
        """Read one document."""

    def close(self) -> None:
        """Let go of the file."""


class _Lines:
    """A .jsonl or .txt file: the byte offset of each document is kept, its text is not."""

    def __init__(self, path: Path, fields: Fields):
        self.name = path.name
        self._path, self._fields, self._json = path, fields, path.suffix == ".jsonl"
        offsets, numbers = array("q"), array("q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and self._parse(line, number) is not None:
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        self._offsets: NDArray[np.int64] = np.array(offsets, np.int64)
        self._numbers: NDArray[np.int64] = np.array(numbers, np.int64)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._offsets)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "documents": len(self), "sha256": sha256_file(self._path)}

    def document(self, index: int) -> Document:
        self._file.seek(self._offsets[index])
        document = self._parse(self._file.readline(), int(self._numbers[index]))
        if document is None:
            raise InputError(f"{self._path}:{self._numbers[index]}: changed while it was read")
        return document

    def close(self) -> None:
        self._file.close()

    def _parse(self, line: bytes, number: int) -> Document | None:
        where = f"{self._path}:{number}"
        try:
            # a byte order mark is no part of the first line
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not self._json:
                text = text.rstrip("\r\n")
                return Document(text, None, where) if text.strip() else None
            record = json.loads(text)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: holds {_kind(record)}, not a JSON object")
        return self._fields.document(record, where)


class _Parquet:
    """A .parquet file: only the columns that are wanted, as Arrow memory."""

    def __init__(self, path: Path, fields: Fields):
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise InputError(f"{path}: reading parquet needs pyarrow; pip install 'fastdiff[data]'") from error
        self.name = path.name
        self._path, self._fields = path, fields
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                have = file.schema_arrow.names
                wanted = fields.wanted(have)
                for name in wanted:
                    if name not in have:
                        raise InputError(f"{path}: no column {name!r}; its columns are {', '.join(map(repr, have))}")
                self._table = file.read(columns=wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not readable as parquet ({' '.join(str(error).split())})") from error
        whole = (row for row in range(self._table.num_rows) if self._read(row) is not None)
        self._rows = np.fromiter(whole, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "documents": len(self), "sha256": sha256_file(self._path)}

    def document(self, index: int) -> Document:
        document = self._read(int(self._rows[index]))
        assert document is not None, "empty documents were left out"
        return document

    def close(self) -> None:
        pass

    def _read(self, row: int) -> Document | None:
        record = {name: self._table[name][row].as_py() for name in self._table.column_names}
        return self._fields.document(record, f"{self._path}: row {row}")


class _Hub:
    """The beginning of a Hugging Face data set."""

    def __init__(self, spec: str, split: str, fields: Fields, *, enough: int, n_tokens: Callable[[Document], int]):
        try:
            import datasets
            import datasets.exceptions
        except ModuleNotFoundError as error:
            raise InputError(
                f"{spec}: not a file; a Hugging Face data set needs `pip install 'fastdiff[data]'`"
            ) from error
        self.name = spec
        self._split = split
        self._documents: list[Document] = []
        path, _, subset = spec.partition(":")
        tokens = 0
        try:
            builder = datasets.load_dataset_builder(path, subset or None)
            self._revision = builder.hash
            for number, record in enumerate(builder.as_streaming_dataset(split=split)):
                document = fields.document(record, f"{spec} ({split}), record {number}")
                if document is not None:
                    self._documents.append(document)
                    tokens += n_tokens(document)
                if tokens >= enough:
                    break
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{spec}: no such file, and no Hugging Face data set to read (split {split!r}): {reason}"
            ) from error

    def __len__(self) -> int:
        return len(self._documents)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "split": self._split, "documents": len(self), "revision": self._revision}

    def document(self, index: int) -> Document:
        return self._documents[index]

    def close(self) -> None:
        pass


class Corpus:
    """All data sets together, in an order that the seed decides.

    Attributes:
        data_sets: The data sets, in the order of `--dataset`.
    """

    def __init__(self, data_sets: list[DataSet], seed: int):
        self.data_sets = data_sets
        self._starts = np.cumsum([0, *(len(data_set) for data_set in data_sets)])
        generator = np.random.Generator(np.random.PCG64(seed))
        self._order = generator.permutation(int(self._starts[-1]))

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        """Yield every document with the index of its data set, in the permuted order."""
        for number in self._order:
            which = int(np.searchsorted(self._starts, number, side="right")) - 1
            yield which, self.data_sets[which].document(int(number - self._starts[which]))


@contextmanager
def open_corpus(config: ExtractConfig, n_tokens: Callable[[Document], int]) -> Iterator[Corpus]:
    """Open the data sets of a configuration.

    Args:
        config: Its dataset, split, *_field, max_tokens and seed are read.
        n_tokens: Tokens that a document gives. It decides how much of a Hugging Face data set is read.

    Raises:
        InputError: A data set is missing, malformed, without the named field, or empty.
        OptionError: A file of another kind.
    """
    data_sets: list[DataSet] = []
    try:
        for spec in config.dataset:
            data_sets.append(_open(spec, config, n_tokens))
            if len(data_sets[-1]) == 0:
                raise InputError(f"{spec}: holds no text; give a data set with at least one document")
        yield Corpus(data_sets, config.seed)
    finally:
        for data_set in data_sets:
            data_set.close()


def _open(spec: str, config: ExtractConfig, n_tokens: Callable[[Document], int]) -> DataSet:
    fields, path = Fields.of(config), Path(spec)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"{spec}: no such file")
        try:
            return _Parquet(path, fields) if path.suffix == ".parquet" else _Lines(path, fields)
        except OSError as error:
            raise InputError(f"{spec}: cannot be read ({error.strerror})") from error
    if path.is_file():
        raise OptionError(f"--dataset {spec}: files end in {', '.join(SUFFIXES)}")
    if spec.startswith(("/", ".", "~")) and not path.exists():
        raise InputError(f"{spec}: no such file")
    return _Hub(spec, config.split, fields, enough=config.max_tokens, n_tokens=n_tokens)
