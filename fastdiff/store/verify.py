"""Whether a store is what was written: every file, checksum and number in it, and all that is wrong at once."""

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError
from fastdiff.progress import SILENT, Progress
from fastdiff.rundir import read_json, sha256_file
from fastdiff.store.format import NORMS, STORE_FILE, VOCABULARY_FILE, StoreMeta, crc_blocks
from fastdiff.store.index import HDF5_ERRORS, ShardIndex, index_shard, open_hdf5
from fastdiff.store.left_out import Rule
from fastdiff.store.parts import disagreements, find_parts, unnamed_shards
from fastdiff.store.verify_columns import ColumnCheck
from fastdiff.store.verify_rows import Moments, check_rows

# problems beyond these are only counted
_KEPT = 200
_LEFTOVERS = (".journal", ".extracting", ".shard-*.h5.tmp", ".*.json.tmp", "..journal.tmp")


@dataclass
class Findings:
    """What a verification has found so far.

    Attributes:
        path: What was verified.
        problems: One line each: what, where, what to do. At most 200.
        n_problems: How many there are.
        notes: What could not be verified, and why.
        facts: What was verified.
        text: The same in words.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    n_problems: int = 0
    notes: list[str] = field(default_factory=list)
    facts: dict[str, int | str] = field(default_factory=dict)
    text: str = ""

    def add(self, problem: str) -> None:
        """Count a problem, and keep it if there are not too many."""
        self.n_problems += 1
        if len(self.problems) < _KEPT:
            self.problems.append(_printable(problem))

    def note(self, text: str) -> None:
        """Add what could not be verified."""
        self.notes.append(_printable(text))

    def merge(self, other: "Findings") -> None:
        """Add what another check of the same path has found."""
        self.n_problems += other.n_problems
        self.problems = [*self.problems, *other.problems][:_KEPT]
        self.notes += other.notes
        self.facts |= other.facts
        self.text = "; ".join(text for text in (self.text, other.text) if text)

    def summary(self) -> list[str]:
        """The findings, a line each."""
        more = [f"and {self.n_problems - _KEPT} more problems"] if self.n_problems > _KEPT else []
        if self.problems:
            return [*self.problems, *more, *self.notes]
        return [f"{self.path}: sound; {self.text}", *self.notes]


def verify_store(path: Path, *, quick: bool = False, n_threads: int = 2, progress: Progress = SILENT) -> Findings:
    """Check a store directory or a bare HDF5 file.

    Args:
        path: The store.
        quick: Leave `/activations` unread.
        n_threads: Threads that read and sum.
        progress: Where to report.

    Returns:
        What was found; nothing is raised for a bad store.
    """
    found = Findings(path)
    meta, files = _parts(path, found)
    _check_leftovers(path, meta, files, found)
    if meta is not None:
        _check_vocabulary(path, meta, found)
    shards = [shard for file in files if (shard := _index(file, meta, found)) is not None]
    if not shards:
        return found
    told = meta or StoreMeta.model_validate({"schema": 1, "models": [f"model-{i}" for i in range(shards[0].n_models)]})
    for disagreement in disagreements(path, told, shards):
        found.add(disagreement)
    _check_columns(path, told, shards, found, whole=len(shards) == len(files))
    unsummed = [shard.path.name for shard in shards if not shard.has_crc]
    if unsummed:
        found.note(f"{path}: {_first(unsummed)} without /crc32c: what it holds cannot be verified")
    n_bytes = sum(shard.n_rows * shard.row_bytes for shard in shards)
    n_blocks = sum(crc_blocks(shard.n_rows) for shard in shards if shard.has_crc)
    n_rows = sum(shard.n_rows for shard in shards)
    found.facts |= {"shards": len(shards), "rows": n_rows, "bytes": n_bytes, "dtype": shards[0].dtype}
    found.text = f"{n_rows:,} rows of {shards[0].n_models} × {shards[0].d_model} {shards[0].dtype}, {_size(n_bytes)}"
    if quick:
        found.note(f"{path}: /activations not read (--quick)")
        if told.stats is not None:
            found.note(f"{path}: statistics in {STORE_FILE} not checked (--quick)")
    else:
        n_nonfinite = _check_rows(path, told, shards, found, n_threads, progress)
        found.facts |= {"blocks": n_blocks, "nonfinite_rows": n_nonfinite}
        found.text += f"; {n_blocks:,} blocks checked, {n_nonfinite} rows with NaN or infinity"
    return found


def _parts(path: Path, found: Findings) -> tuple[StoreMeta | None, list[Path]]:
    try:
        return find_parts(path)
    except InputError as error:
        found.add(str(error))
    # without store.json the shards are not yet a store
    return None, unnamed_shards(path) if (path / STORE_FILE).is_file() else []


def _check_leftovers(path: Path, meta: StoreMeta | None, files: Sequence[Path], found: Findings) -> None:
    """Files that no finished store has, and shards that it does not know."""
    if not path.is_dir():
        return
    left = sorted(file.name for pattern in _LEFTOVERS for file in path.glob(pattern))
    if left and _is_locked(path):
        found.add(f"{path}: {_first(left)}: another process is writing here; wait for it")
    elif left:
        found.add(
            f"{path}: {_first(left)}: left by a writer that was cut off; run its command again, "
            "or delete them if the store is complete"
        )
    if meta is not None and meta.shards is not None:
        extra = sorted({file.name for file in path.glob("shard-*.h5")} - {file.name for file in files})
        if extra:
            found.add(f"{path}: {_first(extra)}: not listed in {STORE_FILE}; delete what is not part of the store")


def _is_locked(directory: Path) -> bool:
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _check_vocabulary(path: Path, meta: StoreMeta, found: Findings) -> None:
    file = path / VOCABULARY_FILE
    if meta.vocabulary_sha256 is None and not file.exists():
        return
    try:
        if meta.vocabulary_sha256 is not None and sha256_file(file) != meta.vocabulary_sha256:
            found.add(f"{file}: changed since the store was written; extract it again")
        tokens = read_json(file, schema=None)
    except InputError as error:
        found.add(str(error))
        return
    except RecursionError:
        tokens = None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        found.add(f"{file}: expected a JSON list of strings; extract it again")


def _index(file: Path, meta: StoreMeta | None, found: Findings) -> ShardIndex | None:
    try:
        return index_shard(file, meta.dtype if meta else None)
    except InputError as error:
        found.add(str(error))
        return None


def _check_columns(path: Path, meta: StoreMeta, shards: Sequence[ShardIndex], found: Findings, *, whole: bool) -> None:
    check = ColumnCheck(meta)
    recorded = {info.file: info.sha256 for info in meta.shards or []}
    for shard in shards:
        try:
            with open_hdf5(shard.path) as file:
                problems, sha256 = check.shard(shard, file)
        except HDF5_ERRORS as error:
            found.add(f"{shard.path}: side columns cannot be read ({error}); copy or extract it again")
            whole = False
            continue
        except InputError as error:
            found.add(str(error))
            whole = False
            continue
        for problem in problems:
            found.add(f"{shard.path}: {problem}")
        wanted = recorded.get(shard.path.name)
        if wanted is not None and sha256 != wanted:
            what = "/crc32c or side columns are" if shard.has_crc else "/crc32c is gone, so it is"
            found.add(f"{shard.path}: {what} not what {STORE_FILE} has the hash of; copy or extract it again")
    if whole:
        for problem in check.whole():
            found.add(f"{path}: {problem}")


def _check_rows(
    path: Path, meta: StoreMeta, shards: Sequence[ShardIndex], found: Findings, n_threads: int, progress: Progress
) -> int:
    n_nonfinite = 0
    # statistics of rows that are damaged or not all there cannot fit, so they are no second problem
    moments = Moments(shards[0].n_models, shards[0].d_model) if meta.stats and not found.n_problems else None
    # without norms nothing says which rows the statistics are over
    if meta.left_out is not None and meta.left_out.max_norm and any(NORMS not in shard.columns for shard in shards):
        moments = None
    n_rows = sum(shard.n_rows for shard in shards)
    with progress.task("verify", n_rows, "rows") as task:
        for shard in shards:
            sums = _checksums(shard, found)
            try:
                norms = _column(shard, NORMS)
                codes = None if moments is None else _codes(meta, shard, norms)
                result = check_rows(shard, sums, n_threads, task.advance, codes, moments, norms)
            except InputError as error:
                found.add(str(error))
                continue
            n_nonfinite += result.n_nonfinite
            for problem in result.problems():
                found.add(f"{shard.path}: {problem}")
    if meta.stats is not None and moments is not None and not found.n_problems:
        for name in moments.differences(meta.stats):
            found.add(
                f"{path}: {name} in the stats of {STORE_FILE} is not that of the rows; "
                "remove the stats there, and they are computed"
            )
        told = None if meta.left_out is None else meta.left_out.variance_share
        share = moments.variance_share()
        if told is not None and (len(told) != len(share) or not np.allclose(told, share, rtol=0, atol=1e-6)):
            found.add(
                f"{path}: left_out in {STORE_FILE} has the variance_share {told}, but it is {share.tolist()}; "
                "extract it again"
            )
    return n_nonfinite


def _codes(meta: StoreMeta, shard: ShardIndex, norms: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """Why each row is left out of use, for statistics; where no rule is recorded they are over all rows but BOS."""
    told = meta.left_out if meta.left_out is not None and meta.left_out.is_recorded else None
    rule = Rule(meta, 0.0 if told is None else told.max_norm)
    found = {name: _column(shard, name) for name in ("roles", "positions")}
    columns = {name: values for name, values in found.items() if values is not None}
    return rule.codes(columns, norms, None if told is None else told.median, shard.n_rows)


def _column(shard: ShardIndex, name: str) -> NDArray[Any] | None:
    if name not in shard.columns:
        return None
    with open_hdf5(shard.path) as file:
        try:
            values: NDArray[Any] = file[name][:]
        except HDF5_ERRORS as error:
            raise InputError(f"{shard.path}: /{name} cannot be read ({error}); copy or extract it again") from error
    return values


def _checksums(shard: ShardIndex, found: Findings) -> NDArray[np.uint32] | None:
    if not shard.has_crc:
        return None
    try:
        with open_hdf5(shard.path) as file:
            sums = file["crc32c"][:]
    except HDF5_ERRORS as error:
        found.add(f"{shard.path}: /crc32c cannot be read ({error}); copy or extract it again")
        return None
    if sums.dtype != np.uint32:
        found.add(f"{shard.path}: /crc32c is {sums.dtype}, expected uint32; write it again")
        return None
    return np.ascontiguousarray(sums)


def _printable(text: str) -> str:
    """One line; a damaged file may hold what no terminal can print."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
