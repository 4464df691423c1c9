"""A small store, always the same, for tests that cut its writer off. As a script: kills it again and again.

    python small_store.py DIRECTORY KILLS SEED

writes stores until KILLS writers were killed. The writer of a store is a forked process that gets SIGKILL a random
time after a random number of appends, up to three times, and is then let run; each goes on where the one before was.
After every kill the rows that were acknowledged are compared with what they have to be. Prints one JSON object.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import torch

from fastdiff.store import left_out, open_shard
from fastdiff.store import writer as writer_module
from fastdiff.store.writer import StoreWriter

N, D = 1000, 128
SHARD_ROWS = 333
STEP = 47
# long before the end, within the second shard: what is in use is known from there on
MAX_NORM, ROWS_OF_MEDIAN = 1.1, 400
META = {"models": ["a", "b"], "roles": ["text", "bos"]}


def rows() -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """All rows, in the stored type, and their columns."""
    rng = np.random.default_rng(5)
    values = torch.from_numpy(rng.standard_normal((N, 2, D)).astype(np.float32)).bfloat16()
    number = np.arange(N)
    columns = {
        "token_ids": rng.integers(0, 99, N),
        "sequence_ids": number // 9,
        "positions": number % 9,
        "roles": (number % 9 == 0).astype(np.int64),
        "sources": number % 3,
    }
    return values, columns


def write(path: Path, *, resume: bool = True, commit_every: int = 0, stop_at: int = N, **changes: Any) -> int:
    """Write the store, or continue it; returns the row at which it began.

    Args:
        path: Directory of the store.
        resume: Whether to continue.
        commit_every: Commit after this many appends; 0 leaves it to the writer.
        stop_at: End the writer with `Stopped` once it has this many rows.
        changes: Other arguments of the writer.
    """
    values, columns = rows()
    options = {"n_rows": N, "n_models": 2, "d_model": D, "dtype": "bfloat16", "shard_rows": SHARD_ROWS, "meta": META}
    options |= {"max_norm": MAX_NORM, **changes}
    with (
        patch.object(left_out, "ROWS_OF_MEDIAN", ROWS_OF_MEDIAN),
        StoreWriter(path, resume=resume, **options) as writer,
    ):
        first = writer.n_appended
        for number, start in enumerate(range(first, N, STEP)):
            if start >= stop_at:
                raise Stopped
            stop = min(N, start + STEP)
            writer.append(values[start:stop], **{name: column[start:stop] for name, column in columns.items()})
            if commit_every and (number + 1) % commit_every == 0:
                writer.commit()
    return first


class Stopped(BaseException):
    """Ends a writer as Ctrl-C would."""


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def acknowledged(path: Path) -> int:
    """Rows acknowledged in an unfinished store, after comparing every one of them with what it has to be."""
    journal = path / ".journal"
    n = json.loads(journal.read_text())["n_rows"] if journal.exists() else 0
    values, columns = rows()
    for index, first in enumerate(range(0, n, SHARD_ROWS)):
        part = slice(first, min(n, first + SHARD_ROWS))
        name = f"shard-{index:05d}.h5"
        file = path / name if (path / name).exists() else path / f".{name}.tmp"
        with h5py.File(file, locking=False) as shard:
            here = slice(0, part.stop - part.start)
            assert np.array_equal(shard["activations"][here].astype(np.float32), values[part].float().numpy()), file
            for column, expected in columns.items():
                assert np.array_equal(shard[column][here], expected[part]), (file, column)
    return n


def frequent_commits() -> None:
    """Small buffers and commits, so that a small store has many of each."""
    open_shard._BUFFER_BYTES = 40_000
    writer_module._COMMIT_SECONDS = 0.0


def _fork(path: Path) -> tuple[int, int]:
    """A process that writes the store: its id, and a pipe that gets a byte with every append."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        append = StoreWriter.append

        def reported(writer: StoreWriter, *args: Any, **options: Any) -> None:
            os.write(theirs, b".")
            append(writer, *args, **options)

        StoreWriter.append = reported
        try:
            write(path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(theirs)
    return pid, ours


def _finish(path: Path) -> None:
    pid, pipe = _fork(path)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(pipe)


def main(directory: Path, n_kills: int, seed: int) -> None:
    """See the module."""
    torch.set_num_threads(1)
    frequent_commits()
    generator = random.Random(seed)
    _finish(directory / "whole")
    expected = contents(directory / "whole")
    kills = stores = resumed = rows_kept = identical = 0
    while kills < n_kills:
        path, n = directory / f"store-{stores}", 0
        for _ in range(generator.randint(1, 3)):
            pid, pipe = _fork(path)
            for _ in range(generator.randint(0, 12)):
                os.read(pipe, 1)  # nothing when the writer has ended
            time.sleep(generator.uniform(0, 0.02))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            os.close(pipe)
            if not os.WIFSIGNALED(status):
                assert status == 0, status
                break
            kills += 1
            if (path / "store.json").exists():  # killed behind its last row: a next writer would begin a new store
                break
            now = acknowledged(path) if path.exists() else 0
            assert now >= n, f"{now} rows are acknowledged, {n} were"
            n = now
        _finish(path)
        stores, resumed, rows_kept = stores + 1, resumed + (n > 0), rows_kept + n
        identical += contents(path) == expected
        shutil.rmtree(path)
    found = {"kills": kills, "stores": stores, "resumed": resumed, "rows_kept": rows_kept, "identical": identical}
    print(json.dumps(found))  # noqa: T201 (what the script is for)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
