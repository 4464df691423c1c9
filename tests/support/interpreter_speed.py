"""Triton's interpreter without its most expensive habit; results are the same.

A launch replaces the functions of `triton.language` by interpreting ones, and every call of a @triton.jit function
inside the kernel, `tl.sum` and `tl.cdiv` among them, looks for them anew: 0.2 ms each, half the time of a training
step's test. Inside `patched_once()` a call that would find everything replaced does not look.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


@functools.cache
def _modules(fn) -> list:
    """Which of the two modules fn's source can name."""
    return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]


def _patch_if_needed(fn):
    # what belongs to both, as tensor and dtype do, is replaced together with either
    if _modules(fn) and not any(tl.core.is_builtin(module.load) for module in _modules(fn)):
        return interpreter._LangPatchScope()
    return _patch_lang(fn)


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Kernels that the interpreter runs inside this context call functions faster."""
    with mock.patch.object(interpreter, "_patch_lang", _patch_if_needed):
        yield
