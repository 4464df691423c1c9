"""Which latents come back with another seed: latents of two crosscoders, matched one to one.

    cosine          c_ij = ⟨d_i, d_j⟩ / (‖d_i‖ ‖d_j‖)                       d: decoder rows of all models in one, [M·D]
    co-activation   r_ij = Σ_n f_in f_jn / √(Σ_n f_in² Σ_n f_jn²)           n: a sample of tokens, f at inference
    similarity      ½ (c_ij + r_ij)                 where c_ij >= floor and both latents fire in the sample

The matching gives every latent at most one of the other crosscoder's, so that the sum of similarities is the largest
there is. A latent that never fires in the sample has no co-activation and no match. Rescaling a latent (f → c·f,
d → d/c) changes nothing, and neither does the order of the two crosscoders.

Nothing of size F² is held: products of decoder rows are looked at a block at a time, co-activations summed for the
pairs that are left, a batch of tokens at a time, and the matching is solved on that sparse graph.

Source: Paulo & Belrose 2025, arXiv:2501.16615 (Hungarian matching of the latents of two seeds).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.errors import FastdiffError
from fastdiff.progress import SILENT, Progress
from fastdiff.store.reader import ActivationStore

# least cosine of a pair: chance does not reach it (the standard deviation is 1/√(M·D)), and it stays below what counts
# as stable, so that a latent whose best partner is taken is not given a stranger
FLOOR = 0.5
# a latent that fires on one token in 5,000 is seen ten times
SAMPLE = 50_000
# more pairs than this (146 for each of 114,688 latents) are a crosscoder whose latents are alike
_MOST_PAIRS = 2**24
# numbers held at a time: 256 MB of float32
_HELD = 2**26
# float32 products, and TF32 ones where torch was told to use them, may be off by this
_MARGIN = 2e-3
# pairs solved together: the solver's time has a part in (latents)², 1.7 ns each, so 114,688 at once take 22 s more
_SOLVED = 4096


@dataclass(frozen=True)
class Matching:
    """What became of the F latents of one crosscoder in another one.

    Attributes:
        partner: (F,) its latent there, -1 if it has none.
        cosine: (F,) of the pair, 0 without one.
        coactivation: (F,) of the pair, 0 without one.
        fired: (F,) bool, whether it fired in the sample.
    """

    partner: NDArray[np.int64]
    cosine: NDArray[np.float64]
    coactivation: NDArray[np.float64]
    fired: NDArray[np.bool_]


def match(
    a: Crosscoder,
    b: Crosscoder,
    store: ActivationStore,
    rows: NDArray[np.int64],
    *,
    batch_size: int,
    floor: float = FLOOR,
    progress: Progress = SILENT,
) -> Matching:
    """Match the latents of two crosscoders of the same activations.

    Args:
        a: On the device to compute on.
        b: Of the same inputs as `a`, normalised alike, on the same device. It may have another number of latents.
        store: The activations.
        rows: Rows of the store to compare firings on, (n,), finite; see `sample`.
        batch_size: Tokens in one pass through the encoders.
        floor: Least cosine of a pair, above 0.
        progress: Where to report.

    Returns:
        The latents of `a`.

    Raises:
        ValueError: The two have different inputs, or more than 2²⁴ pairs reach the floor.
    """
    if a.b_dec.shape != b.b_dec.shape:
        raise ValueError(f"inputs of shape {tuple(a.b_dec.shape)} and {tuple(b.b_dec.shape)} cannot be matched")
    left, right, cosine = near_pairs(a.W_dec.detach().flatten(1), b.W_dec.detach().flatten(1), floor)
    together = np.zeros(len(left))
    squares = np.zeros(a.dict_size), np.zeros(b.dict_size)
    with progress.task("stability", len(rows), "tokens") as task:
        for start in range(0, len(rows), batch_size):
            x = store.rows(rows[start : start + batch_size])
            strengths = firings(a, x), firings(b, x)
            for total, strength in zip(squares, strengths, strict=True):
                total += strength.power(2).sum(axis=1)
            add_products(together, left, right, *strengths)
            task.advance(len(x))
    fired = squares[0] > 0, squares[1] > 0
    both = fired[0][left] & fired[1][right]
    left, right, cosine, together = left[both], right[both], cosine[both], together[both]
    coactivation = together / (np.sqrt(squares[0][left]) * np.sqrt(squares[1][right]))
    chosen = maximum_matching(left, right, (cosine + coactivation) / 2)
    found = Matching(np.full(a.dict_size, -1), np.zeros(a.dict_size), np.zeros(a.dict_size), fired[0])
    at = left[chosen]
    found.partner[at], found.cosine[at], found.coactivation[at] = right[chosen], cosine[chosen], coactivation[chosen]
    return found


def maximum_matching(
    left: NDArray[np.int64], right: NDArray[np.int64], weight: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The one-to-one choice of pairs with the largest sum of weights, exactly.

    Args:
        left: (P,) one end of each pair, at least 0. No pair stands there twice.
        right: (P,) the other end, at least 0.
        weight: (P,) at least 0.

    Returns:
        Positions of the chosen pairs, ascending.
    """
    if not len(left):
        return np.zeros(0, np.int64)
    n, m = int(left.max()) + 1, int(right.max()) + 1
    # what hangs together in no way is solved apart
    graph = coo_array((np.ones(len(left), np.int8), (left, n + right)), shape=(n + m, n + m))
    component = connected_components(graph, directed=False)[1][left]
    order = np.lexsort((right, left, component))
    ends = np.concatenate((np.flatnonzero(np.diff(component[order])) + 1, [len(order)]))
    chosen, start = [], 0
    while start < len(order):
        stop = int(ends[np.searchsorted(ends, min(start + _SOLVED, len(order)))])
        part = order[start:stop]
        row = np.unique(left[part], return_inverse=True)[1]
        column = np.unique(right[part], return_inverse=True)[1]
        chosen.append(part[_solve(row, column, weight[part])])
        start = stop
    return np.sort(np.concatenate(chosen))


def _solve(row: NDArray[np.int64], column: NDArray[np.int64], weight: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positions of the best pairs; both ends number from 0 without gaps, and pairs ascend within a component."""
    n, m = int(row.max()) + 1, int(column.max()) + 1
    # every row has a column of its own for "no pair"; 1 more for all, since a sparse matrix drops zeros
    none = np.arange(n)
    entries = np.concatenate((1 + weight, np.ones(n)))
    places = np.concatenate((row, none)), np.concatenate((column, m + none))
    rows, columns = min_weight_full_bipartite_matching(csr_array((entries, places), shape=(n, m + n)), maximize=True)
    partner = np.full(n, -1)
    partner[rows] = columns
    return np.flatnonzero(partner[row] == column)


def stability(
    crosscoder: Crosscoder,
    others: list[Path],
    store: ActivationStore,
    rows: NDArray[np.int64],
    *,
    batch_size: int,
    min_cosine: float,
    min_coactivation: float,
    progress: Progress = SILENT,
) -> NDArray[np.float64]:
    """In what share of other crosscoders each latent comes back.

    Args:
        crosscoder: On the device to compute on.
        others: Directories of the others, of the same inputs, normalised alike.
        store: The activations.
        rows: Rows of the store to compare firings on, see `sample`.
        batch_size: Tokens in one pass through the encoders.
        min_cosine: What the cosine with its match must reach. At 0.7 they share half of their squared length.
        min_coactivation: What their co-activation must reach. At 0.5 two that always fire equally strongly do so
            together half of the time.
        progress: Where to report.

    Returns:
        (F,), in [0, 1]; NaN for a latent that did not fire in the sample, of which nothing is known.

    Raises:
        InputError: A directory holds no crosscoder that can be read.
        FastdiffError: Too many latents of one are alike.
    """
    count = np.zeros(crosscoder.dict_size)
    for directory in others:
        other, _ = load_crosscoder(directory)
        other.to(crosscoder.b_enc.device)
        floor = min(FLOOR, min_cosine)
        try:
            found = match(crosscoder, other, store, rows, batch_size=batch_size, floor=floor, progress=progress)
        except ValueError as error:
            raise FastdiffError(f"{directory}: {error}; train it again, or move it out of the run") from error
        count += (found.partner >= 0) & (found.cosine >= min_cosine) & (found.coactivation >= min_coactivation)
        count[~found.fired] = np.nan
    return count / len(others)


def near_pairs(a: Tensor, b: Tensor, floor: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of rows of a [F_a, W] and b [F_b, W] whose cosine reaches the floor: both ends [P], and the cosine [P]."""
    F_b, width = b.shape
    unit = torch.nn.functional.normalize(b, dim=1).T
    near, n = [], 0
    step = max(1, _HELD // F_b)
    for start in range(0, len(a), step):
        block = torch.nn.functional.normalize(a[start : start + step], dim=1)
        found = (block @ unit >= floor - _MARGIN).nonzero()
        n += len(found)
        if n > _MOST_PAIRS:
            raise ValueError(f"more than {_MOST_PAIRS:,} pairs of latents have a decoder cosine of {floor} or more")
        found[:, 0] += start
        near.append(found)
    del unit
    left, right = torch.cat(near).unbind(dim=1)
    cosine = torch.zeros(len(left), dtype=torch.float64, device=a.device)
    step = max(1, _HELD // (4 * width))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        first, second = a[left[part]].double(), b[right[part]].double()
        cosine[part] = (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))
    kept = cosine >= floor
    return left[kept].cpu().numpy(), right[kept].cpu().numpy(), cosine[kept].cpu().numpy()


def firings(crosscoder: Crosscoder, x: Tensor) -> csr_array:
    """Activations [F, B] of stored activations [B, M, D], in float64."""
    values, selection = crosscoder.encode(crosscoder.normalize(x))
    by = selection.by_latent
    parts = values[by.order].double(), by.row, by.start
    return csr_array(tuple(part.cpu().numpy() for part in parts), shape=(crosscoder.dict_size, len(x)))


def add_products(
    together: NDArray[np.float64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    firings_a: csr_array,
    firings_b: csr_array,
) -> None:
    """Add Σ_n f_in f_jn of every pair, over the tokens of a batch."""
    # so many that even latents that always fire stay within the bound
    step = max(1, _HELD // (4 * firings_a.shape[1]))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        together[part] += firings_a[left[part]].multiply(firings_b[right[part]]).sum(axis=1)
