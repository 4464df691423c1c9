"""The inference threshold of BatchTopK, set so that as many latents fire as training selects.

    θ such that Σ_b #{j : ReLU(pre_bj)·s_j > θ} = N·k        over N tokens

Training's running mean of the smallest selected score trails the weights, and a mean of minima is not the value at
which k fire on average; this is.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastdiff.crosscoder.metrics import Batch
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.kernels import ops

# a batch may hold this many times its share of the largest scores before any are overlooked
_MARGIN = 4


@torch.no_grad()
def calibrated_threshold(crosscoder: Crosscoder, batches: Iterable[Batch]) -> float:
    """Θ of a BatchTopK crosscoder.

    Args:
        crosscoder: Its weights; its threshold is not read.
        batches: Stored activations, [B, M_stored, D] each.

    Returns:
        A value below exactly N·k scores, up to ties; 0 where fewer are positive, or there are no batches.
    """
    k, found, n = crosscoder.k, list[np.ndarray](), 0
    scale = crosscoder.code_norm()
    for batch in batches:
        stored = batch[0] if isinstance(batch, tuple) else batch
        pre = crosscoder.pre_activations(crosscoder.normalize(stored))
        pairs, _ = ops.batchtopk(pre, min(_MARGIN * k, crosscoder.dict_size), scale=scale)
        found.append(_scores(pre, scale, pairs.row, pairs.col))
        n += len(stored)
    scores = np.concatenate(found) if found else np.zeros(0, np.float32)
    wanted = n * k
    if len(scores) <= wanted:
        return 0.0
    # between the last score that fires and the first that does not
    last, first = -np.partition(-scores, [wanted - 1, wanted])[[wanted - 1, wanted]]
    return float(np.float32((float(last) + float(first)) / 2)) if last > first else float(first)


def _scores(pre: Tensor, scale: Tensor, row: Tensor, col: Tensor) -> np.ndarray:
    values: np.ndarray = (pre[row, col].relu() * scale[col]).cpu().numpy()
    return values
