"""Schedules at their corners."""

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
