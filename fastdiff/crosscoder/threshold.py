"""The inference threshold of BatchTopK, set so that as many latents fire as training selects.

    θ such that Σ_b #{j : ReLU(pre_bj)·s_j > θ} = N·k        over N tokens

Training's running mean of the smallest selected score trails the weights, and a mean of minima is not the value at
which k fire on average; this is.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.kernels import ops

# of its share of the largest scores, as many times are taken from a batch; enough where rows are mixed at all
_MARGIN = 4


@torch.no_grad()
def calibrated_threshold(crosscoder: Crosscoder, batches: Callable[[], Iterable[Tensor]]) -> float:
    """Θ of a BatchTopK crosscoder.

    Args:
        crosscoder: Its weights; its threshold is not read.
        batches: Gives stored activations, [B, M_stored, D] each; the same whenever it is called, which is once unless
            a batch holds far more than its share of the largest scores.

    Returns:
        A value below exactly N·k scores, up to ties; 0 where fewer are positive, or there are no batches.
    """
    taken = _MARGIN * crosscoder.k
    while True:
        theta, overlooked = _threshold(crosscoder, batches(), min(taken, crosscoder.dict_size))
        if not overlooked:
            return theta
        taken *= _MARGIN


def _threshold(crosscoder: Crosscoder, batches: Iterable[Tensor], taken: int) -> tuple[float, bool]:
    """Θ from the B·taken largest scores of each batch, and whether scores above it were left out."""
    found, n, least = list[NDArray[np.float32]](), 0, 0.0
    scale = crosscoder.code_norm()
    for stored in batches:
        pre = crosscoder.pre_activations(crosscoder.normalize(stored))
        pairs, _ = ops.batchtopk(pre, taken, scale=scale)
        scores = (pre[pairs.row, pairs.col].relu() * scale[pairs.col]).cpu().numpy()
        found.append(scores)
        n += len(stored)
        if len(scores) == taken * len(stored) and taken < crosscoder.dict_size:
            least = max(least, float(scores.min()))
    scores = np.concatenate(found) if found else np.zeros(0, np.float32)
    wanted = n * crosscoder.k
    if len(scores) <= wanted:
        return 0.0, least > 0
    # between the last score that fires and the first that does not
    last, first = -np.partition(-scores, [wanted - 1, wanted])[[wanted - 1, wanted]]
    theta = float(np.float32((float(last) + float(first)) / 2)) if last > first else float(first)
    return theta, least > theta
