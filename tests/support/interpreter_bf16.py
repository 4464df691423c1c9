"""Triton's interpreter computes bfloat16 as a GPU does: casts, arithmetic, comparisons, dots, and NaN in min and max.

The interpreter keeps a bfloat16 block as its uint16 bits and hands those bits to NumPy: x * 2 doubles the bits, and a
cast from float32 cuts off the lower half instead of rounding. Inside `correct_bf16()` an operation on bfloat16 is done
in float32 and rounded once to nearest even, which is what torch and the hardware do. `tl.minimum` and `tl.maximum`
return the number when the other operand is NaN, as on a GPU (the interpreter of Triton before 3.9 returns NaN), and a
comparison is a boolean, also when it is spread over a block.

A bfloat16 sum, reduction or scan raises TypeError: its result depends on an order that no GPU promises, so kernels
convert to float32 first.

Works on Triton 3.6 to 3.9. Not covered: `tl.dot` computes float32 operands exactly, a GPU may use TF32.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
ROUNDING = interpreter._ir.ROUNDING_MODE
PROPAGATE_NAN = interpreter._ir.PROPAGATE_NAN

_binary_op = Builder.binary_op
_unary_op = Builder.unary_op
_cast = Builder.cast_impl
_fp_to_fp = Builder.create_fp_to_fp
_dot = Builder.create_dot
_fma = Builder.create_fma
_clampf = Builder.create_clampf
_check_tensor = interpreter.ReduceScanOpInterface.check_tensor


def round_to_bf16(value: np.ndarray) -> np.ndarray:
    """Bits (uint16) of the bfloat16 nearest to float32 values, ties to even; every NaN becomes 0x7FC0, as in torch."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded.astype(np.uint16))


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bits (uint16); exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return Handle(bf16_to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _rounded(handle):
    return Handle(round_to_bf16(handle.data), tl.bfloat16)


def _binary(self, lhs, rhs, op):
    wide = _is_bf16(lhs) or _is_bf16(rhs)
    result = _binary_op(self, _widened(lhs), _widened(rhs), op) if wide else _binary_op(self, lhs, rhs, op)
    if result.data.dtype == bool:
        # the interpreter gives a comparison the type of its operands, and a scalar that is spread over a block becomes
        # what its type says: an int32 mask, which Triton 3.9 refuses
        return Handle(result.data, tl.int1)
    return _rounded(result) if wide else result


def _unary(self, arg, op):
    return _rounded(_unary_op(self, _widened(arg), op)) if _is_bf16(arg) else _unary_op(self, arg, op)


def _convert(self, src, dst_type):
    """Any cast from or to bfloat16 goes by way of float32, as in torch and in Triton's lowering."""
    if src.dtype.scalar == dst_type.scalar:
        return Handle(src.data, dst_type.scalar)
    if _is_bf16(src):
        wide = _widened(src)
        return wide if dst_type.scalar == tl.float32 else _cast(self, wide, dst_type)
    if dst_type.scalar == tl.bfloat16:
        return _rounded(src if src.dtype.scalar == tl.float32 else _cast(self, src, tl.float32))
    return _cast(self, src, dst_type)


def _convert_fp(self, src, dst_type, rounding_mode):
    """Casts that carry a rounding mode: truncation, and all from or to float8."""
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target):
        return _fp_to_fp(self, src, dst_type, rounding_mode)
    if target == tl.bfloat16 and rounding_mode == ROUNDING.RTZ:
        wide = self.cast_impl(src, tl.float32)
        return Handle((wide.data.view(np.uint32) >> np.uint32(16)).astype(np.uint16), tl.bfloat16)
    if source.is_fp8():
        return _rounded(_fp_to_fp(self, src, tl.float32, rounding_mode))
    if target.is_fp8():
        return _fp_to_fp(self, _widened(src), dst_type, rounding_mode)
    return self.cast_impl(src, dst_type)


def _dot_wide(self, a, b, d, *rest):
    return _dot(self, _widened(a), _widened(b), d, *rest)


def _fma_once(self, x, y, z):
    if not _is_bf16(z):
        return _fma(self, x, y, z)
    product = _widened(x).data.astype(np.float64) * _widened(y).data
    return Handle(round_to_bf16(product + _widened(z).data), tl.bfloat16)


def _clamp(self, arg, lo, hi, propagate_nan):
    if propagate_nan == PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
    if _is_bf16(arg):
        return _rounded(_clampf(self, _widened(arg), _widened(lo), _widened(hi), propagate_nan))
    return _clampf(self, arg, lo, hi, propagate_nan)


def _minnum(self, lhs, rhs):
    return self.binary_op(lhs, rhs, np.fmin)


def _maxnum(self, lhs, rhs):
    return self.binary_op(lhs, rhs, np.fmax)


def _constant(self, value):
    return Handle(round_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


def _refuse_bf16(self, inputs):
    _check_tensor(self, inputs)
    if any(block.dtype.scalar == tl.bfloat16 for block in inputs):
        raise TypeError("reduction or scan of bfloat16: its rounding depends on the order; convert to float32 first")


@contextlib.contextmanager
def correct_bf16() -> Iterator[None]:
    """Kernels that the interpreter runs inside this context compute bfloat16 as a GPU does."""
    repairs = {
        "binary_op": _binary,
        "unary_op": _unary,
        "cast_impl": _convert,
        "create_fp_to_fp": _convert_fp,
        "create_dot": _dot_wide,
        "create_fma": _fma_once,
        "create_clampf": _clamp,
        "create_minnumf": _minnum,
        "create_maxnumf": _maxnum,
        "get_bf16": _constant,
    }
    with contextlib.ExitStack() as stack:
        for name, repair in repairs.items():
            # get_bf16 is missing before Triton 3.9
            stack.enter_context(mock.patch.object(Builder, name, repair, create=name == "get_bf16"))
        stack.enter_context(mock.patch.object(interpreter.ReduceScanOpInterface, "check_tensor", _refuse_bf16))
        # kernels make NaN and infinity on purpose; what they store is what tests look at
        stack.enter_context(np.errstate(all="ignore"))
        yield
