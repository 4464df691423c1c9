"""Every kernel of a training step at the real sizes: checked, then timed, beside what else does the same.

    python -P bench/bench_kernels.py --config A B [--only topk decode_loss] [--rivals DIR] [--out FILE]
    python -P bench/bench_kernels.py --dry-run          tiny sizes on a CPU, in Triton's interpreter

For each operation: milliseconds (median of CUDA graph replays), GB/s of the bytes it must move or TFLOP/s, share of
the floor these bytes have at the measured ceilings, memory it allocates, whether a second run gives the same bits, and
its largest error against float64 over the largest true value, on sampled tokens and latents (the longest and the
shortest row, the most and the least frequent latent, and some others). Outputs are filled with NaN before the run that
is checked. Inputs are those of one step at lognormal latent frequencies and uneven rows (`fastdiff/benchmark/data.py`).
Indented rows are others' code on the same data; "ours is faster by" is their time over that of the row above.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import kernels_selecting
import kernels_summing
import torch
from kernel_case import Case, Measure

from fastdiff.benchmark.ceilings import measure_ceilings
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.shapes import SHAPES, Shape
from fastdiff.benchmark.table import format_table, write_json

# inside Triton's interpreter a program costs milliseconds
DRY = Shape("tiny", 5, 2, 12, 40, 3)

# bench_<operation> of both files, in the order of a step
BENCHMARKS: dict[str, Callable[[Measure], None]] = {
    name.removeprefix("bench_"): function
    for module in (kernels_selecting, kernels_summing)
    for name, function in vars(module).items()
    if name.startswith("bench_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=list(SHAPES), default=["A"], help="sizes")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), help="operations")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--rivals", type=Path, help="folder that holds sparsify and what it needs")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--resume", action="store_true", help="keep the operations that --out holds already")
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume needs --out")
    if options.rivals:
        sys.path.append(str(options.rivals))
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device; --dry-run shows on a CPU that everything runs")
    device = torch.device("cpu" if options.dry_run else "cuda")
    shapes = [DRY] if options.dry_run else [SHAPES[name] for name in options.config]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    before: dict[str, Any] = {"rows": [], "done": [], "ceilings": {}}
    if options.resume and options.out.exists():
        before = json.loads(options.out.read_text())
    rows, done = list(before["rows"]), list(before["done"])
    facts = {"machine": machine(device), "ceilings": before["ceilings"]}
    for shape in shapes:
        left = [name for name in options.only or BENCHMARKS if f"{shape.name} {name}" not in done]
        if not left:
            continue
        rates = measure_ceilings(shape, device, "bfloat16" if device.type == "cuda" else "float32")
        facts["ceilings"][shape.name] = vars(rates)
        measure = Measure(
            Case(shape, device), rates, 1 if options.dry_run else options.samples, 0 if options.dry_run else 2
        )
        for name in left:
            BENCHMARKS[name](measure)
            done.append(f"{shape.name} {name}")
            if options.out:
                write_json(options.out, **facts, rows=rows + measure.rows, done=done, complete=False)
        rows += measure.rows
        del measure
    print(format_table(rows))
    if options.out:
        write_json(options.out, **facts, rows=rows, done=done, complete=True)


if __name__ == "__main__":
    main()
