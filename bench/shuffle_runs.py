"""Checks and times the contestants of the shuffle benchmark."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from measure import Ratio, measured
from shuffle_contestant import Batch, Contestant, Session, bits
from shuffle_data import BATCH, CHUNK_ROWS, ROW_BYTES, Data, base_rows, read_stamps, stamp
from shuffle_limits import sequential_direct
from shuffle_rivals import fastdiff

# a disk that is slower than this share above its lasting rate has no burst left
_SETTLED = 1.1


class WrongRows(Exception):
    """A contestant delivered something else than each row once."""


@dataclass(frozen=True)
class Case:
    """A rival, and what fastdiff must reach against it.

    Attributes:
        rival: The other side of the pair.
        target: Least ratio of rows (of bytes, against a limit), or None.
        options: Of fastdiff's shuffler.
    """

    rival: Contestant
    target: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Contestant:
        """Fastdiff as it comes (block mode), on the file that the rival reads."""
        file = self.rival.file or "contiguous"
        return fastdiff(f"fastdiff, {file}", file, **self.options)


@dataclass(frozen=True)
class Run:
    """One timed run."""

    rows: float
    seconds: float
    cpu: float
    foreign: float


def check(contestant: Contestant, data: Data, seconds: float) -> int:
    """Hold every row of an epoch against what it must be; of a contestant that is sampled, what comes in `seconds`.

    Returns:
        How many rows were checked: the whole epoch unless the contestant is sampled.

    Raises:
        WrongRows: A row is not what it must be, comes twice or not at all.
    """
    base = base_rows()
    seen = np.zeros(data.n_rows, np.int64)
    with contestant.session(data) as session, _closing(session.epoch(1, data.n_rows // BATCH)) as batches:
        began = time.perf_counter()
        for i, batch in enumerate(batches):
            assert not isinstance(batch, int)
            rows = bits(batch)
            try:
                numbers = read_stamps(rows)
                np.add.at(seen, numbers, 1)
            except (ValueError, IndexError) as error:
                raise WrongRows(f"{contestant.name}: batch {i}: {error}") from error
            if len(rows) != BATCH or seen[numbers].max() > 1:
                raise WrongRows(f"{contestant.name}: batch {i}: {len(rows)} rows, one came {seen.max()} times")
            if i < 4:  # number and ends are looked at in every row, these batches value by value
                expected = base[numbers % CHUNK_ROWS]
                stamp(expected, numbers)
                if not np.array_equal(rows, expected):
                    raise WrongRows(f"{contestant.name}: batch {i}: a row has its number but not its values")
            if contestant.sampled and time.perf_counter() - began > seconds:
                break
        else:
            if seen.min() != 1:
                raise WrongRows(f"{contestant.name}: row {seen.argmin()} never came")
    return int(seen.sum())


def timed(session: Session, number: int, n_batches: int, seconds: float = math.inf) -> Run:
    """Time about `n_batches` batches of an epoch, or what comes in so many seconds, but one at least."""
    with _closing(session.epoch(number, session.ask(n_batches))) as batches:
        for _ in range(session.skip):
            next(batches)
        n_bytes = 0
        with measured() as load:
            began = time.perf_counter()
            for batch in islice(batches, session.count(n_batches)):
                n_bytes += batch if isinstance(batch, int) else len(batch) * ROW_BYTES
                if time.perf_counter() - began > seconds:
                    break
    return Run(n_bytes / ROW_BYTES, load.seconds, load.cpu, load.foreign)


def warm_pairs(case: Case, data: Data, n_pairs: int, seconds: float) -> tuple[list[Run], list[Run]]:
    """Interleaved runs of fastdiff and the rival over whole epochs; files and pools stay open in between."""
    n_batches = data.n_rows // BATCH
    runs: tuple[list[Run], list[Run]] = ([], [])
    with ExitStack() as stack:
        sides = [case.ours, case.rival]
        sessions = [stack.enter_context(side.session(data)) for side in sides]
        for number in range(n_pairs + 1 if n_pairs > 1 else 1):
            for side, session, found in zip(sides, sessions, runs, strict=True):
                run = timed(session, number, n_batches, seconds if side.sampled else math.inf)
                if number > 0 or n_pairs == 1:  # the first pair of several maps pages and starts threads
                    found.append(run)
    return runs


def disk_pairs(
    case: Case, data: Data, n_pairs: int, seconds: float, n_batches: int, before: Callable[[Contestant], None]
) -> tuple[list[Run], list[Run]]:
    """Interleaved runs that each open the file anew; `before` runs before that."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(1, n_pairs + 1):
        for side, found in ((case.ours, runs[0]), (case.rival, runs[1])):
            before(side)  # not in the session, where a thread may read ahead already
            with side.session(data) as session:
                found.append(timed(session, number, n_batches, seconds if side.sampled else math.inf))
    return runs


class Disk:
    """Reads past the page cache until the disk's burst budget is spent.

    Cloud disks save up unused bandwidth: one here gives 2.5 GB/s for a minute, then 1.1. A slow rival would save up
    for the run that follows it.
    """

    def __init__(self, data: Data):
        self._data = data
        self.sustained = math.inf

    def spend(self, least: float, most: float) -> list[float]:
        """Read for `least` to `most` seconds, until three times 5 s agree within 10 %; returns GB/s of each 5 s."""
        began = time.perf_counter()
        rates: list[float] = []
        while True:
            rates.append(self._rate(5.0))
            elapsed, last = time.perf_counter() - began, rates[-3:]
            if elapsed > most or (elapsed >= least and max(last) < _SETTLED * min(last)):
                self.sustained = last[-1]
                return rates

    def settle(self, most: float = 20.0) -> None:
        """Read until the rate is the lasting one again, if that is known."""
        end = time.perf_counter() + most
        if math.isfinite(self.sustained):
            while self._rate(0.5) > _SETTLED * self.sustained and time.perf_counter() < end:
                pass

    def _rate(self, seconds: float) -> float:
        began, n_bytes = time.perf_counter(), 0
        with sequential_direct().session(self._data) as session:
            while (elapsed := time.perf_counter() - began) < seconds:
                with _closing(session.epoch(0, self._data.n_rows // BATCH)) as pieces:
                    for piece in pieces:
                        assert isinstance(piece, int)
                        n_bytes += piece
                        if time.perf_counter() - began >= seconds:
                            break
        return n_bytes / elapsed / 1e9


class Table:
    """Prints rows as they come and keeps them."""

    def __init__(self, judged: bool):
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self._judged = judged

    def head(self, title: str, data: Data, cases: list[Case]) -> None:
        """Begin a state: say how fastdiff reads, and what the columns are."""
        print(f"\n{title}")
        for ours in {case.ours.name: case.ours for case in cases}.values():
            with ours.session(data) as session:
                print(f"{ours.name}: {session.note}")
        print(f"{'contestant':34} {'rows/s':>10} {'GB/s':>7} {'CPU-s/GB':>8} {'foreign':>7} ", end="")
        print(f"{'fastdiff / it: median (min to max)':>36} {'pairs':>5}  target", flush=True)

    def add(
        self, name: str, state: str, runs: list[Run], ratio: Ratio | None = None, target: float | None = None
    ) -> None:
        """Add a contestant: its runs and, for a rival, the ratios fastdiff / rival."""
        rate = float(np.median([run.rows / run.seconds for run in runs]))
        cpu = float(np.median([run.cpu / run.rows for run in runs])) / ROW_BYTES * 1e9
        foreign = max(run.foreign for run in runs)
        reached = None if target is None or ratio is None else ratio.median >= target
        verdict = "" if reached is None else f"≥ {target:g} {'reached' if reached else 'MISSED'}"
        if reached is not None and not self._judged:
            verdict += " (not judged)"
        print(f"{name:34} {rate:10,.0f} {rate * ROW_BYTES / 1e9:7.3f} {cpu:8.3f} {foreign:7.2f} ", end="")
        print(f"{'' if ratio is None else str(ratio):>36} {len(runs):5}  {verdict}".rstrip(), flush=True)
        if reached is False and self._judged:
            self.missed.append(f"{state}, {name}: {ratio}, at least {target:g} wanted")
        self.rows.append(
            {
                "contestant": name,
                "state": state,
                "rows_per_second": rate,
                "gb_per_second": rate * ROW_BYTES / 1e9,
                "cpu_seconds_per_gb": cpu,
                "ratio": ratio.median if ratio else None,
                "ratios": ratio.values if ratio else None,
                "target": target,
                "reached": reached,
                "runs": [asdict(run) for run in runs],
            }
        )


def ratio(ours: list[Run], rival: list[Run]) -> Ratio:
    """How many times as fast each of our runs was as the rival's that followed it."""
    pairs = zip(ours, rival, strict=True)
    return Ratio([(a.rows / a.seconds) / (b.rows / b.seconds) for a, b in pairs])


class _closing:
    """`contextlib.closing` for iterators of which only some can be closed."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches

    def __enter__(self) -> Iterator[Batch]:
        return self._batches

    def __exit__(self, *_: object) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
