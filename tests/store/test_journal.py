"""Writers that are cut off: acknowledged rows survive, and the finished store is byte for byte that of one writer."""

import errno
import itertools
import json
import math
import os
import random
import resource
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest

from fastdiff.errors import FastdiffError, InputError, OptionError, ResourceError
from fastdiff.store import open_shard
from fastdiff.store.journal import JOURNAL, Journal, read_journal, store_key, write_journal
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

SCRIPT = Path(__file__).with_name("small_store.py")
# a script of its own, because processes are forked from it; it stands beside the tests and in no package
small_store = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
N, STEP, META, Stopped = small_store.N, small_store.STEP, small_store.META, small_store.Stopped
contents, write = small_store.contents, small_store.write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every byte of the store that was never cut off, with one commit."""
    path = tmp_path_factory.mktemp("whole")
    write(path)
    found = contents(path)
    assert sorted(found) == [*(f"shard-{i:05d}.h5" for i in range(4)), "store.json"]
    return found


def cut_off(path: Path, at: int, **options: Any) -> None:
    """Stop a writer as Ctrl-C does, once it has `at` rows or a few more."""
    with pytest.raises(Stopped):
        write(path, stop_at=at, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_writer_loses_no_acknowledged_row_and_leaves_no_trace(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-P", str(SCRIPT), str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= kills
    assert found["identical"] == found["stores"]
    # otherwise the kills came too early to show anything
    assert found["resumed"] >= found["stores"] / 2


@pytest.mark.parametrize("commit_every", [1, 3])
def test_every_commit_can_be_continued_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], commit_every: int
) -> None:
    monkeypatch.setattr(open_shard, "_BUFFER_BYTES", 40_000)
    # copies of the directory are what a kill leaves: at each commit, and after an append behind it
    copies: list[tuple[Path, int]] = []
    append, commit = StoreWriter.append, StoreWriter.commit

    def copied(writer: StoreWriter, call: Any, *args: Any, **options: Any) -> None:
        call(writer, *args, **options)
        copies.append((tmp_path / f"copy-{len(copies)}", writer.n_acknowledged))
        shutil.copytree(tmp_path / "store", copies[-1][0])

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", lambda *args, **options: copied(args[0], append, *args[1:], **options))
        patch.setattr(StoreWriter, "commit", lambda writer: copied(writer, commit))
        write(tmp_path / "store", commit_every=commit_every)
    assert len({n for _, n in copies}) >= 8
    for path, n in copies[:: 1 + len(copies) // 8]:
        assert small_store.acknowledged(path) == n
        assert write(path) == n
        assert contents(path) == whole


def test_a_store_cut_off_again_and_again_is_the_same(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for at in range(STEP, N, 2 * STEP):
        cut_off(tmp_path, at)
    assert contents(tmp_path) != whole
    write(tmp_path)
    assert contents(tmp_path) == whole


def test_all_rows_acknowledged_needs_no_more_rows(tmp_path: Path, whole: dict[str, bytes]) -> None:
    store, again = tmp_path / "store", tmp_path / "again"
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.store.writer.write_json", lambda *_: (_ for _ in ()).throw(Stopped))
        write(store)
    shutil.copytree(store, again)
    assert write(store) == N
    assert contents(store) == whole
    # killed between store.json and the end of the journal
    (again / "store.json").write_bytes(whole["store.json"])
    (again / ".store.json.tmp").write_text("half")
    (again / f".{JOURNAL}.tmp").write_text("half")
    assert write(again) == N
    assert contents(again) == whole


def test_a_shard_that_the_journal_calls_finished_gets_its_name(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cut_off(tmp_path, 846)
    for name in ("shard-00000.h5", "shard-00001.h5"):
        (tmp_path / name).rename(tmp_path / f".{name}.tmp")  # killed between the journal and the new names
    write(tmp_path)
    assert contents(tmp_path) == whole


def test_without_acknowledged_rows_the_writer_starts_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / ".shard-00000.h5.tmp").write_text("reserved by one that was killed")
    assert write(tmp_path) == 0
    assert contents(tmp_path) == whole
    # a finished store has no journal either, and what is there is replaced
    assert write(tmp_path) == 0
    assert contents(tmp_path) == whole


def test_no_resume_starts_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cut_off(tmp_path, 500)
    assert write(tmp_path, resume=False) == 0
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "float16"},
        {"shard_rows": 400},
        {"n_rows": N + 1},
        {"meta": {**META, "command": ["other"]}},
        {"d_model": 64},
    ],
)
def test_other_arguments_are_refused_and_change_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    cut_off(tmp_path, 500)
    before = contents(tmp_path)
    with pytest.raises(OptionError, match=r"unfinished store of other options.*--overwrite"):
        write(tmp_path, **other)
    assert contents(tmp_path) == before


def test_every_argument_is_in_the_key() -> None:
    options: dict[str, Any] = {
        "n_rows": 9,
        "n_models": 2,
        "d_model": 5,
        "dtype": "float32",
        "shard_rows": 4,
        "meta": {},
    }
    changes = [
        ("n_rows", 4),
        ("n_models", 5),
        ("d_model", 2),
        ("dtype", "float16"),
        ("shard_rows", 9),
        ("meta", {"a": 1}),
    ]
    assert len({store_key(**options), *(store_key(**(options | {name: value})) for name, value in changes)}) == 7


def test_journal_comes_back_exactly(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    shards = [{"file": "shard-00000.h5", "n_rows": 9, "sha256": "ab"}]
    journal = Journal.model_validate(
        {"schema": 1, "key": "k", "n_rows": 12, "checked_from": 3, "shards": shards, "sums": {"crc32c": 2**32 - 1},
         "last_sum": 7, "stats": "AAAA"}
    )  # fmt: skip
    write_journal(tmp_path, journal)
    assert read_journal(tmp_path) == journal
    assert journal.stats_state == b"\0\0\0"
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL]


def test_damaged_journals_are_refused_or_harmless(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cut_off(tmp_path / "store", 500, commit_every=3)
    good = (tmp_path / "store" / JOURNAL).read_bytes()
    generator = random.Random(0)
    refused = 0
    for number in range(300):
        bad = bytearray(good)
        at = generator.randrange(len(bad))
        kind = number % 6
        if kind == 0:
            bad[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            bad[at : at + generator.randrange(1, 99)] = b""
        elif kind == 3:
            bad[at:at] = generator.randbytes(generator.randrange(1, 99))
        elif kind == 4:
            bad[at : at + generator.randrange(1, 4096)] = bytes(min(4096, len(bad) - at))
        else:
            bad[at : at + 1] = b"%d" % generator.randrange(1000)
        (tmp_path / "store" / JOURNAL).write_bytes(bad)
        if number == 299:
            (tmp_path / "store" / JOURNAL).write_bytes(b"[" * 100_000)
        before = contents(tmp_path / "store")
        try:
            found = read_journal(tmp_path / "store")
        except InputError as error:
            assert "damaged" in str(error) and "--overwrite" in str(error) and "\n" not in str(error)
            refused += 1
            if number % 10 == 0:
                with pytest.raises(InputError, match="damaged"):
                    write(tmp_path / "store")
                assert contents(tmp_path / "store") == before
            continue
        # a byte between the words of JSON says the same
        (tmp_path / "store" / JOURNAL).write_bytes(good)
        assert found == read_journal(tmp_path / "store")
    assert refused >= 280
    (tmp_path / "store" / JOURNAL).write_bytes(good)
    write(tmp_path / "store")
    assert contents(tmp_path / "store") == whole


def flip(file: Path, row: int) -> None:
    data = bytearray(file.read_bytes())
    data[4096 + row * 4 * small_store.D] ^= 1
    file.write_bytes(data)


# the last commit was at row 423 or at none; rows 333 to 469 are in the second shard
@pytest.mark.parametrize(
    ("commit_every", "buffer_bytes", "file", "row", "rows"),
    [
        (0, 1 << 20, "shard-00000.h5", 0, "rows 0 to 31"),
        (0, 1 << 20, "shard-00000.h5", 332, "rows 320 to 332"),
        (0, 40_000, ".shard-00001.h5.tmp", 0, "rows 0 to 31"),
        (0, 40_000, ".shard-00001.h5.tmp", 136, "rows 128 to 136"),
        (3, 40_000, ".shard-00001.h5.tmp", 100, "rows 96 to 127"),
        # before the commit, but the buffer that it is in will be summed and written again
        (3, 1 << 20, ".shard-00001.h5.tmp", 7, "rows 0 to 31"),
    ],
)
def test_rows_that_changed_since_they_were_written_are_refused_by_file_and_number(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes],
    commit_every: int,
    buffer_bytes: int,
    file: str,
    row: int,
    rows: str,
) -> None:
    monkeypatch.setattr(open_shard, "_BUFFER_BYTES", buffer_bytes)
    cut_off(tmp_path, 470, commit_every=commit_every)
    flip(tmp_path / file, row)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"/{file}: {rows} are not what was written.*--overwrite"):
        write(tmp_path)
    assert contents(tmp_path) == before
    flip(tmp_path / file, row)
    assert write(tmp_path) == 470
    assert contents(tmp_path) == whole


def test_damage_in_what_counts_is_refused_and_behind_it_does_no_harm(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cut_off(tmp_path / "store", 470)
    name = ".shard-00001.h5.tmp"
    with h5py.File(tmp_path / "store" / name, locking=False) as shard:
        starts = {key: data.id.get_offset() for key, data in shard.items()}
        sizes = {key: data.id.get_type().get_size() * math.prod(data.shape[1:]) for key, data in shard.items()}
    # 137 rows; the fifth block is not full, and its sum is in the journal
    ends = {key: start + sizes[key] * (4 if key == "crc32c" else 137) for key, start in starts.items()}
    counts = [8, *starts.values(), *(end - 1 for end in ends.values())]
    for number, at in enumerate([*counts, *ends.values()]):
        path = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "store", path)
        damaged = bytearray((path / name).read_bytes())
        damaged[at] ^= 0x11
        (path / name).write_bytes(damaged)
        if number < len(counts):
            with pytest.raises(InputError, match=r"shard-00001\.h5\.tmp: .*--overwrite"):
                write(path)
        else:
            write(path)
            assert contents(path) == whole


@pytest.mark.parametrize("name", ["shard-00000.h5", ".shard-00002.h5.tmp"])
def test_a_shard_that_is_gone_or_cut_is_refused_by_name(tmp_path: Path, name: str) -> None:
    cut_off(tmp_path, 846)
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(good[:-1])
    with pytest.raises(InputError, match=rf"{name}: \d+ bytes, not {len(good)}; start again with --overwrite"):
        write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"shard-0000\d\.h5.*: cannot be read \(No such file or directory\)"):
        write(tmp_path)
    (tmp_path / name).write_bytes(good)
    assert write(tmp_path) == 846


def test_a_finished_shard_whose_columns_changed_is_refused(tmp_path: Path) -> None:
    cut_off(tmp_path, 846)
    with h5py.File(tmp_path / "shard-00000.h5", "r+") as shard:
        shard["token_ids"][7] += 1
    with pytest.raises(InputError, match=r"shard-00000\.h5: rows 0 to 332 have other side columns"):
        write(tmp_path)


def test_the_journal_follows_the_rows_and_names_follow_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a power cut leaves is a beginning of this order, not of the order of writes
    events: list[str] = []
    functions = {name: getattr(os, name) for name in ("pwrite", "fdatasync", "fsync", "replace")}

    def noted(name: str) -> Any:
        def call(*args: Any) -> Any:
            which = Path(args[1]).name if name == "replace" else Path(f"/proc/self/fd/{args[0]}").readlink().name
            events.append(f"{name} {which}")
            return functions[name](*args)

        return call

    for name in functions:
        monkeypatch.setattr(os, name, noted(name))
    write(tmp_path / "store", commit_every=5)
    unsynced: set[str] = set()
    n_commits = 0
    for number, event in enumerate(events):
        name, file = event.split()
        if name == "pwrite":
            unsynced.add(file)
        elif name in ("fdatasync", "fsync"):
            unsynced.discard(file)
        elif file == JOURNAL:
            n_commits += 1
            assert not unsynced
            assert f"fsync .{JOURNAL}.tmp" in events[number - 1]
            assert events[number + 1] == "fsync store"
        elif file.startswith("shard-"):
            before = [event for event in events[:number] if event.split()[0] == "replace"]
            assert before[-1].endswith((JOURNAL, ".h5"))
        else:
            assert file == "store.json"
            assert not unsynced and f"fsync .{file}.tmp" == events[number - 1]
            last = max(i for i in range(number) if events[i].startswith("replace shard-"))
            assert "fsync store" in events[last:number]
    assert n_commits >= 5
    assert events[-1] == "fsync store"


WATCHED = ("pwrite", "fsync", "fdatasync", "replace", "posix_fallocate")


def fail_at(patch: pytest.MonkeyPatch, n: int, code: int) -> list[str]:
    """Let the n-th call of a function that changes the disk fail; the names of the calls so far."""
    calls: list[str] = []
    lock = threading.Lock()

    def wrapped(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with lock:
                calls.append(name)
                fails = len(calls) == n
            if fails:
                raise OSError(code, os.strerror(code))
            return function(*args, **options)

        return call

    for name in WATCHED:
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whichever_call_fails_the_error_is_clean_and_the_store_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], code: int
) -> None:
    monkeypatch.setattr(open_shard, "_BUFFER_BYTES", 40_000)
    seen: set[str] = set()
    continued = 0
    for n in range(1, 1000):
        path = tmp_path / str(n)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, n, code)
            try:
                write(path, commit_every=9)
            except FastdiffError as error:
                assert isinstance(error, ResourceError) == (code == errno.ENOSPC)
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert len(calls) < n
                break
            seen.add(calls[n - 1])
        if (path / "store.json").exists():
            assert {name: data for name, data in contents(path).items() if name != JOURNAL} == whole
        else:
            with pytest.raises(InputError):
                ActivationStore(path)
        n_kept = small_store.acknowledged(path)
        assert write(path) == n_kept
        assert contents(path) == whole
        continued += n_kept > 0
        shutil.rmtree(path)
    assert n > 100
    assert seen == set(WATCHED)
    assert continued > 50


@contextmanager
def small_disk(path: Path, n_bytes: int) -> Iterator[bool]:
    """A file system of this size at `path`, where that is allowed; whether it was."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


@contextmanager
def only(disk: Path, mounted: bool, n_bytes: int) -> Iterator[None]:
    """Leave this much room on a mounted disk; elsewhere no file may grow beyond it."""
    filler, limits = disk / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted:
            room = os.statvfs(disk)
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize - n_bytes))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        filler.unlink(missing_ok=True)


def test_a_full_disk_stops_the_writer_which_continues_when_there_is_room(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    stopped_at = set()
    with small_disk(tmp_path / "disk", 4 << 20) as mounted:
        path = tmp_path / "disk" / "store"
        with only(tmp_path / "disk", mounted, 100_000), pytest.raises(ResourceError, match=r"no room for 0\.000512 GB"):
            write(path)
        assert list(path.iterdir()) == []
        for at, pages in itertools.product((94, 517, 987), range(4)):
            cut_off(path, at)
            try:
                with only(tmp_path / "disk", mounted, pages * 4096):
                    write(path, commit_every=1)
            except ResourceError as error:
                assert str(path) in str(error)
                stopped_at.add(small_store.acknowledged(path))
            if (path / "store.json").exists():
                assert {name: data for name, data in contents(path).items() if name != JOURNAL} == whole
            write(path)
            assert contents(path) == whole
            shutil.rmtree(path)
    # at the next commit; not at one already written
    assert len(stopped_at) == 3
