"""What `--device` means, for every stage that has one."""

import torch

from fastdiff.errors import OptionError


def resolve_device(spec: str) -> torch.device:
    """The device to compute on; a CUDA device becomes the current one, which is where Triton launches.

    Args:
        spec: "cpu", "cuda", "cuda:1", or "auto": the first CUDA device if there is one, else the CPU.

    Raises:
        OptionError: No such device.
    """
    if spec == "auto":
        spec = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise OptionError(f"--device {spec}: not a device; give cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {spec}: not a device of fastdiff's; give cpu, cuda, cuda:N or auto")
    # torch keeps the index in 8 bits: cuda:999 has index -25
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise OptionError(f"--device {spec}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
