"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Mode = Literal["auto", "on", "off"]

# off a terminal a line appears at most this often, in seconds
_LINE_EVERY = 10.0


class Task:
    """One counted piece of work."""

    def __init__(self, name: str, total: int, unit: str, bars: Bars | None, silent: bool, start: int):
        self.name, self.total, self.unit = name, total, unit
        self.done = self._start = start
        self._note = ""
        self._bars = bars
        self._silent = silent
        self._id = bars.add_task(name, total=total, completed=start, note="") if bars else None
        self._started = self._last = time.monotonic()

    def advance(self, n: int, note: str = "") -> None:
        """Count n more units; `note` is a few words on how it goes, shown until the next one."""
        self.done += n
        self._note = note or self._note
        now = time.monotonic()
        rate = (self.done - self._start) / max(now - self._started, 1e-9)
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, advance=n, note=f"{rate:,.0f} {self.unit}/s  {self._note}")
        elif not self._silent and (now - self._last >= _LINE_EVERY or self.done >= self.total):
            self._last = now
            left = (self.total - self.done) / max(rate, 1e-9)
            line = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, {left:.0f} s left"
            print(f"{line}  {self._note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201 (this is the one place)


class Progress:
    """Where stages report how far they are."""

    def __init__(self, mode: Mode = "auto", quiet: bool = False):
        self._silent = quiet or mode == "off"
        self._live = not self._silent and (mode == "on" or sys.stderr.isatty())

    def say(self, line: str) -> None:
        """Print one line."""
        if not self._silent:
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def task(self, name: str, total: int, unit: str, start: int = 0) -> Iterator[Task]:
        """Count `total` units of work called `name`; `start` of them an earlier process has done."""
        if not self._live:
            yield Task(name, total, unit, None, self._silent, start)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            yield Task(name, total, unit, bars, False, start)


SILENT = Progress("off")
