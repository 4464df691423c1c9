"""What changes from step to step: learning rate, k, penalty weight, memory of the threshold. Steps count from 0."""

import math

from fastdiff.config import TrainConfig


def rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step."""
    return learning_rate(
        step,
        base=config.lr,
        steps=config.steps,
        warmup=config.warmup_steps,
        decay=config.decay_steps,
        shape=config.decay,
    )


def k_at(step: int, config: TrainConfig) -> int:
    """K of a step."""
    return active_latents(step, k=config.k, k_start=config.k_start, anneal=config.k_anneal_steps)


def threshold_memory(step: int, config: TrainConfig) -> float:
    """Share of the inference threshold that a step keeps: set at the first, and not held back by the first ones."""
    return min(config.threshold_decay, step / (step + 9))


def learning_rate(step: int, *, base: float, steps: int, warmup: int, decay: int, shape: str = "linear") -> float:
    """Linear rise over `warmup` steps, constant, fall to 0 over the last `decay` steps: "linear" or half a "cosine"."""
    if step < warmup:
        return base * (step + 1) / warmup
    if step < steps - decay:
        return base
    left = (steps - step) / (decay + 1)
    return base * (left if shape == "linear" else (1 - math.cos(math.pi * left)) / 2)


def active_latents(step: int, *, k: int, k_start: int | None, anneal: int) -> int:
    """K falls linearly from `k_start` to `k` over `anneal` steps; without annealing it is `k` from the start."""
    if k_start is None or step >= anneal:
        return k
    return round(k_start + (k - k_start) * step / anneal)


def ramp(step: int, warmup: int) -> float:
    """0 to 1 over `warmup` steps."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)
