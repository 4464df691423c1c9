"""How much memory this process may use: the machine's, or less where a control group (a container) limits it."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Bytes of memory this process may use at most."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_group_limits()])


def memory_available() -> int:
    """Bytes of memory that are free, or hold pages of files that can be given up."""
    facts = dict(line.split(":", 1) for line in _lines(Path("/proc/meminfo")))
    free = int(facts["MemAvailable"].split()[0]) * 1024
    used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return max(0, min(free, memory_limit() - used))


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out: Python's, CUDA's, or torch's on a CPU, which is known by its text."""
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or "can't allocate memory" in str(error)


def _group_limits() -> Iterator[int]:
    """Limits of the control groups this process is in, version 1 and 2, and of those above them."""
    for line in _lines(Path("/proc/self/cgroup")):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.strip().lstrip("/")
        # in a container the path may be the host's, of which only the top is mounted
        for directory in [group, *group.parents]:
            for limit in _lines(directory / name):
                if limit.strip().isdigit():  # not "max"
                    yield int(limit)
            if directory == root:
                break


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel; none where it has no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
