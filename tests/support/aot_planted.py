"""Kernels and launchers with planted faults, for the tests of `aot`."""

import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), mask=offsets < n)


@triton.jit
def _product_kernel(a_ptr, b_ptr, y_ptr, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, n, DEPTH):
        inside = start + depth < n
        a = tl.load(a_ptr + row * n + start + depth[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(b_ptr + column * n + start + depth[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + row * COLUMNS + column, total)


@triton.jit
def _add_up_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def _centre_kernel(x_ptr, BLOCK: tl.constexpr):
    """Holds a whole row in registers, between its sum and its store."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x - tl.sum(x) / BLOCK)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def copy(x: torch.Tensor, y: torch.Tensor, block: int = 1024) -> None:
    _copy_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), BLOCK=block)


def product(rows: int, columns: int, depth: int, warps: int, stages: int) -> None:
    a, b = (meta(n, 4096, dtype=torch.bfloat16) for n in (rows, columns))
    _product_kernel[(1,)](
        a, b, meta(rows, columns), 4096, ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=warps, num_stages=stages
    )


def wait_for_value() -> None:
    x = meta(8)
    copy(x, meta(8), block=16 if x.sum() > 0 else 32)


def wait_for_copy() -> None:
    meta(8).to("cpu")


GOOD = {
    "aligned": lambda: copy(meta(4096), meta(4096)),
    # no 128-bit loads: neither the address nor the size is a multiple of 16 bytes
    "unaligned": lambda: copy(meta(4098)[1:], meta(4098)[1:]),
    "product": lambda: product(128, 128, 64, warps=8, stages=3),
    "grid from constants": lambda: _copy_kernel[lambda c: (c["n"] // c["BLOCK"],)](meta(64), meta(64), 64, BLOCK=64),
}
CASES = GOOD | {
    "narrow product": lambda: product(32, 32, 64, warps=2, stages=2),
    "spills": lambda: _centre_kernel[(1,)](meta(65536), BLOCK=65536),
    "too much shared memory": lambda: product(128, 256, 128, warps=8, stages=4),
    "float atomics": lambda: _add_up_kernel[(4,)](meta(4096), meta(1), BLOCK=1024),
    "empty grid": lambda: copy(meta(0), meta(0)),
    "grid too high": lambda: _copy_kernel[(1, 65536)](meta(64), meta(64), 64, BLOCK=64),
    "waits for a value": wait_for_value,
    "waits for a copy": wait_for_copy,
}
