import numpy as np
import pytest

from fastdiff import _native
from fastdiff.store.format import CRC_ROWS
from fastdiff.store.open_shard import Staging


@pytest.mark.parametrize("row_bytes", [1, 20, 64, 72, 1000, 9216])
@pytest.mark.parametrize("start", [0, 16, 3])
def test_staged_rows_are_copied_and_summed_whatever_the_portions(row_bytes: int, start: int) -> None:
    rows = np.random.default_rng(row_bytes).integers(0, 256, (100, row_bytes), dtype=np.uint8)
    memory = np.full(100 * row_bytes + 64, 7, np.uint8)
    to = memory[start : start + 100 * row_bytes].reshape(100, row_bytes)
    sums = np.full(4, 99, np.uint32)  # a block begins with nothing, whatever stands in its place
    for first, stop in [(0, 0), (0, 5), (5, 32), (32, 33), (33, 99), (99, 100)]:
        _native.stage_rows(rows[first:stop], to[first:], sums, first, CRC_ROWS)
    assert np.array_equal(to, rows)
    assert (memory[:start] == 7).all() and (memory[start + to.size :] == 7).all()
    assert np.array_equal(sums, _native.crc32c_blocks(rows, CRC_ROWS * row_bytes, tables=True))


def test_what_does_not_fit_is_refused() -> None:
    rows, to, sums = np.zeros((40, 8), np.uint8), np.zeros((40, 8), np.uint8), np.zeros(2, np.uint32)
    read_only = to.copy()
    read_only.flags.writeable = False
    for arguments, message in [
        ((rows, to[:39], sums, 0, 32), "room for 320 bytes"),
        ((rows, read_only, sums, 0, 32), "writeable"),
        ((rows[:, ::2], to, sums, 0, 32), "contiguous"),
        ((rows, to, sums, 25, 32), "place for each block"),
        ((rows, to, sums, 2**63, 32), "place for each block"),
        ((rows, to, sums.astype(np.int64), 0, 32), "uint32"),
        ((rows, to, sums, 0, 0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.stage_rows(*arguments)
    assert not sums.any()


@pytest.mark.parametrize("row_bytes", [2, 20, 4 * 4607, 9216, 14336, 1 << 16])
def test_buffers_begin_at_pages_and_at_blocks(row_bytes: int) -> None:
    staging = Staging(row_bytes, 10**6)
    try:
        assert staging.n_rows % CRC_ROWS == 0
        assert staging.n_rows * row_bytes % 4096 == 0
        buffer = staging.take()
        assert buffer.shape == (staging.n_rows, row_bytes)
        assert buffer.ctypes.data % 4096 == 0
    finally:
        staging.close()


def test_a_buffer_comes_back_when_it_is_written_and_an_error_stays() -> None:
    staging = Staging(64, 10**6)
    written = []
    for number in range(20):
        buffer = staging.take()
        staging.give(buffer, lambda n=number: written.append(n))
    staging.drain()
    assert sorted(written) == list(range(20))

    def fail() -> None:
        raise OSError(5, "Input/output error")

    staging.give(staging.take(), fail)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            staging.drain()
    staging.close()
