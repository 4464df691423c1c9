"""The data that the page's script draws latent cards from.

    {"schema": 1, "runs": [name, …], "natsOf": [[category, …] per run], "rows": [[[category, [latent, …]], …] per run],
     "vocabulary": [token, …], "names": [data set or category, …], "fields": [name, …], "latents": [[value, …], …]}
    example = [document, position, data set, category, activation, peak, [token, …], [index, value, …]]

`fields` names the values of a latent: columns of latents.csv, what its label says, and `examples`, `nats`.
`rows` are the verdict's, each with its latents, most nats first; a latent's nats are in the order of its run's
`natsOf`, none where the run was not attributed. Tokens are indices into `vocabulary` (the most frequent first, so that
indices are short), data sets and categories into `names`; activations are sparse. Everything is text that can be seen
(see text.py) and numbers of at most 4 digits. In the page it stands as base64 of gzip of JSON: 2,000 latents with 8
contexts of 49 tokens take 2 MB instead of 27 MB of ready-made HTML.
"""

import base64
import gzip
import json
import math
from collections import Counter
from typing import Any

from fastdiff.reporting.schema import Card, Example, Run
from fastdiff.reporting.text import visible
from fastdiff.results.labels import Label

# columns of latents.csv that a card shows
_NUMBERS = (
    *("delta_norm", "cosine", "nu_error", "nu_reconstruction", "norm_base", "norm_tuned"),
    *("frequency", "count", "max_activation", "stability"),
)
FIELDS = (
    *("run", "latent", "why", "class", "specific", "category", "label", "confidence", "annotator"),
    *(*_NUMBERS, "top_tokens", "examples", "nats"),
)
# integers beyond this are not exact in JavaScript
_EXACT = 2**53


def encode(value: Any) -> str:
    """Base64 of gzip of JSON (or of text as it is); equal values give equal text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode("ascii")


def island(runs: list[Run], rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The page's data, in the format above.

    Args:
        runs: All runs.
        rows: Of each run, the latents of each category's row.
    """
    seen: Counter[str] = Counter()
    for run in runs:
        for card in run.cards:
            for example in card.examples:
                seen.update(example.tokens)
            seen.update(run.top_tokens[card.latent])
    vocabulary = {token: i for i, (token, _) in enumerate(seen.most_common())}
    names: dict[str, int] = {}
    return {
        "schema": 1,
        "runs": [visible(run.name) for run in runs],
        "natsOf": [[_name(name, names) for name in run.nats.categories] if run.nats else [] for run in runs],
        "rows": [[[_name(name, names), latents] for name, latents in of.items()] for of in rows],
        "latents": [row for i, run in enumerate(runs) for row in _rows(i, run, vocabulary, names)],
        "vocabulary": [visible(token) for token in vocabulary],
        "names": list(names),
        "fields": list(FIELDS),
    }


def _rows(i: int, run: Run, vocabulary: dict[str, int], names: dict[str, int]) -> list[list[Any]]:
    numbers = {name: run.latents.numbers(name) for name in _NUMBERS}
    kind, specific = run.latents.text("class"), run.latents.text("specific")

    def row(card: Card) -> list[Any]:
        label = run.labels.get(card.latent, Label(latent=card.latent, label="", category=""))
        return [
            *(i, card.latent, card.why, kind[card.latent], specific[card.latent]),
            *(_name(label.category, names), visible(label.label), label.confidence, visible(label.annotator)),
            *(_short(float(numbers[name][card.latent])) for name in _NUMBERS),
            [vocabulary[token] for token in run.top_tokens[card.latent]],
            [_example(example, vocabulary, names) for example in card.examples],
            [] if run.nats is None else [_short(float(value)) for value in run.nats.nats[:, card.latent]],
        ]

    return [row(card) for card in run.cards]


def _example(example: Example, vocabulary: dict[str, int], names: dict[str, int]) -> list[Any]:
    document = example.sequence_id if abs(example.sequence_id) < _EXACT else str(example.sequence_id)
    sparse = [part for i, v in enumerate(example.activations) if v != 0 for part in (i, _short(v, 3))]
    return [
        *(document, example.position, _name(example.dataset, names), _name(example.category, names)),
        *(_short(example.activation), example.peak),
        *([vocabulary[token] for token in example.tokens], sparse),
    ]


def _name(text: str, names: dict[str, int]) -> int:
    return names.setdefault(visible(text), len(names))


def _short(value: float, digits: int = 4) -> float | int | None:
    """A number with few digits, an integer as it is, None for NaN."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{digits}g}")
