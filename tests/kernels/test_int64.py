"""Addresses beyond 2^31 elements: in 32 bits they wrap around, and the process dies or reads something else."""

import os
import signal
import subprocess
import sys

import beyond_int32
import pytest

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CUDA: about the interpreter"),
    pytest.mark.slow,
]


def check(*names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", beyond_int32.__file__, *names]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_launcher_reaches_the_last_row():
    names = [name for name in beyond_int32.CHECKS if name != "planted"]
    run = check(*names)
    assert run.stdout.split() == names, run.stderr
    assert run.returncode == 0, run.stderr


def test_a_32_bit_address_would_be_seen():
    run = check("planted")
    assert run.stdout == ""
    assert run.returncode == -signal.SIGSEGV or "AssertionError" in run.stderr
