"""The journal of a store that is being written: `.journal`, one JSON object, replaced whole at every commit.

    schema, key   the key is the sha256 of everything that decides the bytes of the store
    n_rows        rows acknowledged: they and all before them are on the disk
    checked_from  the first row that a resumption reads again and holds against its checksum
    shards        finished shards, as in store.json
    sums          CRC-32C of the beginnings of the side columns and of /crc32c (full blocks) of the shard being filled
    last_sum      CRC-32C of the rows in its last block, if that is not full
    stats         state of the statistics over the acknowledged rows, base64 of float64, so exact; of no row before the
                  median norm is known
    first_positions  rows among them that are left out of use as first positions
    sha256        of all the above as canonical JSON

A kill between two commits leaves the older journal; the rows written since then are written again.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from fastdiff.errors import InputError
from fastdiff.rundir import canonical_json, read_json, sha256_text, write_text
from fastdiff.store.format import COLUMNS, ShardInfo

JOURNAL = ".journal"
SCHEMA = 1

Crc = Annotated[int, Field(ge=0, lt=1 << 32)]


class Journal(BaseModel):
    """What a writer has acknowledged."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    key: str
    n_rows: NonNegativeInt
    checked_from: NonNegativeInt
    shards: list[ShardInfo]
    sums: dict[str, Crc]
    last_sum: Crc
    first_positions: NonNegativeInt = 0
    stats: str

    @property
    def stats_state(self) -> bytes:
        """State of `RunningStats`."""
        return base64.b64decode(self.stats, validate=True)


def store_key(
    *,
    n_rows: int,
    n_models: int,
    d_model: int,
    dtype: str,
    shard_rows: int,
    columns: Sequence[str] = tuple(COLUMNS),
    meta: dict[str, Any],
) -> str:
    """Hash of everything but the rows that decides what a store holds.

    Args:
        n_rows: Rows of the whole store.
        n_models: M.
        d_model: D.
        dtype: Type of the stored values.
        shard_rows: Rows per shard.
        columns: Its side columns, in the format's order.
        meta: Its metadata, without shards and statistics.
    """
    return sha256_text(canonical_json([n_rows, n_models, d_model, dtype, shard_rows, *columns, meta]))


def write_journal(directory: Path, journal: Journal) -> None:
    """Replace the journal, whole or not at all, and make it survive a power cut.

    Raises:
        ResourceError: The disk is full. The journal before stands.
    """
    body = journal.model_dump(by_alias=True)
    write_text(directory / JOURNAL, canonical_json({**body, "sha256": sha256_text(canonical_json(body))}) + "\n")


def read_journal(directory: Path) -> Journal | None:
    """The journal of an unfinished store, or None if there is none.

    Raises:
        InputError: It is damaged.
    """
    path = directory / JOURNAL
    if not path.exists():
        return None
    try:
        body = read_json(path, SCHEMA)
        told = body.pop("sha256", None)
        if told != sha256_text(canonical_json(body)):
            raise InputError(f"{path}: its checksum does not match")
        return Journal.model_validate(body)
    except (InputError, ValidationError, ValueError, RecursionError) as error:
        what = "not a journal" if isinstance(error, ValidationError) else str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: damaged ({what}), so what was written here cannot be trusted; start again with --overwrite"
        ) from error
