import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class ReadError(Exception):
    """args: (message, extent, offset, wanted, got, errno or 0 at the end of the file)."""

    args: tuple[str, int, int, int, int, int]

class CorruptRows(Exception):
    """args: (message, first row, row behind the last)."""

    args: tuple[str, int, int]

class NonFiniteRow(Exception):
    """args: (message, row)."""

    args: tuple[str, int]

class HeldTooLong(RuntimeError): ...

def permute(n: int, seed: int, epoch: int, start: int, count: int) -> NDArray[np.int64]: ...
def gather_rows(
    fds: NDArray[np.int64],
    offsets: NDArray[np.int64],
    first_rows: NDArray[np.int64],
    rows: NDArray[np.int64],
    out: NDArray[np.uint8],
    *,
    n_threads: int = 1,
    crc: tuple[list[NDArray[np.uint32]], NDArray[np.int64]] | None = None,
) -> None: ...
def why_not_direct(
    fds: NDArray[np.int64], offsets: NDArray[np.int64], first_rows: NDArray[np.int64], row_bytes: int
) -> str | None: ...
def cached_share(
    fds: NDArray[np.int64], offsets: NDArray[np.int64], first_rows: NDArray[np.int64], row_bytes: int
) -> float: ...
def first_nonfinite_row(data: NDArray[np.generic], dtype: str) -> int: ...
def stage_rows(
    rows: NDArray[np.generic], to: NDArray[np.generic], sums: NDArray[np.uint32], first: int, block_rows: int
) -> None: ...
def add_statistics(
    data: NDArray[np.generic],
    dtype: str,
    n: int,
    mean: NDArray[np.float64],
    m2: NDArray[np.float64],
    norms: NDArray[np.float64],
) -> int: ...
def row_norms(data: NDArray[np.generic], dtype: str, n_models: int, d_model: int) -> NDArray[np.float32]: ...
def crc32c(data: NDArray[np.generic], value: int = 0, *, tables: bool = False) -> int: ...
def crc32c_blocks(data: NDArray[np.generic], block_bytes: int, *, tables: bool = False) -> NDArray[np.uint32]: ...
def crc32c_has_hardware() -> bool: ...

class BlockOrder:
    def __init__(
        self, n: int, seed: int, block_rows: int, pool_rows: int, rank: int = 0, world_size: int = 1
    ) -> None: ...
    def rows(self, position: int, count: int) -> NDArray[np.int64]: ...
    def rows_in_epoch(self, epoch: int) -> int: ...
    def left_in_window(self, position: int) -> int: ...
    @property
    def n_windows(self) -> int: ...
    @property
    def largest_window(self) -> int: ...
    @property
    def smallest_window(self) -> int: ...

class Batch(Buffer):
    def __len__(self) -> int: ...

class Stream:
    def __init__(
        self,
        fds: NDArray[np.int64],
        offsets: NDArray[np.int64],
        first_rows: NDArray[np.int64],
        *,
        row_bytes: int,
        order: BlockOrder,
        table: NDArray[np.int64] | None,
        start: int,
        count: int,
        batch_rows: int,
        n_slots: int,
        n_threads: int,
        direct: bool,
        finite: str | None,
        crc: tuple[list[NDArray[np.uint32]], NDArray[np.int64]] | None,
    ) -> None: ...
    def take(self, n: int, row_bytes: int) -> Batch: ...
    def stop(self) -> None: ...
    @property
    def pool(self) -> tuple[int, int]: ...
