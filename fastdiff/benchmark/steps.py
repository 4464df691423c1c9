"""Whole training steps: fastdiff's, and anything else that has `step(batch)` and `window()`."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.benchmark.data import Synthetic, synthetic
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.timing import Timing, timed
from fastdiff.config import TrainConfig, validated
from fastdiff.crosscoder.fused_trainer import FusedTrainer

# so small that the measured state stays what it was: nothing about the work depends on it
_RATE = 1e-6
# steps before anything is timed: kernels compile, buffers are allocated, a CUDA graph is captured
WARMUP = 5


class Steps(Protocol):
    """What is measured."""

    def step(self, batch: Tensor, /) -> Any:
        """One update on [B, M, D]."""

    def window(self) -> Any:
        """Wait until all steps are done."""


@dataclass(frozen=True)
class StepFigures:
    """What a step costs."""

    timing: Timing
    peak_bytes: int | None  # most memory that torch's allocator had handed out, on CUDA
    repeats: bool | None  # the same steps from the same start gave the same bits; None: not tried


def step_config(shape: Shape, **options: Any) -> TrainConfig:
    """A configuration of these sizes: BatchTopK with L2-norm loss, clipped at 1, unless `options` say otherwise."""
    plain = {"steps": 1_000_000, "lr": _RATE, "warmup_steps": 0, "sparsity_warmup_steps": 0}
    sizes = {"dict_size": shape.dict_size, "k": shape.k, "batch_size": shape.n_tokens}
    return validated(TrainConfig, {**plain, **sizes, **options})


def fused_steps(data: Synthetic, config: TrainConfig) -> FusedTrainer:
    """Fastdiff's steps on the weights of `data`, in place; latents that cannot fire count as dead from the start."""
    trainer = FusedTrainer(data.crosscoder, config)
    trainer.tokens_since_fired[data.dead] = config.dead_tokens
    return trainer


def measure_steps(
    shape: Shape,
    device: torch.device,
    make: Callable[[Synthetic], Steps],
    *,
    dead_share: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    n: int = 10,
    warmup: int = WARMUP,
    repeat: bool = False,
    least_ms: float = 100.0,
) -> StepFigures:
    """Time steps in this process, which should hold nothing else.

    Args:
        shape: Sizes.
        device: Where.
        make: Builds the contestant from fresh data, whose weights it may use in place.
        dead_share: Share of dead latents.
        dtype: Of the batches.
        n: Timed samples.
        warmup: Steps before.
        repeat: Take the first `warmup` steps twice and compare the weights bit by bit.
        least_ms: Least length of a sample on a GPU; a shorter step is taken several times.
    """
    prints: list[int] = []
    for turn in range(2 if repeat else 1):
        data = synthetic(shape, device, dead_share=dead_share, dtype=dtype)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        contestant, batches = make(data), cycle(data.batches)
        for _ in range(warmup):
            contestant.step(next(batches))
        contestant.window()
        peaks = [_peak(device)]
        if repeat:
            prints.append(fingerprint(list(data.crosscoder.parameters())))
        if turn == 0:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # the fingerprint's memory is none of the steps'
            timing = _timing(contestant, batches, device, n, least_ms)
            contestant.window()
            peak = max([*peaks, _peak(device)])
        # the next turn needs the room
        del data, contestant, batches
        gc.collect()
    return StepFigures(timing, peak or None, prints[0] == prints[1] if repeat else None)


def _peak(device: torch.device) -> int:
    """Most bytes that torch had handed out on a GPU since the last reset; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _timing(contestant: Steps, batches: Iterator[Tensor], device: torch.device, n: int, least_ms: float) -> Timing:
    def call() -> None:
        contestant.step(next(batches))

    return timed(call, device, n=n, warmup=1, least_ms=least_ms)


def fingerprint(tensors: list[Tensor]) -> int:
    """A number that changes when a bit of the float32 tensors does, or two elements change places."""
    total, n = 0, 2**24
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.int32)
        for at in range(0, len(bits), n):
            part = bits[at : at + n].to(torch.int64)
            place = torch.arange(at, at + len(part), device=part.device)
            # odd multipliers lose nothing modulo 2^64
            total = (total * 3 + int((part * (2 * place + 1)).sum())) % 2**64
    return total
