"""Where a step's time goes, from torch's profiler: kernels on a GPU, torch's operations on a CPU, sorted by name."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

# the first that matches counts. Kernels of kernels/*.py stand here by name; tests hold that none is missing
_KERNELS: tuple[tuple[str, str], ...] = (
    ("order", r"sort|permute_kernel|searchsorted|bucketize"),
    ("clip", r"norm_rows_kernel"),
    ("update", r"update_(rows|flat)_kernel|finish_norms_kernel|weight_gradients_kernel|weighted_rows_kernel"),
    ("decode", r"decode_loss|token_gradients|dots_kernel|normalize_kernel|chunk_sums|add_chunks|_backward_kernel"),
    ("selection", r"group_max|topk|digits_kernel|(count|list|emit|close)(_\w+)?_kernel|DeviceScan"),
    ("encoder", r"nvjet|gemm|cutlass|xmma|encoder_scores_kernel"),
)
_OPERATIONS: tuple[tuple[str, str], ...] = (
    ("decode", r"sampled_addmm|embedding_bag"),
    ("encoder", r"addmm|aten::mm$|mkldnn"),
    ("selection", r"topk|nonzero|amax|amin|aten::(ge|gt|eq|bitwise_and|clamp)|max_pool|index_put|masked"),
    ("order", r"sort|searchsorted|bincount|cumsum"),
    ("clip", r"linalg_vector_norm|aten::norm"),
    ("update", r"adam"),
)
OTHER = "other"


def part_of(name: str, device_type: str) -> str:
    """The part of a step that a kernel or operation belongs to."""
    rules = _KERNELS if device_type == "cuda" else _OPERATIONS
    return next((part for part, pattern in rules if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile_parts(step: Callable[[], object], device: torch.device, *, n: int = 5) -> dict[str, float]:
    """Milliseconds of each part of one step; only parts that took time, the longest first.

    On a CPU the weight gradients are sums of gathered rows like the decoding, and count with it.

    Args:
        step: Takes one step; called before as often as it needs to be in its stride.
        device: Where it runs.
        n: Profiled steps.
    """
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with _without_notes(), profile(activities=[activity]) as found:
        for _ in range(n):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    parts: dict[str, float] = {}
    for event in found.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            part = part_of(event.key, device.type)
            parts[part] = parts.get(part, 0.0) + us / 1e3 / n
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


@contextmanager
def _without_notes() -> Iterator[None]:
    """Take the profiler's own notes (USDT: profiler_start, …) out of stderr; there is no setting for it."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            lines = [line for line in held.read().splitlines(keepends=True) if not line.startswith(b"USDT:")]
            os.write(2, b"".join(lines))
