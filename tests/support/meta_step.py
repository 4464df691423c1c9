"""A whole training step on tensors without values: what it launches, and the proof that it reads nothing back."""

import torch
from dense_step import make_settings

from fastdiff.kernels.auxk import DeadLatents
from fastdiff.kernels.step import StepRates, StepTensors
from fastdiff.kernels.triton_step import TritonStep


def meta_step(B: int, M: int, D: int, F: int, k: int, *, n_dead: int, **changed) -> None:
    """One step of B tokens with a list of n_dead dead latents."""
    settings = make_settings(n_tokens=B, k_max=k, clip=1.0, **{"precision": "bfloat16", **changed})

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    W = {"W_enc": empty(F, M, D), "b_enc": empty(F), "W_dec": empty(F, M, D), "b_dec": empty(M, D)}
    kinds = {name: getattr(torch, settings.moments) if w.ndim == 3 else torch.float32 for name, w in W.items()}
    tensors = StepTensors(
        **W,
        moments={name: tuple(empty(*w.shape, dtype=kinds[name]) for _ in range(2)) for name, w in W.items()},
        gradient_norm=empty(),
        threshold=empty(F),
        tokens_since_fired=empty(F, dtype=torch.int64),
        input_mean=empty(M, D),
        input_scale=empty(M),
    )
    step = TritonStep(settings, tensors)
    # the one thing a step reads back, every 64th time, is how long this list must be
    step._planned_at = 1
    if n_dead:
        step._dead = DeadLatents.allocate(n_dead, B, F, M * D, step._x.dtype, torch.device("meta"))
    step.step(empty(settings.max_tokens, M, D, dtype=torch.bfloat16), StepRates(1, k, 1e-4, 0.9))
