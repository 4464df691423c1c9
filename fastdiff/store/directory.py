"""A store's directory while it is written: one writer at a time, temporary names, failures, and how it is emptied."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.errors import FastdiffError, LockedError, ResourceError
from fastdiff.rundir import fsync_directory
from fastdiff.store.format import STORE_FILE, shard_name
from fastdiff.store.journal import JOURNAL

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary(directory: Path, index: int) -> Path:
    """Where a shard stands until it is finished."""
    return directory / f".{shard_name(index)}.tmp"


def lock_directory(directory: Path) -> int:
    """Lock a directory through a file descriptor of its own, so that no file is left in a finished store.

    Returns:
        The descriptor; closing it ends the lock, and so does the end of the process.

    Raises:
        LockedError: Another writer holds it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LockedError(f"{directory}: another process is writing here; wait for it or choose another -o") from error
    except OSError as error:
        # NFS locks only what is open for writing, which a directory never is; `fastdiff extract` has its .lock
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(fd)
            raise
    return fd


@contextmanager
def disk_errors(directory: Path, n_bytes: int) -> Iterator[None]:
    """Say in one line what is wrong with the disk.

    Args:
        directory: Where the store is.
        n_bytes: Size of the whole store.

    Raises:
        ResourceError: The disk, the user's share of it, or a limit on file sizes has no room.
        FastdiffError: Writing failed otherwise.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"{directory}: no room for {n_bytes / 1e9:.3g} GB of activations ({error.strerror}); "
                "free some and run again, or store fewer tokens"
            ) from error
        raise FastdiffError(
            f"{directory}: cannot be written ({error.strerror}); check the disk and run again"
        ) from error


def remove_store(directory: Path) -> None:
    """Remove a store, finished or not."""
    # the mark of a whole store first, then what acknowledges rows, then the rows
    for name in (STORE_FILE, JOURNAL):
        if (directory / name).exists():
            (directory / name).unlink()
            fsync_directory(directory)
    for pattern in (".shard-*.h5.tmp", "shard-*.h5", f".{STORE_FILE}.tmp", f".{JOURNAL}.tmp"):
        for file in directory.glob(pattern):
            file.unlink()
