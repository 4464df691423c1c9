"""What attribution writes comes back as it was, and what does not fit together is refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdiff.errors import InputError
from fastdiff.results.attribution import (
    Attribution,
    DocumentTable,
    Summary,
    category_means,
    read_attribution,
    text_number,
    write_attribution,
)
from fastdiff.rundir import read_json, write_json


def example() -> Attribution:
    nan = np.nan
    table = DocumentTable(
        document=np.array([3, 5, 9]),
        text=np.array([-(2**63), 0, 2**63 - 1]),
        category=np.array([0, 1, 0]),
        held_out=np.array([True, False, False]),
        scored=np.array([2, 7, 4]),
        ce=np.array([[1.0, 0.5], [2.0, 2.5], [3.0, 1.0]]),
        has_nats=np.array([True, True, False]),
        steps=np.array([3, 12, 0]),
        layer=np.array([0.4, -0.3, nan]),
        latents=np.array([[0.25, -0.25, nan], [0.5, 0.125, nan]]),
        offset=np.array([[0.125, 0.5, nan], [0.25, 0.0, nan]]),
        error=np.array([[0.1, 0.2, nan], [0.3, 0.4, nan]]),
        left_out=np.array([0.01, 0.02, nan]),
        bos=np.array([0.5, 0.0, nan]),
    )
    summary = Summary(
        state="checked", models=["a", "b"], layer=3, hook="resid_post", seeds=[0, 4], categories=["x", "y"],
        unigram_entropy={"x": 1.5, "y": 2.5}, largest_gap=0.02, tau=0.05, dict_size=4,
    )  # fmt: skip
    return Attribution(summary, table, np.arange(16, dtype=np.float32).reshape(2, 2, 4))


def test_it_comes_back_as_it_was_and_in_the_same_bytes(tmp_path):
    want = example()
    assert set(write_attribution(tmp_path, want)) == {"summary.json", "documents.safetensors", "latents.safetensors"}
    got = read_attribution(tmp_path)
    assert got.summary == want.summary and (got.nats == want.nats).all()
    for name, array in vars(want.documents).items():
        found = getattr(got.documents, name)
        assert np.array_equal(found, array, equal_nan=array.dtype == np.float64) and found.dtype == array.dtype, name
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_attribution(tmp_path, got)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    raw = load_file(tmp_path / "documents.safetensors")
    assert raw["held_out"].dtype == np.uint8 and raw["layer"].dtype == np.float64
    assert read_json(tmp_path / "summary.json", 2)["schema"] == 2


def test_means_of_categories():
    means = category_means(example())
    assert means["x"]["B"] == pytest.approx((0.5 + 2.0) / 2) and means["y"]["B"] == -0.5
    assert means["x"]["L"] == 0.4 and means["x"]["V"] == [0.375, 0.75] and means["y"]["error"] == [0.2, 0.4]


def test_not_checked_takes_the_tables_away(tmp_path):
    write_attribution(tmp_path, example())
    refused = Attribution(Summary(state="not checked", reason="gone", remedy="put it back", tau=0.05), None, None)
    assert write_attribution(tmp_path, refused) == ["summary.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert read_attribution(tmp_path) == refused and category_means(refused) == {}


def test_a_text_has_one_number():
    assert text_number(np.array([1, 2, 3])) == text_number(np.array([1, 2, 3], np.int32))
    assert len({text_number(np.array(ids)) for ids in ([1, 2, 3], [1, 2], [3, 2, 1], [1, 2, 3, 0], [])}) == 5
    # printf '\1\0\0\0\0\0\0\0' | sha256sum, the first 8 bytes from the last to the first
    import hashlib

    assert text_number(np.array([1])) == int.from_bytes(
        hashlib.sha256(b"\x01" + bytes(7)).digest()[:8], "little", signed=True
    )


def damage(path, name, change):
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "summary.json").unlink(), "summary.json: no such file"),
        (lambda p: write_json(p / "summary.json", {"schema": 3}), "schema 3"),
        (lambda p: write_json(p / "summary.json", {"schema": 2, "state": "fine", "tau": 1}), "state: "),
        (lambda p: (p / "latents.safetensors").unlink(), "latents.safetensors: no such file"),
        (lambda p: (p / "documents.safetensors").write_bytes(b"x"), "not readable as safetensors"),
        (lambda p: damage(p, "documents.safetensors", lambda t: t.pop("bos")), "has no bos"),
        (lambda p: damage(p, "documents.safetensors", lambda t: t.update(ce=t["ce"][:2])), r"ce is \(2, 2\)"),
        (lambda p: damage(p, "documents.safetensors", lambda t: t["category"].fill(2)), "does not name"),
        (lambda p: damage(p, "latents.safetensors", lambda t: t.update(nats=t["nats"][:1])), r"nats is \(1, 2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, harm, message):
    write_attribution(tmp_path, example())
    harm(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_attribution(tmp_path)
    assert "\n" not in str(caught.value)
