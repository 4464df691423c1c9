"""What `aot` compiles: every launcher, on tensors without values, at the sizes of a real run and at odd ones.

Letters as in `fastdiff.kernels`: B tokens, M models of width D, C = M·D, F latents, k.
"""

import functools
from collections.abc import Callable

import torch
from meta_step import meta_step

from fastdiff.kernels.above import AboveWork, above_slots
from fastdiff.kernels.dots import dots_into
from fastdiff.kernels.encoder_scores import encoder_scores_into
from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.latent_order import LatentOrder
from fastdiff.kernels.normalize import normalize
from fastdiff.kernels.row_gradients import weight_gradients
from fastdiff.kernels.slots import Slots
from fastdiff.kernels.topk import topk_slots_radix
from fastdiff.kernels.weighted_rows import weighted_rows_into

META = torch.device("meta")
# B, M, D, F, k
A = (8192, 2, 3584, 114688, 100)
B = (4096, 2, 2304, 73728, 100)
ODD = (77, 3, 130, 1001, 7)
N_DEAD = 4096


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def integers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def step(size: tuple[int, ...], **changed) -> None:
    """All launches of a training step, with AuxK over a list of dead latents."""
    meta_step(*size, n_dead=min(size[3], N_DEAD), **changed)


def batches(size: tuple[int, ...]) -> None:
    """Stored activations of the types that `step` has no case of, to both types that the encoder multiplies."""
    n_tokens, M, D, _, _ = size
    for stored, low in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        x = meta(n_tokens, M * D, dtype=low)
        batch = meta(n_tokens, M, D, dtype=stored)
        normalize(batch, meta(M, D), meta(M), x, meta(n_tokens, M), integers(2), integers(1), row_offset=0)


def gradients(size: tuple[int, ...]) -> None:
    """Dense gradients of both weights from sorted pairs."""
    n_tokens, M, D, F, k = size
    x, rows = meta(n_tokens, M * D, dtype=torch.bfloat16), meta(F, M * D)
    order = LatentOrder.allocate(n_tokens * k, F, META)
    weight_gradients(order, meta(n_tokens, M), x, x, rows, rows, meta(F), n_models=M)


def topk(size: tuple[int, ...], k: int) -> None:
    """Selection of more latents than registers hold; stored scores of both types."""
    n_tokens, _, _, F, _ = size
    slots = Slots.allocate(n_tokens, k, META)
    for dtype in (torch.float32, torch.bfloat16):
        topk_slots_radix(
            meta(n_tokens, F, dtype=dtype), meta(F), meta(F), integers(2), integers(1), slots, k_max=k, row_offset=0
        )


def above(size: tuple[int, ...]) -> None:
    """JumpReLU's selection, and that of inference with BatchTopK's threshold."""
    n_tokens, _, _, F, k = size
    for bias, scale in ((meta(F), meta(F)), (None, None)):
        above_slots(
            meta(n_tokens, F),
            bias,
            scale,
            meta(F),
            AboveWork.allocate(n_tokens, F, META),
            integers(2),
            integers(1),
            Slots.allocate(n_tokens, k, META),
            meta(1, dtype=torch.int64),
        )


def sparse_ops(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Decoding and its gradients outside the fused step: index int64, one nnz per token and k."""
    n_tokens, M, D, F, k = size
    nnz, long = n_tokens * k, torch.int64
    index, values = meta(nnz, dtype=long), meta(nnz)
    rows, tokens = meta(F, M * D, dtype=dtype), meta(n_tokens, M * D, dtype=dtype)
    weighted_rows_into(index, rows, meta(n_tokens + 1, dtype=long), values, meta(n_tokens, M * D, dtype=dtype))
    weighted_rows_into(index, tokens, meta(F + 1, dtype=long), values, rows)
    weighted_rows_into(meta(nnz, dtype=long), meta(1, 1), meta(F + 1, dtype=long), values, meta(F, 1))
    dots_into(meta(n_tokens + 1, dtype=long), index, tokens, rows, values)


def encoder(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """The product by the kernel, with and without maxima."""
    n_tokens, M, D, F, _ = size
    x, W_enc = meta(n_tokens, M * D, dtype=dtype), meta(F, M * D, dtype=dtype)
    encoder_scores_into(x, W_enc, meta(n_tokens, F), bias=meta(F), store_bias=True)
    encoder_scores_into(
        x,
        W_enc,
        meta(n_tokens, F),
        bias=meta(F),
        scale=meta(F),
        maxima=meta(n_tokens, -(-F // 64)),
        limits=integers(2),
        bad=integers(1),
    )


def low_scores(size: tuple[int, ...]) -> None:
    """Maxima of bfloat16 scores, without bias and scale."""
    n_tokens, _, _, F, _ = size
    scores = meta(n_tokens, F, dtype=torch.bfloat16)
    group_max(scores, None, None, meta(n_tokens, -(-F // 64)), integers(2), integers(1))


CASES: dict[str, Callable[[], None]] = {}
for name, size in (("A", A), ("B", B), ("odd", ODD)):
    CASES[f"{name} step batchtopk"] = functools.partial(step, size)
    CASES[f"{name} step topk"] = functools.partial(
        step, size, selection="topk", loss="mse", moments="bfloat16", clip_mode="previous"
    )
    CASES[f"{name} step float32"] = functools.partial(step, size, precision="float32")
    CASES[f"{name} batches"] = functools.partial(batches, size)
    CASES[f"{name} gradients"] = functools.partial(gradients, size)
    CASES[f"{name} above"] = functools.partial(above, size)
    CASES[f"{name} sparse bfloat16"] = functools.partial(sparse_ops, size, torch.bfloat16)
    CASES[f"{name} sparse float32"] = functools.partial(sparse_ops, size, torch.float32)
    CASES[f"{name} encoder bfloat16"] = functools.partial(encoder, size, torch.bfloat16)
    CASES[f"{name} bfloat16 scores"] = functools.partial(low_scores, size)
CASES["odd encoder float32"] = functools.partial(encoder, ODD, torch.float32)
CASES["A topk, large k"] = functools.partial(topk, A, 2000)
