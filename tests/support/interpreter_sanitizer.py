"""Memory checker for Triton kernels in the interpreter: what compute-sanitizer finds on a GPU, and more, without one.

Every launch inside `sanitized()` is checked; the first launch that does one of these raises `SanitizerError`:

    out of bounds        an address outside the elements of the very argument it was computed from, the gaps of a
                         strided view included, even where another tensor happens to lie there; misaligned addresses
    race                 two programs of a launch store to one address, or one reads what another stores
    mixed access         one program changes an address atomically, another loads or stores it plainly
    duplicates           one store with two active lanes on one address: which value stays is undefined
    missing barrier      a program loads what it stored, or stores what other lanes of it loaded, with no
                         `tl.debug_barrier()` between: the interpreter runs lanes in lockstep, warps do not
    order-dependent      atomic addition of floats, exchange, compare-and-swap: not reproducible from run to run

Masked-off lanes of a load without `other` are undefined on a GPU and zero in the interpreter; here they hold NaN, or
0x55 bytes for integers, so a kernel that uses them computes garbage that its test sees.

Atomics of several programs on one address are fine among themselves, and so is a launch that reads what an earlier
launch wrote. How it works: the top 16 bits of every pointer number the argument it came from (addresses have 48), and
each storage has shadow arrays that hold, for every element, which program stored, read or changed it. NumPy allocates
them lazily, so a huge tensor costs what is touched. Works on Triton 3.6 to 3.9.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
RMW = interpreter._ir.ATOMIC_OP

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64(2**48 - 1)
SEVERAL = -1  # more than one program
MOST_REPORTED = 5

_load = Builder.create_masked_load
_store = Builder.create_masked_store
_rmw = Builder.create_atomic_rmw
_cas = Builder.create_atomic_cas
_barrier = Builder.create_barrier
_implicit_cvt = interpreter._implicit_cvt
_run_grid = interpreter.GridExecutor.__call__

_launch: "_Launch | None" = None


class SanitizerError(Exception):
    """A kernel did what a GPU punishes or leaves undefined; names kernel, line, program and argument."""


class _Argument:
    """The elements of one tensor argument."""

    def __init__(self, name: str, tensor, shadow: "_Shadow"):
        self.name = name
        self.shadow = shadow
        self.item = tensor.element_size()
        self.low = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.high = self.low + (last + 1) * self.item if tensor.numel() else self.low
        # which elements of the extent belong to a view with gaps; None where there is no gap
        self.member = None
        if tensor.numel() and tensor.numel() <= last:
            member = np.zeros(last + 1, dtype=bool)
            np.lib.stride_tricks.as_strided(member, tuple(tensor.shape), tensor.stride())[...] = True
            self.member = member


class _Shadow:
    """Who did what to each element of a storage in this launch; 0 is nobody, p is program p - 1."""

    def __init__(self, storage):
        self.low = storage.data_ptr()
        self.size = storage.nbytes()
        self.grain = 8
        self.stored = False
        self.writer = None

    def allocate(self) -> None:
        """To be called when every argument of the launch is known, since they decide the grain."""
        n = -(-self.size // self.grain)
        self.writer, self.write_epoch = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.reader, self.read_epoch = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.read_lane = np.zeros(n, np.int32)
        self.atomic, self.atomic_epoch = np.zeros(n, np.int32), np.zeros(n, np.int32)


class _Launch:
    """State of one launch: its arguments, and what it did wrong so far."""

    def __init__(self, kernel: str, names: dict[int, list[str]]):
        self.kernel = kernel
        self.names = names
        self.arguments: list[_Argument] = []
        self.shadows: dict[int, _Shadow] = {}
        self.epoch = 1
        self.problems: list[str] = []

    def add(self, tensor) -> int:
        """Register a tensor argument; returns the tag of its pointers."""
        tensor = getattr(tensor, "base", tensor)
        storage = tensor.untyped_storage()
        shadow = self.shadows.setdefault(storage.data_ptr(), _Shadow(storage))
        shadow.grain = min(shadow.grain, tensor.element_size())
        names = self.names.get(tensor.data_ptr())
        name = names.pop(0) if names else f"tensor {len(self.arguments)}"
        self.arguments.append(_Argument(name, tensor, shadow))
        return len(self.arguments)

    def report(self, problem: str) -> None:
        """Note a problem with the kernel line that caused it."""
        text = f"{problem}, {_kernel_line()}, kernel {self.kernel}"
        if text not in self.problems:
            self.problems.append(text)

    def stop(self, problem: str) -> None:
        """Report what would touch foreign memory: the launch ends before it does."""
        self.report(problem)
        raise SanitizerError(self.problems[-1])


def _kernel_line() -> str:
    """Where in the kernel's source the interpreter is: the innermost frame that is neither Triton's nor ours."""
    triton_home = str(Path(triton.__file__).parent)
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(triton_home)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "unknown line"


class _Access:
    """The active lanes of one memory operation: `argument`, and shadow index and lane number of each grain."""

    def __init__(self, launch: _Launch, what: str, builder, pointers, mask):
        self.launch, self.builder = launch, builder
        x, y, z = builder.grid_idx
        _, n_y, n_z = builder.grid_dim
        self.me = (x * n_y + y) * n_z + z + 1
        item = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        data = pointers.data
        keep = np.broadcast_to(np.asarray(mask.data), data.shape).ravel()
        data = data.ravel()
        if keep.all():
            lanes = None
        else:
            lanes = np.flatnonzero(keep)
            data = data[lanes]
        self.n = data.size
        self.parts: list[tuple[_Argument, np.ndarray, np.ndarray]] = []
        if not self.n:
            return
        tags = (data >> TAG_SHIFT).astype(np.int64)
        address = (data & ADDRESS).astype(np.int64)
        lanes = np.arange(self.n) if lanes is None else lanes
        if tags[0] == tags[-1] and (tags == tags[0]).all():
            self.parts = [self._part(what, int(tags[0]), address, lanes, item)]
        else:
            self.parts = [
                self._part(what, int(tag), address[tags == tag], lanes[tags == tag], item) for tag in np.unique(tags)
            ]

    def _part(self, what: str, tag: int, address: np.ndarray, lanes: np.ndarray, item: int):
        launch = self.launch
        if not 1 <= tag <= len(launch.arguments):
            launch.stop(f"{what} out of bounds: no argument's address in program {self.builder.grid_idx}")
        argument = launch.arguments[tag - 1]
        bad = (address < argument.low) | (address + item > argument.high)
        if argument.member is not None and not bad.any():
            bad = ~argument.member[(address - argument.low) // argument.item]
        if bad.any():
            element = (int(address[bad][0]) - argument.low) // argument.item
            size = (argument.high - argument.low) // argument.item
            inside = ", a gap of the view" if 0 <= element < size else ""
            launch.stop(
                f"{what} out of bounds: {int(bad.sum())} of {self.n} lanes, first at element {element} of "
                f"{argument.name} with {size}{inside}, program {self.builder.grid_idx}"
            )
        if (address % item).any():
            launch.stop(f"{what} misaligned: {argument.name}, program {self.builder.grid_idx}")
        shadow = argument.shadow
        if shadow.writer is None:
            shadow.allocate()
        index = (address - shadow.low) // shadow.grain
        if item > shadow.grain:
            width = item // shadow.grain
            index = (index[:, None] + np.arange(width)).ravel()
            lanes = np.repeat(lanes, width)
        return argument, index, lanes

    def expect(self, fine: np.ndarray, problem: str, argument: _Argument, index: np.ndarray) -> None:
        """Report `problem` unless all of `fine`, at the first grain that is not."""
        if not fine.all():
            shadow = argument.shadow
            element = (int(index[~fine][0]) * shadow.grain + shadow.low - argument.low) // argument.item
            self.launch.report(f"{problem}: element {element} of {argument.name}, program {self.builder.grid_idx}")

    def check_load(self) -> None:
        me, epoch = self.me, self.launch.epoch
        for argument, index, lanes in self.parts:
            shadow = argument.shadow
            if shadow.stored:
                writer, atomic = shadow.writer[index], shadow.atomic[index]
                self.expect(
                    (writer == 0) | (writer == me), "race: load of what another program stores", argument, index
                )
                self.expect(
                    (atomic == 0) | (atomic == me),
                    "mixed access: plain load of what another program changes atomically",
                    argument,
                    index,
                )
                stale = ((writer == me) & (shadow.write_epoch[index] == epoch)) | (
                    (atomic == me) & (shadow.atomic_epoch[index] == epoch)
                )
                self.expect(~stale, "missing barrier: load after a store of the same program", argument, index)
            reader = shadow.reader[index]
            shadow.reader[index] = np.where((reader == 0) | (reader == me), me, SEVERAL)
            shadow.read_epoch[index] = epoch
            shadow.read_lane[index] = lanes

    def check_store(self) -> None:
        me, epoch = self.me, self.launch.epoch
        for argument, index, lanes in self.parts:
            shadow = argument.shadow
            shadow.stored = True
            # the last of several lanes on one address finds its own number there, the others do not
            first_read, first_lane = shadow.read_epoch[index], shadow.read_lane[index]
            shadow.read_lane[index] = lanes
            self.expect(
                shadow.read_lane[index] == lanes, "duplicates: two lanes of one store on one address", argument, index
            )
            writer, reader, atomic = shadow.writer[index], shadow.reader[index], shadow.atomic[index]
            self.expect((writer == 0) | (writer == me), "race: two programs store", argument, index)
            self.expect((reader == 0) | (reader == me), "race: store to what another program loads", argument, index)
            self.expect(
                (atomic == 0) | ((atomic == me) & (shadow.atomic_epoch[index] != epoch)),
                "mixed access: plain store to what is changed atomically",
                argument,
                index,
            )
            self.expect(
                (reader != me) | (first_read != epoch) | (first_lane == lanes),
                "missing barrier: store to what another lane of the same program loaded",
                argument,
                index,
            )
            shadow.writer[index] = me
            shadow.write_epoch[index] = epoch

    def check_atomic(self) -> None:
        me, epoch = self.me, self.launch.epoch
        for argument, index, _ in self.parts:
            shadow = argument.shadow
            shadow.stored = True
            writer, reader, atomic = shadow.writer[index], shadow.reader[index], shadow.atomic[index]
            self.expect(
                (writer == 0) | ((writer == me) & (shadow.write_epoch[index] != epoch)),
                "mixed access: atomic on what is stored plainly",
                argument,
                index,
            )
            self.expect(
                (reader == 0) | (reader == me),
                "mixed access: atomic on what another program loads plainly",
                argument,
                index,
            )
            shadow.atomic[index] = np.where((atomic == 0) | (atomic == me), me, SEVERAL)
            shadow.atomic_epoch[index] = epoch


def _without_tags(pointers):
    return interpreter.TensorHandle(pointers.data & ADDRESS, pointers.dtype)


def _poison(pointers):
    """What the masked-off lanes of a load without `other` hold."""
    element = pointers.get_element_ty()
    dtype = np.dtype(interpreter._get_np_dtype(element))
    if element.is_floating() and dtype.kind == "f":
        value = dtype.type(np.nan)
    elif element == tl.bfloat16:
        value = dtype.type(0x7FC0)
    elif element.is_floating():  # float8: all ones is NaN in every format but e5m2, whose NaN it is too
        value = dtype.type(0xFF)
    elif dtype.kind == "b":
        value = True
    else:
        value = np.frombuffer(b"\x55" * dtype.itemsize, dtype)[0]
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype), element)


def _checked_load(self, ptrs, mask, other, *args, **kwargs):
    if _launch is None:
        return _load(self, ptrs, mask, other, *args, **kwargs)
    _Access(_launch, "load", self, ptrs, mask).check_load()
    # Triton drops `other` where it is one element of value zero (`if other`), so one lane cannot be judged
    if other is None and ptrs.data.size > 1 and not np.asarray(mask.data).all():
        other = _poison(ptrs)
    return _load(self, _without_tags(ptrs), mask, other, *args, **kwargs)


def _checked_store(self, ptrs, value, mask, *args, **kwargs):
    if _launch is None:
        return _store(self, ptrs, value, mask, *args, **kwargs)
    _Access(_launch, "store", self, ptrs, mask).check_store()
    return _store(self, _without_tags(ptrs), value, mask, *args, **kwargs)


def _checked_rmw(self, op, ptr, val, mask, *args):
    if _launch is None:
        return _rmw(self, op, ptr, val, mask, *args)
    if op == RMW.FADD:
        _launch.report("order-dependent: atomic addition of floats")
    if op == RMW.XCHG:
        _launch.report("order-dependent: atomic exchange")
    _Access(_launch, "atomic", self, ptr, mask).check_atomic()
    return _rmw(self, op, _without_tags(ptr), val, mask, *args)


def _checked_cas(self, ptr, cmp, val, *args):
    if _launch is None:
        return _cas(self, ptr, cmp, val, *args)
    _launch.report("order-dependent: compare-and-swap")
    everywhere = interpreter.TensorHandle(np.ones(ptr.data.shape, dtype=bool), tl.int1)
    _Access(_launch, "compare-and-swap", self, ptr, everywhere).check_atomic()
    return _cas(self, _without_tags(ptr), cmp, val, *args)


def _counted_barrier(self):
    if _launch is not None:
        _launch.epoch += 1
    return _barrier(self)


def _tagged_argument(arg):
    """Turn a kernel argument into what the interpreter computes with; tensor pointers get their tag."""
    value = _implicit_cvt(arg)
    if _launch is not None and hasattr(arg, "data_ptr"):
        value.handle.data = value.handle.data | (np.uint64(_launch.add(arg)) << TAG_SHIFT)
    return value


def _tensors(name: str, value) -> Iterator[tuple[int, str]]:
    """Address and name of the tensors in a launch argument: itself, a descriptor's base, members of a tuple."""
    if hasattr(value, "data_ptr"):
        yield value.data_ptr(), name
    elif isinstance(value, tuple):
        for i, member in enumerate(value):
            yield from _tensors(f"{name}[{i}]", member)
    elif hasattr(value, "base"):
        yield from _tensors(name, value.base)


def _checked_grid(self, *args, **kwargs):
    global _launch
    names: dict[int, list[str]] = {}
    for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
        for address, label in _tensors(name, value):
            names.setdefault(address, []).append(label)
    _launch = launch = _Launch(self.fn.__name__, names)
    try:
        _run_grid(self, *args, **kwargs)
    except interpreter.InterpreterError:
        if launch.problems:
            raise SanitizerError(launch.problems[-1]) from None
        raise
    finally:
        _launch = None
    if launch.problems:
        more = len(launch.problems) - MOST_REPORTED
        listed = launch.problems[:MOST_REPORTED] + ([f"and {more} more"] if more > 0 else [])
        raise SanitizerError("\n".join(listed))


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Launches inside this context are checked.

    Raises:
        SanitizerError: From the launch that did something wrong.
    """
    checks = {
        "create_masked_load": _checked_load,
        "create_masked_store": _checked_store,
        "create_atomic_rmw": _checked_rmw,
        "create_atomic_cas": _checked_cas,
        "create_barrier": _counted_barrier,
    }
    with contextlib.ExitStack() as stack:
        for name, check in checks.items():
            stack.enter_context(mock.patch.object(Builder, name, check))
        stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", _tagged_argument))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", _checked_grid))
        yield
