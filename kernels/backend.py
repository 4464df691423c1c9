"""Which implementation of an op runs: the one place where that is decided."""

import os
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch", "dense"]


def resolve_backend(backend: Backend, device: torch.device) -> Literal["triton", "torch", "dense"]:
    """Name the implementation that will run; an explicit choice is obeyed or refused, never swapped.

    Args:
        backend: "triton": the kernels. "torch": sparse, in plain torch. "dense": the definition, in `reference`.
            "auto": "triton" on CUDA, "torch" elsewhere.
        device: Where the tensors are.

    Raises:
        ValueError: An unknown name, or kernels asked for on tensors they cannot run on.
    """
    if backend not in ("auto", "triton", "torch", "dense"):
        raise ValueError(f"backend must be auto, triton, torch or dense, got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {device}; use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to debug kernels on a CPU"
        )
    return backend
