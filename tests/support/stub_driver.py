"""A Triton driver for a GPU that is not there: kernels compile for it as they would on it, and cannot run."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class StubDriver(DriverBase):
    """Stands for an NVIDIA GPU of compute capability arch / 10, e.g. 90; `triton.runtime.driver.set_active(it)`."""

    def __init__(self, arch: int):
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # kernels keep what they compiled by device, so each architecture is a device of its own
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("no GPU: a launcher cannot be built")

    def get_benchmarker(self):
        raise RuntimeError("no GPU: nothing can be timed")
