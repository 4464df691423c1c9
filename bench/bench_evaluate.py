"""What evaluating a crosscoder costs, against training on the same tokens in the same run.

    python -P bench/bench_evaluate.py [--config C] [--out FILE]

First the variance that `evaluate` explains is checked against a dense computation in float64, at a small size and over
batches of uneven sizes. Weights and tokens are synthetic (`fastdiff/benchmark/data.py`), the threshold is the mean of
the smallest scores that BatchTopK takes. Times are for 100,000 tokens: on a CPU the fastest of interleaved rounds and
the fewest CPU milliseconds, on a GPU the median. The shares are of what a training step takes on the same tokens:
fastdiff's, and dense autograd's as published trainers compute it. The encoder's product alone, which an evaluation
cannot do without, is the least it can cost.

The exit code is 1 if a figure is wrong.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from fastdiff.benchmark.data import Synthetic, synthetic
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.shapes import SHAPES, Shape
from fastdiff.benchmark.steps import fused_steps, step_config
from fastdiff.benchmark.table import Row, format_table, write_json
from fastdiff.benchmark.timing import Call, Timing, interleaved, timed
from fastdiff.crosscoder.metrics import evaluate
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.kernels import ops

CHECK = Shape("check", 301, 2, 40, 512, 8)
# float32 and another order of sums
LARGEST_DIFFERENCE = 1e-5
TOKENS = 100_000
N_SOURCES, N_ROLES = 12, 3
EVALUATE, GROUPED, PRODUCT = "evaluate", f"evaluate, {N_SOURCES} sources, {N_ROLES} roles", "the encoder's product"
FUSED, DENSE = "training: fastdiff", "training: dense fp32, as published"


@torch.no_grad()
def with_threshold(data: Synthetic, shape: Shape) -> Crosscoder:
    """A copy of the crosscoder that lets about k latents fire."""
    crosscoder = copy.deepcopy(data.crosscoder)
    scale = crosscoder.code_norm()
    lowest = [
        ops.batchtopk(crosscoder.pre_activations(crosscoder.normalize(batch)), shape.k, scale=scale)[1]
        for batch in data.batches
    ]
    crosscoder.threshold.fill_(float(torch.stack(lowest).mean()))
    return crosscoder


@torch.no_grad()
def dense_fve(crosscoder: Crosscoder, stored: Tensor) -> Tensor:
    """Fraction of the variance explained, by model and pooled, from every activation in float64; [M + 1]."""
    c = copy.deepcopy(crosscoder).double()
    x = (stored.to(c.b_dec) - c.input_mean) * c.input_scale[:, None]
    f = (torch.einsum("bmd,fmd->bf", x, c.W_enc) + c.b_enc).relu()
    f = torch.where(f * c.W_dec.norm(dim=2).sum(dim=1) > c.threshold, f, 0.0)
    error = x - torch.einsum("bf,fmd->bmd", f, c.W_dec) - c.b_dec
    errors, spread = error.square().sum(dim=(0, 2)), (x - x.mean(dim=0)).square().sum(dim=(0, 2))
    return torch.cat((1 - errors / spread, (1 - errors.sum() / spread.sum())[None]))


def check(device: torch.device) -> float:
    """The largest difference of a fraction of the variance explained from the dense one.

    Raises:
        SystemExit: They differ.
    """
    data = synthetic(CHECK, device, dtype=torch.float32)
    crosscoder = with_threshold(data, CHECK)
    stored = torch.cat(data.batches)
    quality = evaluate(crosscoder, stored.split((257, 1, 300, len(stored) - 558)))
    found = torch.tensor([*quality.fve, quality.fve_pooled], dtype=torch.float64)
    difference = float((found - dense_fve(crosscoder, stored).cpu()).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"WRONG FIGURE: the variance explained differs from the dense one by {difference:.1e}")
    return difference


def measure(shape: Shape, device: torch.device, rounds: int, n_batches: int) -> list[Row]:
    """A row for each contestant; all take the same tokens."""
    data = synthetic(shape, device, dtype=torch.float32, n_batches=n_batches)
    crosscoder = with_threshold(data, shape)
    rng = np.random.default_rng(0)
    sizes = {"source": N_SOURCES, "role": N_ROLES}
    names = {grouping: [str(i) for i in range(n)] for grouping, n in sizes.items()}
    grouped = [
        (batch, {grouping: rng.integers(n, size=len(batch)) for grouping, n in sizes.items()}) for batch in data.batches
    ]
    dense = DenseTrainer(data.crosscoder, step_config(shape))
    fused = fused_steps(data, step_config(shape))
    inputs = [crosscoder.normalize(batch) for batch in data.batches]
    calls: dict[str, Call] = {
        FUSED: lambda: [fused.step(batch) for batch in data.batches],
        DENSE: lambda: [dense.step(batch) for batch in data.batches],
        PRODUCT: lambda: [crosscoder.pre_activations(x) for x in inputs],
        EVALUATE: lambda: evaluate(crosscoder, data.batches),
        GROUPED: lambda: evaluate(crosscoder, grouped, names),
    }
    if device.type == "cpu":
        timings = interleaved(calls, rounds=rounds)
    else:
        timings = {name: timed(call, device, n=rounds) for name, call in calls.items()}
    scale = TOKENS / (n_batches * shape.n_tokens)
    return [as_row(shape, name, timing, timings, scale) for name, timing in timings.items()]


def as_row(shape: Shape, name: str, timing: Timing, timings: dict[str, Timing], scale: float) -> Row:
    """Times for 100,000 tokens, and shares of those of training."""
    row: Row = {"shape": shape.name, "name": name, "ms": timing.ms * scale, "median_ms": timing.median_ms * scale}
    if timing.cpu_ms is not None:
        row["cpu_ms"] = timing.cpu_ms * scale
    if name in (FUSED, DENSE):
        return row
    for key, other in (("fused", timings[FUSED]), ("dense", timings[DENSE])):
        row[f"of_{key}"] = timing.ms / other.ms
        if timing.cpu_ms is not None and other.cpu_ms is not None:
            row[f"cpu_of_{key}"] = timing.cpu_ms / other.cpu_ms
    return row


COLUMNS = (
    ("shape", "size", "{}"),
    ("name", "", "{}"),
    ("ms", "ms for 100 k", "{:,.0f}"),
    ("cpu_ms", "CPU ms", "{:,.0f}"),
    ("of_fused", "of fastdiff's step", "{:.1%}"),
    ("cpu_of_fused", "by CPU time", "{:.1%}"),
    ("of_dense", "of the dense step", "{:.1%}"),
    ("cpu_of_dense", "by CPU time", "{:.1%}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=list(SHAPES), default=["C"], help="sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--batches", type=int, default=2, help="different batches in a round")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(machine(device))
    difference = check(device)
    print(f"checked: the variance explained equals a dense float64 computation to {difference:.1e}")
    rows = []
    for name in options.config:
        print(SHAPES[name])
        rows += measure(SHAPES[name], device, options.rounds, options.batches)
    print("\n" + format_table(rows, COLUMNS))
    if options.out:
        write_json(options.out, machine=machine(device), check=difference, rows=rows)


if __name__ == "__main__":
    main()
