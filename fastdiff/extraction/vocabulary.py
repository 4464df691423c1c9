r"""What each token looks like to a reader.

A tokenizer's own pieces are not text: byte-level ones spell bytes with stand-in letters (" the" is "Ġthe"),
SentencePiece ones write "▁" for a blank and <0x0A> for a byte. Here they become the text they stand for;
bytes that are no UTF-8 by themselves, since a character is split over tokens, are written \xe2.
"""

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")


def display_strings(tokenizer: Any) -> list[str]:
    """Display string of every token id, "" for an id without a token.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        List indexed by token id.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # a slow tokenizer is a SentencePiece one
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]) if tokenizer.is_fast else "▁"
    byte_level = '"ByteLevel"' in decoder
    # JSON escapes the blank's stand-in; Metaspace decodes it by itself
    blank = "▁" in decoder or "\\u2581" in decoder or "Metaspace" in decoder
    letters = _byte_letters()
    strings = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, index in vocabulary.items():
        strings[index] = piece if piece in added else _display(piece, letters if byte_level else None, blank)
    return strings


def _display(piece: str, letters: dict[str, int] | None, blank: bool) -> str:
    if letters is not None:
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece).decode("utf-8", errors="backslashreplace")
        return piece
    if match := _BYTE.match(piece):
        return bytes([int(match[1], 16)]).decode("utf-8", errors="backslashreplace")
    return piece.replace("▁", " ") if blank else piece


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters: a printable byte is itself, the others are U+0100, U+0101, ... in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in letters)
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}
