"""Which implementation runs: what is asked for, or an error."""

import pytest
import torch

from fastdiff.kernels.backend import resolve_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_triton_on_cuda_and_torch_elsewhere():
    assert resolve_backend("auto", CUDA) == "triton"
    assert resolve_backend("auto", CPU) == "torch"
    assert resolve_backend("auto", torch.device("mps")) == "torch"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_an_explicit_choice_is_obeyed(backend, device):
    assert resolve_backend(backend, device) == backend


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU) == "triton"
    for unset in (lambda: monkeypatch.setenv("TRITON_INTERPRET", "0"), lambda: monkeypatch.delenv("TRITON_INTERPRET")):
        unset()
        with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; use backend='torch'"):
            resolve_backend("triton", CPU)
        assert resolve_backend("triton", CUDA) == "triton"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="auto, triton, torch or dense, got 'cuda'"):
        resolve_backend("cuda", CPU)
