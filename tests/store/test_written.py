"""Values that were never written, or lie in a file that is gone, are refused: HDF5 would read zeros."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fastdiff.errors import InputError
from fastdiff.store.reader import ActivationStore

X = np.arange(60 * 6, dtype=np.float32).reshape(60, 2, 3)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        ActivationStore(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("how", [{}, {"compression": "gzip"}, {"dtype": ">f4"}, {"libver": "latest"}])
@pytest.mark.parametrize(
    ("chunks", "written", "missing"),
    [
        ((8, 2, 3), [], "rows 0 to 59"),
        ((8, 2, 3), [(8, 60)], "rows 0 to 7"),
        ((8, 2, 3), [(0, 16), (40, 60)], "rows 16 to 39"),
        ((8, 2, 3), [(0, 56)], "rows 56 to 59"),
        ((8, 1, 3), [(0, 24)], "rows 24 to 59"),
        ((60, 2, 3), [], "rows 0 to 59"),
    ],
)
def test_chunks_never_written(
    tmp_path: Path, how: dict[str, Any], chunks: tuple[int, ...], written: list[tuple[int, int]], missing: str
) -> None:
    how = {"dtype": np.float32} | how
    with h5py.File(tmp_path / "a.h5", "w", libver=how.pop("libver", None)) as file:
        data_set = file.create_dataset("activations", X.shape, chunks=chunks, **how)
        for start, stop in written:
            data_set[start:stop] = X[start:stop]
    message = refusal(tmp_path / "a.h5")
    assert f"a.h5: {missing} of /activations were never written; extract or write them again" in message


def test_one_model_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data_set = file.create_dataset("activations", X.shape, np.float32, chunks=(8, 1, 3))
        data_set[:, 0] = X[:, 0]
        data_set[:8, 1] = X[:8, 1]
    assert "rows 8 to 59 of /activations were never written" in refusal(tmp_path / "a.h5")


@pytest.mark.parametrize("chunks", [None, (8,)])
def test_columns_never_written(tmp_path: Path, chunks: tuple[int] | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = X
        file.create_dataset("token_ids", (60,), np.int32, chunks=chunks)
    assert "rows 0 to 59 of /token_ids were never written" in refusal(tmp_path / "a.h5")


def external(tmp_path: Path, size: int) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("activations", X.shape, np.float32, external=[("rows.raw", 100, size)])
    (tmp_path / "rows.raw").write_bytes(bytes(100) + X.tobytes())
    return tmp_path / "a.h5"


@pytest.mark.parametrize("size", [X.nbytes, h5py.h5f.UNLIMITED])
def test_external_file_missing_or_short(tmp_path: Path, size: int) -> None:
    path = external(tmp_path, size)
    with ActivationStore(path) as store:
        assert np.array_equal(store.slice(0, 60).numpy(), X)
    (tmp_path / "rows.raw").write_bytes((tmp_path / "rows.raw").read_bytes()[:-1])
    assert f"/activations lies in {tmp_path / 'rows.raw'}, which is missing or too short" in refusal(path)
    (tmp_path / "rows.raw").unlink()
    assert "missing or too short" in refusal(path)


def virtual(tmp_path: Path, change: Callable[[Path], None]) -> str:
    part = tmp_path / "part.h5"
    with h5py.File(part, "w") as file:
        file["acts"] = X
    layout = h5py.VirtualLayout(X.shape, np.float32)
    layout[:] = h5py.VirtualSource("part.h5", "acts", X.shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("activations", layout)
    with ActivationStore(tmp_path / "a.h5") as store:
        assert np.array_equal(store.slice(0, 60).numpy(), X)
    change(part)
    return refusal(tmp_path / "a.h5")


def test_virtual_source_missing(tmp_path: Path) -> None:
    message = virtual(tmp_path, Path.unlink)
    assert f"a.h5: /activations shows rows of {tmp_path / 'part.h5'}, which is missing; copy it too" in message


def test_virtual_source_without_the_data_set(tmp_path: Path) -> None:
    def rename(part: Path) -> None:
        with h5py.File(part, "w") as file:
            file["other"] = X

    assert "shows acts of " in virtual(tmp_path, rename)


def test_virtual_source_never_written(tmp_path: Path) -> None:
    def empty(part: Path) -> None:
        with h5py.File(part, "w") as file:
            file.create_dataset("acts", X.shape, np.float32, chunks=(6, 2, 3))[:30] = X[:30]

    assert "part.h5: rows 30 to 59 of /acts were never written" in virtual(tmp_path, empty)


def test_virtual_source_shorter_than_it_was(tmp_path: Path) -> None:
    def shorten(part: Path) -> None:
        with h5py.File(part, "w") as file:
            file["acts"] = X[:59]

    assert "shows acts of " in virtual(tmp_path, shorten)


def test_virtual_part_of_a_source(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((20, 2, 3), np.float32)
    layout[:] = h5py.VirtualSource("part.h5", "acts", X.shape)[10:50:2]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("activations", layout)
    for rows, works in ((60, True), (49, True), (48, False)):
        with h5py.File(tmp_path / "part.h5", "w") as file:
            file["acts"] = X[:rows]
        if works:
            with ActivationStore(tmp_path / "a.h5") as store:
                assert np.array_equal(store.slice(0, 20).numpy(), X[10:50:2])
        else:
            assert "shows acts of " in refusal(tmp_path / "a.h5")


def test_virtual_data_set_with_a_gap(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout(X.shape, np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["part"] = X
        layout[:59] = h5py.VirtualSource(file["part"])[:59]
        file.create_virtual_dataset("activations", layout)
    assert "of /activations were never written" in refusal(tmp_path / "a.h5")


def test_chunk_behind_the_end_of_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data_set = file.create_dataset("activations", data=X, chunks=(60, 2, 3))
        at = data_set.id.get_chunk_info(0).byte_offset
    data = (tmp_path / "a.h5").read_bytes()
    assert data.count(at.to_bytes(8, "little")) == 1
    (tmp_path / "a.h5").write_bytes(data.replace(at.to_bytes(8, "little"), (at + 4096).to_bytes(8, "little")))
    assert "damaged" in refusal(tmp_path / "a.h5")
