"""What a store consists of: `store.json`, its shards, and whether they agree."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from fastdiff.errors import InputError
from fastdiff.rundir import read_json
from fastdiff.store.format import SCHEMA, STORE_FILE, StoreMeta
from fastdiff.store.index import ShardIndex


def find_parts(path: Path) -> tuple[StoreMeta | None, list[Path]]:
    """The metadata, if any, and the shards of a store directory or bare file, in row order.

    Raises:
        InputError: There is no store, or its `store.json` cannot be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such store; `fastdiff extract` makes one")
    if not path.is_dir():
        return None, [path]
    if not (path / STORE_FILE).exists():
        begun = any(path.glob("shard-*.h5")) or any(path.glob(".shard-*.h5.tmp"))
        why = "the store was not finished" if begun else "not a store"
        raise InputError(f"{path}: no {STORE_FILE}, {why}; run `fastdiff extract` (again)")
    try:
        raw = read_json(path / STORE_FILE, SCHEMA, "fastdiff extract` or `fastdiff import")
    except RecursionError as error:
        raise InputError(f"{path / STORE_FILE}: nested too deeply to be read; extract it again") from error
    try:
        meta = StoreMeta.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:5])
        raise InputError(f"{path / STORE_FILE}: {wrong}; extract it again") from error
    files = unnamed_shards(path) if meta.shards is None else [path / shard.file for shard in meta.shards]
    if not files:
        raise InputError(f"{path}: {STORE_FILE} without any shard-00000.h5 beside it; extract it again")
    return meta, files


def unnamed_shards(path: Path) -> list[Path]:
    """The shards of a directory whose `store.json` lists none, in row order."""
    return sorted(file for file in path.glob("*.h5") if not file.name.startswith("."))


def disagreements(path: Path, meta: StoreMeta, shards: Sequence[ShardIndex]) -> Iterator[str]:
    """A line for everything in which shards differ from the first one, or from `store.json`."""
    first = shards[0]
    for shard in shards[1:]:
        for name in ("n_models", "d_model", "dtype", "columns"):
            here, there = getattr(shard, name), getattr(first, name)
            if here != there:
                yield f"{shard.path}: {name} is {here}, but {there} in {first.path.name}; extract it again"
    if len(meta.models) != first.n_models:
        yield (
            f"{path}: {STORE_FILE} names {len(meta.models)} models, /activations holds {first.n_models}; "
            f"list each model once in {STORE_FILE}"
        )
    if meta.dtype is not None and meta.dtype != first.dtype:
        yield f"{path}: {STORE_FILE} says {meta.dtype}, the shards are {first.dtype}; extract it again"
    for name, times in Counter(shard.path.name for shard in shards).items():
        if times > 1:
            yield f"{path}: {STORE_FILE} lists {name} {times} times; list each shard once"
    told = {info.file: info.n_rows for info in meta.shards or []}
    for shard in shards:
        n_rows = told.get(shard.path.name, shard.n_rows)
        if n_rows != shard.n_rows:
            yield f"{shard.path}: {shard.n_rows} rows, but {STORE_FILE} says {n_rows}; extract it again"
    if meta.left_out is not None:
        for name in ("median", "variance_share"):
            values = getattr(meta.left_out, name)
            if values is not None and len(values) != first.n_models:
                yield f"{path}: {name} of left_out in {STORE_FILE} is not for {first.n_models} models; extract it again"
    if meta.stats is not None:
        shape = (len(meta.stats.mean), {len(row) for row in meta.stats.mean})
        sizes = {len(meta.stats.variance), len(meta.stats.mean_norm), first.n_models}
        if shape != (first.n_models, {first.d_model}) or len(sizes) != 1:
            yield (
                f"{path}: stats in {STORE_FILE} are not for {first.n_models} models of width "
                f"{first.d_model}; remove them there, and they are computed"
            )
