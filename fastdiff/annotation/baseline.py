"""The offline annotator: a latent is about the category whose documents it fires in; top tokens name it.

    it fires in n_c of the N_c documents of category c, in n of all N;  r = (n + ½) / (N + 1)
    rate_c = (n_c + ½) / (N_c + ½/r)                       half a firing document at its overall rate is added
    lift_c = rate_c / (the same over all other documents)
    p_c    = P(at least n_c of n documents drawn from all N without return are of category c)

Its category is the one with the largest lift among those with lift_c ≥ `min_lift` and C·p_c < 0.05
(Bonferroni over C categories); without one it is "uninterpretable". Adding at the overall rate keeps a
category with few or no documents at lift 1; the test keeps a latent that fires in a handful of documents from
being named after the luckiest category. Confidence is rate_c / (rate_c + rate elsewhere).

Counting documents, not tokens, keeps one long or repetitive document from deciding. It needs the data set's
own categories, and it never learns which model a latent belongs to, so it cannot favour one.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

NAME = "baseline-1"
UNINTERPRETABLE = "uninterpretable"
_CHANCE = 0.05


@dataclass(frozen=True)
class Label:
    """What an annotator says of one latent."""

    latent: int
    label: str
    category: str
    confidence: float
    annotator: str
    top_tokens: list[str]


def annotate_baseline(
    documents_fired: np.ndarray,
    documents: np.ndarray,
    categories: list[str],
    count: np.ndarray,
    top_tokens: list[list[str]],
    *,
    min_count: int,
    min_lift: float,
) -> list[Label]:
    """Label every latent that fires often enough.

    Args:
        documents_fired: Documents in which each latent fires, by category, [F, C] int.
        documents: Documents of each category, [C] int.
        categories: Their names, C of them.
        count: Tokens on which each latent fires, [F].
        top_tokens: Per latent.
        min_count: Latents below this count get no label.
        min_lift: Smallest lift that counts as a category.

    Returns:
        Labels by ascending latent.
    """
    fired, total = documents_fired.sum(axis=1, keepdims=True), documents.sum()
    added = 0.5 * (total + 1) / (fired + 0.5)
    inside = (documents_fired + 0.5) / (documents + added)
    outside = (fired - documents_fired + 0.5) / (total - documents + added)
    lift = inside / outside
    chance = len(categories) * stats.hypergeom.sf(documents_fired - 1, total, documents, fired)
    sure = (lift >= min_lift) & (chance < _CHANCE)
    labels = []
    for latent in np.flatnonzero(count >= min_count):
        clear = bool(sure[latent].any())
        best = int(np.where(sure[latent] | ~clear, lift[latent], 0).argmax())
        tokens = top_tokens[latent]
        category = categories[best] if clear else UNINTERPRETABLE
        confidence = inside[latent, best] / (inside[latent, best] + outside[latent, best])
        labels.append(
            Label(
                latent=int(latent),
                label=f"{category}: {', '.join(token.strip() or repr(token) for token in tokens)}",
                category=category,
                confidence=round(float(confidence), 4),
                annotator=NAME,
                top_tokens=tokens,
            )
        )
    return labels
