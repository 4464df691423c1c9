"""What `fastdiff benchmark` does: ceilings, whole steps, the parts of a step, and what limits it."""

from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch

from fastdiff.benchmark.ceilings import Ceilings, measure_ceilings
from fastdiff.benchmark.data import Spread, spread, synthetic
from fastdiff.benchmark.floor import Floor, step_floor
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.parts import OTHER, profile_parts
from fastdiff.benchmark.shapes import SHAPES, Shape
from fastdiff.benchmark.steps import WARMUP, fused_steps, measure_steps, step_config
from fastdiff.benchmark.table import Row, format_table
from fastdiff.device import resolve_device
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.progress import Progress

_DEAD_SHARE = 0.3
_MEMORY_OF_A = 40e9
# bytes a step holds for each weight, and the scores: what has to fit
_BYTES_PER_WEIGHT = 14
_PARTS = (("part", "part of a step", "{}"), ("ms", "ms", "{:,.3g}"), ("share", "share", "{:.0%}"),
          ("floor_ms", "floor, ms", "{:,.3g}"), ("of_floor", "of floor", "{:.0%}"))  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """What was measured."""

    machine: dict[str, Any]
    shape: Shape
    spread: Spread
    ceilings: Ceilings
    steps: list[Row]
    parts: list[Row]
    verdict: str

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "machine": self.machine,
            "size": vars(self.shape),
            "spread": vars(self.spread),
            "ceilings": vars(self.ceilings),
            "steps": self.steps,
            "parts": self.parts,
            "verdict": self.verdict,
        }

    def text(self) -> str:
        """For people."""
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "device")
        ceilings = "\n".join(f"  {line}" for line in self.ceilings.lines())
        return (
            f"{self.machine['device']} ({facts})\n{self.shape}\n{self.spread}\n\nceilings\n{ceilings}\n\n"
            f"{format_table(self.steps)}\n\n{format_table(self.parts, _PARTS)}\n\n{self.verdict}"
        )


def benchmark_command(
    size: str,
    sizes: dict[str, int | None],
    device: str,
    threads: int,
    *,
    precision: str,
    moments: str,
    n: int,
    progress: Progress,
) -> Benchmark:
    """Run with the options of the command line.

    Args:
        size: A name in `SHAPES`, or "auto".
        sizes: batch_size, d_model, dict_size and k; None leaves one as the named size has it.
        device: As `resolve_device` takes it.
        threads: CPU threads; 0 leaves them as they are.
        precision: As `run_benchmark` takes it, like the rest.
        moments: Likewise.
        n: Likewise.
        progress: Likewise.

    Raises:
        OptionError: Options do not go together.
    """
    where = resolve_device(device)
    if threads:
        torch.set_num_threads(threads)
    if size == "auto" and where.type == "cuda":
        size = "A" if torch.cuda.get_device_properties(where).total_memory >= _MEMORY_OF_A else "B"
    given = dict(sizes)
    given["n_tokens"] = given.pop("batch_size")
    shape = SHAPES["C" if size == "auto" else size].with_sizes(**given)
    if shape.k > shape.dict_size:
        raise OptionError(f"--k must lie in [1, --dict-size={shape.dict_size}], got {shape.k}")
    return run_benchmark(shape, where, progress, precision=precision, moments=moments, n=n)


def run_benchmark(
    shape: Shape,
    device: torch.device,
    progress: Progress,
    *,
    precision: str = "auto",
    moments: str = "float32",
    n: int = 10,
) -> Benchmark:
    """Measure training steps of one size.

    Args:
        shape: Sizes.
        device: Where.
        progress: How it goes.
        precision: As `TrainConfig` has it.
        moments: Likewise.
        n: Timed samples of each.

    Raises:
        FastdiffError: The step does not fit the device's memory.
    """
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    _check_memory(shape, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    with progress.task("benchmark", total=6, unit="measurements") as task:
        ceilings = measure_ceilings(shape, device, precision)
        task.advance(1)
        # sizes of a user's own may leave no room for rows of different lengths; the figure is printed
        named = shape in SHAPES.values()
        uneven = spread(synthetic(shape, device, n_batches=1, dtype=dtype), shape, check=named)
        task.advance(1)
        for clip, dead in (("exact", 0.0), ("previous", 0.0), ("exact", _DEAD_SHARE)):
            config = step_config(shape, precision=precision, moments=moments, clip_mode=clip)
            found = measure_steps(
                shape,
                device,
                partial(fused_steps, config=config),
                dead_share=dead,
                dtype=dtype,
                n=n,
                repeat=clip == "exact" and not dead,
            )
            floor = _floor(shape, ceilings, clip, dead, moments, device)
            row: Row = {"name": "fastdiff step", "clip": clip, "dead": dead, "ms": found.timing.ms}
            row |= {"cpu_ms": found.timing.cpu_ms, "tokens_per_s": 1e3 * shape.n_tokens / found.timing.ms}
            row |= {"of_floor": floor.total / found.timing.ms, "repeats": found.repeats}
            row["peak_gb"] = None if found.peak_bytes is None else found.peak_bytes / 1e9
            rows.append(row)
            task.advance(1)
        parts = _parts(shape, device, precision, moments, dtype, _floor(shape, ceilings, "exact", 0.0, moments, device))
        task.advance(1)
    verdict = what_limits(parts, rows[0])
    return Benchmark(machine(device), shape, uneven, ceilings, rows, parts, verdict)


def _check_memory(shape: Shape, device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed = _BYTES_PER_WEIGHT * shape.n_weights + 4 * shape.n_tokens * shape.dict_size
    free = torch.cuda.mem_get_info(device)[0]
    # the ceilings and AuxK's rows come on top
    if needed * 1.25 > free:
        raise FastdiffError(
            f"{shape} needs about {needed * 1.25 / 1e9:.0f} GB and {free / 1e9:.0f} GB are free; "
            "lower --dict-size or --batch-size"
        )


def _floor(shape: Shape, ceilings: Ceilings, clip: str, dead: float, moments: str, device: torch.device) -> Floor:
    # on a CPU only the encoder's factors are ever bfloat16
    shadow = device.type == "cuda" and ceilings.precision == "bfloat16"
    n_dead = round(dead * shape.dict_size)
    return step_floor(shape, ceilings, clip=clip, n_dead=n_dead, moments=moments, shadow=shadow)


def _parts(
    shape: Shape, device: torch.device, precision: str, moments: str, dtype: torch.dtype, floor: Floor
) -> list[Row]:
    """Where the time of a step goes, with exact clip and no dead latents."""
    data = synthetic(shape, device, dtype=dtype)
    trainer = fused_steps(data, step_config(shape, precision=precision, moments=moments))
    batches = cycle(data.batches)
    for _ in range(WARMUP):
        trainer.step(next(batches))
    trainer.window()
    found = profile_parts(lambda: trainer.step(next(batches)), device)
    total = sum(found.values())
    rows: list[Row] = []
    for part, ms in found.items():
        row: Row = {"part": part, "ms": ms, "share": ms / total}
        least = vars(floor).get(part)
        if least:
            row |= {"floor_ms": least, "of_floor": least / ms}
        rows.append(row)
    return rows


# part -> what it waits for
_LIMITS = {
    "encoder": "the encoder's dense product, that is, arithmetic",
    "selection": "the selection, which reads all scores: memory bandwidth",
    "decode": "gathered decoder rows: cache and memory bandwidth",
    "order": "sorting the active pairs by latent",
    "clip": "the gradient's norm, which --clip-mode previous gets for nothing on a GPU: cache and memory bandwidth",
    "update": "Adam, which reads and writes every weight and moment: memory bandwidth",
    OTHER: "small operations and launches; a larger --batch-size helps",
}


def what_limits(parts: list[Row], step: Row) -> str:
    """In a sentence or two.

    Args:
        parts: Rows with part, ms, share and, where there is one, of_floor; the longest first.
        step: The row of the whole step.
    """
    first = parts[0]
    line = f"What limits the step: {_LIMITS[first['part']]} ({first['share']:.0%} of the time"
    if first.get("of_floor"):
        line += f", at {min(1.0, first['of_floor']):.0%} of what this machine reaches"
    line += ")."
    if len(parts) > 1:
        line += f" Next: {parts[1]['part']} ({parts[1]['share']:.0%})."
    line += f" The whole step: {step['tokens_per_s']:,.0f} tokens/s, "
    if step["of_floor"] > 1:
        return line + "faster than its floor, which counts memory bandwidth: its data fit in the caches."
    return line + f"{step['of_floor']:.0%} of its floor."
