"""Which documents are taken, and which of their tokens are scored.

Scored is a token that has one before it, for that is where it is predicted. In a store in which some row has the role
assistant, only the words of answers are scored: a preference-tuned model may ruin what it is never asked to write, and
prompts are given. The token that ends an answer is written by the chat template, has the role template, and is not
scored; nor is anything of a user or a system message. In a store of plain text every token is scored, the one that the
tokenizer puts at the end included.

Of each category so many documents are taken, evenly spread over the store; those that no crosscoder was trained on
come first, and others only where they are too few. Documents with fewer than two scored tokens are never taken.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastdiff.crosscoder.rows import spread_rows
from fastdiff.patching.documents import Document, DocumentIndex
from fastdiff.patching.refusal import CannotRun
from fastdiff.store.reader import ActivationStore

ANSWER = "assistant"
_LEAST_SCORED = 2


@dataclass(frozen=True)
class Choice:
    """Documents of a store, by their place in its index.

    Attributes:
        scored: Whose tokens count.
        categories: Names, in alphabetical order.
        category: (n,) of every document of the index.
        held_out: (n,) whether no crosscoder was trained on it.
        eligible: (n,) whether it has enough scored tokens.
        named: Whether the store has categories; otherwise they are its data sets.
    """

    scored: Literal["all text", "answers"]
    categories: list[str]
    category: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    eligible: NDArray[np.bool_]
    named: bool

    def take(self, most: int, of: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """At most so many documents of each category, ascending; of these only, where they are given."""
        candidates = np.flatnonzero(self.eligible) if of is None else of
        taken: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for code in range(len(self.categories)):
            mine = candidates[self.category[candidates] == code]
            first, rest = mine[self.held_out[mine]], mine[~self.held_out[mine]]
            taken.append(spread_rows(first, most))
            if len(first) < most:
                taken.append(spread_rows(rest, most - len(first)))
        return np.sort(np.concatenate(taken))


def choice_of(store: ActivationStore, index: DocumentIndex, holdout: float) -> Choice:
    """What can be taken of a store.

    Args:
        store: An open store.
        index: Its documents.
        holdout: Share of the documents that no crosscoder was trained on.

    Raises:
        CannotRun: It holds chats without an answer, or no document has enough scored tokens.
    """
    roles = index.roles_present()
    answers = ANSWER in roles
    if not answers and "user" in roles:
        raise CannotRun(
            f"{store.path}: holds messages of users but no answer, so there is no behaviour to score",
            "extract chats with an assistant's answers, or plain text with --text-field",
        )
    n_scored = index.following(ANSWER) if answers else index.lengths - 1
    eligible = n_scored >= _LEAST_SCORED
    if not eligible.any():
        raise CannotRun(
            f"{store.path}: no document has two tokens to score",
            "extract longer documents, or raise --ctx-len where answers are cut off",
        )
    sources = store.meta.sources or []
    names = [source.category or source.dataset for source in sources] or ["all documents"]
    categories = sorted(set(names))
    code = np.array([categories.index(name) for name in names], np.int64)
    return Choice(
        "answers" if answers else "all text",
        categories,
        code[index.sources],
        index.held_out(holdout),
        eligible,
        any(source.category is not None for source in sources),
    )


def scored_at(document: Document, answer: int | None) -> NDArray[np.bool_]:
    """(T,) positions whose next token is scored.

    Args:
        document: Its roles are read.
        answer: Index of the role assistant, or None if every token is scored.
    """
    scored = np.zeros(len(document.ids), bool)
    scored[:-1] = True if answer is None else document.roles[1:] == answer
    return scored


def unigram_entropy(tokens: NDArray[np.int64]) -> float:
    """Entropy of a distribution of tokens, in nats, from a sample: plug-in estimate + (distinct - 1) / (2 n).

    Source: Miller 1955.
    """
    counts = np.array(list(Counter(tokens.tolist()).values()), np.float64)
    n = counts.sum()
    return float(np.log(n) - (counts * np.log(counts)).sum() / n + (len(counts) - 1) / (2 * n))
