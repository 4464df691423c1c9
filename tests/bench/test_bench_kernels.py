"""Every kernel has a benchmark, and a wrong result or one that does not repeat is never timed."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import fastdiff.kernels
from fastdiff.benchmark.ceilings import Ceilings

BENCH = Path(__file__).parents[2] / "bench"
OPERATIONS = [
    "normalize", "encoder_scores", "group_max", "topk", "batchtopk", "above", "jumprelu",
    "sparse_decode", "sparse_encode", "weighted_rows", "decode_loss", "token_gradients", "column_sums",
    "latent_order", "norm_rows", "fused_adam", "auxk",
]  # fmt: skip
# files whose kernels belong to an operation of another name
PARTS = {"batchtopk_kernels": "batchtopk", "dots": "sparse_decode", "row_gradients": "norm_rows"}
RATES = Ceilings(copy=1e10, cache=2e10, gather=2e10, gemm=1e11, precision="float32")


@pytest.fixture(scope="module")
def modules():
    """bench_kernels and kernel_case."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("bench_kernels"), importlib.import_module("kernel_case")
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def measure(modules):
    bench, case = modules
    return case.Measure(case.Case(bench.DRY, torch.device("cpu")), RATES, n=1, warmup=0)


def test_every_operation_has_a_benchmark(modules):
    assert list(modules[0].BENCHMARKS) == OPERATIONS
    folder = Path(fastdiff.kernels.__file__).parent
    files = {
        file.stem for file in folder.glob("*.py") if re.search(r"^def \w+_kernel\(", file.read_text(), re.MULTILINE)
    }
    assert {PARTS.get(name, name) for name in files} <= set(OPERATIONS)


@pytest.mark.parametrize("name", ["normalize", "decode_loss", "above"])
def test_a_benchmark_checks_and_times(modules, measure, name):
    measure.rows.clear()
    modules[0].BENCHMARKS[name](measure)
    (row,) = measure.rows
    assert row["name"] == name and row["repeats"] is True and row["error"] < 1e-5
    assert row["ms"] > 0 and row["gb_per_s"] > 0 and row["of_floor"] > 0


def kernel(case, measure, call, out, true, **options):
    measure.rows.clear()
    measure.kernel(
        "planted",
        call,
        case.Cost(moved=8.0),
        outputs=[out],
        error=lambda: case.relative([(out, true)]),
        tolerance=1e-6,
        **options,
    )
    return measure.rows[0]


def test_a_wrong_result_stops(modules, measure):
    out, true = torch.zeros(4), torch.arange(4).double()
    with pytest.raises(SystemExit, match=r"WRONG RESULT: planted differs from float64 by 3\.3e-01, allowed 1\.0e-06"):
        kernel(modules[1], measure, lambda: out.copy_(true + torch.tensor([0, 0, 0, 1])), out, true)


def test_an_element_that_is_not_written_stops(modules, measure):
    out, true = torch.zeros(4), torch.arange(4).double()
    with pytest.raises(SystemExit, match="by inf"):
        kernel(modules[1], measure, lambda: out[:3].copy_(true[:3]), out, true)


def test_other_bits_the_second_time_are_shown(modules, measure):
    out, true, calls = torch.zeros(4), torch.ones(4).double(), []

    def call():
        calls.append(0)
        out.copy_(true + 1.2e-7 * len(calls))

    row = kernel(modules[1], measure, call, out, true)
    assert row["repeats"] is False and row["error"] < 1e-6


def test_what_changes_in_place_is_put_back(modules, measure):
    state, true = torch.ones(4), torch.full((4,), 2.0).double()
    row = kernel(modules[1], measure, lambda: state.mul_(2), state, true, restore=lambda: state.fill_(1.0))
    assert row["repeats"] is True and row["error"] == 0


def test_a_rival_is_compared_with_the_operation_above(modules, measure):
    out, true = torch.zeros(4), torch.ones(4).double()
    kernel(modules[1], measure, lambda: out.fill_(1.0), out, true)
    measure.rival("theirs", lambda: torch.ones(4), modules[1].Cost(moved=8.0))
    ours, theirs = measure.rows
    assert theirs["name"] == "  theirs" and theirs["ratio"] == pytest.approx(theirs["ms"] / ours["ms"])


def test_the_floor_of_an_operation(modules):
    cost = modules[1].Cost(moved=1e7, gathered=6e7, flop=1e8)
    # 1 ms by the copy rate, 3.5 by the cache, 1 by the products
    assert cost.floor_ms(RATES) == pytest.approx(3.5)
