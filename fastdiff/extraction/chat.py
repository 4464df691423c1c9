"""Chats through a chat template, and which characters of the result are whose words.

A template may trim a message, fold it into another turn or write the same words itself, so a search for the
messages in the rendered text can hit the wrong place. The chat is therefore rendered twice, the second time
with a mark that occurs nowhere else in place of each message:

    rendered = part_0 + message_0 + part_1 + message_1 + ... + part_n

The marked text gives the parts; if parts and messages (as they are, or trimmed) make up the first text, the
places are exact. Where the template looks into a message this fails, and each message is searched for from
the end of the one before it; one that is not found leaves no span and is counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fastdiff.errors import InputError
from fastdiff.extraction.text import Document, Message

# private-use characters: no text means anything by them
_MARK = "\ue0f0{}\ue0f1"
_MARKS = re.compile("\ue0f0(\\d+)\ue0f1")

# prompt and answer as they are, for a tokenizer that has no template of its own
JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# today's date would make the tokens depend on the day; this one is the default of Llama 3 templates
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    ".replace('%d', '26').replace('%-d', '26').replace('%b', 'Jul').replace('%B', 'July').replace('%m', '07')"
    ".replace('%Y', '2024').replace('%y', '24').replace('%A', 'Friday').replace('%a', 'Fri')"
    ".replace('%H', '12').replace('%M', '00').replace('%S', '00') }}{%- endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of the rendered chat are the words of `role`."""

    start: int
    stop: int
    role: str


class ChatTemplate:
    """The tuned model's chat template.

    Attributes:
        rewritten: Messages so far (document, index) whose words the template changed beyond finding.

    Args:
        tokenizer: Tokenizer that holds the template.
        owner: Model that the tokenizer comes from, for error messages.
        otherwise: The template of a tokenizer that has none.

    Raises:
        InputError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, owner: str, otherwise: str | None = None):
        self.rewritten: set[tuple[str, int]] = set()
        self._tokenizer, self._owner = tokenizer, owner
        try:
            template = tokenizer.get_chat_template(otherwise if tokenizer.chat_template is None else None)
        except ValueError as error:
            raise InputError(
                f"{owner}: its tokenizer has no chat template; give a text field instead of --messages-field"
            ) from error
        self._template = _FIXED_DATE + template if "strftime_now" in template else template

    def render(self, document: Document) -> tuple[str, list[Span]]:
        """Render a chat.

        Returns:
            The text to tokenize (special tokens included), and whose words are where, in order.

        Raises:
            InputError: The template refuses the chat.
        """
        messages = document.content
        assert not isinstance(messages, str), "a plain text has no chat template"
        rendered = self._apply(messages, document.where)
        marked = self._apply(
            [Message(message.role, _MARK.format(index)) for index, message in enumerate(messages)],
            document.where,
        )
        places = _exact(rendered, marked, messages)
        if places is None:
            places = _searched(rendered, messages)
        spans = [
            Span(*place, message.role)
            for message, place in zip(messages, places, strict=True)
            if place is not None and place[1] > place[0]
        ]
        self.rewritten |= {
            (document.where, index)
            for index, place in enumerate(places)
            if place is None and messages[index].content.strip()
        }
        return rendered, sorted(spans, key=lambda span: span.start)

    def _apply(self, messages: Sequence[Message], where: str) -> str:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{where}: the chat template of {self._owner} refuses it: {reason}") from error


def _exact(rendered: str, marked: str, messages: Sequence[Message]) -> list[tuple[int, int] | None] | None:
    """Place of each message if the parts around the marks make up the rendered text, else None."""
    parts = _MARKS.split(marked)
    order = [int(index) for index in parts[1::2]]
    if len(set(order)) != len(order) or not rendered.startswith(parts[0]):
        return None
    places: list[tuple[int, int] | None] = [None] * len(messages)
    at = len(parts[0])
    for index, after in zip(order, parts[2::2], strict=True):
        content = messages[index].content
        for words in (content, content.strip(), content.rstrip(), content.lstrip()):
            if rendered.startswith(words + after, at):
                break
        else:
            return None
        places[index] = (at, at + len(words))
        at += len(words) + len(after)
    return places if at == len(rendered) else None


def _searched(rendered: str, messages: Sequence[Message]) -> list[tuple[int, int] | None]:
    """Place of each message, searched for in order."""
    places: list[tuple[int, int] | None] = []
    at = 0
    for message in messages:
        words = message.content.strip()
        start = rendered.find(words, at) if words else -1
        if start < 0:
            places.append(None)
            continue
        at = start + len(words)
        places.append((start, at))
    return places
