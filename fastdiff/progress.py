"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

Mode = Literal["auto", "on", "off"]

# off a terminal a line appears at most this often, in seconds
_LINE_EVERY = 10.0
# a bar's text changes at most this often: rich draws ten times a second
_TEXT_EVERY = 0.1
# seconds over which speed is averaged: work of long ago weighs e times less each time they pass
_RECENT = 60.0
# a line that would be longer has its note below it
_COLUMNS = 80


class _Speed:
    """Units per second of late: the exponentially weighted mean, without the bias of a short history."""

    def __init__(self) -> None:
        self._units = self._seconds = 0.0

    def add(self, n: int, seconds: float) -> None:
        """Count n units that took so long."""
        keep = math.exp(-seconds / _RECENT)
        # the weight of all of those seconds together, each less the longer ago
        weight = (1 - keep) * _RECENT
        self._units = self._units * keep + (n * weight / seconds if seconds else n)
        self._seconds = self._seconds * keep + weight

    @property
    def per_second(self) -> float:
        """The mean."""
        return self._units / max(self._seconds, 1e-9)


class Task:
    """One counted piece of work."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        bars: Bars | None,
        silent: bool,
        start: int,
        rate: tuple[int, str] | None,
    ):
        self.name, self.total, self.unit = name, total, unit
        self.done = start
        self._note = ""
        self._bars = bars
        self._silent = silent
        self._factor, self._rate_unit = rate or (1, "" if bars is None else unit)
        self._id = bars.add_task(name, total=total, completed=start, status="", note="") if bars else None
        self._speed = _Speed()
        self._counted = self._shown = time.monotonic()

    def advance(self, n: int, note: str = "") -> None:
        """Count n more units; `note` is a few words on how it goes, shown until the next one."""
        self.done += n
        self._note = note or self._note
        now = time.monotonic()
        self._speed.add(n, now - self._counted)
        self._counted = now
        ended = self.done >= self.total
        if self._bars is not None and self._id is not None:
            if now - self._shown >= _TEXT_EVERY or ended:
                self._shown = now
                self._bars.update(self._id, completed=self.done, status=self._status(), note=self._note)
        elif not self._silent and (now - self._shown >= _LINE_EVERY or ended):
            self._shown = now
            line = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {self._status()}"
            if self._note:
                line += ("  " if len(line) + 2 + len(self._note) <= _COLUMNS else "\n  ") + self._note
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (this is the one place)

    def _status(self) -> str:
        """Speed and time left."""
        speed = self._speed.per_second
        rate = f"{_count(speed * self._factor)} {self._rate_unit}".rstrip()
        return f"{rate}/s, {_duration((self.total - self.done) / max(speed, 1e-9))} left"


class _Bars(Bars):
    """A row for the bar, and one below it for the note, which would not fit beside it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


class Progress:
    """Where stages report how far they are."""

    def __init__(self, mode: Mode = "auto", quiet: bool = False):
        self._silent = quiet or mode == "off"
        # a terminal that cannot go back to a line would show nothing until the end
        moves = sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
        self._live = not self._silent and (mode == "on" or moves)

    def say(self, line: str) -> None:
        """Print one line."""
        if not self._silent:
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def task(
        self, name: str, total: int, unit: str, start: int = 0, rate: tuple[int, str] | None = None
    ) -> Iterator[Task]:
        """Count work.

        Args:
            name: What it is called.
            total: How many units there are.
            unit: What is counted, in the plural.
            start: Units that an earlier process has done.
            rate: Show the speed in something else, of which a unit is so many: (4096, "tokens").
        """
        if not self._live:
            yield Task(name, total, unit, None, self._silent, start, rate)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with _Bars(*columns, console=Console(stderr=True), transient=True, expand=True) as bars:
            yield Task(name, total, unit, bars, False, start, rate)


def _count(number: float) -> str:
    """Thousands with separators, and two digits below ten."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    """The two largest units of a time; seconds alone below two minutes."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


SILENT = Progress("off")
