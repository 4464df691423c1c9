"""What two models do on held-out text, measured without fastdiff: the truth that its verdicts are held against.

Plain transformers: the cross entropy of every document under both models, mean over the tokens behind its first. The
change of a category is the mean over its documents of CE_base - CE_tuned, so positive means that the tuned model does
better. The cuts were fixed before any verdict was looked at:

    clear   |change| of at least 0.20 nats a token and an interval (bootstrap over documents) without 0
    none    |change| of at most 0.05
    small   the rest

A category is scorable if the better of the two models stays below the unigram entropy of the scored tokens by 0.05 at
least. Where it does not, neither model can do what the text asks for, whatever the difference between them is.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

CLEAR, NONE, GUARD = 0.20, 0.05, 0.05
RESAMPLES = 2000
# logits of one batch: 25 million float32 are 100 MB, and a batch of more than 32 documents gains nothing on a CPU
_LOGITS, _ROWS = 25_000_000, 32


@dataclass(frozen=True)
class Cell:
    """The truth about one category, in nats per scored token.

    Attributes:
        category: Its name.
        documents: How many were measured.
        ce_base: Cross entropy, mean over documents.
        ce_tuned: The same of the tuned model.
        change: ce_base - ce_tuned; positive: gained.
        low: Lower end of its 95 % interval.
        high: Upper end.
        entropy: Unigram entropy of the scored tokens.
        level: clear, small or none.
        scorable: Whether the better model is below that entropy by `GUARD` at least.
    """

    category: str
    documents: int
    ce_base: float
    ce_tuned: float
    change: float
    low: float
    high: float
    entropy: float
    level: str
    scorable: bool


def read_documents(path: Path) -> dict[str, list[str]]:
    """Texts of a JSON-lines file by category, in the order of the file."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            record = json.loads(line)
            found.setdefault(record["category"], []).append(record["text"])
    return found


def entropy(tokens: Sequence[int]) -> float:
    """Entropy of the tokens' frequencies in nats, with Miller and Madow's correction for a small sample.

    Source: Miller 1955, Note on the bias of information estimates.
    """
    counts = np.array(list(Counter(tokens).values()), float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))


def interval(values: NDArray[Any]) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of `RESAMPLES` bootstrap means, always of the same draws."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def level(change: float, low: float, high: float) -> str:
    """How large a change is; see the module."""
    if abs(change) >= CLEAR and (low > 0 or high < 0):
        return "clear"
    return "none" if abs(change) <= NONE else "small"


@torch.no_grad()
def cross_entropies(model: Any, documents: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Mean cross entropy of each document's tokens behind the first, in nats.

    Args:
        model: A causal language model of transformers.
        documents: Token ids, at least two in each.

    Returns:
        (N,) float64.
    """
    found = np.zeros(len(documents))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]), reverse=True)
    while order:
        longest = len(documents[order[0]])
        n = max(1, min(_ROWS, _LOGITS // (longest * model.config.vocab_size)))
        batch, order = order[:n], order[n:]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        wanted = torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            own = torch.tensor(documents[i])
            ids[row, : len(own)] = wanted[row, : len(own)] = own
        # padding stands behind the text, and attention only looks back
        logits = model(ids).logits[:, :-1].float().transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, wanted[:, 1:], ignore_index=-100, reduction="none")
        scored = (wanted[:, 1:] >= 0).sum(dim=1)
        found[batch] = (losses.double().sum(dim=1) / scored).numpy()
    return found


def cell(category: str, ce: NDArray[np.float64], tokens: Sequence[int]) -> Cell:
    """The truth about a category.

    Args:
        category: Its name.
        ce: (N, 2) cross entropy of each document under base and tuned.
        tokens: All scored tokens of these documents.
    """
    change = ce[:, 0] - ce[:, 1]
    low, high = interval(change)
    base, tuned = ce.mean(axis=0).tolist()
    chance, mean = entropy(tokens), float(change.mean())
    return Cell(
        category, len(ce), base, tuned, mean, low, high, chance, level(mean, low, high),
        scorable=min(base, tuned) <= chance - GUARD,
    )  # fmt: skip


def measure(base: Path, tuned: Path, documents: dict[str, list[str]], ctx_len: int, most: int | None) -> list[Cell]:
    """The truth about every category, by both models in float32.

    Args:
        base: Directory of the first model; its tokenizer is used.
        tuned: Directory of the second.
        documents: Texts by category.
        ctx_len: Tokens of a document that are read.
        most: Documents per category, the first ones; all if None.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = {
        category: [tokenizer(text, truncation=True, max_length=ctx_len).input_ids for text in texts[:most]]
        for category, texts in documents.items()
    }
    ids = {category: [one for one in of if len(one) > 1] for category, of in ids.items()}
    flat = [one for of in ids.values() for one in of]
    columns = []
    for path in (base, tuned):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        columns.append(cross_entropies(model, flat))
    ce, at, cells = np.stack(columns, axis=1), 0, []
    for category, of in ids.items():
        scored = [token for one in of for token in one[1:]]
        cells.append(cell(category, ce[at : at + len(of)], scored))
        at += len(of)
    return cells
