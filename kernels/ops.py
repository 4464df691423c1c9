"""The public ops: check what a caller can get wrong, choose an implementation, compute.

A training step is `encoder_scores` (the one dense product), one of `topk`, `batchtopk`, `above` (which latents
fire), `sparse_encode` (their values), `sparse_decode` (the reconstruction). Gradients flow through the last two
and touch active latents only. `fastdiff.kernels.reference` says what each one means.

`backend` is "triton" (the kernels; needs CUDA), "torch" (sparse, in plain torch), "dense" (`reference`, with autograd's
gradients) or "auto": triton on CUDA, torch elsewhere. An explicit choice is obeyed or refused. Indices are not
range-checked: reading them back would stall the GPU. Every op raises ValueError, with what it saw, for a backend that
cannot run, tensors on different devices, dtypes that are not floating, and on triton for matrices that are not
contiguous.
"""

import torch
from torch import Tensor

from fastdiff.kernels import above as _above
from fastdiff.kernels import batchtopk as _batchtopk
from fastdiff.kernels import encoder_scores as _encoder_scores
from fastdiff.kernels import jumprelu as _jumprelu
from fastdiff.kernels import reference
from fastdiff.kernels import topk as _topk
from fastdiff.kernels.backend import Backend
from fastdiff.kernels.checks import check_encoder, check_entries, check_threshold, choose
from fastdiff.kernels.dots import dots as _dots
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.sparse_decode import sparse_decode as _sparse_decode
from fastdiff.kernels.sparse_encode import sparse_encode as _sparse_encode
from fastdiff.kernels.weighted_rows import at_entries as _at_entries
from fastdiff.kernels.weighted_rows import sum_by_latent as _sum_by_latent
from fastdiff.kernels.weighted_rows import sum_dtype
from fastdiff.kernels.weighted_rows import weighted_rows as _weighted_rows

__all__ = [
    "Selection",
    "above",
    "at_entries",
    "batchtopk",
    "dots",
    "encoder_scores",
    "jumprelu",
    "sparse_decode",
    "sparse_encode",
    "step",
    "sum_by_latent",
    "topk",
    "weighted_rows",
]


def encoder_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Pre-activations of every latent; no gradient is recorded.

    Args:
        x: Inputs, [B, C], C = M·D.
        W_enc: Encoder rows, [F, C], dtype of x.
        b_enc: Encoder biases, [F].
        backend: See the module; "auto" is "torch" on every device, since cuBLAS is the fastest there is. "triton"
            multiplies no float64.

    Returns:
        [B, F]; float32 for inputs of 16 bits, else their dtype.

    Raises:
        ValueError: The shapes or dtypes disagree.
    """
    check_encoder(x, W_enc, b_enc)
    if x.dtype != W_enc.dtype:
        raise ValueError(f"x and W_enc must have one dtype, got {x.dtype} and {W_enc.dtype}")
    chosen = choose("torch" if backend == "auto" else backend, x=x, W_enc=W_enc, b_enc=b_enc)
    with torch.no_grad():
        if chosen == "dense":
            dtype = sum_dtype(x.dtype)
            return reference.encoder_scores(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        if chosen == "torch":
            return _encoder_scores.encoder_scores_torch(x, W_enc, b_enc)
        return _encoder_scores.encoder_scores_triton(x, W_enc, b_enc)


@torch.no_grad()
def topk(score: Tensor, k: int, *, scale: Tensor | None = None, backend: Backend = "auto") -> Selection:
    """Select the k largest positive scores of each token.

    Args:
        score: [B, F], any float dtype; float64 not for backend "triton".
        k: At most this many per token, in [1, F].
        scale: What the score is yet to be multiplied by, [F], not negative; spares the product [B, F] on a CPU.
        backend: See the module.

    Returns:
        The selected pairs. Ties go to the lowest latent; NaN and infinity are never selected.

    Raises:
        ValueError: score is not 2-D, k is out of range, scale has another shape, or the backend cannot take them.

    Source:
        Gao et al. 2024, arXiv:2406.04093.
    """
    _check_k(score, k)
    _check_scale(score, scale)
    chosen = choose(backend, score=score, scale=scale)
    if chosen == "dense":
        return Selection.from_mask(reference.select_topk(_scaled(score, scale), k))
    return (_topk.topk_triton if chosen == "triton" else _topk.topk)(score, k, scale)


@torch.no_grad()
def batchtopk(
    score: Tensor, k: int, *, scale: Tensor | None = None, backend: Backend = "auto"
) -> tuple[Selection, Tensor]:
    """Select the B·k largest positive scores of the batch.

    Args:
        score: [B, F], any float dtype; float64 not for backend "triton".
        k: Selected pairs per token on average, in [1, F].
        scale: What the score is yet to be multiplied by, [F], not negative; spares the product [B, F] on a CPU.
        backend: See the module.

    Returns:
        The selected pairs (ties go to the lowest token, then latent; NaN and infinity are never selected), and
        the smallest selected score [], infinity where nothing is selected.

    Raises:
        ValueError: score is not 2-D, k is out of range, scale has another shape, or the backend cannot take them.

    Source:
        Bussmann et al. 2024, arXiv:2412.06410.
    """
    _check_k(score, k)
    _check_scale(score, scale)
    chosen = choose(backend, score=score, scale=scale)
    if chosen == "dense":
        score = _scaled(score, scale)
        mask = reference.select_batchtopk(score, k)
        return Selection.from_mask(mask), torch.where(mask, score, torch.inf).amin()
    return (_batchtopk.batchtopk_triton if chosen == "triton" else _batchtopk.batchtopk)(score, k, scale)


@torch.no_grad()
def above(score: Tensor, threshold: Tensor, *, backend: Backend = "auto") -> Selection:
    """Select the finite scores [B, F] above each latent's threshold [F].

    Raises:
        ValueError: The shapes disagree, or the backend cannot take them: "triton" takes no float64.
    """
    if score.ndim != 2 or threshold.shape != score.shape[1:]:
        raise ValueError(f"score [B, F] and threshold [F] disagree: {tuple(score.shape)}, {tuple(threshold.shape)}")
    chosen = choose(backend, score=score, threshold=threshold)
    if chosen == "dense":
        return Selection.from_mask(reference.select_above(score, threshold))
    return (_above.above_triton if chosen == "triton" else _above.above)(score, threshold)


def sparse_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, selection: Selection, *, backend: Backend = "auto"
) -> Tensor:
    """Pre-activations of the selected pairs, with gradients for W_enc and b_enc.

    Args:
        x: Inputs, [B, C]; data, gets no gradient.
        W_enc: Encoder rows, [F, C].
        b_enc: Encoder biases, [F].
        pre: What `encoder_scores` gave for them, [B, F]; "dense" computes it anew, with gradient.
        selection: nnz selected pairs.
        backend: See the module.

    Returns:
        [nnz], dtype of pre.

    Raises:
        ValueError: pre does not belong to x and W_enc.
    """
    check_encoder(x, W_enc, b_enc)
    if pre.shape != (len(x), len(W_enc)) or selection.n_tokens != len(x) or selection.dict_size != len(W_enc):
        raise ValueError(
            f"pre must be [B={len(x)}, F={len(W_enc)}] and the selection of B tokens and F latents, "
            f"got {tuple(pre.shape)} and {selection.n_tokens}, {selection.dict_size}"
        )
    chosen = choose(backend, selection, x=x, W_enc=W_enc, b_enc=b_enc, pre=pre)
    if chosen == "dense":
        return reference.encoder_scores(x.detach(), W_enc, b_enc)[selection.row, selection.col].to(pre.dtype)
    by = _by_latent_if_needed(selection, W_enc, b_enc)
    return _sparse_encode(x.detach(), W_enc, b_enc, pre.detach(), selection.col, selection.row, *by, chosen)


def sparse_decode(values: Tensor, selection: Selection, W_dec: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Add up the decoder rows of the selected latents, with gradients for values and W_dec.

    Args:
        values: Activations of the selected pairs, [nnz].
        selection: nnz selected pairs of B tokens.
        W_dec: Decoder rows, [F, C].
        backend: See the module.

    Returns:
        Reconstruction without bias, [B, C], dtype of W_dec. Sums run in float32, of float64 in float64.

    Raises:
        ValueError: The shapes disagree.
    """
    check_entries(selection, values=values)
    if W_dec.ndim != 2 or len(W_dec) != selection.dict_size:
        raise ValueError(f"W_dec must be [F={selection.dict_size}, C], got {tuple(W_dec.shape)}")
    chosen = choose(backend, selection, values=values, W_dec=W_dec)
    if chosen == "dense":
        dtype = sum_dtype(values.dtype, W_dec.dtype)
        f = values.new_zeros(selection.n_tokens, selection.dict_size, dtype=dtype)
        f = f.index_put((selection.row, selection.col), values.to(dtype))
        return reference.sparse_decode(f, W_dec.to(dtype)).to(W_dec.dtype)
    by = _by_latent_if_needed(selection, W_dec)
    return _sparse_decode(values.contiguous(), W_dec, selection.crow, selection.col, *by, chosen)


def weighted_rows(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Weighted sums of gathered rows: out[g] = Σ weight[i] · rows[index[i]] over start[g] <= i < start[g + 1].

    Args:
        index: Which row, [nnz] int64, each in [0, R).
        rows: [R, C].
        start: Where each of G groups begins, [G + 1] int64, the last being nnz.
        weight: [nnz].
        backend: See the module.

    Returns:
        [G, C], dtype of rows; zero for an empty group. It has no gradient (backward raises): `sparse_decode` is the
        same sum with gradients.

    Raises:
        ValueError: The shapes disagree, or index and start are no integers.
    """
    if rows.ndim != 2 or index.ndim != 1 or weight.shape != index.shape or start.ndim != 1 or not len(start):
        raise ValueError(
            f"index [nnz], rows [R, C], start [G + 1] and weight [nnz] expected, "
            f"got {tuple(index.shape)}, {tuple(rows.shape)}, {tuple(start.shape)}, {tuple(weight.shape)}"
        )
    if index.dtype != torch.int64 or start.dtype != torch.int64:
        raise ValueError(f"index and start must be int64, got {index.dtype} and {start.dtype}")
    if index.device != rows.device or start.device != rows.device:
        raise ValueError(
            f"index, start and rows must share a device, got {index.device}, {start.device}, {rows.device}"
        )
    chosen = choose(backend, rows=rows, weight=weight)
    if chosen == "dense":
        dtype = sum_dtype(rows.dtype, weight.dtype)
        return reference.weighted_rows(index, rows.to(dtype), start, weight.to(dtype)).to(rows.dtype)
    return _weighted_rows(index.contiguous(), rows, start.contiguous(), weight.contiguous(), rows.dtype, chosen)


def dots(selection: Selection, left: Tensor, right: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Inner products ⟨left[row[i]], right[col[i]]⟩ of the selected pairs.

    Args:
        selection: nnz selected pairs of B tokens.
        left: [B, C].
        right: [F, C].
        backend: See the module.

    Returns:
        [nnz]; float64 where one of them is, else float32. It has no gradient: backward raises.

    Raises:
        ValueError: The shapes disagree.
    """
    if (
        left.ndim != 2
        or right.ndim != 2
        or left.shape[1] != right.shape[1]
        or (len(left), len(right)) != (selection.n_tokens, selection.dict_size)
    ):
        raise ValueError(
            f"left [B={selection.n_tokens}, C] and right [F={selection.dict_size}, C] expected, "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    chosen = choose(backend, selection, left=left, right=right)
    dtype = sum_dtype(left.dtype, right.dtype)
    if chosen == "dense":
        return (left.to(dtype) @ right.to(dtype).T)[selection.row, selection.col]
    return _dots(selection.crow, selection.col, left, right, dtype, chosen)


def sum_by_latent(selection: Selection, values: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Sum of the values [nnz] of each latent, [F]; with gradient, in a fixed order, so repeats are bit-identical.

    Raises:
        ValueError: The shapes disagree.
    """
    check_entries(selection, values=values)
    chosen = choose(backend, selection, values=values)
    if chosen == "dense":
        return values.new_zeros(selection.dict_size).index_add(0, selection.col, values)
    order, start, _ = _by_latent(selection)
    return _sum_by_latent(values.contiguous(), selection.col, order, start, chosen)


def at_entries(selection: Selection, per_latent: Tensor, *, backend: Backend = "auto") -> Tensor:
    """What latents have [F], such as thresholds, at each entry [nnz]: per_latent[col].

    Its gradient is `sum_by_latent`. That of plain indexing is added up by atomics on a CPU with several threads: 20
    repeats on two threads gave 4 different results.

    Raises:
        ValueError: The shapes disagree.
    """
    if per_latent.shape != (selection.dict_size,):
        raise ValueError(f"per_latent must be [F={selection.dict_size}], got {tuple(per_latent.shape)}")
    chosen = choose(backend, selection, per_latent=per_latent)
    if chosen == "dense":
        return per_latent[selection.col]
    order, start, _ = _by_latent_if_needed(selection, per_latent)
    return _at_entries(per_latent, selection.col, order, start, chosen)


def jumprelu(z: Tensor, theta: Tensor, bandwidth: float, *, backend: Backend = "auto") -> Tensor:
    """Activations z·1[z > θ] of selected pairs; `fastdiff.kernels.jumprelu` gives the gradients.

    Args:
        z: Pre-activations, [nnz].
        theta: Thresholds of their latents, [nnz], above 0; see `at_entries`.
        bandwidth: ε > 0, width of the window in which θ gets a gradient.
        backend: See the module; only the gradients differ.

    Returns:
        [nnz].

    Raises:
        ValueError: The shapes disagree or the bandwidth is not above 0.
    """
    check_threshold(z, theta, bandwidth)
    chosen = choose(backend, z=z, theta=theta)
    if chosen == "dense":
        return reference.jumprelu(z, theta, bandwidth)
    return _jumprelu.jumprelu(z.contiguous(), theta.contiguous(), bandwidth, chosen)


def step(z: Tensor, theta: Tensor, bandwidth: float, *, backend: Backend = "auto") -> Tensor:
    """1[z > θ] of selected pairs, the summand of L0, with a straight-through gradient for θ; see `jumprelu`."""
    check_threshold(z, theta, bandwidth)
    chosen = choose(backend, z=z, theta=theta)
    if chosen == "dense":
        return reference.step(z, theta, bandwidth)
    return _jumprelu.step(z.contiguous(), theta.contiguous(), bandwidth, chosen)


def _by_latent_if_needed(selection: Selection, *weights: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The entries by latent where a gradient of these weights may be asked for: it costs a sort."""
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _by_latent(selection)
    return None, None, None


def _by_latent(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    # cached_property holds a lock on Python 3.11, which torch.compile cannot trace
    by = selection.sort_by_latent() if torch.compiler.is_compiling() else selection.by_latent
    return by.order, by.start, by.row


def _check_k(score: Tensor, k: int) -> None:
    if score.ndim != 2:
        raise ValueError(f"score must be [B, F], got {tuple(score.shape)}")
    if not 1 <= k <= score.shape[1]:
        raise ValueError(f"k must lie in [1, F={score.shape[1]}], got {k}")


def _check_scale(score: Tensor, scale: Tensor | None) -> None:
    if scale is not None and scale.shape != score.shape[1:]:
        raise ValueError(f"scale must be [F={score.shape[1]}], got {tuple(scale.shape)}")


def _scaled(score: Tensor, scale: Tensor | None) -> Tensor:
    """In the type that the other implementations compare in."""
    return score if scale is None else score.to(torch.promote_types(score.dtype, torch.float32)) * scale
