"""What the benchmarks measure with: processor time, foreign load, the page cache, memory, a memory-limited group."""

import ctypes
import errno
import mmap
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = mmap.PAGESIZE
_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Load:
    """What a stretch of time cost.

    Attributes:
        seconds: Of wall time.
        cpu: CPU seconds of this process and its children, also of those still running.
        foreign: Cores that others kept busy, mean.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    foreign: float = 0.0


@dataclass
class Ratio:
    """Ratios of interleaved pairs."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median, of at least one value."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@contextmanager
def measured() -> Iterator[Load]:
    """Fill in the yielded `Load` at the end of the block."""
    load = Load()
    cpu, busy, began = _cpu_seconds(), _busy_seconds(), time.perf_counter()
    yield load
    load.seconds = time.perf_counter() - began
    # /proc counts in ticks of 10 ms, so a short stretch can come out a little below zero
    load.cpu = max(0.0, _cpu_seconds() - cpu)
    load.foreign = max(0.0, (_busy_seconds() - busy - load.cpu) / load.seconds)


def _cpu_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in active_children():
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(stat[11]) + int(stat[12])) / _TICKS
    return total


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    return (int(user) + int(nice) + int(system) + int(irq) + int(softirq)) / _TICKS


def evict(*files: Path) -> None:
    """Drop files from the page cache. Pages that are mapped somewhere stay."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(*files: Path) -> None:
    """Read files into the page cache."""
    buffer = bytearray(1 << 22)
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def cached_share(file: Path, samples: int = 500) -> float:
    """Share of a file that is in the page cache, from randomly chosen pages; nothing is read from the disk."""
    size = file.stat().st_size
    fd = os.open(file, os.O_RDONLY)
    found = 0
    try:
        for page in np.random.default_rng(0).integers(0, size // _PAGE, samples).tolist():
            try:
                found += os.preadv(fd, [bytearray(1)], page * _PAGE, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
    finally:
        os.close(fd)
    return found / samples


def resident_bytes() -> int:
    """Memory that this process occupies now (RssAnon and shared memory; no mapped files)."""
    fields = _status()
    return fields["RssAnon"] + fields["RssShmem"]


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Put into the yielded list how far the resident memory rose above what it was, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status()["VmRSS"]
    rise: list[int] = []
    yield rise
    rise.append(_status()["VmHWM"] - before)


def _status() -> dict[str, int]:
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


def faulted(n_bytes: int) -> mmap.mmap:
    """Anonymous memory whose pages are all there, in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, n_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, n_bytes)
    return memory


@contextmanager
def limited_group(name: str, limit_bytes: int) -> Iterator[Callable[[], None]]:
    """A control group with a memory limit, for child processes; it counts the page cache too.

    Yields:
        What a child must call to join, before it has used memory (`preexec_fn` of subprocess).

    Raises:
        OSError: There is no memory controller, or this user may not make a group.
    """
    if (_CGROUP / "memory").is_dir():
        group, limits = _CGROUP / "memory" / name, {"memory.limit_in_bytes": str(limit_bytes)}
    elif "memory" in _read(_CGROUP / "cgroup.subtree_control").split():
        group, limits = _CGROUP / name, {"memory.max": str(limit_bytes), "memory.swap.max": "0"}
    else:
        raise OSError(errno.ENOTSUP, "no memory controller", str(_CGROUP))
    group.mkdir(exist_ok=True)
    try:
        for file, value in limits.items():
            (group / file).write_text(value)
        yield lambda: _write(group / "cgroup.procs", str(os.getpid()))
    finally:
        group.rmdir()


def device() -> dict[str, Any]:
    """The machine in words and numbers."""
    model = next((line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * _PAGE / 1e9, 1),
        "kernel": platform.release(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _write(path: Path, text: str) -> None:
    path.write_text(text)
