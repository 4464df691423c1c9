"""What all tests share: forgotten writes become visible, and nothing leaves this machine."""

import os
import socket

import pytest

# read when torch loads OpenMP; see fastdiff.cli.main
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# read by @triton.jit: without a GPU the kernels run in Triton's interpreter, on CPU tensors
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# marker: the option that runs it; a lane composes with -m, which chooses among what the options let through
LANES = {"long": "--long", "sanitizer": "--sanitizer"}


def pytest_addoption(parser):
    group = parser.getgroup("lanes")
    group.addoption("--fast", action="store_true", help="leave out tests marked slow")
    for marker, option in LANES.items():
        group.addoption(option, action="store_true", help=f"also run tests marked {marker}")


def pytest_collection_modifyitems(config, items):
    """Deselects, not skips, what no option asked for: CI refuses skipped tests."""
    out = {marker for marker, option in LANES.items() if not config.getoption(option)}
    if config.getoption("--fast"):
        out.add("slow")
    left = [item for item in items if any(item.get_closest_marker(marker) for marker in out)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not any(item.get_closest_marker(marker) for marker in out)]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors on two threads of a busy machine take ten times as long as on one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory():
    """torch.empty returns NaN, so that an op which skips an element fails instead of passing by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anything but this machine is an error."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
