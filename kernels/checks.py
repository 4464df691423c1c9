"""What callers of the public ops can get wrong: refused with the values seen, before anything runs."""

from torch import Tensor

from fastdiff.kernels.backend import Backend, resolve_backend
from fastdiff.kernels.selection import Selection


def choose(backend: Backend, selection: Selection | None = None, **given: Tensor | None) -> str:
    """The implementation that will run, on the tensors that are given and that it can run on."""
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if selection is not None:
        devices["selection"] = selection.col.device
    if len(set(devices.values())) > 1:
        raise ValueError("one device expected, got " + ", ".join(f"{name} on {d}" for name, d in devices.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    chosen = resolve_backend(backend, next(iter(devices.values())))
    for name, tensor in tensors.items():
        if chosen == "triton" and tensor.ndim == 2 and name != "pre" and not tensor.is_contiguous():
            raise ValueError(
                f"backend='triton' needs {name} contiguous, got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    return chosen


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    """Refuse shapes that disagree."""
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[1] or b_enc.shape != W_enc.shape[:1]:
        raise ValueError(
            f"x [B, C], W_enc [F, C] and b_enc [F] disagree: "
            f"{tuple(x.shape)}, {tuple(W_enc.shape)}, {tuple(b_enc.shape)}"
        )


def check_entries(selection: Selection, **tensors: Tensor) -> None:
    """Refuse what has not one number per entry."""
    for name, tensor in tensors.items():
        if tensor.shape != selection.col.shape:
            raise ValueError(f"{name} must be [nnz={len(selection.col)}], got {tuple(tensor.shape)}")


def check_threshold(z: Tensor, theta: Tensor, bandwidth: float) -> None:
    """Refuse shapes that disagree, and a window without width."""
    if z.ndim != 1 or z.shape != theta.shape:
        raise ValueError(f"z and theta must be [nnz], got {tuple(z.shape)} and {tuple(theta.shape)}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0, got {bandwidth}")
