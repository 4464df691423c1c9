"""Kernels in the interpreter compute bfloat16 as a GPU does, and every launch is checked for misuse of memory."""

import os

import pytest


@pytest.fixture(autouse=True)
def gpu_like_interpreter():
    """Nothing on CUDA. A test file about these tools themselves overrides this fixture by one of the same name."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from interpreter_bf16 import correct_bf16
    from interpreter_sanitizer import sanitized
    from interpreter_speed import patched_once

    with correct_bf16(), sanitized(), patched_once():
        yield
