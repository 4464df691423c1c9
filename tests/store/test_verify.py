"""Every kind of damage to a store is found, named with its place, and all at once."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdiff.cli import main
from fastdiff.store import verify_rows
from fastdiff.store.format import bfloat16_type
from fastdiff.store.verify import verify_store
from fastdiff.store.writer import StoreWriter

N, SHARD, D = 500, 200, 16
ROW_BYTES = 2 * D * 2


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "acts"
    meta = {
        "models": ["a", "b"],
        "roles": ["text", "bos"],
        "sources": [{"dataset": "d"}, {"dataset": "e"}],
    }
    with StoreWriter(path, n_rows=N, n_models=2, d_model=D, dtype="bfloat16", shard_rows=SHARD, meta=meta) as writer:
        writer.append(
            torch.randn(N, 2, D, generator=torch.Generator().manual_seed(0)),
            token_ids=np.arange(N),
            sequence_ids=np.arange(N) // 7,
            positions=np.arange(N) % 7,
            roles=np.arange(N) % 7 == 0,
            sources=np.arange(N) // 300,
        )
    return path


def offset(file: Path, name: str = "activations") -> int:
    with h5py.File(file) as f:
        return int(f[name].id.get_offset())


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


def edit(path: Path, **changes: Any) -> None:
    told = json.loads((path / "store.json").read_text())
    told.update(changes)
    (path / "store.json").write_text(json.dumps(told))


def problems(path: Path, **how: Any) -> list[str]:
    found = verify_store(path, **how)
    assert found.n_problems == len(found.problems)
    assert all("\n" not in line for line in found.problems)
    return found.problems


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_sound_store(store: Path, n_threads: int) -> None:
    found = verify_store(store, n_threads=n_threads)
    assert found.problems == [] and found.notes == []
    assert found.facts == {
        "shards": 3, "rows": N, "bytes": N * ROW_BYTES, "dtype": "bfloat16", "blocks": 7 + 7 + 4, "nonfinite_rows": 0
    }  # fmt: skip
    (line,) = found.summary()
    assert (
        line == f"{store}: sound; 500 rows of 2 × 16 bfloat16, 0.032 MB; 18 blocks checked, 0 rows with NaN or infinity"
    )


@pytest.mark.parametrize("piece_bytes", [1, 8 << 20])
@pytest.mark.parametrize("row", [0, 31, 32, 199, 200, 499])
def test_every_block_is_checked(store: Path, monkeypatch: pytest.MonkeyPatch, row: int, piece_bytes: int) -> None:
    monkeypatch.setattr(verify_rows, "_PIECE_BYTES", piece_bytes)
    shard, inside = divmod(row, SHARD)
    file = store / f"shard-0000{shard}.h5"
    flip(file, offset(file) + inside * ROW_BYTES + 1)
    first = inside // 32 * 32
    last = min(first + 31, (100 if shard == 2 else SHARD) - 1)
    assert problems(store) == [
        f"{file}: rows {first} to {last} are not what was written (CRC-32C); copy or extract it again"
    ]
    assert problems(store, quick=True) == []


def test_neighbouring_blocks_are_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_rows, "_PIECE_BYTES", 1)
    file = store / "shard-00001.h5"
    for row in (40, 70, 100, 190):
        flip(file, offset(file) + row * ROW_BYTES)
    assert [line.partition(": ")[2].split(" are")[0] for line in problems(store)] == [
        "rows 32 to 127",
        "rows 160 to 191",
    ]


@pytest.mark.parametrize("name", ["token_ids", "sequence_ids", "positions", "roles", "sources", "crc32c"])
def test_every_column_is_hashed(store: Path, name: str) -> None:
    file = store / "shard-00002.h5"
    flip(file, offset(file, name))
    found = problems(store, quick=True)
    assert any("side columns are not what store.json has the hash of" in line and str(file) in line for line in found)


def corrupt_shard(store: Path) -> str:
    file = store / "shard-00000.h5"
    flip(file, offset(file) + 5)
    return "rows 0 to 31 are not what was written"


def missing_shard(store: Path) -> str:
    (store / "shard-00001.h5").unlink()
    return "shard-00001.h5: no such file"


def truncated_shard(store: Path) -> str:
    os.truncate(store / "shard-00002.h5", 5000)
    return "shard-00002.h5: truncated, 5000 bytes are left"


def extra_shard(store: Path) -> str:
    (store / "shard-00007.h5").write_bytes(b"")
    return "shard-00007.h5: not listed in store.json"


def leftover(store: Path) -> str:
    (store / ".shard-00003.h5.tmp").write_bytes(b"")
    (store / ".journal").write_text("{}")
    return ".journal and 1 more: left by a writer that was cut off"


def changed_vocabulary(store: Path) -> str:
    (store / "vocabulary.json").write_text('["a"]')
    edit(store, vocabulary_sha256="0" * 64)
    return "vocabulary.json: changed since the store was written"


def other_stats(store: Path) -> str:
    stats = json.loads((store / "store.json").read_text())["stats"]
    edit(store, stats=stats | {"mean": [[0.0]]})
    return "stats in store.json are not for 2 models of width 16"


DAMAGES = [corrupt_shard, missing_shard, truncated_shard, extra_shard, leftover, changed_vocabulary, other_stats]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damage(store: Path, damage: Callable[[Path], str]) -> None:
    wanted = damage(store)
    found = problems(store)
    assert any(wanted in line for line in found), found
    assert len(found) == 1, found


def test_all_damages_are_reported_at_once(store: Path) -> None:
    wanted = [damage(store) for damage in DAMAGES]
    found = problems(store)
    for text in wanted:
        assert any(text in line for line in found), text


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"roles": ["text"]}, "/roles of row 0 is 1, but store.json lists 1 roles"),
        ({"sources": [{"dataset": "d"}]}, "/sources of row 100 is 1, but store.json lists 1 sources"),
        ({"dtype": "float16"}, "store.json says float16, the shards are bfloat16"),
        ({"models": ["a"]}, "names 1 models, /activations holds 2"),
        ({"models": [], "dtype": "x"}, "models: List should have at least 1 item after validation, not 0; dtype: In"),
        ({"roles": ["bos", "text"]}, "stats in store.json are over 428 rows, but 72 are usable"),
        ({"shards": [{"file": f"shard-0000{i}.h5", "n_rows": 200} for i in range(3)]}, "100 rows, but store.json says"),
        ({"schema": 2}, "schema 2, but this fastdiff"),
    ],
)  # fmt: skip
def test_store_json(store: Path, changes: dict[str, Any], wanted: str) -> None:
    edit(store, **changes)
    assert any(wanted in line for line in problems(store, quick=True)), problems(store, quick=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000, '{"schema": 1, "models": "\\ud800"}', "\x00"])
def test_unreadable_store_json_is_one_problem(store: Path, text: str) -> None:
    (store / "store.json").write_text(text)
    assert str(store / "store.json") in problems(store, quick=True)[0]


def test_columns_that_cannot_be(tmp_path: Path) -> None:
    columns = {
        "token_ids": ([0, 1, -2, 3], "/token_ids of row 2 is -2, but no token id is negative"),
        "sequence_ids": ([5, 6, 5, 6], "sequence 5 begins at row 0 and again at row 2 (2 such sequences)"),
        "positions": ([0, 1, 2**40, 3], "/positions of row 2 is 1099511627776, which does not fit int32"),
        "roles": ([0, 300, 1, 1], "/roles of row 1 is 300, which does not fit uint8"),
        "sources": ([-1, 0, 0, 0], "/sources of row 0 is -1, which does not fit uint16"),
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = np.zeros((4, 2, 3), np.float32)
        for name, (values, _) in columns.items():
            file[name] = np.array(values)
    found = problems(tmp_path / "a.h5")
    assert len(found) == len(columns)
    for _, wanted in columns.values():
        assert any(wanted in line for line in found), found


def test_sequences_run_on_over_shards_and_pieces(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema": 1, "models": ["a", "b"]}')
    for i, ids in enumerate([[1, 1, 2], [2, 2, 3], [3, 4, 1]]):
        with h5py.File(tmp_path / f"shard-0000{i}.h5", "w") as file:
            file["activations"] = np.zeros((3, 2, 3), np.float32)
            file["sequence_ids"] = np.array(ids)
    (found,) = problems(tmp_path)
    assert "sequence 1 begins at row 0 and again at row 8 (1 such sequences)" in found


@pytest.mark.parametrize("how", [{}, {"chunks": (8, 2, 4)}, {"chunks": (8, 2, 4), "compression": "gzip"}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nan_is_counted_without_checksums(tmp_path: Path, dtype: str, how: dict[str, Any]) -> None:
    x = torch.zeros(100, 2, 4)
    x[3, 1, 2], x[3, 0, 0], x[50, 0, 3], x[99, 1, 3] = float("nan"), float("inf"), float("-inf"), float("nan")
    kind: Any = {"float16": np.float16, "float32": np.float32}.get(dtype) or bfloat16_type()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("activations", x.shape, kind if dtype != "bfloat16" else h5py.Datatype(kind), **how)
        bits = x.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=made.id.get_type())
    found = verify_store(tmp_path / "a.h5")
    assert found.facts["nonfinite_rows"] == 3
    assert found.problems == [
        f"{tmp_path}/a.h5: 3 rows hold NaN or infinity, the first is row 3; extract it again, or leave them out"
    ]
    assert found.notes == [f"{tmp_path}/a.h5: a.h5 without /crc32c: what it holds cannot be verified"]


def test_gzip_chunk_that_cannot_be_read(store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "a.h5"
    with h5py.File(store / "shard-00000.h5") as old, h5py.File(bare, "w") as new:
        kind = bfloat16_type()
        bits = np.empty((SHARD, 2, D), np.uint16)
        old["activations"].id.read(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=kind)
        made = new.create_dataset("activations", bits.shape, h5py.Datatype(kind), chunks=(32, 2, D), compression="gzip")
        made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=kind)
        new["crc32c"] = old["crc32c"][:]
        at = made.id.get_chunk_info(2).byte_offset
    assert problems(bare) == []
    for i in range(50, 90):
        flip(bare, at + i)
    (found,) = problems(bare)
    assert found.startswith(f"{bare}: rows 0 to 199 cannot be read (cannot be read (")


def test_a_store_being_written_is_not_called_abandoned(store: Path) -> None:
    (store / ".journal").write_text("{}")
    fd = os.open(store, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert "another process is writing here; wait for it" in problems(store)[0]
    finally:
        os.close(fd)


@pytest.mark.parametrize("piece_bytes", [1, 8 << 20])
@pytest.mark.parametrize("name", ["mean", "variance", "mean_norm"])
def test_statistics_are_those_of_the_rows(
    store: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(verify_rows, "_PIECE_BYTES", piece_bytes)
    assert problems(store) == []
    stats = json.loads((store / "store.json").read_text())["stats"]
    by = 1 + 1e-7
    changed = (
        [[x * by for x in row] for row in stats[name]] if name == "mean" else [stats[name][0], stats[name][1] * by]
    )
    edit(store, stats=stats | {name: changed})
    assert problems(store) == [
        f"{store}: {name} in the stats of store.json is not that of the rows; "
        "remove the stats there, and they are computed"
    ]
    quick = verify_store(store, quick=True)
    assert quick.problems == [] and any("statistics in store.json not checked (--quick)" in n for n in quick.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_statistics_of_equal_and_of_large_rows_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(verify_rows, "_PIECE_BYTES", 1)
    x = torch.full((N, 2, D), 0.1)
    x[:, 1] = 3e4 + torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    meta = {"models": ["a", "b"]}
    with StoreWriter(
        tmp_path / "s", n_rows=N, n_models=2, d_model=D, dtype=dtype, shard_rows=SHARD, meta=meta, columns=()
    ) as writer:
        writer.append(x)
    assert problems(tmp_path / "s") == []


def test_unfinished_store(store: Path) -> None:
    (store / "store.json").unlink()
    assert "no store.json, the store was not finished" in problems(store)[0]


def test_many_problems_are_counted(store: Path) -> None:
    edit(store, shards=[{"file": f"shard-{i}.h5", "n_rows": 1} for i in range(1000)])
    found = verify_store(store)
    assert found.n_problems == 1001 and len(found.problems) == 200
    assert found.summary()[200] == "and 801 more problems"


def test_command_and_exit_codes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = run("verify", store, "--json", "--progress", "off")
    assert code == 0 and json.loads(out)["sound"] is True
    file = store / "shard-00000.h5"
    flip(file, offset(file))
    code, out = run("verify", store, "-q")
    assert code == 3
    assert out == f"{file}: rows 0 to 31 are not what was written (CRC-32C); copy or extract it again\n"
    told = json.loads(run("verify", store, "--json", "-q")[1])
    assert told["n_problems"] == 1 and told["rows"] == N
    assert run("verify", store / "nowhere")[0] == 3
    code, out = run("verify", store, "--quick")
    assert code == 0 and "/activations not read" in out


def test_what_cannot_be_printed(store: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    edit(store, shards=[{"file": name, "n_rows": 1} for name in ("\ud800.h5", "a\0b", "new\nline")])
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(store), *more])
        assert ended.value.code == 3
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert "\\ud800.h5: no such file" in lines[1]


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    n, d = 40_000, 1024
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("activations", (n, 2, d), np.float32)
        for start in range(0, n, 2000):
            made[start : start + 2000] = np.ones((2000, 2, d), np.float32)
    code = (
        "import sys, resource; from pathlib import Path; from fastdiff.store.verify import verify_store;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert verify_store(Path(sys.argv[1])).facts['nonfinite_rows'] == 0;"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    grown = subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "a.h5"], capture_output=True, text=True)
    assert float(grown.stdout) < 100, grown  # MB, of a store of 328 MB
    (tmp_path / "a.h5").unlink()
