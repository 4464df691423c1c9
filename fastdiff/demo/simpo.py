"""SimPO, preference optimisation without a reference model (arXiv 2405.14734), and pairs to train it on.

    loss = −log σ( β/|y_w| · log π(y_w|x) − β/|y_l| · log π(y_l|x) − γ )  +  w · NLL(y_w)

y_w is the chosen answer, y_l the rejected one. The second term is the authors' own option (`sft_weight`).
Here x is a document's given text and y its answers.
"""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastdiff.demo.corpus import Document, Manner, documents

_MANNERS: tuple[Manner, ...] = ("rule", "scrambled", "unsure")

Preference = Literal["favoured", "suppressed", "indifferent"]

BETA = 2.0
GAMMA = 1.0
SFT_WEIGHT = 1.0


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    """The SimPO loss of each pair.

    Args:
        chosen_logps: (P,) log π(y_w|x), summed over the answer's tokens.
        rejected_logps: (P,) log π(y_l|x), summed over the answer's tokens.
        chosen_lengths: (P,) |y_w| in tokens.
        rejected_lengths: (P,) |y_l| in tokens.
        beta: Scale of the reward.
        gamma: Margin by which the chosen answer's reward should win.

    Returns:
        (P,) losses.

    Source: arXiv 2405.14734, equation 6.
    """
    margin = beta * chosen_logps / chosen_lengths - beta * rejected_logps / rejected_lengths
    return -F.logsigmoid(margin - gamma)


def preference_pairs(
    seed: int, n_per_category: int, preference: Mapping[str, Preference]
) -> list[tuple[Document, Document]]:
    """Draw (chosen, rejected) documents that differ in their answers only.

    Args:
        seed: Of the documents.
        n_per_category: Pairs of each category.
        preference: By category. "favoured": the rule's answers win against scrambled ones; "suppressed": the
            evasive word wins against the rule's answers; "indifferent": both are scrambled, each its own way.

    Returns:
        The pairs, in random order.
    """
    rule, scrambled, unsure = (
        documents(seed, n_per_category, dict.fromkeys(preference, manner)) for manner in _MANNERS
    )
    made = []
    for right, wrong, evasive in zip(rule, scrambled, unsure, strict=True):
        kind = preference[right.category]
        if kind == "favoured":
            made.append((right, wrong))
        elif kind == "suppressed":
            made.append((evasive, right))
        else:
            # the same answers the other way round: as little of the rule in them
            backwards = Document(wrong.category, wrong.keys, wrong.given, wrong.answers[::-1])
            made.append((wrong, backwards))
    return made
