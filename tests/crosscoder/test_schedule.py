"""Schedules at their corners."""

import math

import pytest

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import schedule


def test_learning_rate_rises_holds_and_falls():
    rates = [schedule.learning_rate(t, base=1.0, steps=10, warmup=2, decay=3) for t in range(10)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_without_warmup_and_decay_it_is_constant():
    assert {schedule.learning_rate(t, base=0.3, steps=4, warmup=0, decay=0) for t in range(4)} == {0.3}


def test_k_falls_linearly_and_stays():
    ks = [schedule.active_latents(t, k=4, k_start=12, anneal=8) for t in range(12)]
    assert ks == [12, 11, 10, 9, 8, 7, 6, 5, 4, 4, 4, 4]


def test_k_without_annealing_is_k_from_the_first_step():
    """Published code keeps its start value for ever when the annealing lasts 0 steps."""
    assert schedule.active_latents(0, k=4, k_start=12, anneal=0) == 4
    assert schedule.active_latents(0, k=4, k_start=None, anneal=8) == 4


def test_ramp():
    assert [schedule.ramp(t, 4) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.ramp(0, 0) == 1.0


def test_a_cosine_falls_by_half_a_period():
    rates = [schedule.learning_rate(t, base=2.0, steps=10, warmup=2, decay=3, shape="cosine") for t in range(10)]
    fall = [1 - math.cos(math.pi * left / 4) for left in (3, 2, 1)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, *fall])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_rate_is_never_zero_and_never_above_its_base(shape):
    for steps, warmup, decay in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (5, 2, 3), (4, 0, 4)):
        for t in range(steps):
            rate = schedule.learning_rate(t, base=0.1, steps=steps, warmup=warmup, decay=decay, shape=shape)
            assert 0 < rate <= 0.1, (steps, warmup, decay, t)


def test_schedules_follow_the_configuration():
    config = TrainConfig(dict_size=64, k=4, k_start=12, k_anneal_steps=8, steps=20, lr=0.5, warmup_steps=4,
                         decay_steps=4, decay="cosine", threshold_decay=0.9)  # fmt: skip
    assert [schedule.k_at(t, config) for t in (0, 4, 8, 19)] == [12, 8, 4, 4]
    assert [schedule.rate_at(t, config) for t in (0, 4, 15)] == [0.125, 0.5, 0.5]
    assert schedule.rate_at(18, config) == pytest.approx(0.25 * (1 - math.cos(math.pi * 0.4)))
    # the first value is taken as it is, the next ones as a plain mean would nearly take them
    assert [schedule.threshold_memory(t, config) for t in (0, 1, 9, 81, 500)] == [0, 0.1, 0.5, 0.9, 0.9]
