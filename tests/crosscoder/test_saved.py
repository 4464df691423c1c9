"""Finished crosscoders on disk: round trip, equal bytes in every process, and what is refused."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder, save_crosscoder
from fastdiff.errors import FastdiffError, InputError


def make(seed: int = 0, **options) -> Crosscoder:
    c = Crosscoder(10, 2, 4, activation="batchtopk", k=3, **options)
    c.initialize(torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(seed)), init="independent", seed=seed)
    c.threshold.fill_(0.75)
    c.input_scale.copy_(torch.tensor([2.0, 3.0]))
    return c


@pytest.mark.parametrize("options", [{}, {"code_norm": "sae", "inputs": "0,2"}], ids=["plain", "options"])
def test_round_trip(tmp_path, options):
    saved = make(**options)
    save_crosscoder(tmp_path, saved, {"n_train": 7})
    loaded, config = load_crosscoder(tmp_path)
    assert config["n_train"] == 7 and config["schema"] == 1 and (loaded.activation, loaded.k) == ("batchtopk", 3)
    assert (loaded.code_norm_kind, loaded.inputs) == (saved.code_norm_kind, saved.inputs)
    assert (config["code_norm"], config["inputs"]) == (saved.code_norm_kind, saved.inputs)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and tensor.dtype == torch.float32, name


@pytest.mark.slow
def test_bytes_are_equal_in_every_process(tmp_path):
    save_crosscoder(tmp_path / "here", make(), {})
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from fastdiff.crosscoder.saved import *\nfrom fastdiff.crosscoder.model import Crosscoder\n"
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


def test_a_config_from_before_code_norm_and_inputs_is_read(tmp_path):
    save_crosscoder(tmp_path, make(), {})
    edit_config(tmp_path, code_norm=None, inputs=None)
    loaded, _ = load_crosscoder(tmp_path)
    assert (loaded.code_norm_kind, loaded.inputs) == ("crosscoder", "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2, but this fastdiff .* reads 1"),
        ({"format": "sae"}, "format 'sae', expected 'fastdiff-crosscoder'"),
        ({"dict_size": 11}, r"tensor \w+ is \(10.*the configuration says \(11"),
        ({"k": None}, "key 'k' is missing"),
        ({"code_norm": "l2"}, "code_norm 'l2', expected one of crosscoder, sae, none"),
        ({"code_norm": ["sae"]}, "code_norm"),
        ({"inputs": "first"}, "inputs 'first', expected all, difference or numbers"),
        ({"inputs": 0}, "inputs 0, expected"),
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


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    c = make()
    c.b_dec.data[0, 1] = float("nan")
    with pytest.raises(FastdiffError, match="b_dec holds NaN"):
        save_crosscoder(tmp_path / "c", c, {})
    assert not (tmp_path / "c").exists()
