"""The floor is the formula it documents, at rates whose result is known."""

import pytest
import torch

from fastdiff.benchmark.ceilings import Ceilings, measure_ceilings
from fastdiff.benchmark.floor import state_bytes, step_floor
from fastdiff.benchmark.shapes import SHAPES, Shape

# rates assumed when the kernels were planned: the predictions then were 32.9 and 9.5 ms
PLANNED = Ceilings(copy=4.3e12, cache=6.5e12, gather=4e12, gemm=790e12, precision="bfloat16")


@pytest.mark.parametrize(("size", "ms"), [("A", 32.9), ("B", 9.5)])
def test_the_planned_figures(size, ms):
    assert step_floor(SHAPES[size], PLANNED, clip="exact").total == pytest.approx(ms, abs=0.06)


def test_each_part_by_hand():
    shape = Shape("hand", 10, 2, 4, 64, 3)
    rates = Ceilings(copy=100.0, cache=50.0, gather=200.0, gemm=1000.0, precision="bfloat16")
    floor = step_floor(shape, rates, clip="exact", n_dead=5)
    g, once, weights = 10 * 3 * 8 * 2, 2 * 10 * 8 * 2, 2 * 64 * 8
    assert floor.encoder == pytest.approx(1e3 * 2 * 10 * 8 * 64 / 1000)
    assert floor.selection == pytest.approx(1e3 * (2 * 10 * 4 + 10 * 64 * 4) / 100)
    assert floor.decode == pytest.approx(1e3 * (g / 200 + once / 100))
    assert floor.clip == pytest.approx(1e3 * (2 * g / 200 + once / 100))
    assert floor.update == pytest.approx(1e3 * (26 * weights + once) / 100)
    assert floor.auxk == pytest.approx(1e3 * 4 * 2 * 10 * 8 * 5 / 1000)
    assert floor.total == pytest.approx(sum(vars(floor).values()))


def test_only_the_exact_clip_looks_at_the_gradient_before_the_update():
    exact, previous = (step_floor(SHAPES["A"], PLANNED, clip=clip) for clip in ("exact", "previous"))
    assert previous.clip == 0 < exact.clip and exact.update == previous.update


def test_a_slow_cache_bounds_the_update():
    slow = Ceilings(copy=4.3e12, cache=1e12, gather=1e12, gemm=790e12, precision="bfloat16")
    fast = step_floor(SHAPES["A"], PLANNED, clip="none").update
    assert step_floor(SHAPES["A"], slow, clip="none").update > 2 * fast


def test_bytes_per_weight():
    # the figures of the plan: 26 and 18 with a bfloat16 copy, 24 without
    assert state_bytes(moments="float32", shadow=True) == 26
    assert state_bytes(moments="bfloat16", shadow=True) == 18
    assert state_bytes(moments="float32", shadow=False) == 24


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ceilings_are_measured(precision):

    found = measure_ceilings(SHAPES["tiny"], torch.device("cpu"), precision, n=1)
    assert min(found.copy, found.cache, found.gemm) > 0 and found.gather == found.cache
    assert any(precision in line for line in found.lines())
