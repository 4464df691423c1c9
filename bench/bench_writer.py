"""How fast a store is written, against h5py appending to a data set, and what it costs in processor time.

    python -P bench/bench_writer.py [--dir DIR] [--gb 2.4] [--pairs 5] [--out results.json]

Rows of 9,216 bytes (2 models, width 2304, bfloat16) in portions of 1024. fastdiff writes what every store has: space
reserved first, side columns, a checksum per 32 rows, a look at every value for NaN, the journal, and syncs. The rivals
write the activations alone, as 16-bit integers, so that HDF5 converts nothing. Every run begins with no file and ends
with fsync. Each contestant's rows are read back by h5py and compared before anything is timed. A ratio is the median
over interleaved pairs (fastdiff, rival, fastdiff, …); rivals without a target get two. The float64 statistics are timed
apart. "foreign" is how many cores others kept busy during the worst run; a virtual machine's host does not show there.

The exit code is 1 if a row is wrong or a target is missed; targets are judged from 2.4 GB and 5 pairs on.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

import h5py
import numpy as np
import torch
from measure import Load, Ratio, device, faulted, measured, versions

from fastdiff.store import writer as writer_module
from fastdiff.store.reader import ActivationStore
from fastdiff.store.statistics import RunningStats
from fastdiff.store.writer import StoreWriter

N_MODELS, D_MODEL, PORTION = 2, 2304, 1024
ROW_BYTES = 2 * N_MODELS * D_MODEL
META = {"models": ["base", "tuned"], "roles": ["text"]}
# name, what is wanted: how many times as fast, and at most this share of the processor time
TARGETS = {"h5py resize + slab": (2.0, 0.3)}

torch.set_num_threads(1)
Write = Callable[[Path, torch.Tensor, int], None]


class NoStatistics(RunningStats):
    """Counts nothing in; their cost is stated apart."""

    def add(self, activations: torch.Tensor) -> None:
        pass


def fastdiff(path: Path, rows: torch.Tensor, n_rows: int) -> None:
    zeros = np.zeros(PORTION, np.int64)
    columns = dict.fromkeys(("token_ids", "sequence_ids", "positions", "roles", "sources"), zeros)
    with StoreWriter(
        path, n_rows=n_rows, n_models=N_MODELS, d_model=D_MODEL, dtype="bfloat16", shard_rows=n_rows, meta=META
    ) as writer:
        for _ in range(0, n_rows, PORTION):
            writer.append(rows, **columns)


def h5py_resize(chunk_rows: int) -> Write:
    def write(path: Path, rows: torch.Tensor, n_rows: int) -> None:
        bits = rows.view(torch.uint16).numpy()
        with h5py.File(path, "w", libver="latest") as file:
            shape, chunks = (0, N_MODELS, D_MODEL), (chunk_rows, N_MODELS, D_MODEL)
            data = file.create_dataset("activations", shape, "<u2", maxshape=(None, *shape[1:]), chunks=chunks)
            for start in range(0, n_rows, PORTION):
                data.resize(start + PORTION, axis=0)
                data[start : start + PORTION] = bits
        sync(path)

    return write


def h5py_contiguous(path: Path, rows: torch.Tensor, n_rows: int) -> None:
    bits = rows.view(torch.uint16).numpy()
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset("activations", (n_rows, N_MODELS, D_MODEL), "<u2")
        for start in range(0, n_rows, PORTION):
            data[start : start + PORTION] = bits
    sync(path)


def plain(path: Path, rows: torch.Tensor, n_rows: int) -> None:
    data = memoryview(rows.view(torch.uint8).numpy()).cast("B")
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, n_rows * ROW_BYTES)
        for start in range(0, n_rows, PORTION):
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done:], start * ROW_BYTES + done)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


RIVALS: dict[str, Write] = {
    # 256 rows to a chunk were the fastest of 64, 256 and 1024
    "h5py resize + slab": h5py_resize(256),
    "h5py contiguous, size known": h5py_contiguous,
    "pwrite + fsync, nothing else": plain,
}


def check(directory: Path, rows: torch.Tensor) -> None:
    """Every contestant's file holds the rows.

    Raises:
        SystemExit: One does not.
    """
    expected = rows.view(torch.uint16).numpy()
    for name, write in {"fastdiff": fastdiff, **RIVALS}.items():
        path = directory / "check"
        write(path, rows, 4 * PORTION)
        if name == "fastdiff":
            with ActivationStore(path) as store:
                found = store.slice(0, store.n_rows).view(torch.uint16).numpy()
        elif write is plain:
            found = np.fromfile(path, np.uint16).reshape(-1, N_MODELS, D_MODEL)
        else:
            with h5py.File(path) as file:
                found = file["activations"][:]
        if found.shape[0] != 4 * PORTION or not all(np.array_equal(part, expected) for part in np.split(found, 4)):
            sys.exit(f"{name}: the rows in the file are not those that were written")
        remove(path)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def timed(write: Write, path: Path, rows: torch.Tensor, n_rows: int) -> Load:
    # a virtual machine may have given free memory back to its host: who writes through the page cache would pay for it
    faulted(n_rows * ROW_BYTES).close()
    with measured() as load:
        write(path, rows, n_rows)
    remove(path)
    return load


def cost_of_statistics(rows: torch.Tensor, repeats: int = 30) -> float:
    """CPU seconds per GB."""
    stats = RunningStats(N_MODELS, D_MODEL)
    stats.add(rows)
    costs = []
    for _ in range(repeats):
        with measured() as load:
            stats.add(rows)
            stats.add(rows)
        costs.append(load.cpu / (2 * rows.nbytes / 1e9))
    return statistics.median(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--gb", type=float, default=2.4, help="size of each store")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each contestant")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    n_rows = max(1, round(options.gb * 1e9 / ROW_BYTES / PORTION)) * PORTION
    gb = n_rows * ROW_BYTES / 1e9
    rows = torch.randn(PORTION, N_MODELS, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()

    with tempfile.TemporaryDirectory(prefix="fastdiff-bench-", dir=options.dir) as name:
        directory = Path(name)
        check(directory, rows)
        print(f"{device()}\n{versions('h5py', 'numpy', 'torch')}\n{gb:.2f} GB, {options.pairs} pairs\n")
        writer_module.RunningStats = NoStatistics  # type: ignore[misc]
        loads: dict[str, list[Load]] = {"fastdiff": []}
        ratios: dict[str, tuple[Ratio, Ratio]] = {}
        for rival, write in RIVALS.items():
            faster, cheaper = ratios[rival] = (Ratio(), Ratio())
            for _ in range(options.pairs if rival in TARGETS else min(2, options.pairs)):
                ours = timed(fastdiff, directory / "store", rows, n_rows)
                theirs = timed(write, directory / "rival", rows, n_rows)
                loads["fastdiff"].append(ours)
                loads.setdefault(rival, []).append(theirs)
                faster.values.append(theirs.seconds / ours.seconds)
                cheaper.values.append(ours.cpu / theirs.cpu)
    statistics_cost = cost_of_statistics(rows)

    print(f"{'':30}{'GB/s':>6}{'CPU s/GB':>10}  {'fastdiff is faster by':24}{'its CPU time is':24}foreign")
    missed, table = [], {}
    for name, runs in loads.items():
        speed = gb / statistics.median(run.seconds for run in runs)
        cost = statistics.median(run.cpu for run in runs) / gb
        foreign = max(run.foreign for run in runs)
        words = [str(ratio) for ratio in ratios.get(name, ("", ""))]
        print(f"{name:30}{speed:6.2f}{cost:10.3f}  {words[0]:24}{words[1]:24}{foreign:.1f}")
        table[name] = {"gb_per_s": speed, "cpu_s_per_gb": cost, "foreign": foreign}
        if name in ratios:
            table[name] |= {"faster": ratios[name][0].values, "cpu": ratios[name][1].values}
        if name in TARGETS and options.gb >= 2.4 and options.pairs >= 5:
            faster, share = TARGETS[name]
            if ratios[name][0].median < faster or ratios[name][1].median > share:
                missed.append(f"{name}: wanted {faster:g} times as fast at {share:g} of its processor time")
    print(f"\nstatistics in float64, apart: {statistics_cost:.3f} CPU s/GB")
    if options.out:
        facts: dict[str, Any] = {"device": device(), "gb": gb, "statistics_cpu_s_per_gb": statistics_cost}
        options.out.write_text(json.dumps({**facts, "contestants": table}, indent=1) + "\n")
    for line in missed:
        print(f"missed: {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
