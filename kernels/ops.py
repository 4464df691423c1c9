"""The public ops: check what a caller can get wrong, then compute.

A training step is `encoder_scores` (the one dense product), one of `topk`, `batchtopk`, `above` (which latents
fire), `sparse_encode` (their values), `sparse_decode` (the reconstruction). Gradients flow through the last two
and touch active latents only. `fastdiff.kernels.reference` says what each one means.
"""

import torch
from torch import Tensor

from fastdiff.kernels import selection as _selection
from fastdiff.kernels.jumprelu import JumpReLU, Step
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.sparse_matmul import SparseDecode, SparseEncode, gather_add

__all__ = [
    "Selection",
    "above",
    "batchtopk",
    "encoder_scores",
    "gather_add",
    "jumprelu",
    "sparse_decode",
    "sparse_encode",
    "step",
    "topk",
]


def encoder_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Pre-activations of every latent; no gradient is recorded.

    Args:
        x: Inputs, [B, C], C = M·D.
        W_enc: Encoder rows, [F, C].
        b_enc: Encoder biases, [F].

    Returns:
        [B, F].

    Raises:
        ValueError: The shapes disagree.
    """
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[1] or b_enc.shape != W_enc.shape[:1]:
        raise ValueError(
            f"x [B, C], W_enc [F, C] and b_enc [F] disagree: "
            f"{tuple(x.shape)}, {tuple(W_enc.shape)}, {tuple(b_enc.shape)}"
        )
    with torch.no_grad():
        return torch.addmm(b_enc, x, W_enc.T)


def topk(score: Tensor, k: int) -> Selection:
    """Select the k largest positive scores of each token.

    Args:
        score: [B, F], any float dtype.
        k: At most this many per token, in [1, F].

    Returns:
        The selected pairs. Ties go to the lowest latent; NaN and infinity are never selected.

    Raises:
        ValueError: score is not 2-D or k is out of range.

    Source:
        Gao et al. 2024, arXiv:2406.04093.
    """
    _check_k(score, k)
    return _selection.topk(score, k)


def batchtopk(score: Tensor, k: int) -> tuple[Selection, Tensor]:
    """Select the B·k largest positive scores of the batch.

    Args:
        score: [B, F], any float dtype.
        k: Selected pairs per token on average, in [1, F].

    Returns:
        The selected pairs (ties go to the lowest token, then latent; NaN and infinity are never selected), and
        the smallest selected score [], infinity where nothing is selected.

    Raises:
        ValueError: score is not 2-D or k is out of range.

    Source:
        Bussmann et al. 2024, arXiv:2412.06410.
    """
    _check_k(score, k)
    return _selection.batchtopk(score, k)


def above(score: Tensor, threshold: Tensor) -> Selection:
    """Select the scores [B, F] above each latent's threshold [F].

    Raises:
        ValueError: The shapes disagree.
    """
    if score.ndim != 2 or threshold.shape != score.shape[1:]:
        raise ValueError(f"score [B, F] and threshold [F] disagree: {tuple(score.shape)}, {tuple(threshold.shape)}")
    return _selection.above(score, threshold)


def sparse_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, selection: Selection) -> Tensor:
    """Pre-activations of the selected pairs, with gradients for W_enc and b_enc.

    Args:
        x: Inputs, [B, C]; data, gets no gradient.
        W_enc: Encoder rows, [F, C].
        b_enc: Encoder biases, [F].
        pre: What `encoder_scores` gave for them, [B, F].
        selection: nnz selected pairs.

    Returns:
        [nnz].

    Raises:
        ValueError: pre does not belong to x and W_enc.
    """
    if pre.shape != (len(x), len(W_enc)) or selection.n_tokens != len(x):
        raise ValueError(
            f"pre must be [B={len(x)}, F={len(W_enc)}] and the selection of B tokens, "
            f"got {tuple(pre.shape)} and {selection.n_tokens}"
        )
    return SparseEncode.apply(x, W_enc, b_enc, pre, selection)


def sparse_decode(values: Tensor, selection: Selection, W_dec: Tensor) -> Tensor:
    """Add up the decoder rows of the selected latents, with gradients for values and W_dec.

    Args:
        values: Activations of the selected pairs, [nnz].
        selection: nnz selected pairs of B tokens.
        W_dec: Decoder rows, [F, C].

    Returns:
        Reconstruction without bias, [B, C].

    Raises:
        ValueError: The shapes disagree.
    """
    if values.shape != selection.col.shape or W_dec.ndim != 2 or len(W_dec) != selection.dict_size:
        raise ValueError(
            f"values [nnz={len(selection.col)}] and W_dec [F={selection.dict_size}, C] expected, "
            f"got {tuple(values.shape)} and {tuple(W_dec.shape)}"
        )
    return SparseDecode.apply(values, W_dec, selection)


def jumprelu(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Activations z·1[z > θ] of selected pairs; `fastdiff.kernels.jumprelu` gives the gradients.

    Args:
        z: Pre-activations, [nnz].
        theta: Thresholds of their latents, [nnz], above 0.
        bandwidth: ε, width of the window in which θ gets a gradient.

    Returns:
        [nnz].
    """
    return JumpReLU.apply(z, theta, bandwidth)


def step(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[z > θ] of selected pairs, the summand of L0, with a straight-through gradient for θ; see `jumprelu`."""
    return Step.apply(z, theta, bandwidth)


def _check_k(score: Tensor, k: int) -> None:
    if score.ndim != 2:
        raise ValueError(f"score must be [B, F], got {tuple(score.shape)}")
    if not 1 <= k <= score.shape[1]:
        raise ValueError(f"k must lie in [1, F={score.shape[1]}], got {k}")
