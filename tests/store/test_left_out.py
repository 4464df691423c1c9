"""Rows left out of use, against a plain reading of the rule in NumPy."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastdiff.store import left_out
from fastdiff.store.format import STORE_FILE
from fastdiff.store.left_out import Medians, norms_of
from fastdiff.store.reader import ActivationStore
from fastdiff.store.verify import verify_store
from fastdiff.store.writer import StoreWriter

N, M, D, LENGTH = 96, 2, 6, 8
ROLES = ["text", "bos"]


def columns(*, with_bos: bool) -> dict[str, NDArray[Any]]:
    """12 documents of 8 tokens; with `with_bos` those of even number begin with BOS."""
    rows = np.arange(N)
    document, position = rows // LENGTH, rows % LENGTH
    return {
        "token_ids": rows,
        "sequence_ids": document,
        "positions": position,
        "roles": ((position == 0) & (document % 2 == 0) & with_bos).astype(np.uint8),
        "sources": np.zeros(N, np.int64),
    }


def activations(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of which a few are sinks in the first model and others in the second."""
    rows = torch.randn(N, M, D, generator=torch.Generator().manual_seed(1))
    rows[[3, 20, 50], 0] *= 20
    rows[[5, 20], 1] *= 20
    # two first positions, one of them a BOS where there are any
    rows[[0, 8]] *= 20
    return rows.to(dtype)


class Stopped(BaseException):
    """Ends a writer as Ctrl-C would."""


def write(
    path: Path,
    max_norm: float,
    *,
    dtype: str = "bfloat16",
    with_bos: bool = True,
    piece: int = N,
    resume: bool = False,
    stop_at: int = N,
    commit: bool = False,
) -> Path:
    """Write the store, or continue it; `Stopped` once it has `stop_at` rows, with `commit` all of them on disk."""
    meta = {"models": ["a", "b"], "roles": ROLES, "sources": [{"dataset": "d"}]}
    rows, side = activations(getattr(torch, dtype)), columns(with_bos=with_bos)
    with StoreWriter(
        path, n_rows=N, n_models=M, d_model=D, dtype=dtype, shard_rows=40, meta=meta, max_norm=max_norm, resume=resume
    ) as writer:
        for start in range(writer.n_appended, N, piece):
            if start >= stop_at:
                raise Stopped
            part = slice(start, start + piece)
            writer.append(rows[part], **{name: values[part] for name, values in side.items()})
            if commit:
                writer.commit()
    return path


def expected(
    rows: torch.Tensor, side: dict[str, NDArray[Any]], max_norm: float, first: int = 50_000
) -> dict[str, NDArray[np.bool_]]:
    """The rule, row by row."""
    norms = rows.double().norm(dim=-1).numpy()
    bos = side["roles"] == 1
    median = np.median(norms[~bos][:first], axis=0)
    at_first = (side["positions"] == 0) & ~bos & (max_norm > 0)
    sink = (norms > max_norm * median).any(axis=1) & ~bos & ~at_first & (max_norm > 0)
    return {"bos": bos, "first": at_first, "sinks": sink, "used": ~(bos | at_first | sink)}


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("max_norm", [0.0, 1.2, 3.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("piece", [7, N])
def test_the_rule_is_that_of_the_definition(tmp_path: Path, dtype, max_norm, with_bos, piece) -> None:
    wanted = expected(activations(getattr(torch, dtype)), columns(with_bos=with_bos), max_norm)
    rows = activations(getattr(torch, dtype)).double().numpy()
    path = write(tmp_path / "s", max_norm, dtype=dtype, with_bos=with_bos, piece=piece)
    assert verify_store(path).problems == []
    with ActivationStore(path) as store:
        found = store.left_out()
        for name in ("bos", "first", "sinks"):
            assert np.array_equal(getattr(found, name), wanted[name]), name
        usable = store.usable_rows()
        assert np.array_equal(np.arange(N) if usable is None else usable, np.flatnonzero(wanted["used"]))
        assert np.allclose(store.column("norms"), np.linalg.norm(rows, axis=-1), rtol=1e-6, atol=0)
        counted, used = rows[~wanted["bos"]], rows[wanted["used"]]
        assert np.allclose(store.stats().mean, used.mean(axis=0), rtol=1e-12, atol=1e-12)
        assert np.allclose(store.stats().variance, used.var(axis=0).sum(axis=-1), rtol=1e-12)
        apart = (wanted["first"] | wanted["sinks"])[~wanted["bos"]]
        squares = ((counted - counted.mean(axis=0)) ** 2).sum(axis=-1)
        facts = store.left_out_facts()
        assert facts["rows"] == apart.sum() and facts["position_0"] == wanted["first"].sum()
        assert facts["usable"] == len(used) and facts["share"] == pytest.approx(apart.mean())
        assert facts["variance_share"] == pytest.approx((squares[apart].sum(axis=0) / squares.sum(axis=0)).tolist())
        assert facts["from"] == STORE_FILE
        line = store.left_out_line()
    assert (line is None) == (not apart.any())
    if line is not None:
        assert f"left out of use: {apart.sum()} of {len(apart)} rows" in line and "of the variance" in line


@pytest.mark.parametrize("first", [1, 5, 30, 40, 41, 89, 90])
@pytest.mark.parametrize("piece", [1, 7, 40, N])
def test_rows_from_before_the_median_was_known_are_counted_once(tmp_path: Path, monkeypatch, first, piece) -> None:
    monkeypatch.setattr(left_out, "ROWS_OF_MEDIAN", first)
    wanted = expected(activations(), columns(with_bos=True), 1.2, first)
    path = write(tmp_path / "s", 1.2, piece=piece)
    assert verify_store(path).problems == []
    used = activations().double().numpy()[wanted["used"]]
    with ActivationStore(path) as store:
        assert np.array_equal(store.usable_rows(), np.flatnonzero(wanted["used"]))
        facts, stats = store.left_out_facts(), store.stats()
    assert facts["rows"] == (wanted["first"] | wanted["sinks"]).sum() and facts["position_0"] == wanted["first"].sum()
    assert stats.n_rows == len(used)
    assert np.allclose(stats.mean, used.mean(axis=0), rtol=1e-12, atol=1e-12)
    assert np.allclose(stats.variance, used.var(axis=0).sum(axis=-1), rtol=1e-12)


# before the median is known, as it becomes so within a shard and at its end, and never before the end
@pytest.mark.parametrize("first", [5, 30, 35, 50_000])
@pytest.mark.parametrize("commit", [False, True])
def test_a_store_that_was_cut_off_anywhere_has_the_same_bytes(tmp_path: Path, monkeypatch, first, commit) -> None:
    monkeypatch.setattr(left_out, "ROWS_OF_MEDIAN", first)
    whole = {file.name: file.read_bytes() for file in write(tmp_path / "whole", 1.2, piece=8).iterdir()}
    for stop_at in range(8, N, 8):
        path = tmp_path / str(stop_at)
        with pytest.raises(Stopped):
            write(path, 1.2, piece=8, stop_at=stop_at, commit=commit)
        write(path, 1.2, piece=8, resume=True)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == whole, stop_at


def test_a_store_without_norms_is_measured_and_gives_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "s", 3.0)
    with ActivationStore(path) as store:
        usable, stats, facts = store.usable_rows(), store.stats(), store.left_out_facts()
        assert not store.must_be_measured
    for shard in path.glob("*.h5"):
        with h5py.File(shard, "a") as file:
            del file["norms"]
    told = (path / STORE_FILE).read_text()
    meta = json.loads(told)
    del meta["left_out"], meta["stats"]
    (path / STORE_FILE).write_text(json.dumps(meta))
    with ActivationStore(path) as store:
        assert store.must_be_measured
        assert np.array_equal(store.usable_rows(), usable)
        assert np.allclose(store.stats().mean, stats.mean, rtol=1e-12)
        measured = store.left_out_facts()
    assert measured.pop("from") == "measured" and facts.pop("from") == STORE_FILE
    assert measured == {key: pytest.approx(value, rel=1e-9) for key, value in facts.items()}


def test_the_median_is_of_the_first_rows_that_are_not_bos(monkeypatch) -> None:
    monkeypatch.setattr(left_out, "ROWS_OF_MEDIAN", 10)
    norms = np.arange(60, dtype=np.float32).reshape(30, 2)
    bos = np.arange(30) % 3 == 0
    medians = Medians(2)
    for start in range(0, 30, 4):
        medians.add(norms[start : start + 4], bos[start : start + 4])
    assert medians.complete
    assert medians.result() == np.median(norms[~bos][:10], axis=0).tolist()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31, 576])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_those_of_numpy_at_every_width(width, dtype) -> None:
    rows = torch.randn(5, 3, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    exact = np.linalg.norm(rows.double().numpy(), axis=-1)
    # rounded once, from a sum that is right to a few units of float64
    assert np.allclose(norms_of(rows).astype(np.float64), exact, rtol=2.0**-24 * 1.01, atol=0)


def test_norms_are_summed_in_float64_and_survive_values_whose_squares_do_not() -> None:
    rows = torch.tensor([[[3e30, 4e30]], [[0.0, 0.0]], [[1e-30, 0.0]]])
    assert norms_of(rows).ravel() == pytest.approx([5e30, 0, 1e-30], rel=1e-6)
    assert norms_of(torch.empty(0, 2, 3)).shape == (0, 2)


def test_a_model_that_is_zero_has_no_sinks_and_rows_that_are_not_finite_stay_to_be_refused(tmp_path: Path) -> None:
    rows = activations()
    rows[:, 1] = 0
    rows[30, 1] = 1
    meta = {"models": ["a", "b"], "roles": ROLES, "sources": [{"dataset": "d"}]}
    with StoreWriter(
        tmp_path / "s", n_rows=N, n_models=M, d_model=D, dtype="bfloat16", shard_rows=N, meta=meta, max_norm=3.0
    ) as writer:
        writer.append(rows, **columns(with_bos=True))
    with ActivationStore(tmp_path / "s") as store:
        assert not store.left_out().sinks[30] and store.left_out().sinks[3]


def test_a_wrong_norm_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s", 3.0)
    with h5py.File(sorted(path.glob("*.h5"))[1], "a") as file:
        file["norms"][2, 1] *= 1.01
    problems = "\n".join(verify_store(path).problems)
    assert "/norms of 1 rows are not those of /activations, the first is row 2" in problems


def test_counts_that_do_not_fit_the_rule_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s", 3.0)
    meta = json.loads((path / STORE_FILE).read_text())
    meta["left_out"]["rows"] += 1
    (path / STORE_FILE).write_text(json.dumps(meta))
    assert any("left_out in store.json says rows" in problem for problem in verify_store(path).problems)
