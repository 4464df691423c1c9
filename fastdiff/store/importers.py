"""`fastdiff import`: a store from activations that other tools have written, without running a model.

Rows are copied in blocks, so memory does not grow with the sources, and no value changes unless another type is asked
for. The store says of every file it was made from what its sha256 was.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.errors import InputError, OptionError
from fastdiff.progress import SILENT, Progress
from fastdiff.rundir import sha256_file, versions
from fastdiff.store.directory import disk_errors, lock_directory
from fastdiff.store.format import COLUMNS, STORE_FILE, DtypeName
from fastdiff.store.import_sources import Source, open_source, read_integers
from fastdiff.store.journal import JOURNAL
from fastdiff.store.left_out import default_max_norm
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify_columns import torn_sequence
from fastdiff.store.writer import StoreWriter

# read, converted and written at a time; a resumed import must append the same blocks
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class ImportOptions:
    """How a store is made.

    Attributes:
        names: Names of the models; empty for those of the sources.
        dataset_name: Tensor or data set to take from each file.
        bits: "bfloat16" if values of 2 bytes without a float type are its bits.
        store_dtype: Type to store; None for the sources' own.
        shard_rows: Rows per shard.
        token_ids: .npy or .pt with the token of each row.
        sequence_ids: .npy or .pt with the document of each row.
        bos_token_id: Rows with this token are not trained on, and begin a sequence if nothing else says so.
        max_norm: Rows whose norm is over so many times the median are left out of use; 0 for none.
    """

    names: tuple[str, ...] = ()
    dataset_name: str | None = None
    bits: str | None = None
    store_dtype: DtypeName | None = None
    shard_rows: int = 1_000_000
    token_ids: Path | None = None
    sequence_ids: Path | None = None
    bos_token_id: int | None = None
    max_norm: float = 3.0


def import_store(
    texts: Sequence[str],
    out: Path,
    options: ImportOptions,
    progress: Progress = SILENT,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> Path:
    """Make a store.

    Args:
        texts: Sources in the order of the models: paths, or path:name.
        out: Directory of the store.
        options: How.
        progress: Where to report.
        resume: Leave a complete store of the same sources and options as it is, and continue an interrupted
            one; if False, a complete store is refused and an interrupted one started again.
        overwrite: Replace a store in `out`, whatever it holds.

    Returns:
        `out`.

    Raises:
        InputError: A source is missing, damaged, or does not go with the others, or a value is not finite.
        OptionError: The options do not fit the sources, or `out` holds something else.
        ResourceError: No room on the disk.
        LockedError: Another process writes to `out`.
    """
    sources = [open_source(text, name=options.dataset_name, bits=options.bits) for text in texts]
    _require_apart(out, sources)
    n_rows, n_models, d_model, dtype = _common(sources, options)
    columns = _columns(sources, options, n_rows)
    meta = _meta(sources, options, n_models, columns, progress)
    if _is_complete(out, meta, resume=resume, overwrite=overwrite):
        progress.say(f"{out}: complete, made from the same sources with the same options; skipped")
        return out
    with StoreWriter(
        out,
        n_rows=n_rows,
        n_models=n_models,
        d_model=d_model,
        dtype=dtype,
        shard_rows=options.shard_rows,
        meta=meta,
        columns=tuple(name for name in COLUMNS if name in columns),
        resume=resume and not overwrite,
        max_norm=options.max_norm,
    ) as writer:
        block = max(32, _BLOCK_BYTES // (n_models * d_model * 4) // 32 * 32)
        first = writer.n_appended
        if first:
            progress.say(f"{out}: continues at row {first:,}")
        with progress.task("import", n_rows, "rows", start=first) as task:
            for start in range(first, n_rows, block):
                stop = min(n_rows, start + block)
                parts = [source.read(start, stop) for source in sources]
                kind = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float64
                rows = torch.cat([part.to(kind) for part in parts], dim=1)
                try:
                    writer.append(rows, **{name: values[start:stop] for name, values in columns.items()})
                except InputError:
                    # no import of these files can come past a value that is not finite
                    writer.discard()
                    raise
                task.advance(stop - start)
    with ActivationStore(out) as store:
        if (left_out := store.left_out_line()) is not None:
            progress.say(left_out)
    return out


def _require_apart(out: Path, sources: Sequence[Source]) -> None:
    """Refuse to write where the sources are: a store replaces what is in its directory."""
    for source in sources:
        for file in source.files:
            if out.resolve() in (file.resolve(), *file.resolve().parents):
                raise OptionError(f"{out}: holds {file}, which is to be imported; choose another -o")


def _common(sources: Sequence[Source], options: ImportOptions) -> tuple[int, int, int, DtypeName]:
    """Rows, models, width and type of the store."""
    first = sources[0]
    widths = [(source, part.d_model, part.n_models) for source in sources for part in source.parts]
    for source, d_model, _ in widths:
        if d_model != widths[0][1]:
            raise InputError(
                f"{source.text}: width {d_model}, but {first.text} has {widths[0][1]}; they do not go together"
            )
    for source in sources:
        if source.n_rows != first.n_rows:
            raise InputError(
                f"{source.text}: {source.n_rows} rows, but {first.text} has {first.n_rows}; "
                "row i of all sources must be the same token"
            )
    n_models = sum(source.parts[0].n_models for source in sources)
    if options.names and len(options.names) != n_models:
        raise OptionError(f"{len(options.names)} times --name, but the sources hold {n_models} models; name each once")
    kinds = sorted({part.dtype for source in sources for part in source.parts})
    storable: dict[str, DtypeName] = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    dtype = options.store_dtype or (storable.get(kinds[0]) if len(kinds) == 1 else None)
    if dtype is None:
        raise OptionError(f"the sources are {' and '.join(kinds)}; say what to store with --store-dtype")
    return first.n_rows, n_models, widths[0][1], dtype


def _columns(sources: Sequence[Source], options: ImportOptions, n_rows: int) -> dict[str, NDArray[Any]]:
    """The columns that are known; a source that says otherwise than another does not go with it."""
    columns: dict[str, NDArray[Any]] = {}
    said_by: dict[str, str] = {}

    def take(name: str, values: NDArray[Any], by: str) -> None:
        limits = np.iinfo(COLUMNS[name])
        if values.min() < limits.min or values.max() > limits.max:
            reach = f"{name} reach from {values.min()} to {values.max()}"
            raise InputError(f"{by}: {reach}, which does not fit {COLUMNS[name]}; check the file")
        if name not in columns:
            columns[name], said_by[name] = values.astype(COLUMNS[name], copy=False), by
        elif not np.array_equal(columns[name], values):
            row = int(np.argmax(columns[name] != values))
            raise InputError(
                f"{by}: {name} of row {row} is {values[row]}, but {columns[name][row]} in {said_by[name]}; "
                "row i of all sources must be the same token"
            )

    for name, path in (("token_ids", options.token_ids), ("sequence_ids", options.sequence_ids)):
        if path is not None:
            take(name, read_integers(path, n_rows), str(path))
    for source in sources:
        # not kept twice: 150 million tokens are 1.2 GB
        while source.columns:
            take(*source.columns.popitem(), source.text)
    if options.bos_token_id is not None:
        if "token_ids" not in columns:
            raise OptionError("--bos-token-id needs token ids: give --token-ids, the sources have none")
        is_bos = columns["token_ids"] == options.bos_token_id
        if not is_bos.any():
            raise OptionError(f"--bos-token-id {options.bos_token_id}: no row has that token")
        columns["roles"] = np.where(is_bos, 0, 1)
        if "sequence_ids" not in columns:
            columns["sequence_ids"] = np.cumsum(is_bos)
    if "sequence_ids" in said_by:
        ids = columns["sequence_ids"]
        begins = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        torn = torn_sequence(ids[begins], begins)
        if torn is not None:
            raise InputError(f"{said_by['sequence_ids']}: {torn}")
    return columns


def _meta(
    sources: Sequence[Source],
    options: ImportOptions,
    n_models: int,
    columns: dict[str, NDArray[Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Everything store.json holds besides shards and statistics."""
    files = [file for source in sources for file in source.files]
    files += [path for path in (options.token_ids, options.sequence_ids) if path is not None]
    with progress.task("hash", len(files), "files") as task:
        hashes = []
        for file in files:
            hashes.append({"file": str(file.resolve()), "bytes": file.stat().st_size, "sha256": sha256_file(file)})
            task.advance(1)
    told = iter(hashes)
    return {
        "models": [{"name": name} for name in options.names or _names(sources, n_models)],
        "roles": ["bos", "text"] if "roles" in columns else None,
        "datasets": [{"dataset": source.text, "files": list(islice(told, len(source.files)))} for source in sources],
        # by what the files hold, wherever they lie
        "config": {
            "sources": [file["sha256"] for file in hashes],
            **{name: value for name, value in _settings(options).items() if name not in ("token_ids", "sequence_ids")},
            "columns": [name for name in COLUMNS if name in columns],
        },
        "command": _command(sources, options),
        "versions": versions(),
    }


def _settings(options: ImportOptions) -> dict[str, Any]:
    """Options that were given, as JSON has them."""
    given = {name: value for name, value in asdict(options).items() if value not in (None, ())}
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in given.items()
    }


def _command(sources: Sequence[Source], options: ImportOptions) -> list[str]:
    """The command line that makes the store, without -o: equal stores must not differ by it."""
    command = ["fastdiff", "import", *(source.text for source in sources)]
    for name, value in _settings(options).items():
        flag = "--name" if name == "names" else "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            command += [flag, str(one)]
    return command


def _names(sources: Sequence[Source], n_models: int) -> Iterator[str]:
    """Names of models that the user has not named."""
    names = [source.name for source in sources]
    if len(set(names)) == n_models:
        yield from names
    elif n_models == 2:
        yield from ("base", "tuned")
    else:
        yield from (f"model-{i}" for i in range(n_models))


def _is_complete(out: Path, meta: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Whether `out` already holds the store. Of a complete one, a journal left by a kill is removed.

    Raises:
        OptionError: `out` holds something that may not be replaced.
        InputError: `out` holds a damaged store.
        LockedError: Another process is about to finish or replace the store.
    """
    if overwrite or not out.is_dir():
        return False
    if not (out / STORE_FILE).exists():
        begun = {".lock", JOURNAL, f".{JOURNAL}.tmp", f".{STORE_FILE}.tmp"}
        # a writer names a shard so only once the journal is there: without it, the file is somebody's own
        journaled = (out / JOURNAL).exists()
        for path in sorted(out.iterdir()):
            is_shard = path.match("shard-*.h5")
            ours = path.name in begun or path.match(".shard-*.h5.tmp") or (is_shard and journaled)
            if not ours:
                fate = "deletes" if is_shard else "leaves"
                raise OptionError(
                    f"{out}: holds {path.name} but no store; choose an empty directory for -o, "
                    f"or --overwrite, which {fate} that file"
                )
        return False
    if not resume:
        raise OptionError(f"{out}: holds a store; --overwrite replaces it")
    with ActivationStore(out) as store:
        # a store from before the option is held against the default rule whenever it is used
        had = store.meta.config and {"max_norm": default_max_norm(None), **store.meta.config}
        if had != meta["config"]:
            raise OptionError(
                f"{out}: holds a store made from other sources or with other options; choose another -o, "
                "or --overwrite to replace it"
            )
    if (out / JOURNAL).exists():
        _end_journal(out)
    return True


def _end_journal(out: Path) -> None:
    """Remove what a writer leaves that is killed behind its last step but one."""
    with disk_errors(out, 0):
        lock = lock_directory(out)
        try:
            # a writer that was here until now may have begun another store
            if (out / STORE_FILE).exists():
                (out / JOURNAL).unlink(missing_ok=True)
        finally:
            os.close(lock)
