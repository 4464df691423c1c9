"""How long something takes. On a GPU by device events; on a CPU by the fastest of interleaved runs and CPU time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms: On a GPU the median, on a CPU the fastest: other programs only ever add.
        median_ms: Of all runs.
        cpu_ms: Fewest CPU milliseconds, summed over threads; on a CPU only.
        n: Runs.
        how: "graph" if a CUDA graph was replayed, "events" if calls were launched one by one, "wall" on a CPU.
    """

    ms: float
    median_ms: float
    cpu_ms: float | None
    n: int
    how: str


def interleaved(calls: dict[str, Call], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time calls on a CPU in turn, so that what slows the machine slows all of them.

    Args:
        calls: By name.
        rounds: Timed runs of each.
        warmup: Runs of each before.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            call()
            if turn >= warmup:
                wall[name].append(1e3 * (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - began_cpu))
    return {
        name: Timing(min(wall[name]), statistics.median(wall[name]), min(cpu[name]), rounds, "wall") for name in calls
    }


def timed(
    call: Call, device: torch.device, *, n: int = 10, warmup: int = 3, graph: bool = False, least_ms: float = 0.2
) -> Timing:
    """Time one call.

    Args:
        call: Launches work on the current stream.
        device: Where it runs.
        n: Timed samples.
        warmup: Calls before.
        graph: Capture the call in a CUDA graph and time replays, so that launches cost nothing. The call must not
            wait for the device. Ignored on a CPU.
        least_ms: A sample on a GPU has as many calls as fill this time; events resolve about a microsecond.
    """
    if device.type != "cuda":
        return interleaved({"": call}, rounds=n, warmup=min(warmup, 1))[""]
    for _ in range(warmup):
        call()
    torch.cuda.synchronize(device)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    once = _event_ms(call, 1)
    calls = max(1, min(100, round(least_ms / max(once, 1e-3))))
    samples = [_event_ms(call, calls) / calls for _ in range(n)]
    return Timing(statistics.median(samples), statistics.median(samples), None, n, "graph" if graph else "events")


def _event_ms(call: Call, n: int) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(n):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)
