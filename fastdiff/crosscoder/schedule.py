"""What changes from step to step: learning rate, k, penalty weight. Steps count from 0."""


def learning_rate(step: int, *, base: float, steps: int, warmup: int, decay: int) -> float:
    """Linear rise over `warmup` steps, constant, linear fall to 0 over the last `decay` steps."""
    if step < warmup:
        return base * (step + 1) / warmup
    if step >= steps - decay:
        return base * (steps - step) / (decay + 1)
    return base


def active_latents(step: int, *, k: int, k_start: int | None, anneal: int) -> int:
    """K falls linearly from `k_start` to `k` over `anneal` steps; without annealing it is `k` from the start."""
    if k_start is None or step >= anneal:
        return k
    return round(k_start + (k - k_start) * step / anneal)


def ramp(step: int, warmup: int) -> float:
    """0 to 1 over `warmup` steps."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)
