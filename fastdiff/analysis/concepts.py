"""Concepts: latents of one model that stand for one thing, because a thing was split into several of them.

Two latents are near if the cosine of their decoder rows (all models' rows side by side) and the cosine of their
activations over tokens are both at least 0.5; a concept is what hangs together by such pairs. Either alone is a poor
sign: only a third of the pairs of the demo whose decoders are near share a label.

A test that takes every latent for an independent draw finds, in concepts of mean size 2, a difference in half of all
comparisons in which there is none. `fastdiff.comparison.statistics.design_effect` is the remedy.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fastdiff.analysis.stability import add_products, firings, near_pairs
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.progress import SILENT, Progress
from fastdiff.store.reader import ActivationStore

LEAST = 0.5


def concepts(
    crosscoder: Crosscoder,
    store: ActivationStore,
    rows: NDArray[np.int64],
    members: NDArray[np.bool_],
    *,
    batch_size: int,
    progress: Progress = SILENT,
) -> NDArray[np.int64]:
    """The concept of each of some latents.

    Args:
        crosscoder: On the device to compute on.
        store: The activations.
        rows: (n,) rows on which activations are compared.
        members: (F,) the latents in question, those of one side.
        batch_size: Tokens in one pass through the encoder.
        progress: Where to report.

    Returns:
        (F,) the smallest latent of its concept; -1 for a latent that is not in question.

    Raises:
        ValueError: More than 2²⁴ pairs of latents are near.
    """
    chosen = np.flatnonzero(members)
    found = np.full(len(members), -1)
    found[chosen] = chosen
    if len(chosen) < 2:
        return found
    decoder = crosscoder.W_dec.detach().flatten(1)[chosen.tolist()]
    left, right, _ = near_pairs(decoder, decoder, LEAST)
    once = left < right
    left, right = left[once], right[once]
    together, squares = np.zeros(len(left)), np.zeros(len(chosen))
    with progress.task("concepts", len(rows), "tokens") as task:
        for start in range(0, len(rows), batch_size):
            x = store.rows(rows[start : start + batch_size])
            strength = firings(crosscoder, x)[chosen]
            squares += strength.power(2).sum(axis=1)
            add_products(together, left, right, strength, strength)
            task.advance(len(x))
    scale = np.sqrt(squares[left] * squares[right])
    near = together >= LEAST * np.maximum(scale, np.finfo(np.float64).tiny)
    edges = (np.ones(int(near.sum()), np.int8), (left[near], right[near]))
    component = connected_components(coo_array(edges, shape=(len(chosen), len(chosen))), directed=False)[1]
    # latents ascend, so the first of a component is its smallest
    first = np.unique(component, return_index=True)[1]
    found[chosen] = chosen[first[component]]
    return found
