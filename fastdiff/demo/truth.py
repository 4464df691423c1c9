"""What is true of the demo's models, measured on them apart from every stage that is to find it.

A planted change is true by construction. Of a cell in which nothing was planted, how the models answer decides,
on documents that no model was trained on and no stage reads:

    unchanged   B, the difference of their cross entropies of the answers, is smaller than τ
    lacking     neither model is better than chance, so whatever B is, no capability was gained or lost
    drifted     a side effect of training: a change that nobody planted, but a real one
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from fastdiff.demo.corpus import CATEGORIES, documents
from fastdiff.demo.training import encode, token_losses
from fastdiff.extraction.models import quiet

Change = Literal["gained", "lost", "unchanged"]
Kind = Literal["planted", "unchanged", "lacking", "drifted"]

_PER_CATEGORY = 40


@dataclass(frozen=True)
class Cell:
    """What is true of one category between two models."""

    expected: Change  # what was planted
    kind: Kind
    B: float  # nats per token of the answers, positive = the second model does better

    def right(self, change: str, claimed: bool) -> bool:
        """Whether a verdict is right: a planted change claimed with its sign, nothing claimed where nothing was.

        What drifted may be claimed with its own sign, or not.
        """
        if self.kind == "planted":
            return claimed and change == self.expected
        if self.kind == "drifted":
            return not claimed or change == ("gained" if self.B > 0 else "lost")
        return not claimed


def measured(model: Path, seed: int) -> dict[str, float]:
    """Mean cross entropy of the answers of a demo model, in nats per token, by category.

    Args:
        model: Directory of the model.
        seed: Of the documents.
    """
    with quiet():
        loaded = Gemma2ForCausalLM.from_pretrained(model).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    found = {}
    for category in CATEGORIES:
        data = encode(tokenizer, documents(seed, _PER_CATEGORY, {category.name: "rule"}))
        with torch.inference_mode():
            found[category.name] = token_losses(loaded, data.ids, data.answer).mean().item()
    return found


def cells(
    planted: Mapping[str, Change], first: Mapping[str, float], second: Mapping[str, float], tau: float
) -> dict[str, Cell]:
    """What is true of every category between two models.

    Args:
        planted: By category, as the models were planned.
        first: Cross entropy by category of the model that is compared against.
        second: That of the other.
        tau: Nats below which a difference is no change.
    """
    # a key's answer is one of as many as there are keys, each as often as the others
    chance = {category.name: math.log(len(category.rule)) for category in CATEGORIES}
    found = {}
    for category, plan in planted.items():
        B = first[category] - second[category]
        kind: Kind
        if plan != "unchanged":
            kind = "planted"
        elif min(first[category], second[category]) > chance[category] - tau:
            kind = "lacking"
        else:
            kind = "unchanged" if abs(B) < tau else "drifted"
        found[category] = Cell(plan, kind, B)
    return found
