"""How the report writes text and numbers, untrusted text (tokens, labels, categories, names) above all.

Escaping is the template's work; this module deals with what HTML escaping leaves: characters that cannot be
seen or that reorder their neighbours.

    newline ↵ · tab ⇥ · other C0 controls and DEL their pictures (NUL ␀, ESC ␛)
    C1 controls, bidi marks, zero widths, U+2028, tags, surrogates ⟪U+202E⟫
"""

import unicodedata

# a byte-level token can be long (a row of dashes); nothing longer helps a reader
LONGEST = 200
# the longest sentence or paragraph
SENTENCE = 4000

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Unicode classes that draw nothing: control, format, surrogate, line and paragraph separators
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}


def visible(text: str, longest: int = LONGEST) -> str:
    """Replace every character that draws nothing by one that does, and cut what is too long.

    Args:
        text: Any text, lone surrogates included.
        longest: Number of characters kept.

    Returns:
        Text that encodes as UTF-8, is one line, and is read in the order it is stored.
    """
    kept = text[:longest]
    if not kept.isprintable():
        kept = "".join(_shown(c) for c in kept)
    return kept if len(text) <= longest else f"{kept}… ({len(text):,} characters)"


def csv_cell(text: str) -> str:
    """A text cell that a spreadsheet does not take for a formula: a leading apostrophe where one would be."""
    return f"'{visible(text)}" if text.startswith(_FORMULA) else visible(text)


def short_name(name: str, others: list[str]) -> str:
    """The last part of a model's path or id, or all of it where the last part is not its own."""
    last = _last_part(name)
    return last if last and all(_last_part(o) != last for o in others if o != name) else name


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; an en dash where there is none."""
    if value is None or value != value:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    text = f"{value:.{digits}g}"
    return (f"{value:,.0f}" if "e+" in text else text).replace("-", "−")


def fixed(value: float | None, decimals: int = 1, signed: bool = False) -> str:
    """A number with so many decimals, with its sign where asked."""
    if value is None or value != value:
        return "–"
    text = f"{abs(value):,.{decimals}f}"
    if not float(f"{value:.{decimals}f}"):
        return text
    return f"−{text}" if value < 0 else f"+{text}" if signed else text


def probability(value: float | None) -> str:
    """A p or q value."""
    if value is None or value != value:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _shown(c: str) -> str:
    if c in _NAMED:
        return _NAMED[c]
    if c < " ":
        return chr(0x2400 + ord(c))
    return f"⟪U+{ord(c):04X}⟫" if unicodedata.category(c) in _UNSEEN else c
