"""How fast fastdiff's shuffler delivers rows, against other ways to read them and against what the machine can do.

    python -P bench/bench_shuffle.py [--dir DIR] [--gb 6] [--pairs 7] [--out results.json] [--only warm] [--small]

Batches of 2048 rows of 9,216 bytes (2 models, width 2304, bfloat16). Three states: the page cache holds all data
(warm); nothing of it (cold: evicted before every run); the data are larger than memory (ram: a control group of
1.6 GB; needs root). Every contestant's rows are checked before anything is timed. A ratio is the median over
interleaved pairs (fastdiff, rival, fastdiff, …); both sides read the same file, and nobody uses the batches. Making
and first filling a pool is not timed; from there on a run reads as many rows as it delivers: an epoch when warm, 2.4 GB
from the disk (there with a pool of 0.4 GB). Rivals whose rate is low and even are timed on a sample of a second (3 from
the disk; a batch at least). Rows without a target get fewer pairs. "foreign" is how many cores others kept busy during
the worst run. Exact mode is a row beside the others.

Before a run from the disk the files are evicted and the disk's burst budget is spent (sequential reading until the rate
is the lasting one). For contestants that use the page cache free memory is touched too: a virtual machine may have
given it back to its host, which makes filling the cache several times as slow as on a real machine.

The exit code is 1 if a row is wrong or a target is missed; targets are judged from 4 GB and 7 pairs on.

The same contestants under pytest-benchmark, without pairs, page cache warm (FASTDIFF_BENCH_DIR, FASTDIFF_BENCH_GB):

    pytest bench/bench_shuffle.py --benchmark-only -o python_files='bench_*.py' -o python_functions='bench_*'
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

from measure import (
    cached_share,
    device,
    evict,
    faulted,
    limited_group,
    peak_of_memory,
    resident_bytes,
    versions,
    warm,
)
from shuffle_contestant import Contestant
from shuffle_data import BATCH, ROW_BYTES, Data, make
from shuffle_limits import memcpy, sequential_direct
from shuffle_loaders import loader_h5py_rows, loader_memmap_rows, loader_pool
from shuffle_orders import quality_table
from shuffle_rivals import fastdiff, h5py_fancy, h5py_pool, h5py_slices, memmap_gather, pure_python
from shuffle_runs import Case, Disk, Run, Table, WrongRows, check, disk_pairs, ratio, timed, warm_pairs

from fastdiff.store.reader import ActivationStore
from fastdiff.store.shuffler import Shuffler

PARTS = ("memory", "warm", "cold", "ram", "quality")
RAM_BYTES = 1_600_000_000
# what one run reads from the disk: 2 s at 1.1 GB/s
DISK_BYTES = 128 * BATCH * ROW_BYTES
JUDGED_GB, JUDGED_PAIRS = 4.0, 7
QUALITY_ROWS = 1 << 22


def _pool(gb: float) -> dict[str, Any]:
    # as it comes, but for data that are only to try the script: they would fit the pool
    return {} if gb >= JUDGED_GB else {"memory_bytes": int(gb * 2.5e8)}


def warm_cases(gb: float) -> list[Case]:
    """What is measured with all data in the page cache."""
    ours = _pool(gb)
    cases = [
        Case(fastdiff("fastdiff exact", mode="exact")),
        Case(fastdiff("fastdiff, check_finite", check_finite=True, **ours)),
        Case(fastdiff("fastdiff, check_crc", check_crc=True, **ours)),
        Case(h5py_fancy("contiguous"), 8),
        Case(loader_memmap_rows()),
        Case(memmap_gather("numpy")),
        Case(memmap_gather("torch"), 0.85),
        Case(pure_python(direct=False)),
        Case(memcpy(1)),
        Case(memcpy(2), 0.6),
        Case(h5py_fancy("chunked"), 200),
        Case(h5py_slices()),
        Case(h5py_pool(read_ahead=False), 3),
        Case(h5py_pool(read_ahead=True)),
        Case(loader_h5py_rows(), 200),
        Case(loader_pool()),
    ]
    return [replace(case, options=ours) for case in cases]


def disk_cases(state: str, gb: float) -> list[Case]:
    """What is measured when rows come from the disk."""
    # what fits the limited group, in both states: a smaller pool is as fast, and fills sooner
    ours = _pool(gb) or {"memory_bytes": RAM_BYTES // 4}
    # Data that fit the page cache are read through it by default. The chunked copy is in both states: HDF5 puts chunks
    # at odd offsets, which O_DIRECT cannot read.
    direct: dict[str, Any] = ours if state == "ram" else {"direct": True, **ours}
    cases = [
        Case(sequential_direct(), 0.9, direct),
        Case(h5py_slices(), None, ours),
        Case(h5py_pool(read_ahead=False), 1.6, ours),
        Case(h5py_pool(read_ahead=True), None, ours),
        Case(memmap_gather("numpy"), 100 if state == "ram" else None, direct),
        Case(fastdiff("fastdiff exact", mode="exact", **direct), None, direct),
        Case(pure_python(direct=True), None, direct),
    ]
    if state == "cold":
        return [*cases, Case(fastdiff("fastdiff through the page cache", direct=False, **ours), None, direct)]
    return [*cases, Case(memmap_gather("torch"), None, direct)]


def check_all(data: Data, cases: list[Case], seconds: float) -> None:
    """Check every contestant; fastdiff also on the chunked copy."""
    seen = set()
    for case in cases:
        for contestant in (case.ours, case.rival):
            if not contestant.is_limit and contestant.name not in seen:
                seen.add(contestant.name)
                print(f"checked: {contestant.name}, {check(contestant, data, seconds):,} rows", flush=True)


def compare(state: str, cases: list[Case], table: Table, pairs: Callable[[Case], tuple[list[Run], list[Run]]]) -> None:
    """Run the cases and fill the table; fastdiff's own row is of all its runs."""
    ours: dict[str, list[Run]] = {}
    for case in cases:
        mine, rivals = pairs(case)
        ours.setdefault(case.ours.name, []).extend(mine)
        table.add(case.rival.name, state, rivals, ratio(mine, rivals), case.target)
    for name, runs in ours.items():
        table.add(name, state, runs)


def _matching(cases: list[Case], arguments: argparse.Namespace) -> list[Case]:
    return [case for case in cases if arguments.match in case.rival.name]


def _pairs(case: Case, n_pairs: int) -> int:
    return n_pairs if case.target else max(1, n_pairs // 3)


def run_warm(data: Data, table: Table, arguments: argparse.Namespace) -> None:
    """All data in the page cache."""
    cases = _matching(warm_cases(data.n_rows * ROW_BYTES / 1e9), arguments)
    check_all(data, cases, arguments.seconds)
    table.head("Page cache warm", data, cases)

    def pairs(case: Case) -> tuple[list[Run], list[Run]]:
        # each time: some machines drop what was not read for a minute
        file = data.chunked if case.rival.file == "chunked" else data.contiguous
        for _ in range(3):
            warm(file)
            share = cached_share(file)
            if share > 0.95:  # pages that are just being moved count as absent: 1 % measured
                return warm_pairs(case, data, _pairs(case, arguments.pairs), arguments.seconds)
        raise SystemExit(f"only {share:.0%} of {file} stay in the page cache: give a smaller --gb")

    compare("warm", cases, table, pairs)


def run_disk(state: str, data: Data, table: Table, disk: Disk, arguments: argparse.Namespace) -> None:
    """Nothing in the page cache at the start of a run (cold), nor room for it (ram)."""
    files = (data.contiguous, data.chunked)

    def before(contestant: Contestant) -> None:
        for _ in range(5):  # pages that are just being read or moved are not dropped
            evict(*files)
            share = max(cached_share(file) for file in files)
            if share <= 0.02:
                break
            time.sleep(1)
        else:
            raise SystemExit(f"{share:.0%} of the data stay in the page cache: give a --dir on a disk")
        if contestant.buffered:
            faulted(min(RAM_BYTES // 4 if state == "ram" else DISK_BYTES, data.n_rows * ROW_BYTES)).close()
        disk.settle()

    cases = _matching(disk_cases(state, data.n_rows * ROW_BYTES / 1e9), arguments)
    if state == "ram":
        check_all(data, [case for case in cases if case.target], arguments.seconds)
    n_batches = min(data.n_rows, DISK_BYTES // ROW_BYTES) // BATCH
    title = {
        "cold": "Page cache cold (evicted before every run)",
        "ram": f"Data larger than memory (all memory and page cache of the process: {RAM_BYTES / 1e9} GB)",
    }
    spent = (
        "burst not spent" if math.isinf(disk.sustained) else f"burst spent, the disk gives {disk.sustained:.2f} GB/s"
    )
    table.head(f"{title[state]}; {spent}", data, cases)
    compare(
        state,
        cases,
        table,
        lambda case: disk_pairs(case, data, _pairs(case, arguments.pairs), 3 * arguments.seconds, n_batches, before),
    )


def run_in_group(data: Data, table: Table, arguments: argparse.Namespace, sustained: float) -> None:
    """The state ram, in a child process that is in the control group from its start."""
    if data.n_rows * ROW_BYTES < 2 * RAM_BYTES:
        print(f"\nram: left out, the data are not larger than {RAM_BYTES / 1e9} GB twice")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ram.json"
        command = [sys.executable, "-P", __file__, "--only", "ram", "--in-group", str(sustained), "--out", str(out)]
        for name in ("dir", "gb", "pairs", "seconds", "match"):
            command += [f"--{name}", str(getattr(arguments, name))]
        with ExitStack() as stack:
            try:
                join = stack.enter_context(limited_group(f"fastdiff-bench-{os.getpid()}", RAM_BYTES))
            except OSError as error:
                print(f"\nram: impossible here ({error}); it needs root and a control group for memory")
                return
            code = subprocess.run(command, check=False, preexec_fn=join).returncode
        if not out.exists():
            table.missed.append(f"ram: the run in the control group ended with code {code} (-9: it needed more memory)")
            return
        found = json.loads(out.read_text())
    table.rows += found["rows"]
    table.missed += found["missed"]


def run_memory(data: Data) -> tuple[dict[str, Any], list[str]]:
    """What three epochs of the shuffler occupy, against what it was allowed."""
    allowed = min(1 << 30, data.n_rows * ROW_BYTES // 4)
    n_batches = data.n_rows // BATCH
    with ActivationStore(data.store) as store:
        # so that the libraries are there already
        list(Shuffler(store, batch_size=BATCH, seed=0, memory_bytes=allowed // 4).stream(0, 3))
        with peak_of_memory() as rise:
            shuffler = Shuffler(store, batch_size=BATCH, seed=0, memory_bytes=allowed)
            resident = [resident_bytes() for _ in shuffler.stream(0, 3 * n_batches)]
    growth = max(resident[2 * n_batches :]) - max(resident[n_batches : 2 * n_batches])
    found = {
        "allowed_bytes": allowed,
        "pool_bytes": shuffler.pool_bytes,
        "peak_bytes": rise[0],
        "growth_bytes": growth,
    }
    print(f"\n{shuffler.describe()}")
    print(f"Memory: allowed {allowed / 1e6:.0f} MB, pool {shuffler.pool_bytes / 1e6:.0f} MB, ", end="")
    print(f"rise of the peak {rise[0] / 1e6:.0f} MB, third epoch over the second {growth / 1e6:+.1f} MB", flush=True)
    # beside the pool: a batch that lies in two windows is copied, and malloc keeps two such; stacks of the threads
    slack = 2 * BATCH * ROW_BYTES + (16 << 20)
    missed = []
    if shuffler.pool_bytes > allowed or rise[0] > allowed + slack:
        missed.append(f"memory: {rise[0]} bytes used, {allowed} allowed")
    if growth > 4 << 20:
        missed.append(f"memory: it grew by {growth} bytes in an epoch")
    return found, missed


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/fastdiff-bench"), help="twice --gb is kept here")
    parser.add_argument("--gb", type=float, help="size of the rows (default 6)")
    parser.add_argument("--pairs", type=int, help="interleaved pairs (default 7)")
    parser.add_argument("--seconds", type=float, help="time limit of a rival's run (default 1, 3 times that from disk)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part only; may be repeated")
    parser.add_argument("--match", default="", help="only rivals with this text in their name")
    parser.add_argument("--small", action="store_true", help="0.5 GB, 1 pair, no wait for the disk: does it run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--in-group", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = arguments.small
    for name, usual, little in (("gb", 6.0, 0.5), ("pairs", 7, 1), ("seconds", 1.0, 0.1)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, little if small else usual)
    parts = arguments.only or PARTS
    result: dict[str, Any] = {
        "device": device(),
        "versions": versions("fastdiff", "numpy", "h5py", "torch"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": {k: str(v) for k, v in vars(arguments).items() if v is not None},
    }
    if not arguments.in_group:
        print(f"{result['device']} {result['versions']} {result['started']}", flush=True)
    began = time.perf_counter()
    data = make(arguments.dir, arguments.gb)
    if not arguments.in_group:
        print(f"data: {data.n_rows:,} rows, {data.n_rows * ROW_BYTES / 1e9:.2f} GB, in {arguments.dir}, ", end="")
        print(f"made or found in {time.perf_counter() - began:.0f} s", flush=True)
    judged = arguments.gb >= JUDGED_GB and arguments.pairs >= JUDGED_PAIRS
    table = Table(judged)
    disk = Disk(data)
    try:
        if arguments.in_group:
            disk.sustained = arguments.in_group
            run_disk("ram", data, table, disk, arguments)
            parts = ()
        if "memory" in parts:
            result["memory"], missed = run_memory(data)
            table.missed += missed
        if "warm" in parts:
            run_warm(data, table, arguments)
        if ("cold" in parts or "ram" in parts) and not small:
            rates = disk.spend(60, 150)
            result["disk_gb_per_second"] = rates
            print(f"\nDisk read past the page cache until the rate is stable: {rates[0]:.2f} GB/s at first, ", end="")
            print(f"{rates[-1]:.2f} at the end", flush=True)
        if "cold" in parts:
            run_disk("cold", data, table, disk, arguments)
        if "ram" in parts:
            run_in_group(data, table, arguments, disk.sustained)
        if "quality" in parts:
            result["quality"], missed = quality_table(1 << 18 if small else QUALITY_ROWS)
            table.missed += missed
    except WrongRows as error:
        print(f"WRONG ROWS: {error}", file=sys.stderr)
        return 1
    result |= {"rows": table.rows, "missed": table.missed, "judged": judged, "seconds": time.perf_counter() - began}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))
    if not arguments.in_group:
        print(f"\n{result['seconds']:.0f} s. ", end="")
        print("\nmissed: ".join(["Missed:", *table.missed]) if table.missed else "No target missed.")
        print() if judged else print("Targets of speed were not judged: too little data or too few pairs.")
    return 1 if table.missed else 0


def pytest_generate_tests(metafunc: Any) -> None:
    """One benchmark for each contestant."""
    contestants = [fastdiff("fastdiff"), *(case.rival for case in warm_cases(JUDGED_GB))]
    metafunc.parametrize("contestant", contestants, ids=lambda contestant: contestant.name)


def bench_batches(benchmark: Any, contestant: Any) -> None:
    """Batches of an epoch, or of a second; `extra_info` holds rows/s, which is the figure to look at."""
    folder = Path(os.environ.get("FASTDIFF_BENCH_DIR", "/var/tmp/fastdiff-bench"))
    data = make(folder, float(os.environ.get("FASTDIFF_BENCH_GB", "6")))
    warm(data.contiguous, data.chunked)
    if not contestant.is_limit:
        check(contestant, data, 0.2)
    rates = []
    with contestant.session(data) as session:

        def once(number: int) -> None:
            run = timed(session, number, data.n_rows // BATCH, 1.0 if contestant.sampled else math.inf)
            rates.append(run.rows / run.seconds)

        numbers = iter(range(1, 100))
        benchmark.pedantic(once, setup=lambda: ((next(numbers),), {}), rounds=3, warmup_rounds=1)
    benchmark.extra_info["rows_per_second"] = sorted(rates[1:])[len(rates[1:]) // 2]


if __name__ == "__main__":
    sys.exit(main())
