import numpy as np
from numpy.typing import NDArray

class ReadError(Exception):
    """args: (message, shard, offset, wanted, got, errno or 0 at the end of the file)."""

    args: tuple[str, int, int, int, int, int]

def permute(n: int, seed: int, epoch: int, start: int, count: int) -> NDArray[np.int64]: ...
def gather_rows(
    fds: NDArray[np.int64],
    offsets: NDArray[np.int64],
    first_rows: NDArray[np.int64],
    rows: NDArray[np.int64],
    out: NDArray[np.uint8],
    *,
    n_threads: int = 1,
) -> None: ...
def crc32c(data: NDArray[np.generic], value: int = 0, *, tables: bool = False) -> int: ...
def crc32c_blocks(data: NDArray[np.generic], block_bytes: int, *, tables: bool = False) -> NDArray[np.uint32]: ...
def crc32c_has_hardware() -> bool: ...
