"""Activations in exactly the form other tools write become stores of the same rows, or are refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdiff.cli import main
from fastdiff.errors import FastdiffError, InputError, LockedError, OptionError
from fastdiff.store import importers
from fastdiff.store.directory import lock_directory
from fastdiff.store.format import bfloat16_type
from fastdiff.store.importers import ImportOptions, import_store
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify import verify_store
from fastdiff.store.writer import StoreWriter

N, D = 230, 6


def rows(seed: int, dtype: torch.dtype = torch.float32, n_models: int = 1) -> torch.Tensor:
    x = torch.randn(N, n_models, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x[:, 0] if n_models == 1 else x


def write_cache(
    directory: Path,
    activations: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    ranges: torch.Tensor | None = None,
    shard_size: int = 100,
    submodule: str = "layer_13_out",
    **config: Any,
) -> Path:
    """What `ActivationCache.collect` of jkminder/dictionary_learning leaves."""
    path = directory / submodule
    path.mkdir(parents=True)
    shards = activations.split(shard_size)
    for i, shard in enumerate(shards):
        values = (shard.view(torch.int16) if shard.dtype == torch.bfloat16 else shard).numpy()
        memmap = np.memmap(path / f"shard_{i}.memmap", dtype=values.dtype, mode="w+", shape=values.shape)
        memmap[:] = values
        memmap.flush()
        (path / f"shard_{i}.meta").write_text(json.dumps({"shape": list(shard.shape), "dtype": str(shard.dtype)}))
    told = {
        "batch_size": 64, "context_len": 128, "shard_size": shard_size, "d_model": activations.shape[1],
        "shuffle_shards": False, "io": "out", "total_size": len(activations), "shard_count": len(shards),
        "store_tokens": tokens is not None, "store_sequence_ranges": ranges is not None,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(told | config))
    if tokens is not None:
        torch.save(tokens, directory / "tokens.pt")
    if ranges is not None:
        torch.save(ranges, directory / "sequence_ranges.pt")
    torch.save(activations.double().mean(0), path / "mean.pt")
    return path


def make(out: Path, *sources: object, **options: Any) -> ActivationStore:
    import_store([str(source) for source in sources], out, ImportOptions(**options))
    assert verify_store(out).problems == []
    return ActivationStore(out)


def refusal(kind: type[FastdiffError], out: Path, *sources: object, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        make(out, *sources, **options)
    assert "\n" not in str(caught.value)
    assert not (out / "store.json").exists()
    return str(caught.value)


def same(store: ActivationStore, *models: torch.Tensor) -> bool:
    wanted = torch.cat([x[:, None] if x.ndim == 2 else x for x in models], dim=1)
    found = store.slice(0, store.n_rows)
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "_BLOCK_BYTES", 1)  # 32 rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activation_caches(tmp_path: Path, dtype: torch.dtype) -> None:
    tokens = torch.arange(N) * 3
    ranges = torch.tensor([0, 50, 120, 120, N])
    base = write_cache(tmp_path / "gemma" / "base", rows(1, dtype), tokens=tokens, ranges=ranges)
    tuned = write_cache(tmp_path / "gemma" / "tuned", rows(2, dtype), tokens=tokens, ranges=ranges, shard_size=64)
    with make(tmp_path / "acts", base, tuned, shard_rows=100) as store:
        assert same(store, rows(1, dtype), rows(2, dtype))
        assert [model.name for model in store.meta.models] == ["base", "tuned"]
        assert np.array_equal(store.column("token_ids"), tokens.numpy())
        assert np.array_equal(store.column("sequence_ids"), np.repeat([0, 1, 3], [50, 70, 110]))
        assert store.column("roles") is None and store.column("sources") is None and store.column("positions") is None
        assert store.n_train(0.4) == 120  # documents are not split
        (first, _) = store.meta.datasets or []
        assert first["dataset"] == str(base)
        assert {Path(told["file"]).name for told in first["files"]} >= {"shard_0.memmap", "shard_2.meta", "tokens.pt"}


def test_a_directory_with_one_cache_is_that_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "base", rows(1))
    write_cache(tmp_path / "tuned", rows(2))
    with make(tmp_path / "acts", tmp_path / "base", tmp_path / "tuned") as store:
        assert same(store, rows(1), rows(2))
        assert store.column("token_ids") is None
    write_cache(tmp_path / "base", rows(3), submodule="layer_20_out")
    message = refusal(OptionError, tmp_path / "more", tmp_path / "base", tmp_path / "tuned")
    assert "caches layer_13_out, layer_20_out in it; name one" in message


def test_old_caches_have_no_dtype_and_tokens_inside(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "base", rows(1), store_tokens=True)
    for meta in path.glob("*.meta"):
        told = json.loads(meta.read_text())
        del told["dtype"]
        meta.write_text(json.dumps(told))
    torch.save(torch.arange(N), path / "tokens.pt")
    with make(tmp_path / "acts", path, path, names=("a", "b")) as store:
        assert same(store, rows(1), rows(1))
        assert np.array_equal(store.column("token_ids"), np.arange(N))
        assert [model.name for model in store.meta.models] == ["a", "b"]


def test_beginnings_of_sequences_from_bos(tmp_path: Path) -> None:
    tokens = torch.arange(N) % 23 + 2
    base = write_cache(tmp_path / "base", rows(1), tokens=tokens)
    tuned = write_cache(tmp_path / "tuned", rows(2), tokens=tokens)
    with make(tmp_path / "acts", base, tuned, bos_token_id=2) as store:
        assert np.array_equal(store.column("sequence_ids"), np.arange(N) // 23 + 1)
        assert np.array_equal(store.column("roles"), np.where(np.arange(N) % 23 == 0, 0, 1))
        usable = store.usable_rows()
        assert usable is not None and len(usable) == N - 10
        assert store.stats().n_rows == N - 10
    assert "no row has that token" in refusal(OptionError, tmp_path / "b", base, tuned, bos_token_id=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", ">f2"])
def test_npy(tmp_path: Path, dtype: Any) -> None:
    wanted = {2: torch.float16, 4: torch.float32}[np.dtype(dtype).itemsize]
    for i, name in enumerate(["small", "large"]):
        np.save(tmp_path / f"{name}.npy", rows(i, wanted).numpy().astype(dtype))
    np.save(tmp_path / "both.npy", rows(5, wanted, 2).numpy().astype(dtype))
    with make(tmp_path / "a", tmp_path / "small.npy", tmp_path / "large.npy") as store:
        assert same(store, rows(0, wanted), rows(1, wanted))
        assert [model.name for model in store.meta.models] == ["small", "large"]
    with make(tmp_path / "b", tmp_path / "both.npy") as store:
        assert same(store, rows(5, wanted, 2))
        assert [model.name for model in store.meta.models] == ["base", "tuned"]
    with make(tmp_path / "c", tmp_path / "both.npy", tmp_path / "small.npy") as store:
        assert same(store, rows(5, wanted, 2), rows(0, wanted)) and store.n_models == 3


@pytest.mark.parametrize("kind", ["uint16", "int16", "V2"])
def test_bits_of_bfloat16(tmp_path: Path, kind: str) -> None:
    bits = rows(1, torch.bfloat16, 2).view(torch.int16).numpy().view(kind)
    np.save(tmp_path / "a.npy", bits)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = bits
    for name in ("a.npy", "a.h5"):
        assert "say --bits bfloat16" in refusal(OptionError, tmp_path / "no", tmp_path / name)
        with make(tmp_path / f"{name}-store", tmp_path / name, bits="bfloat16") as store:
            assert same(store, rows(1, torch.bfloat16, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    one, two, both = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "both.safetensors"
    save_file({"x": rows(1, dtype)}, one)
    save_file({"a": rows(1, dtype), "b": rows(2, dtype), "other": torch.zeros(3)}, two)
    save_file({"acts": rows(3, dtype, 2)}, both)
    with make(tmp_path / "a", both) as store:
        assert same(store, rows(3, dtype, 2))
    with make(tmp_path / "b", f"{two}:a", f"{two}:b") as store:
        assert same(store, rows(1, dtype), rows(2, dtype))
        assert [model.name for model in store.meta.models] == ["a", "b"]
    with make(tmp_path / "c", one, f"{two}:b") as store:
        assert same(store, rows(1, dtype), rows(2, dtype))
    with make(tmp_path / "d", two, two, dataset_name="b") as store:
        assert same(store, rows(2, dtype), rows(2, dtype))
    assert "holds a, b, other; say" in refusal(OptionError, tmp_path / "e", two)


@pytest.mark.parametrize("how", [{}, {"chunks": (7, 2, D)}, {"compression": "gzip"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hdf5(tmp_path: Path, dtype: torch.dtype, how: dict[str, Any]) -> None:
    x = rows(1, dtype, 2)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = {torch.float16: np.float16, torch.float32: np.float32}.get(dtype) or h5py.Datatype(bfloat16_type())
        made = file.create_dataset("deep/acts", x.shape, kind, **how)
        bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
        made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=made.id.get_type())
        file["token_ids"] = np.arange(N)
        file["roles"] = np.arange(N)  # of what?
    with make(tmp_path / "s", f"{tmp_path / 'a.h5'}:deep/acts") as store:
        assert same(store, x)
        assert np.array_equal(store.column("token_ids"), np.arange(N))
        assert store.column("roles") is None
    with make(tmp_path / "t", tmp_path / "a.h5", dataset_name="deep/acts") as store:
        assert same(store, x)
    assert "no data set /activations (found: deep, roles, token_ids)" in refusal(
        OptionError, tmp_path / "u", tmp_path / "a.h5"
    )


def test_one_hdf5_file_per_model(tmp_path: Path) -> None:
    for i, name in enumerate(["base", "tuned"]):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["activations"] = rows(i).numpy()
    with make(tmp_path / "s", tmp_path / "base.h5", tmp_path / "tuned.h5") as store:
        assert same(store, rows(0), rows(1))


def test_types_are_converted_only_when_asked(tmp_path: Path) -> None:
    np.save(tmp_path / "half.npy", rows(1, torch.float16).numpy())
    np.save(tmp_path / "double.npy", rows(2, torch.float64).numpy())
    np.save(tmp_path / "single.npy", rows(3).numpy())
    message = refusal(OptionError, tmp_path / "a", tmp_path / "half.npy", tmp_path / "single.npy")
    assert "the sources are float16 and float32; say what to store with --store-dtype" in message
    assert "are float64; say" in refusal(OptionError, tmp_path / "a", tmp_path / "double.npy")
    sources = [tmp_path / "half.npy", tmp_path / "double.npy"]
    with make(tmp_path / "b", *sources, store_dtype="bfloat16") as store:
        assert same(store, rows(1, torch.float16).bfloat16(), rows(2, torch.float64).bfloat16())


def test_columns_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    np.save(tmp_path / "documents.npy", np.arange(N) // 10)
    torch.save(torch.arange(N, dtype=torch.int32), tmp_path / "tokens.pt")
    given = {"token_ids": tmp_path / "tokens.pt", "sequence_ids": tmp_path / "documents.npy"}
    with make(tmp_path / "s", tmp_path / "x.npy", **given) as store:
        assert np.array_equal(store.column("token_ids"), np.arange(N))
        assert np.array_equal(store.column("sequence_ids"), np.arange(N) // 10)
    np.save(tmp_path / "documents.npy", np.arange(N + 1))
    assert f"expected ({N},) integers" in refusal(InputError, tmp_path / "t", tmp_path / "x.npy", **given)
    np.save(tmp_path / "documents.npy", np.full(N, 2**40))
    with make(tmp_path / "u", tmp_path / "x.npy", sequence_ids=tmp_path / "documents.npy") as store:
        assert store.column("token_ids") is None
    given["token_ids"] = tmp_path / "documents.npy"
    assert "which does not fit int32" in refusal(InputError, tmp_path / "v", tmp_path / "x.npy", **given)


def unpickle(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path.parent / "executed"),)

    torch.save(Evil(), path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    unpickle(tmp_path / "tokens.pt")
    message = refusal(InputError, tmp_path / "s", tmp_path / "x.npy", token_ids=tmp_path / "tokens.pt")
    assert "tokens.pt: not a plain tensor (" in message
    np.save(tmp_path / "o.npy", np.array([[1.0, None]], object))
    assert "Python objects, which are never unpickled" in refusal(InputError, tmp_path / "s", tmp_path / "o.npy")
    cache = write_cache(tmp_path / "base", rows(1), tokens=torch.arange(N), ranges=torch.tensor([0, N]))
    unpickle(tmp_path / "base" / "sequence_ranges.pt")
    assert "sequence_ranges.pt: not a plain tensor" in refusal(InputError, tmp_path / "s", cache, cache)
    assert not (tmp_path / "executed").exists()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_caches(tmp_path: Path) -> None:
    def cache(name: str) -> Path:
        return write_cache(tmp_path / name, rows(1), tokens=torch.arange(N), ranges=torch.tensor([0, 9, N]))

    good = cache("good")
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("1000 bytes, but its rows need 2400", lambda p: os.truncate(p / "shard_1.memmap", 1000)),
        ("shard_1.memmap: no such file", lambda p: (p / "shard_1.memmap").unlink()),
        ("shard_2.meta: no such file", lambda p: (p / "shard_2.meta").unlink()),
        ("shape is [0, 6], expected [rows, d_model]", lambda p: edit_json(p / "shard_0.meta", shape=[0, 6])),
        ("dtype is torch.int8, expected a float", lambda p: edit_json(p / "shard_0.meta", dtype="torch.int8")),
        ("dtype is ??, expected a float", lambda p: edit_json(p / "shard_0.meta", dtype="??")),
        ("230 rows, but config.json says 231", lambda p: edit_json(p / "config.json", total_size=231)),
        ("230 rows, but", lambda p: edit_json(p / "shard_1.meta", shape=[100, 5])),
        ("its rows were shuffled", lambda p: edit_json(p / "config.json", shuffle_shards=True)),
        ("no shard_count", lambda p: edit_json(p / "config.json", shard_count=None)),
        ("not readable as JSON", lambda p: (p / "config.json").write_text("{")),
        ("is (229,) int64, expected (230,)", lambda p: torch.save(torch.arange(229), p.parent / "tokens.pt")),
        (
            "not the first rows of sequences",
            lambda p: torch.save(torch.tensor([0, 5]), p.parent / "sequence_ranges.pt"),
        ),
        ("not the first rows", lambda p: torch.save(torch.tensor([0, 9, 5, N]), p.parent / "sequence_ranges.pt")),
        ("token_ids of row 7 is 0, but 7 in", lambda p: torch.save(torch.arange(N) % 7, p.parent / "tokens.pt")),
    ]
    for i, (wanted, damage) in enumerate(damages):
        bad = cache(f"bad{i}")
        damage(bad)
        if wanted.startswith("230 rows, but") and "231" not in wanted:
            wanted = "width 5, but"
        assert wanted in refusal(InputError, tmp_path / "s", good, bad), wanted


def test_damaged_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1).numpy())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows(1).numpy()))
    np.save(tmp_path / "integers.npy", np.zeros((N, D), np.int32))
    np.save(tmp_path / "flat.npy", np.zeros(N, np.float32))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    save_file({"x": rows(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    save_file({"x": torch.zeros(N, D, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "gap.h5", "w") as file:
        file.create_dataset("activations", (N, D), np.float32, chunks=(10, D))[:100] = 1
    for name, wanted in {
        "none.npy": "no such file or directory",
        "fortran.npy": "Fortran order",
        "integers.npy": "is int32, expected bfloat16",
        "flat.npy": "shape (230,)",
        "text.npy": "not a .npy file",
        "cut.npy": "truncated, copy it again",
        "cut.safetensors": "not a safetensors file",
        "int8.safetensors": "x is I8",
        "text.h5": "cannot be opened as HDF5",
        "gap.h5": "rows 100 to 229 of /activations were never written",
    }.items():
        message = refusal(InputError, tmp_path / "s", tmp_path / "x.npy", tmp_path / name)
        assert message.startswith(str(tmp_path / name)) and wanted in message
    (tmp_path / "x.txt").write_text("")
    assert "not a cache directory, .npy" in refusal(OptionError, tmp_path / "s", tmp_path / "x.txt")


def test_sources_that_do_not_go_together(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1).numpy())
    np.save(tmp_path / "short.npy", rows(2).numpy()[:-1])
    np.save(tmp_path / "narrow.npy", rows(2).numpy()[:, :-1])
    message = refusal(InputError, tmp_path / "s", tmp_path / "x.npy", tmp_path / "short.npy")
    assert "short.npy: 229 rows, but" in message and "has 230; row i of all sources must be the same token" in message
    assert "narrow.npy: width 5, but" in refusal(
        InputError, tmp_path / "s", tmp_path / "x.npy", tmp_path / "narrow.npy"
    )
    assert "3 times --name, but the sources hold 1 models" in refusal(
        OptionError, tmp_path / "s", tmp_path / "x.npy", names=("a", "b", "c")
    )
    bad = rows(3).numpy().copy()
    bad[77, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    message = refusal(InputError, tmp_path / "s", tmp_path / "x.npy", tmp_path / "nan.npy")
    assert "model nan, row 77: activation is nan" in message


def test_the_same_import_is_done_once(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    texts, out = [str(tmp_path / "x.npy")], tmp_path / "s"
    import_store(texts, out, ImportOptions())
    before = (out / "shard-00000.h5").stat()
    import_store(texts, out, ImportOptions())
    assert (out / "shard-00000.h5").stat().st_ino == before.st_ino
    with pytest.raises(OptionError, match="made from other sources or with other options; choose another -o"):
        import_store(texts, out, ImportOptions(store_dtype="float16"))
    with pytest.raises(OptionError, match="holds a store; --overwrite replaces it"):
        import_store(texts, out, ImportOptions(), resume=False)
    np.save(tmp_path / "x.npy", rows(2, n_models=2).numpy())
    with pytest.raises(OptionError, match="other sources"):
        import_store(texts, out, ImportOptions())
    import_store(texts, out, ImportOptions(), overwrite=True)
    with ActivationStore(out) as store:
        assert same(store, rows(2, n_models=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(OptionError, match=r"holds mine\.txt but no store"):
        import_store(texts, tmp_path / "other", ImportOptions())
    with pytest.raises(OptionError, match="which is to be imported; choose another -o"):
        import_store(texts, tmp_path, ImportOptions(), overwrite=True)


def test_an_interrupted_import_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    texts, out = [str(tmp_path / "x.npy")], tmp_path / "s"
    import_store(texts, tmp_path / "whole", ImportOptions(shard_rows=100))
    append, appended = StoreWriter.append, []

    def interrupted(self: StoreWriter, activations: torch.Tensor, **columns: Any) -> None:
        if len(appended) == 4:
            raise KeyboardInterrupt
        appended.append(len(activations))
        append(self, activations, **columns)

    monkeypatch.setattr(StoreWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_store(texts, out, ImportOptions(shard_rows=100))
    assert not (out / "store.json").exists()
    appended.clear()
    with pytest.raises(OptionError, match="unfinished store of other options"):
        import_store(texts, out, ImportOptions(shard_rows=50))
    import_store(texts, out, ImportOptions(shard_rows=100))
    assert sum(appended) == N - 4 * 32
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("name", ["shard-precious.h5", "shard-00007.h5"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_shard_that_no_writer_acknowledged_is_kept(tmp_path: Path, name: str, resume: bool) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    out = tmp_path / "s"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    with pytest.raises(OptionError, match=rf"holds {name} but no store; .* or --overwrite, which deletes that file"):
        import_store([str(tmp_path / "x.npy")], out, ImportOptions(), resume=resume)
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(name, b"mine")]
    import_store([str(tmp_path / "x.npy")], out, ImportOptions(), overwrite=True)
    assert verify_store(out).problems == []


def test_external_files_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = rows(1, n_models=2).numpy(), np.arange(N)
    (tmp_path / "rows.raw").write_bytes(x.tobytes())
    (tmp_path / "ids.raw").write_bytes(ids.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("activations", x.shape, np.float32, external=[("rows.raw", 0, x.nbytes)])
        file.create_dataset("token_ids", ids.shape, np.int64, external=[("ids.raw", 0, ids.nbytes)])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.raw").write_bytes(bytes(x.nbytes))
    (elsewhere / "ids.raw").write_bytes(bytes(ids.nbytes))
    monkeypatch.chdir(elsewhere)
    with make(tmp_path / "s", tmp_path / "a.h5") as store:
        assert same(store, rows(1, n_models=2))
        assert np.array_equal(store.column("token_ids"), ids)
        (told,) = store.meta.datasets or []
        assert {Path(file["file"]).name for file in told["files"]} == {"a.h5", "rows.raw", "ids.raw"}
    (tmp_path / "rows.raw").write_bytes((-x).tobytes())
    with pytest.raises(OptionError, match="made from other sources"):
        import_store([str(tmp_path / "a.h5")], tmp_path / "s", ImportOptions())


def test_nothing_is_left_of_sources_with_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = rows(3, n_models=2).numpy().copy()
    bad[200, 1, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    monkeypatch.setattr("fastdiff.store.writer._COMMIT_BYTES", 1)
    assert "row 200: activation is nan" in refusal(InputError, tmp_path / "s", tmp_path / "nan.npy")
    assert list((tmp_path / "s").iterdir()) == []


def test_the_journal_of_a_complete_store_is_removed(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    texts, out = [str(tmp_path / "x.npy")], tmp_path / "s"
    import_store(texts, out, ImportOptions())
    (out / ".journal").write_text("{}")
    fd = lock_directory(out)
    with pytest.raises(LockedError, match="another process is writing here"):
        import_store(texts, out, ImportOptions())
    assert (out / ".journal").exists()
    os.close(fd)
    import_store(texts, out, ImportOptions())
    assert not (out / ".journal").exists() and verify_store(out).problems == []


def test_documents_that_do_not_lie_together(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    np.save(tmp_path / "documents.npy", np.arange(N) // 10 % 20)
    message = refusal(InputError, tmp_path / "s", tmp_path / "x.npy", sequence_ids=tmp_path / "documents.npy")
    assert message == (
        f"{tmp_path / 'documents.npy'}: sequence 0 begins at row 0 and again at row 200 (3 such sequences); "
        "the rows of a document must lie together"
    )
    assert not (tmp_path / "s").exists()


def test_a_name_where_there_is_nothing_to_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, n_models=2).numpy())
    cache = write_cache(tmp_path / "base", rows(1))
    for path in (tmp_path / "x.npy", cache):
        assert "so :foo names nothing; leave it out" in refusal(OptionError, tmp_path / "s", f"{path}:foo")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(["a", "b"]):
        np.save(tmp_path / f"{name}.npy", rows(i).numpy())
    arguments = ["import", tmp_path / "a.npy", tmp_path / "b.npy", "-o", tmp_path / "s", "--name", "x", "--name", "y"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--shard-rows", "64", "--json", "-q"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["store"] == str(tmp_path / "s")
    with ActivationStore(tmp_path / "s") as store:
        assert same(store, rows(0), rows(1))
        assert [model.name for model in store.meta.models] == ["x", "y"]
        wanted = ["fastdiff", "import", str(arguments[1]), str(arguments[2]), "--name", "x", "--name", "y"]
        assert store.meta.command == [*wanted, "--shard-rows", "64", "--max-norm", "3.0"]
    with pytest.raises(SystemExit) as ended:
        main(["import", str(tmp_path / "c.npy"), "-o", str(tmp_path / "t")])
    assert ended.value.code == 3 and "c.npy: no such file" in capsys.readouterr().err
