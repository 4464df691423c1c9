"""Reads a store: rows by positioned reads where the layout allows, else through HDF5, as side columns are."""

import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.errors import InputError, OptionError
from fastdiff.rundir import read_json, sha256_file, sha256_text
from fastdiff.store.documents import cut_before_holdout
from fastdiff.store.format import (
    COLUMNS,
    NORM_TYPE,
    NORMS,
    STORE_FILE,
    TORCH_DTYPES,
    VOCABULARY_FILE,
    LeftOut,
    ModelInfo,
    Stats,
    StoreMeta,
)
from fastdiff.store.hdf5_rows import Hdf5Rows
from fastdiff.store.index import BITS, HDF5_ERRORS, REPACK, ShardIndex, index_shard, open_hdf5
from fastdiff.store.left_out import BOS, FIRST, SINK, USED, LeftOutRows, Medians, Rule, default_max_norm, norms_of
from fastdiff.store.parts import disagreements, find_parts
from fastdiff.store.statistics import PartedStats

# rows read at a time for statistics: 4096 rows of 2 x 3584 bfloat16 are 59 MB
_PASS_ROWS = 4096


class Extents(NamedTuple):
    """Runs of rows that lie back to back in a file.

    Attributes:
        fds: (E,) open file of each extent.
        offsets: (E,) byte offset of its first row.
        first_rows: (E + 1,) number of its first row in the store, and the number of all rows.
        files: (E,) number of its shard.
    """

    fds: NDArray[np.int64]
    offsets: NDArray[np.int64]
    first_rows: NDArray[np.int64]
    files: NDArray[np.int64]


class ActivationStore:
    """A store directory, or a bare HDF5 file with `/activations`, open for reading.

    Close it with `close()` or a `with` block.

    Attributes:
        path: What was opened.
        meta: `store.json`; for a bare file only names for the models.
        n_rows: N, over all shards.
        n_models: M.
        d_model: D.
        dtype: Type of the stored values, and of what `rows` returns.
        first_rows: (S + 1,) the first row of each shard, and N.
        slow: The first shard whose rows must be read through HDF5, and why; None if all are read by position.

    Raises:
        InputError: It is missing, incomplete, damaged, or of another schema.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        meta, files = find_parts(self.path)
        self._shards = [index_shard(file, meta.dtype if meta else None) for file in files]
        first = self._shards[0]
        self.n_models, self.d_model = first.n_models, first.d_model
        self.dtype = TORCH_DTYPES[first.dtype]
        self.meta = meta or StoreMeta(models=_unnamed_models(self.n_models))
        for disagreement in disagreements(self.path, self.meta, self._shards):
            raise InputError(disagreement)
        self.first_rows = np.cumsum([0, *(shard.n_rows for shard in self._shards)], dtype=np.int64)
        self.n_rows = int(self.first_rows[-1])
        self.slow = next((f"{s.path.name}: {s.slow}" for s in self._shards if s.slow is not None), None)
        self._codes: NDArray[np.uint8] | None = None
        self._left_out: LeftOut | None = None
        self._stats: Stats | None = None
        self._sha256: str | None = None
        self._vocabulary: list[str] | None = None
        self._hdf5: Hdf5Rows | None = None
        self._extents: Extents | None = None
        fds: list[int] = []
        if self.slow is not None:
            self._hdf5 = Hdf5Rows([shard.path for shard in self._shards], self.first_rows)
        self._close = weakref.finalize(self, _close_all, fds, self._hdf5)
        if self.slow is None:
            for shard in self._shards:
                fds.append(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
            self._extents = _join(self._shards, fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading rows afterwards is an error; closing again is not."""
        self._close()

    def sha256(self) -> str:
        """Hash of `store.json`, which holds the hashes of the shards; where it does not, of the shards too.

        A bare file, and a shard without a recorded hash, is read whole.
        """
        if self._sha256 is None:
            known = {info.file for info in self.meta.shards or [] if info.sha256 is not None}
            unknown = [shard.path for shard in self._shards if shard.path.name not in known]
            parts = [self.path / STORE_FILE] * self.path.is_dir() + unknown
            hashes = [sha256_file(part) for part in parts]
            self._sha256 = hashes[0] if len(hashes) == 1 else sha256_text(" ".join(hashes))
        return self._sha256

    def rows(
        self, rows: NDArray[np.int64], *, n_threads: int = 2, crc: list[NDArray[np.uint32]] | None = None
    ) -> Tensor:
        """Read rows.

        Args:
            rows: (n,) row numbers in [0, N), in any order, repeats allowed.
            n_threads: Threads that read.
            crc: What `crc32c` gave, to check the rows against; not for a store that is `slow`.

        Returns:
            [n, M, D] in the stored type.

        Raises:
            InputError: A file is shorter than it was, or cannot be read, or rows are not what was written.
            IndexError: A row number is outside [0, N).
        """
        if not self._close.alive:
            raise ValueError(f"{self.path}: the store is closed")
        rows = np.ascontiguousarray(rows, np.int64)
        out = torch.empty((len(rows), self.n_models, self.d_model), dtype=self.dtype)
        if self._hdf5 is not None:
            outside = (rows < 0) | (rows >= self.n_rows)
            if outside.any():
                raise IndexError(f"row {rows[outside][0]} is outside [0, {self.n_rows})")
            self._hdf5.read(rows, out.view(torch.uint8).numpy().view(BITS[out.itemsize]))
            return out
        extents = self.extents
        try:
            _native.gather_rows(
                extents.fds,
                extents.offsets,
                extents.first_rows,
                rows,
                out.view(torch.uint8).numpy(),
                n_threads=n_threads,
                crc=None if crc is None else (crc, self.first_rows),
            )
        except (_native.ReadError, _native.CorruptRows) as error:
            raise self.explained(error) from error
        return out

    @property
    def extents(self) -> Extents:
        """Where the rows lie, for reading them by position.

        Raises:
            ValueError: Rows must be read through HDF5; see `slow`.
        """
        if self._extents is None:
            raise ValueError(f"{self.path}: no extents, {self.slow}")
        return self._extents

    def explain(self) -> list[str]:
        """How each file is read, a line per file, and what makes it faster."""
        lines = []
        for shard in self._shards:
            if self.slow is None:
                how = "positioned reads"
                if len(shard.offsets) > 1:
                    how += f", {len(shard.offsets)} extents"
            elif shard.slow is None:
                how = f"through HDF5, because of {self.slow}"
            else:
                how = f"through HDF5 ({shard.slow}); {REPACK} makes it fast"
            lines.append(f"{shard.path.name}: {how}")
        return lines

    def crc32c(self) -> list[NDArray[np.uint32]] | None:
        """The `/crc32c` of each shard, (⌈n/32⌉,), or None unless every shard has one.

        Raises:
            InputError: A file cannot be read.
        """
        if not all(shard.has_crc for shard in self._shards):
            return None
        return [_integers(shard.path, "crc32c", np.dtype("<u4")) for shard in self._shards]

    def slice(self, start: int, stop: int) -> Tensor:
        """Read rows [start, stop): [stop - start, M, D] in the stored type."""
        return self.rows(np.arange(start, stop, dtype=np.int64))

    def column(self, name: str) -> NDArray[Any] | None:
        """A side column over all shards: (N,), norms (N, M), or None if the store has none.

        Args:
            name: token_ids, sequence_ids, positions, roles, sources or norms.

        Raises:
            InputError: A file cannot be read.
        """
        if name not in (*COLUMNS, NORMS):
            raise ValueError(f"no column {name!r}; there are {', '.join((*COLUMNS, NORMS))}")
        if name not in self._shards[0].columns:
            return None
        return np.concatenate([_column(shard.path, name) for shard in self._shards])

    def stats(self) -> Stats:
        """Mean, variance and mean norm over the usable rows, from `store.json` or by one pass in float64.

        Raises:
            InputError: There are no usable rows, or a value is NaN or infinite.
        """
        if self._stats is None:
            # those of a store without a rule are over all rows that are not BOS
            if self.meta.stats is not None and (self._recorded() is not None or not self._found().rows):
                self._stats = self.meta.stats
            else:
                self._compute_stats()
        assert self._stats is not None
        return self._stats

    def usable_rows(self) -> NDArray[np.int64] | None:
        """Numbers of the rows that are not left out of use: (n,), ascending, or None if that is all rows.

        Left out are those of `left_out`: BOS, sinks, and first positions without BOS. The first call for a store
        without `norms` may read all rows.

        Raises:
            InputError: A file cannot be read.
        """
        usable = np.flatnonzero(self._why_left_out() == USED)
        return None if len(usable) == self.n_rows else usable

    def left_out(self) -> LeftOutRows:
        """The rows that are left out of use, by why they are.

        Raises:
            InputError: A file cannot be read.
        """
        codes = self._why_left_out()
        return LeftOutRows(bos=codes == BOS, sinks=codes == SINK, first=codes == FIRST)

    @property
    def must_be_measured(self) -> bool:
        """What is left out of use takes a pass over the rows, because there is no column `norms`."""
        return self._codes is None and self._rule().max_norm > 0 and NORMS not in self._shards[0].columns

    def left_out_facts(self) -> dict[str, Any]:
        """What is left out of use besides BOS, for JSON.

        Returns:
            `max_norm`; `median` per model, or null where the rule is off; `rows`, how many are left out; `position_0`,
            how many of them as first positions; `share` of the rows that are not BOS; `variance_share` per model;
            `usable`, the rows in use; `from`, "store.json" or, for a store without the rule, "measured".

        Raises:
            InputError: There are no usable rows, or a value is NaN or infinite, where that must be measured.
        """
        if self._found().variance_share is None:
            self._compute_stats()
        found = self._found()
        if self._recorded() is None:
            usable = int(np.count_nonzero(self._why_left_out() == USED))
        else:
            usable = 0 if self.meta.stats is None else self.meta.stats.n_rows
        rows = found.rows or 0
        return {
            **found.model_dump(include={"max_norm", "median", "rows", "position_0", "variance_share"}),
            "share": rows / max(1, rows + usable),
            "usable": usable,
            "from": "measured" if self._recorded() is None else STORE_FILE,
        }

    def left_out_line(self) -> str | None:
        """The same in a line, or None if nothing but BOS is left out.

        Raises:
            InputError: As `left_out_facts`.
        """
        facts = self.left_out_facts()
        if not facts["rows"]:
            return None
        n_first, n_sinks = facts["position_0"], facts["rows"] - facts["position_0"]
        parts = [f"{n_sinks:,} whose norm is over {facts['max_norm']:g} times the median"] if n_sinks else []
        if n_first:
            parts.append(f"{n_first:,} at position 0 without BOS")
        variance = " and ".join(f"{share:.0%}" for share in facts["variance_share"])
        return (
            f"left out of use: {facts['rows']:,} of {facts['rows'] + facts['usable']:,} rows ({facts['share']:.1%}), "
            f"{' and '.join(parts)}; they hold {variance} of the variance"
        )

    def _rule(self) -> Rule:
        told = self.meta.left_out
        return Rule(self.meta, default_max_norm(self.meta.models[0].hook) if told is None else told.max_norm)

    def _why_left_out(self) -> NDArray[np.uint8]:
        """(N,) codes of `left_out.py`."""
        if self._codes is None:
            rule, told = self._rule(), self.meta.left_out
            median = None if told is None else told.median
            norms: list[NDArray[np.float32]] = []
            columns = [self._columns_of(shard) for shard in self._shards]
            if rule.max_norm:
                norms = [self._norms(index) for index in range(len(self._shards))]
                if median is None:
                    medians = Medians(self.n_models)
                    for shard, part, of in zip(self._shards, norms, columns, strict=True):
                        medians.add(part, rule.bos(of, shard.n_rows))
                    median = medians.result()
            self._codes = np.concatenate(
                [
                    rule.codes(of, norms[i] if norms else None, median, self._shards[i].n_rows)
                    for i, of in enumerate(columns)
                ]
            )
            n_first, n_sinks = (int(np.count_nonzero(self._codes == code)) for code in (FIRST, SINK))
            self._left_out = LeftOut(
                max_norm=rule.max_norm, median=median, rows=n_first + n_sinks, position_0=n_first,
                variance_share=None if n_first + n_sinks else [0.0] * self.n_models,
            )  # fmt: skip
        return self._codes

    def _columns_of(self, shard: ShardIndex) -> dict[str, NDArray[Any]]:
        return {name: _column(shard.path, name) for name in ("roles", "positions") if name in shard.columns}

    def _norms(self, index: int) -> NDArray[np.float32]:
        """The norms of a shard, (n, M): its column, or measured."""
        shard, first = self._shards[index], int(self.first_rows[index])
        if NORMS in shard.columns:
            return _column(shard.path, NORMS)
        parts = (
            self.slice(start, min(first + shard.n_rows, start + _PASS_ROWS))
            for start in range(first, first + shard.n_rows, _PASS_ROWS)
        )
        return np.concatenate([norms_of(part) for part in parts])

    def _recorded(self) -> LeftOut | None:
        told = self.meta.left_out
        return told if told is not None and told.is_recorded else None

    def _found(self) -> LeftOut:
        """What is left out besides BOS: as store.json says, or counted."""
        recorded = self._recorded()
        if recorded is not None:
            return recorded
        self._why_left_out()
        assert self._left_out is not None
        return self._left_out

    def n_train(self, holdout: float) -> int:
        """Rows [0, n_train) are for training, the others for evaluation.

        Args:
            holdout: Share of the documents at the end that is kept for evaluation, in [0, 1). A document is
                never split; without sequence ids the share is one of rows.

        Raises:
            OptionError: `holdout` is outside [0, 1).
        """
        if not 0 <= holdout < 1:
            raise OptionError(f"holdout is {holdout}: it must be at least 0 and less than 1")
        if holdout == 0:
            return self.n_rows
        ids = self.column("sequence_ids")
        if ids is None:
            return max(1, self.n_rows - max(1, round(holdout * self.n_rows)))
        return cut_before_holdout(ids, holdout)

    @property
    def vocabulary(self) -> list[str] | None:
        """Display string of each token id, or None if the store has no `vocabulary.json`."""
        if self._vocabulary is None and self.path.is_dir():
            path = self.path / VOCABULARY_FILE
            wanted = self.meta.vocabulary_sha256
            if wanted is None and not path.exists():
                return None
            if wanted is not None and sha256_file(path) != wanted:
                raise InputError(f"{path}: changed since the store was written; extract it again")
            found = read_json(path, schema=None)
            if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
                raise InputError(f"{path}: expected a JSON list of strings; extract it again")
            self._vocabulary = found
        return self._vocabulary

    def _compute_stats(self) -> None:
        """Statistics of the usable rows, and which share of the variance the others have, in one pass."""
        codes = self._why_left_out()
        assert self._left_out is not None
        counted = np.flatnonzero(codes != BOS)
        running = PartedStats(self.n_models, self.d_model)
        for start in range(0, len(counted), _PASS_ROWS):
            numbers = counted[start : start + _PASS_ROWS]
            block = self.rows(numbers)
            finite = torch.isfinite(block)
            if not bool(finite.all()):
                at, model = (int(i) for i in (~finite).nonzero()[0][:2])
                name = self.meta.models[model].name
                raise InputError(
                    f"{self.path}: row {numbers[at]} of model {name} holds NaN or infinity; extract it again"
                )
            used = codes[numbers] == USED
            running.add(block, used, ~used)
        self._stats = running.result()
        if self._stats is None:
            why = "is left out of use (BOS, position 0, norm)" if len(counted) else "has the role bos"
            raise InputError(f"{self.path}: every row {why}, so there is nothing to learn from")
        self._left_out = self._left_out.model_copy(update={"variance_share": running.variance_share()})

    def explained(self, error: _native.ReadError | _native.CorruptRows | _native.NonFiniteRow) -> InputError:
        """What a native reader of this store found, with the file, and what to do about it."""
        if isinstance(error, _native.ReadError):
            _, extent, offset, wanted, got, code = error.args
            path = self._shards[int(self.extents.files[extent])].path
            if code:
                return InputError(f"{path}: cannot be read at byte {offset} ({os.strerror(code)}); check the disk")
            return InputError(
                f"{path}: truncated, {got} of {wanted} bytes left at byte {offset}; copy or extract it again"
            )
        row = error.args[1]
        path = self._shards[int(np.searchsorted(self.first_rows, row, side="right")) - 1].path
        if isinstance(error, _native.CorruptRows):
            return InputError(
                f"{path}: rows {row} to {error.args[2] - 1} of the store are not what was written (CRC-32C); "
                "copy or extract it again"
            )
        return InputError(f"{path}: row {row} of the store holds NaN or infinity; extract it again")


def _close_all(fds: list[int], hdf5: Hdf5Rows | None) -> None:
    for fd in fds:
        os.close(fd)
    if hdf5 is not None:
        hdf5.close()


def _join(shards: list[ShardIndex], fds: list[int]) -> Extents:
    """The extents of all shards."""
    counts = [len(shard.offsets) for shard in shards]
    rows = np.concatenate([shard.extent_rows for shard in shards])
    return Extents(
        fds=np.repeat(np.array(fds, np.int64), counts),
        offsets=np.concatenate([shard.offsets for shard in shards]),
        first_rows=np.concatenate([[0], np.cumsum(rows)]),
        files=np.repeat(np.arange(len(shards)), counts),
    )


def _integers(path: Path, name: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """A data set of integers, in its type; a value that does not fit is refused, not wrapped."""
    with open_hdf5(path) as file:
        try:
            values: NDArray[Any] = file[name][:]
        except HDF5_ERRORS as error:
            raise InputError(f"{path}: /{name} cannot be read ({error}); copy or extract it again") from error
    limits = np.iinfo(kind)
    if values.dtype != kind and len(values) and (values.min() < limits.min or values.max() > limits.max):
        raise InputError(
            f"{path}: /{name} reach from {values.min()} to {values.max()}, which does not fit {kind}; "
            "write them again as the format says"
        )
    return values.astype(kind, copy=False)


def _column(path: Path, name: str) -> NDArray[Any]:
    """A side column of one file, in its type."""
    if name != NORMS:
        return _integers(path, name, COLUMNS[name])
    with open_hdf5(path) as file:
        try:
            norms: NDArray[np.float32] = file[name][:].astype(NORM_TYPE, copy=False)
        except HDF5_ERRORS as error:
            raise InputError(f"{path}: /{name} cannot be read ({error}); copy or extract it again") from error
    return norms


def _unnamed_models(n_models: int) -> list[ModelInfo]:
    names = ["base", "tuned"] if n_models == 2 else [f"model-{i}" for i in range(n_models)]
    return [ModelInfo(name=name) for name in names]
