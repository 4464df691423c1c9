import numpy as np
import pytest

from fastdiff import _native


def crc32c(data: bytes) -> int:
    """One bit at a time, straight from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this one and the next three: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_known_sums(data: bytes, expected: int, tables: bool) -> None:
    assert _native.crc32c(as_array(data), tables=tables) == expected


@pytest.mark.parametrize("tables", [False, True])
def test_any_length_and_alignment(tables: bool) -> None:
    data = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8)
    for start in range(9):
        for length in (0, 1, 3, 7, 8, 9, 63, 64, 65, 255):
            piece = data[start : start + length]
            assert _native.crc32c(piece, tables=tables) == crc32c(piece.tobytes())


def test_sum_continues_from_a_part() -> None:
    data = np.random.default_rng(1).integers(0, 256, 1000, dtype=np.uint8)
    for cut in (0, 1, 8, 500, 1000):
        assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == crc32c(data.tobytes())


# the hardware path sums three runs side by side, of 2048 bytes and of 256, then words, then bytes
LONG, SHORT = 3 * 2048, 3 * 256
BOUNDARIES = sorted({n + i for n in (0, SHORT, 2 * SHORT, LONG, LONG + SHORT, 2 * LONG) for i in range(-9, 10)})


@pytest.mark.parametrize("value", [0, 1, 0xFFFFFFFF, 0x9E3779B9])
def test_hardware_equals_tables_around_every_block_boundary(value: int) -> None:
    assert _native.crc32c_has_hardware()
    data = np.random.default_rng(3).integers(0, 256, 2 * LONG + 32, dtype=np.uint8)
    for length in filter(lambda n: n >= 0, BOUNDARIES):
        for start in (0, 1, 5):
            piece = data[start : start + length]
            assert _native.crc32c(piece, value) == _native.crc32c(piece, value, tables=True), (start, length)


def test_hardware_equals_tables_at_every_length() -> None:
    data = np.random.default_rng(4).integers(0, 256, LONG + 2 * SHORT, dtype=np.uint8)
    for length in range(len(data) + 1):
        assert _native.crc32c(data[:length], length) == _native.crc32c(data[:length], length, tables=True), length


def test_tables_are_right_at_a_length_with_every_kind_of_run() -> None:
    data = np.random.default_rng(5).integers(0, 256, LONG + SHORT + 13, dtype=np.uint8)
    assert _native.crc32c(data) == _native.crc32c(data, tables=True) == crc32c(data.tobytes())


@pytest.mark.parametrize("row_bytes", [1, 20, 767, 9216, 14336])
def test_rows_summed_one_after_the_other_equal_their_block(row_bytes: int) -> None:
    data = np.random.default_rng(6).integers(0, 256, (32, row_bytes), dtype=np.uint8)
    chained = 0
    for row in data:
        chained = _native.crc32c(row, chained)
    assert [chained] == _native.crc32c_blocks(data, 32 * row_bytes, tables=True).tolist()


def test_one_wrong_bit_anywhere_changes_the_sum() -> None:
    data = np.random.default_rng(7).integers(0, 256, LONG + SHORT + 9, dtype=np.uint8)
    right = _native.crc32c(data)
    for at in range(0, len(data), 61):
        data[at] ^= 1 << at % 8
        assert _native.crc32c(data) != right
        data[at] ^= 1 << at % 8


@pytest.mark.parametrize("tables", [False, True])
def test_one_sum_per_block(tables: bool) -> None:
    data = np.random.default_rng(2).standard_normal((70, 6)).astype(np.float32)
    got = _native.crc32c_blocks(data, 32 * 24, tables=tables)
    assert got.dtype == np.uint32
    assert got.tolist() == [crc32c(data[i : i + 32].tobytes()) for i in (0, 32, 64)]
    assert len(_native.crc32c_blocks(data[:0], 24)) == 0


def test_scattered_data_and_empty_blocks_are_refused() -> None:
    data = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        _native.crc32c(data[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        _native.crc32c_blocks(data.T, 4)
    with pytest.raises(ValueError, match="at least 1"):
        _native.crc32c_blocks(data, 0)
