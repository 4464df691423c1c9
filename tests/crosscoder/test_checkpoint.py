"""Crosscoders on disk: round trip, equal bytes in every process, and what is refused."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from fastdiff.crosscoder.checkpoint import load_checkpoint, load_crosscoder, save_checkpoint, save_crosscoder
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError


def make(seed: int = 0) -> Crosscoder:
    c = Crosscoder(10, 2, 4, activation="batchtopk", k=3)
    c.initialize(torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(seed)), init="independent", seed=seed)
    c.threshold.fill_(0.75)
    c.input_scale.copy_(torch.tensor([2.0, 3.0]))
    return c


def test_round_trip(tmp_path):
    saved = make()
    save_crosscoder(tmp_path, saved, {"n_train": 7})
    loaded, config = load_crosscoder(tmp_path)
    assert config["n_train"] == 7 and config["schema"] == 1 and (loaded.activation, loaded.k) == ("batchtopk", 3)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and tensor.dtype == torch.float32, name


def test_bytes_are_equal_in_every_process(tmp_path):
    save_crosscoder(tmp_path / "here", make(), {})
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from fastdiff.crosscoder.checkpoint import *\nfrom fastdiff.crosscoder.model import Crosscoder\n"
        "c = Crosscoder(10, 2, 4, activation='batchtopk', k=3)\n"
        "x = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(0))\n"
        "c.initialize(x, init='independent', seed=0); c.threshold.fill_(0.75)\n"
        "c.input_scale.copy_(torch.tensor([2.0, 3.0])); save_crosscoder(Path(sys.argv[1]), c, {})"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "there")], check=True)
    for name in ("model.safetensors", "config.json"):
        a, b = (hashlib.sha256((tmp_path / d / name).read_bytes()).hexdigest() for d in ("here", "there"))
        assert a == b, name


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2, but this fastdiff .* reads 1"),
        ({"format": "sae"}, "format 'sae', expected 'fastdiff-crosscoder'"),
        ({"dict_size": 11}, r"tensor \w+ is \(10.*config.json says \(11"),
        ({"k": None}, "key 'k' is missing"),
    ],
)
def test_another_schema_or_shape_is_refused(tmp_path, changes, message):
    save_crosscoder(tmp_path, make(), {})
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_crosscoder(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_a_damaged_weights_file_is_refused(tmp_path, damage):
    save_crosscoder(tmp_path, make(), {})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\xff" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_crosscoder(tmp_path)


def test_checkpoints_keep_the_newest_two(tmp_path):
    c = make()
    assert load_checkpoint(tmp_path, c) is None
    for step in (5, 10, 15):
        c.threshold.fill_(float(step))
        save_checkpoint(tmp_path, step, c, {"a": torch.tensor([step])}, {"threads": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    other = make()
    tensors, state = load_checkpoint(tmp_path, other)
    assert state["step"] == 15 and tensors["a"].item() == 15 and other.threshold[0] == 15.0


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    c = make()
    save_checkpoint(tmp_path, 5, c, {"a": torch.tensor([5])}, {"threads": 1})
    (tmp_path / ".step-000010.tmp").mkdir()
    (tmp_path / ".step-000010.tmp" / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, c)[1]["step"] == 5
    save_checkpoint(tmp_path, 10, c, {"a": torch.tensor([10])}, {"threads": 1})
    assert load_checkpoint(tmp_path, c)[1]["step"] == 10
