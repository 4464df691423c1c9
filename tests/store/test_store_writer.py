import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdiff import _native
from fastdiff.errors import InputError, LockedError, OptionError, ResourceError
from fastdiff.store import open_shard
from fastdiff.store import writer as writer_module
from fastdiff.store.format import StoreMeta
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
META: dict[str, Any] = {
    "models": [{"name": "org/base", "layer": 3}, {"name": "org/tuned"}],
    "roles": ["text", "bos", "user"],
    "sources": [{"dataset": "pile"}, {"dataset": "chat", "category": "code"}],
    "command": ["fastdiff", "extract"],
}


def make_rows(n: int, d_model: int = 5, seed: int = 0) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    # means far from zero and unlike spreads, as real activations have
    values = rng.standard_normal((n, 2, d_model)) * rng.uniform(0.1, 9, d_model) + rng.uniform(-30, 30, d_model)
    columns = {
        "token_ids": rng.integers(0, 2**31 - 1, n),
        "sequence_ids": np.arange(n) // 7 + 2**40,
        "positions": np.arange(n) % 7,
        "roles": np.where(np.arange(n) % 7 == 0, 1, 2),
        "sources": rng.integers(0, 2, n),
    }
    return torch.from_numpy(values).float(), columns


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def write(path: Path, n: int = 100, *, step: int = 33, **changes: Any) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    values, columns = make_rows(n)
    options = {"n_rows": n, "n_models": 2, "d_model": 5, "dtype": "bfloat16", "shard_rows": 40, "meta": META}
    with StoreWriter(path, **(options | changes)) as writer:
        for start in range(0, n, step):
            writer.append(values[start : start + step], **{k: v[start : start + step] for k, v in columns.items()})
    return values, columns


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_h5py_alone_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    values, columns = write(tmp_path, 100, dtype=dtype)
    start = 0
    for name, n_rows in [("shard-00000.h5", 40), ("shard-00001.h5", 40), ("shard-00002.h5", 20)]:
        with h5py.File(tmp_path / name) as file:
            expected = values[start : start + n_rows].to(DTYPES[dtype]).float().numpy()
            assert np.array_equal(file["activations"][:].astype(np.float32), expected)
            assert file["activations"].chunks is None
            assert file["activations"].compression is None
            for column, kind in {
                "token_ids": "<i4",
                "sequence_ids": "<i8",
                "positions": "<i4",
                "roles": "u1",
                "sources": "<u2",
            }.items():
                assert file[column].dtype == np.dtype(kind)
                assert np.array_equal(file[column][:], columns[column][start : start + n_rows])
            start += n_rows


def test_bfloat16_is_the_ieee_style_hdf5_type(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / "shard-00000.h5") as file:
        kind = file["activations"].id.get_type()
        assert (kind.get_size(), kind.get_fields(), kind.get_ebias()) == (2, (15, 7, 8, 0, 7), 127)
        assert kind.get_order() == h5py.h5t.ORDER_LE
        assert file["activations"].dtype == np.float32


def test_large_data_sets_begin_at_a_page(tmp_path: Path) -> None:
    n = 5000
    write(tmp_path, n, step=n, shard_rows=n)
    with h5py.File(tmp_path / "shard-00000.h5") as file:
        for name in ("activations", "token_ids", "sequence_ids", "positions", "roles", "sources"):
            assert file[name].id.get_offset() % 4096 == 0


def test_bfloat16_rounding_is_torchs(tmp_path: Path) -> None:
    # every tie between two bfloat16 of one exponent, both signs, and the values beside each tie
    ties = np.arange(0x3F80, 0x4000, dtype=np.uint32) << 16 | 0x8000
    bits = np.concatenate([ties - 1, ties, ties + 1, ties | 0x80000000, np.array([1, 0x7FFF, 0x8001], np.uint32)])
    values = torch.from_numpy(bits.view(np.float32).copy()).reshape(-1, 1, 1).expand(-1, 2, 5)
    n = len(values)
    zeros = np.zeros(n, np.int64)
    columns = dict.fromkeys(("token_ids", "sequence_ids", "positions", "roles", "sources"), zeros)
    with StoreWriter(tmp_path, n_rows=n, n_models=2, d_model=5, dtype="bfloat16", shard_rows=n, meta=META) as writer:
        writer.append(values, **columns)
    with ActivationStore(tmp_path) as store:
        got = store.slice(0, n)[:, 0, 0].view(torch.int16)
    assert torch.equal(got, values[:, 0, 0].to(torch.bfloat16).view(torch.int16))
    even = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    assert np.array_equal(got.numpy().view(np.uint16), even.astype(np.uint16))


def test_checksums_are_per_32_rows_however_rows_arrive(tmp_path: Path) -> None:
    for step in (1, 7, 33, 100):
        write(tmp_path / str(step), step=step)
    for shard in ("shard-00000.h5", "shard-00001.h5", "shard-00002.h5"):
        with h5py.File(tmp_path / "7" / shard) as file:
            n, width = len(file["activations"]), 2 * 5 * 2
            raw = (tmp_path / "7" / shard).read_bytes()[file["activations"].id.get_offset() :][: n * width]
            expected = [
                _native.crc32c(np.frombuffer(raw[i : i + 32 * width], np.uint8)) for i in range(0, len(raw), 32 * width)
            ]
            assert file["crc32c"][:].tolist() == expected
        assert len({(tmp_path / str(step) / shard).read_bytes() for step in (1, 7, 33, 100)}) == 1


def test_writing_twice_gives_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    time.sleep(1.1)  # the times HDF5 would record are whole seconds
    write(tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["shard-00000.h5", "shard-00001.h5", "shard-00002.h5", "store.json"]
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shard_hash_covers_checksums_columns_and_metadata(tmp_path: Path) -> None:
    write(tmp_path)
    told = json.loads((tmp_path / "store.json").read_text())["shards"]
    assert [(shard["file"], shard["n_rows"]) for shard in told] == [
        ("shard-00000.h5", 40),
        ("shard-00001.h5", 40),
        ("shard-00002.h5", 20),
    ]
    with h5py.File(tmp_path / "shard-00001.h5") as file:
        names = ("crc32c", "token_ids", "sequence_ids", "positions", "roles", "sources", "norms")
        digest = hashlib.sha256(b"".join(file[name][:].tobytes() for name in names))
    digest.update(b'{"d_model":5,"dtype":"bfloat16","n_models":2,"n_rows":40,"schema":1}')
    assert told[1]["sha256"] == digest.hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_statistics_are_those_of_the_stored_values_without_bos(tmp_path: Path, dtype: str) -> None:
    values, columns = write(tmp_path, 1000, shard_rows=300, step=77, dtype=dtype)
    x = values.to(DTYPES[dtype]).double().numpy()[columns["roles"] != 1]
    stats = StoreMeta.model_validate_json((tmp_path / "store.json").read_text()).stats
    assert stats is not None
    assert stats.n_rows == len(x) < 1000
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, x.var(axis=0).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(stats.mean_norm, np.linalg.norm(x, axis=2).mean(axis=0), rtol=1e-12)


def test_metadata_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    with ActivationStore(tmp_path) as store:
        assert [model.name for model in store.meta.models] == ["org/base", "org/tuned"]
        assert store.meta.models[0].layer == 3
        assert store.meta.sources is not None and store.meta.sources[1].category == "code"
        assert store.meta.dtype == "bfloat16"
        assert store.sha256() == hashlib.sha256((tmp_path / "store.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    values, columns = make_rows(50)
    values[37, 1, 2] = bad
    with (
        pytest.raises(InputError) as caught,
        StoreWriter(tmp_path, n_rows=50, n_models=2, d_model=5, dtype="bfloat16", shard_rows=20, meta=META) as writer,
    ):
        writer.append(values, **columns)
    message = str(caught.value)
    where = f"model org/tuned, sequence {columns['sequence_ids'][37]}, position {columns['positions'][37]}"
    assert where in message
    assert str(bad) in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_float16_names_the_cure(tmp_path: Path) -> None:
    values, columns = make_rows(5)
    values[2, 0, 0] = 70000.0
    options: dict[str, Any] = {"n_rows": 5, "n_models": 2, "d_model": 5, "shard_rows": 5, "meta": META}
    with (
        pytest.raises(InputError, match=r"org/base.*70000 is too large for float16; store bfloat16"),
        StoreWriter(tmp_path / "half", dtype="float16", **options) as writer,
    ):
        writer.append(values, **columns)
    with StoreWriter(tmp_path / "brain", dtype="bfloat16", **options) as writer:
        writer.append(values, **columns)


def test_an_exception_keeps_what_was_appended_but_leaves_no_store(tmp_path: Path) -> None:
    write(tmp_path / "whole", step=10)
    values, columns = make_rows(100)
    options: dict[str, Any] = {"n_rows": 100, "n_models": 2, "d_model": 5, "dtype": "bfloat16", "shard_rows": 40}

    def fail_after(n: int, path: Path) -> None:
        with StoreWriter(path, meta=META, **options) as writer:
            assert not (path / "store.json").exists()
            for start in range(0, n, 10):
                writer.append(values[start : start + 10], **{k: v[start : start + 10] for k, v in columns.items()})
            raise KeyboardInterrupt

    for n in (0, 10, 40, 90):
        path = tmp_path / str(n)
        write(path)
        with pytest.raises(KeyboardInterrupt):
            fail_after(n, path)
        with pytest.raises(InputError, match="the store was not finished" if n else "not a store"):
            ActivationStore(path)
        assert n or list(path.iterdir()) == []
        with StoreWriter(path, meta=META, resume=True, **options) as writer:
            assert writer.n_appended == writer.n_acknowledged == n
            for start in range(n, 100, 10):
                writer.append(values[start : start + 10], **{k: v[start : start + 10] for k, v in columns.items()})
        assert contents(path) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_writer_killed_before_a_commit_leaves_no_store_and_the_next_one_starts_afresh(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
import numpy as np, torch
from pathlib import Path
from fastdiff.store.writer import StoreWriter
zeros = np.zeros(50, np.int64)
with StoreWriter(Path({str(tmp_path)!r}), n_rows=100, n_models=2, d_model=5, dtype="bfloat16", shard_rows=40,
                 meta={{"models": ["a", "b"]}}) as writer:
    writer.append(torch.ones(50, 2, 5), token_ids=zeros, sequence_ids=zeros, positions=zeros, roles=zeros,
                  sources=zeros)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script], check=False, cwd=tmp_path.parent)
    assert ran.returncode == -9
    # names are settled by commits
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".shard-00000.h5.tmp",
        ".shard-00001.h5.tmp",
        ".shard-00002.h5.tmp",
    ]
    with pytest.raises(InputError, match="the store was not finished"):
        ActivationStore(tmp_path)
    write(tmp_path, resume=True)
    assert len(list(tmp_path.iterdir())) == 4
    ActivationStore(tmp_path).close()


def test_discard_removes_even_what_was_acknowledged(tmp_path: Path) -> None:
    values, columns = make_rows(100)
    options: dict[str, Any] = {"n_rows": 100, "n_models": 2, "d_model": 5, "dtype": "bfloat16", "shard_rows": 40}
    with StoreWriter(tmp_path, meta=META, **options) as writer:
        writer.append(values[:90], **{k: v[:90] for k, v in columns.items()})
        writer.commit()
        assert (tmp_path / "shard-00001.h5").exists()
        writer.discard()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="failed or ended"):
            writer.append(values[90:], **{k: v[90:] for k, v in columns.items()})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)  # the lock is free again


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="0 rows appended"),
        StoreWriter(tmp_path, n_rows=9, n_models=2, d_model=5, dtype="float32", shard_rows=9, meta=META),
    ):
        before = sorted(tmp_path.iterdir())
        for resume in (False, True):
            with pytest.raises(LockedError, match="another process is writing here"):
                write(tmp_path, resume=resume)
        assert sorted(tmp_path.iterdir()) == before
    write(tmp_path)


def test_rows_that_are_refused_cost_none_of_those_before(tmp_path: Path) -> None:
    write(tmp_path / "whole", step=50)
    values, columns = make_rows(100)
    bad = values.clone()
    bad[60, 1, 2] = float("nan")
    options: dict[str, Any] = {"n_rows": 100, "n_models": 2, "d_model": 5, "dtype": "bfloat16", "shard_rows": 40}
    halves = [{k: v[:50] for k, v in columns.items()}, {k: v[50:] for k, v in columns.items()}]
    with (
        pytest.raises(InputError, match="activation is nan"),
        StoreWriter(tmp_path / "s", meta=META, **options) as writer,
    ):
        writer.append(bad[:50], **halves[0])
        writer.append(bad[50:], **halves[1])
    with StoreWriter(tmp_path / "s", meta=META, resume=True, **options) as writer:
        assert writer.n_appended == 50
        writer.append(values[50:], **halves[1])
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("name", "limit"), [("_COMMIT_BYTES", 700), ("_COMMIT_SECONDS", 0.0)])
def test_commits_happen_by_themselves_by_size_and_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: float
) -> None:
    values, columns = make_rows(100)
    monkeypatch.setattr(writer_module, name, limit)
    with StoreWriter(tmp_path, n_rows=100, n_models=2, d_model=5, dtype="bfloat16", shard_rows=40, meta=META) as writer:
        seen = []
        for start in range(0, 100, 20):  # 400 bytes each
            writer.append(values[start : start + 20], **{k: v[start : start + 20] for k, v in columns.items()})
            seen.append(writer.n_acknowledged)
    assert seen == ([0, 40, 40, 80, 80] if name == "_COMMIT_BYTES" else [20, 40, 60, 80, 100])


def test_large_rows_pass_through_every_buffer_and_the_end_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d_model = 1000, 256
    values, columns = make_rows(n, d_model)
    monkeypatch.setattr(open_shard, "_BUFFER_BYTES", 40_000)  # 32 rows of 1024 bytes in each of four buffers
    monkeypatch.setattr(writer_module, "_COMMIT_BYTES", 100_000)
    with StoreWriter(
        tmp_path, n_rows=n, n_models=2, d_model=d_model, dtype="bfloat16", shard_rows=333, meta=META
    ) as writer:
        for start in range(0, n, 77):
            writer.append(values[start : start + 77], **{k: v[start : start + 77] for k, v in columns.items()})
    with ActivationStore(tmp_path) as store:
        assert torch.equal(store.slice(0, n), values.bfloat16())
        for k, v in columns.items():
            assert np.array_equal(store.column(k), v)
        sums = store.crc32c()
        assert sums is not None
        for first, shard in zip(range(0, n, 333), sums, strict=True):
            rows = values.bfloat16()[first : min(n, first + 333)].contiguous().view(torch.uint8).numpy()
            assert np.array_equal(shard, _native.crc32c_blocks(rows, 32 * 1024, tables=True))


@pytest.mark.parametrize("at_most", [1, 4095, 5000, 12_288])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    values, columns = make_rows(100, 128)
    options: dict[str, Any] = {"n_rows": 100, "n_models": 2, "d_model": 128, "dtype": "bfloat16", "shard_rows": 70}
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(at_most, len(data) // 9)], offset))
    with StoreWriter(tmp_path, meta=META, **options) as writer:
        writer.append(values, **columns)
    with ActivationStore(tmp_path) as store:
        assert torch.equal(store.slice(0, 100), values.bfloat16())
        assert np.array_equal(store.column("sequence_ids"), columns["sequence_ids"])


def test_a_file_system_without_direct_writes_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    os_open, pwrite, direct = os.open, os.pwrite, set()

    def without(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_open(path, flags, *rest)

    def watched(path: Any, flags: int, *rest: Any) -> int:
        fd = os_open(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def picky(fd: int, data: Any, offset: int) -> int:
        if fd in direct:
            refused.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, data, offset)

    write(tmp_path / "a", 5000, shard_rows=3000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", without)
        write(tmp_path / "b", 5000, shard_rows=3000)
    assert refused
    refused.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        patch.setattr(os, "pwrite", picky)
        write(tmp_path / "c", 5000, shard_rows=3000)
    assert refused
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_store_may_have_only_some_columns(tmp_path: Path) -> None:
    values, columns = make_rows(100)
    options: dict[str, Any] = {"n_rows": 100, "n_models": 2, "d_model": 5, "dtype": "float32", "shard_rows": 40}
    options |= {"meta": META, "columns": ("sequence_ids",)}
    ids = columns["sequence_ids"]

    def fill(path: Path, stop: int, **more: Any) -> None:
        with StoreWriter(path, **(options | more)) as writer:
            for start in range(writer.n_appended, stop, 30):
                writer.append(values[start : start + 30], sequence_ids=ids[start : start + 30])

    fill(tmp_path / "whole", 100)
    with pytest.raises(ValueError, match="60 rows appended"):
        fill(tmp_path / "s", 60)
    with pytest.raises(OptionError, match="other options"):
        fill(tmp_path / "s", 100, resume=True, columns=("sequence_ids", "roles"))
    fill(tmp_path / "s", 100, resume=True)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    with ActivationStore(tmp_path / "s") as store:
        assert np.array_equal(store.column("sequence_ids"), ids)
        assert store.column("roles") is None
        # without roles no row is known to be bos
        assert store.stats().n_rows == 100
    for given in ({}, columns):
        with pytest.raises(ValueError, match=r"columns \["), StoreWriter(tmp_path / "t", **options) as writer:
            writer.append(values, **given)
    values[70, 0, 0] = float("inf")
    with pytest.raises(InputError, match="model org/base, row 90: activation is inf"):
        values[90] = values[70]
        values[70] = 0
        fill(tmp_path / "t", 100)


def test_a_full_disk_is_found_before_any_work(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"no room for 4 GB .*free some") as caught:
            StoreWriter(
                tmp_path,
                n_rows=10**6,
                n_models=2,
                d_model=1000,
                dtype="bfloat16",
                shard_rows=10**6,
                meta=META,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_space_is_reserved_before_the_first_row(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="0 rows appended"),
        StoreWriter(tmp_path, n_rows=100000, n_models=2, d_model=5, dtype="float32", shard_rows=60000, meta=META),
    ):
        taken = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
        assert taken >= 100000 * (2 * 5 * 4 + 4 + 8 + 4 + 1 + 2)


def test_misuse_is_refused(tmp_path: Path) -> None:
    values, columns = make_rows(10)
    options: dict[str, Any] = {
        "n_rows": 10,
        "n_models": 2,
        "d_model": 5,
        "dtype": "bfloat16",
        "shard_rows": 4,
        "meta": META,
    }
    with pytest.raises(ValueError, match="names 2 models, the activations have 3"):
        StoreWriter(tmp_path, **(options | {"n_models": 3}))
    with pytest.raises(ValueError, match="must be at least 1"):
        StoreWriter(tmp_path, **(options | {"n_rows": 0}))
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        StoreWriter(tmp_path / "file", **options)
    for given, wrong, message in [
        (values[:, :1], {}, r"expected \[n, 2, 5\]"),
        (values, {"roles": columns["roles"][:3]}, "roles must be"),
        (values, {"roles": columns["roles"] + 300}, "does not fit uint8"),
        (values, {"positions": columns["positions"] + 0.5}, "positions must be"),
        (torch.cat([values, values]), {k: np.r_[v, v] for k, v in columns.items()}, "20 rows appended"),
        (values[:4], {k: v[:4] for k, v in columns.items()}, "4 rows appended, but n_rows=10"),
    ]:
        with pytest.raises(ValueError, match=message), StoreWriter(tmp_path / "s", **options) as writer:
            writer.append(given, **(columns | wrong))
        # four good rows are kept, for a writer that knows the others
        assert sorted(file.name for file in (tmp_path / "s").iterdir()) == (
            [".journal", ".shard-00001.h5.tmp", ".shard-00002.h5.tmp", "shard-00000.h5"] if len(given) == 4 else []
        )
