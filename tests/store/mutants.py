"""Damages copies of small stores at random and counts what becomes of them; a script, so that a crash is seen.

    python -P tests/store/mutants.py DIRECTORY COUNT [SEED]

Every mutant is opened, read whole and verified in a forked child with little memory and an alarm. It counts as
"found" if any of that reports a problem, as "same" if nothing does and all rows and columns are the original's, as
"wrong" if nothing does and they are not, as "crash" or "hang" if the child ends, and as "raised" if anything but an
InputError comes out. One line of JSON says how many there were of each, and which were bad.
"""

import json
import os
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from fastdiff.errors import InputError
from fastdiff.store.format import COLUMNS, NORMS, bfloat16_type
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify import verify_store
from fastdiff.store.writer import StoreWriter

N, M, D = 100, 2, 4
SECONDS = 10
MEMORY = 2 << 30

Content = tuple[torch.Tensor, dict[str, np.ndarray | None]]


def make_store(path: Path, layout: str) -> None:
    """A store with checksums and hashes, in the writer's layout or in that of another tool."""
    columns = {
        "token_ids": np.arange(N),
        "sequence_ids": np.arange(N) // 9,
        "positions": np.arange(N) % 9,
        "roles": np.arange(N) % 2,
        "sources": np.arange(N) // 50,
    }
    meta = {"models": ["a", "b"], "roles": ["text", "bos"], "sources": [{"dataset": "d"}, {"dataset": "e"}]}
    shard_rows = 64 if layout == "contiguous" else N
    with StoreWriter(
        path, n_rows=N, n_models=M, d_model=D, dtype="bfloat16", shard_rows=shard_rows, meta=meta, max_norm=1.2
    ) as writer:
        writer.append(torch.randn(N, M, D, generator=torch.Generator().manual_seed(0)), **columns)
    if layout == "contiguous":
        return
    how = {"chunks": (16, M, D)} | ({"compression": "gzip"} if layout == "gzip" else {})
    rewrite(path / "shard-00000.h5", how, "latest" if layout == "latest" else None)


def rewrite(file: Path, how: dict[str, Any], libver: str | None) -> None:
    kind = bfloat16_type()
    with h5py.File(file) as old:
        bits = np.empty(old["activations"].shape, np.uint16)
        old["activations"].id.read(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=kind)
        others = {name: old[name][:] for name in (*COLUMNS, NORMS, "crc32c")}
    with h5py.File(file, "w", libver=libver) as new:
        made = new.create_dataset("activations", bits.shape, h5py.Datatype(kind), **how)
        made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=kind)
        for name, values in others.items():
            new.create_dataset(name, data=values, chunks=values.shape if "chunks" in how else None)


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """One damage, of a kind drawn at random."""
    if not data:
        return b"\0"
    made = bytearray(data)
    head = min(4096, len(made))
    kind = int(rng.integers(0, 8))
    if kind == 0:  # one bit anywhere
        made[rng.integers(0, len(made))] ^= 1 << int(rng.integers(0, 8))
    elif kind in (1, 2):  # one bit of the metadata
        made[rng.integers(0, head)] ^= 1 << int(rng.integers(0, 8))
    elif kind == 3:
        del made[rng.integers(0, len(made)) :]
    elif kind == 4:  # what a lost write leaves
        start = int(rng.integers(0, len(made)))
        stop = min(len(made), start + int(rng.integers(1, 600)))
        made[start:stop] = bytes(stop - start)
    elif kind == 5:  # several bytes of the metadata
        for at in rng.integers(0, head, int(rng.integers(1, 9))):
            made[at] = int(rng.integers(0, 256))
    elif kind == 6:  # a length, an address or a size that cannot be
        at = int(rng.integers(0, head // 8)) * 8
        odd = (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
        made[at : at + 8] = odd[int(rng.integers(0, len(odd)))].to_bytes(8, "little")
    else:  # a piece in the place of another
        size = int(rng.integers(1, 64))
        start, stop = (int(at) for at in rng.integers(0, head, 2))
        made[start : start + size] = made[stop : stop + size]
    return bytes(made)


def mutate_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes as in any file, or a value that is still JSON."""
    if rng.random() < 0.5:
        return mutate(rng, data)
    told = json.loads(data)
    place, key = told, str(rng.choice(list(told)))
    if key == "shards" and rng.random() < 0.7:
        place = told["shards"][int(rng.integers(0, len(told["shards"])))]
        key = str(rng.choice(list(place)))
    odd = [None, 0, -1, 1, 2**70, "", "x", "\ud800", [], {}, [1], "../x", "shard-00001.h5", 1e999, True, [[[]]]]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = odd[int(rng.integers(0, len(odd)))]
    return json.dumps(told).encode(errors="surrogatepass")


def content(path: Path) -> Content:
    """All rows, as bits, and all columns."""
    with ActivationStore(path) as store:
        rows = store.slice(0, store.n_rows)
        store.explain()
        return rows.view(torch.uint8), {name: store.column(name) for name in (*COLUMNS, NORMS)}


def same(found: Content, wanted: Content) -> bool:
    return torch.equal(found[0], wanted[0]) and all(
        values is not None and np.array_equal(values, wanted[1][name]) for name, values in found[1].items()
    )


def outcome(path: Path, wanted: Content) -> str:
    """What becomes of a mutant."""
    try:
        found = content(path)
    except InputError:
        found = None
    if verify_store(path).n_problems or found is None:
        return "found"
    return "same" if same(found, wanted) else "wrong"


def run_some(path: Path, first: int, count: int, seed: int, wanted: Content, report: int) -> None:
    """Judge mutants first, …, count - 1, and write a line for each; in a child."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    originals = {file: file.read_bytes() for file in files}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in range(first, count):
        rng = np.random.default_rng([seed, number])
        file = path / ("store.json" if number % 5 == 0 else "shard-00000.h5")
        damage = mutate_json if file.suffix == ".json" else mutate
        file.unlink()
        file.write_bytes(damage(rng, originals[file]))
        signal.alarm(SECONDS)
        try:
            result = outcome(path, wanted)
        except BaseException as error:
            result = f"raised {type(error).__name__}: {error}"[:300].replace("\n", " ")
        signal.alarm(0)
        file.write_bytes(originals[file])
        os.write(report, f"{number}\t{result}\n".encode())


def run(path: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Judge `count` mutants of a store; a child that ends is replaced and goes on after the mutant it died of."""
    wanted = content(path)
    assert outcome(path, wanted) == "same"
    originals = {file: file.read_bytes() for file in path.iterdir()}
    counts: Counter[str] = Counter()
    bad: list[str] = []
    done = 0
    while done < count:
        for file, data in originals.items():
            file.write_bytes(data)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run_some(path, done, count, seed, wanted, theirs)
            finally:
                os._exit(0)
        os.close(theirs)
        with os.fdopen(ours, "rb") as lines:
            for line in lines:
                number, _, result = line.decode(errors="replace").rstrip("\n").partition("\t")
                done = int(number) + 1
                counts[result.split()[0]] += 1
                if result not in ("found", "same"):
                    bad.append(f"{path.name} {seed} {number}: {result}")
        _, status = os.waitpid(child, 0)
        if status:
            how = "hang" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "crash"
            counts[how] += 1
            bad.append(f"{path.name} {seed} {done}: {how}, status {status}")
            done += 1
        elif done < count:
            raise RuntimeError(f"the child ended after mutant {done - 1}")
    return counts, bad


def main(directory: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    layouts = ("contiguous", "chunked", "latest", "gzip")
    counts: dict[str, Counter[str]] = {}
    bad: list[str] = []
    for layout in layouts:
        make_store(directory / layout, layout)
        counts[layout], more = run(directory / layout, count // len(layouts), seed)
        bad += more
    sys.stdout.write(json.dumps({"counts": counts, "bad": bad}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
