"""Whole training steps: fastdiff's against dense autograd and against sparsify, in the same run.

    python -P bench/bench_train.py --config C [--rivals DIR] [--out FILE]      CPU: interleaved in one process
    python -P bench/bench_train.py --config A B [--seconds 240] [--out FILE]   GPU: a process for each contestant
    python -P bench/bench_train.py --config C --fve                            reconstruction after 300 steps

First fastdiff's step is checked against the dense autograd step at a small size, AuxK alive and the clip active.
Weights and batches are synthetic: latent frequencies lognormal, row lengths with a standard deviation of 0.7·k
(`fastdiff/benchmark/data.py`; printed). Contestants are those of `rivals.py`; all of a group do the same mathematics.

On a CPU a figure is the fastest step and the fewest CPU milliseconds of interleaved rounds; on a GPU the median of
samples between device events, and the most memory that torch had handed out, CUDA graph included. "of floor" is the
floor of `fastdiff/benchmark/floor.py` over the time, from ceilings measured in the same run. "ours is faster by" is
the contestant's time over that of fastdiff with the same group and the same clip (a dense step under `previous` would
take the same passes as under `exact`, so it stands for both). DIR holds sparsify: see bench/gpu.sh.

The exit code is 1 if the step is wrong; and, for configurations C, A and B at full size, if a target is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# before CUDA starts: cuBLAS repeats bit by bit
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

import torch
from rivals import DENSE, ON_CPU, ON_CUDA, OURS, SPARSIFY, Contestant, sparsify_is_there

from fastdiff.benchmark.ceilings import Ceilings, measure_ceilings
from fastdiff.benchmark.data import spread, synthetic
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.benchmark.floor import step_floor
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.shapes import SHAPES, Shape
from fastdiff.benchmark.steps import fused_steps, measure_steps, step_config
from fastdiff.benchmark.table import COLUMNS, Row, format_table, write_json
from fastdiff.benchmark.timing import interleaved

CHECK = Shape("check", 96, 2, 40, 512, 8)
DEAD_SHARE = 0.3
# contestant -> how many times as fast fastdiff must be, by configuration
TARGETS = {
    "A": {"dense bf16, torch.compile, fused Adam": 2.6, "dense fp32 high": 5, "dense fp32 highest": 25, SPARSIFY: 2},
    "B": {"dense bf16, torch.compile, fused Adam": 2.2, "dense fp32 high": 4, "dense fp32 highest": 20, SPARSIFY: 2},
    "C": {"dense fp32, as published": 4.5, SPARSIFY: 1.5},
}
BF16_ON_CPU = 6.0
# of fastdiff's own rows on a GPU: least tokens/s by clip and share of the floor; most GB without and with dead latents
BARS = {
    "A": {"exact": 195e3, "previous": 220e3, "of_floor": 0.80, "peak_gb": (29, 32)},
    "B": {"exact": 330e3, "previous": 370e3, "of_floor": 0.75},
}


def check(device: torch.device) -> float:
    """Take six steps fastdiff's way and densely; the largest relative difference of a weight tensor.

    Raises:
        SystemExit: They differ.
    """
    data = synthetic(CHECK, device, dead_share=0.3, dtype=torch.float32, n_batches=6)
    # the first steps' gradients are above the clip, AuxK acts from the first step on
    config = step_config(CHECK, lr=1e-3, precision="float32", clip=0.5)
    before = {name: p.detach().clone() for name, p in data.crosscoder.named_parameters()}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    dense = DenseTrainer(data.crosscoder, config)
    dense.tokens_since_fired[data.dead] = config.dead_tokens
    ours = fused_steps(data, config)
    for batch in data.batches:
        dense.step(batch)
        ours.step(batch)
    ours.window()
    torch.set_float32_matmul_precision(precision)
    worst = 0.0
    for name, weight in dense.weights().items():
        expected, found = weight.detach(), getattr(data.crosscoder, name).detach()
        worst = max(worst, float((found - expected).norm() / (expected - before[name]).norm()))
    if not worst <= 1e-4:
        sys.exit(
            f"WRONG STEP: after {len(data.batches)} steps a weight differs from autograd's by {worst:.1e} of its change"
        )
    return worst


def on_cpu(shape: Shape, rounds: int) -> list[Row]:
    """Every contestant in turn, in this process."""
    contestants = [c for c in ON_CPU if c.side != SPARSIFY or sparsify_is_there()]
    calls = {}
    for c in contestants:
        data = synthetic(shape, torch.device("cpu"), dtype=torch.float32, n_batches=1)
        steps, batch = c.make(data, shape), data.batches[0]
        calls[c.name] = lambda steps=steps, batch=batch: steps.step(batch)
    timings = interleaved(calls, rounds=rounds, warmup=3)
    return [
        {
            "shape": shape.name, "name": c.name, "clip": c.clip, "side": c.side, "group": c.group,
            "ms": timings[c.name].ms, "median_ms": timings[c.name].median_ms, "cpu_ms": timings[c.name].cpu_ms,
            "tokens_per_s": 1e3 * shape.n_tokens / timings[c.name].ms,
        }
        for c in contestants
    ]  # fmt: skip


def in_processes(shapes: list[Shape], device: torch.device, options: argparse.Namespace) -> list[Row]:
    """A process for each contestant, the important ones first, until the time is up.

    With `--resume` those that `--out` holds already are taken from there.
    """
    deadline = time.monotonic() + options.seconds
    before = json.loads(options.out.read_text())["rows"] if options.resume and options.out.exists() else []
    known = {(row["shape"], row["name"], row["clip"], row["dead"]): row for row in before if "ms" in row}
    jobs = []
    for c in ON_CUDA:
        if c.side == SPARSIFY and not sparsify_is_there():
            continue
        jobs += [(shape, c, 0.0) for shape in shapes]
        if c.name == "fastdiff":
            jobs += [(shape, c, DEAD_SHARE) for shape in shapes]
    rows: list[Row] = []
    for shape, c, dead in jobs[: options.first]:
        left = deadline - time.monotonic()
        row = {"shape": shape.name, "name": c.name, "clip": c.clip, "side": c.side, "group": c.group, "dead": dead}
        if (shape.name, c.name, c.clip, dead) in known:
            rows.append(known[shape.name, c.name, c.clip, dead])
            continue
        if left < options.least_seconds:
            rows.append(row | {"note": "not run: out of time"})
            continue
        rows.append(row | child(shape, c, dead, device, min(left, options.each), options))
        if options.out:
            write_json(options.out, rows=rows, complete=False)
        print(format_table([rows[-1]]).splitlines()[-1], file=sys.stderr)
    return rows


def child(
    shape: Shape, c: Contestant, dead: float, device: torch.device, seconds: float, options: argparse.Namespace
) -> Row:
    """Measure one contestant in a process of its own, so that all of its memory is free again."""
    command = [sys.executable, "-P", __file__, "--config", shape.name, "--contestant", str(ON_CUDA.index(c))]
    command += ["--dead", str(dead), "--device", str(device)]
    if options.rivals:
        command += ["--rivals", str(options.rivals)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        try:
            done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"note": "stopped: out of time"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"note": f"failed: {last[:150]}"}
        found: Row = json.loads(out.read_text())["row"]
    return found


def measure_one(shape: Shape, c: Contestant, dead: float, device: torch.device) -> Row:
    """What `child` runs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        found = measure_steps(
            shape, device, lambda data: c.make(data, shape), dead_share=dead, dtype=dtype, n=c.samples, warmup=c.warmup,
            repeat=c.side == OURS,
        )  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        return {"note": str(error).split(". ")[0]}
    row: Row = {
        "ms": found.timing.ms, "median_ms": found.timing.median_ms, "samples": found.timing.n, "repeats": found.repeats,
        "tokens_per_s": 1e3 * shape.n_tokens / found.timing.ms,
    }  # fmt: skip
    if found.peak_bytes is not None:
        row["peak_gb"] = found.peak_bytes / 1e9
    if found.timing.cpu_ms is not None:
        row["cpu_ms"] = found.timing.cpu_ms
    return row


def add_ratios(rows: list[Row], ceilings: dict[str, Ceilings]) -> None:
    """Floors for fastdiff's rows; for the others, their time over fastdiff's."""
    ours = {
        (r["shape"], r["name"], r["clip"]): r for r in rows if r["side"] == OURS and not r.get("dead") and "ms" in r
    }
    for row in rows:
        if "ms" not in row:
            continue
        if row["side"] == OURS:
            # ceilings are of the precision that the others multiply in
            if row["name"] != "fastdiff, bf16 encoder":
                row["of_floor"] = floor_ms(row, ceilings[row["shape"]]) / row["ms"]
            continue
        plain = "fastdiff" if row["group"] == "batchtopk" else "fastdiff TopK, MSE"
        for key, name, clip in (
            ("ratio", plain, row["clip"]),
            ("ratio_previous", plain, "previous"),
            ("ratio_bf16_encoder", "fastdiff, bf16 encoder", row["clip"]),
        ):
            other = ours.get((row["shape"], name, clip))
            if other is not None:
                row[key] = row["ms"] / other["ms"]
                if "cpu_ms" in row and "cpu_ms" in other:
                    row[f"cpu_{key}"] = row["cpu_ms"] / other["cpu_ms"]


def floor_ms(row: Row, ceilings: Ceilings) -> float:
    """Of one of fastdiff's rows; the ceilings are of the precision that its encoder multiplies in."""
    shape = SHAPES[row["shape"]]
    moments = "bfloat16" if row["name"] == "fastdiff, bf16 moments" else "float32"
    n_dead = round(row.get("dead", 0.0) * shape.dict_size)
    shadow = ceilings.precision == "bfloat16"
    return step_floor(shape, ceilings, clip=row["clip"], n_dead=n_dead, moments=moments, shadow=shadow).total


def missed(rows: list[Row]) -> list[str]:
    """Targets that were not reached."""
    lines = []
    for row in rows:
        what, bars = f"{row['shape']}: {row['name']}, clip {row['clip']}", BARS.get(row["shape"], {})
        if row.get("repeats") is False:
            lines.append(f"{what}: other bits from the same start")
        if row["name"] == "fastdiff" and "ms" in row:
            if not row.get("dead") and row["tokens_per_s"] < bars.get(row["clip"], 0):
                lines.append(f"{what}: wanted {bars[row['clip']]:,.0f} tokens/s, got {row['tokens_per_s']:,.0f}")
            if not row.get("dead") and row.get("of_floor", 1) < bars.get("of_floor", 0):
                lines.append(f"{what}: wanted {bars['of_floor']:.0%} of the floor, got {row['of_floor']:.0%}")
            most = bars.get("peak_gb", (float("inf"),) * 2)[bool(row.get("dead"))]
            if row.get("peak_gb", 0) > most:
                lines.append(f"{what}: wanted at most {most} GB, got {row['peak_gb']:.1f}")
        wanted = TARGETS.get(row["shape"], {}).get(row["name"])
        if wanted and "ratio" not in row:
            lines.append(f"{row['shape']}: {row['name']} has no ratio ({row.get('note', 'not measured')})")
        elif wanted and row["ratio"] < wanted:
            lines.append(f"{row['shape']}: wanted {wanted} times as fast as {row['name']}, got {row['ratio']:.2f}")
        elif wanted and row.get("cpu_ratio", wanted) < wanted:
            lines.append(f"{row['shape']}: by CPU time wanted {wanted} times {row['name']}, got {row['cpu_ratio']:.2f}")
        if row["shape"] == "C" and row["side"] == DENSE and wanted and row.get("ratio_bf16_encoder", 0) < BF16_ON_CPU:
            got = row.get("ratio_bf16_encoder", 0)
            lines.append(f"C: wanted {BF16_ON_CPU} times as fast as {row['name']} with the bf16 encoder, got {got:.2f}")
    return lines


EXTRA = (
    ("ratio_bf16_encoder", "with bf16 encoder", "{:.2f}"),
    ("ratio_previous", "with previous", "{:.2f}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=list(SHAPES), default=["C"], help="sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds on a CPU")
    parser.add_argument("--seconds", type=float, default=240, help="most time on a GPU")
    parser.add_argument("--each", type=float, default=100, help="most time for one contestant on a GPU")
    parser.add_argument("--least-seconds", type=float, default=15, help="a process is not begun with less left")
    parser.add_argument("--first", type=int, help="only this many rows on a GPU, the most important ones")
    parser.add_argument("--processes", action="store_true", help="a process for each contestant on a CPU too")
    parser.add_argument("--fve", action="store_true", help="compare reconstruction after training instead")
    parser.add_argument("--steps", type=int, default=300, help="of --fve")
    parser.add_argument("--lr", type=float, default=1e-4, help="of --fve; fastdiff's default")
    parser.add_argument("--rivals", type=Path, help="folder that holds sparsify and what it needs")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already, on a GPU")
    parser.add_argument("--contestant", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dead", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume needs --out")
    if options.rivals:
        sys.path.append(str(options.rivals))
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shapes = [SHAPES[name] for name in options.config]
    if options.contestant is not None:
        row = measure_one(shapes[0], ON_CUDA[options.contestant], options.dead, device)
        write_json(options.out, row=row)
        return
    if options.fve:
        from train_fve import compare_training

        sys.exit(compare_training(shapes[0], device, options.steps, options.lr, options.out))

    facts: dict[str, Any] = {"machine": machine(device)}
    print(facts["machine"])
    facts["check"] = check(device)
    print(f"checked: six steps equal autograd's to {facts['check']:.1e} of the weights' change")
    precision = "bfloat16" if device.type == "cuda" else "float32"
    ceilings, facts["ceilings"], facts["spread"] = {}, {}, {}
    for shape in shapes:
        ceilings[shape.name] = measure_ceilings(shape, device, precision)
        uneven = spread(synthetic(shape, device, n_batches=1), shape)
        print(f"{shape}\n  {uneven}")
        print("\n".join(f"  ceiling: {line}" for line in ceilings[shape.name].lines()))
        facts["ceilings"][shape.name], facts["spread"][shape.name] = vars(ceilings[shape.name]), vars(uneven)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cuda" or options.processes:
        rows = in_processes(shapes, device, options)
    else:
        rows = [row for shape in shapes for row in on_cpu(shape, options.rounds)]
    if not sparsify_is_there():
        print("sparsify is not installed, so there is no comparison with it (see bench/gpu.sh)")
    add_ratios(rows, ceilings)
    print("\n" + format_table(rows, (*COLUMNS[:-1], *EXTRA, COLUMNS[-1])))
    lines = missed(rows)
    if options.out:
        write_json(options.out, **facts, rows=rows, missed=lines, complete=True)
    for line in lines:
        print(f"missed: {line}")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
