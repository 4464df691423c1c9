"""Bfloat16 in the repaired interpreter is bit for bit what torch computes; NaN in min and max is what a GPU makes."""

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CUDA: about the interpreter")

# halfway cases between neighbouring bfloat16 numbers, subnormals, infinity, NaN, overflow on rounding
AWKWARD = [0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 1e-40, 9.2e-41, 3.4e38, 3.3961776e38, 1e-45]
AWKWARD += [float("inf"), -float("inf"), float("nan"), 65504.0, 257.0, 0.1]


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def _binary_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "scale":
        y = 0.1 * a
    elif OP == "neg":
        y = -a
    elif OP == "abs":
        y = tl.abs(a)
    elif OP == "fma":
        y = tl.fma(a, b, a)
    elif OP == "less":
        y = (a < b).to(tl.bfloat16)
    elif OP == "where":
        y = tl.where(a > 0.5, a, 1.5)
    elif OP == "minimum":
        y = tl.minimum(a, b)
    elif OP == "maximum":
        y = tl.maximum(a, b)
    elif OP == "clamp":
        y = tl.clamp(a, -1.0, 1.0)
    tl.store(y_ptr + offsets, y)


@triton.jit
def _mixed_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    """Bfloat16 times float32 is float32."""
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(a_ptr + offsets) * tl.load(b_ptr + offsets))


@triton.jit
def _truncate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + row * N + column)
    b = tl.load(b_ptr + row * N + column)
    tl.store(y_ptr + row * N + column, tl.dot(a, b))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, WIDE: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if WIDE:
        x = x.to(tl.float32)
    tl.store(y_ptr, tl.sum(x))


@triton.jit
def _max_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.max(tl.load(x_ptr + tl.arange(0, N))))


@triton.jit
def _scalar_mask_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    offsets = tl.arange(0, N)
    mask = (offsets < N) & (tl.program_id(0) < n)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=2.0))


def numbers(n: int, seed: int) -> torch.Tensor:
    """Float32 numbers of every magnitude that bfloat16 has, the awkward ones among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x[: len(AWKWARD)] = torch.tensor(AWKWARD)
    return x


def assert_same_bits(got: torch.Tensor, want: torch.Tensor):
    """Except that any NaN equals any NaN."""
    assert got.dtype == want.dtype
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got[~nan].view(integer), want[~nan].view(integer))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_casts_round_to_nearest_even(source, target):
    if source == torch.int32:
        x = torch.arange(4096, dtype=torch.int32) * 16411 - 2**24
    elif source == torch.float64:
        # double rounding by way of float32, as in torch
        x = numbers(4096, 0).double() * (1 + 2**-30)
    else:
        x = numbers(4096, 0).to(source)
    y = torch.zeros(4096, dtype=target)
    _cast_kernel[(1,)](x, y, N=4096)
    assert_same_bits(y, x.to(target))


def test_cast_to_integer():
    x = torch.linspace(-200, 200, 512).bfloat16()
    y = torch.zeros(512, dtype=torch.int32)
    _cast_kernel[(1,)](x, y, N=512)
    assert torch.equal(y, x.to(torch.int32))


def test_cast_can_truncate():
    x = numbers(4096, 1).nan_to_num(0.0)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    _truncate_kernel[(1,)](x, y, N=4096)
    assert torch.equal(y.view(torch.int16), (x.view(torch.int32) >> 16).to(torch.int16))


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "scale": lambda a, b: (a.float() * torch.tensor(0.1).bfloat16().float()).bfloat16(),
    "abs": lambda a, b: a.abs(),
    "fma": lambda a, b: (a.double() * b.double() + a.double()).float().bfloat16(),
    "less": lambda a, b: (a < b).bfloat16(),
    "where": lambda a, b: torch.where(a > 0.5, a, torch.tensor(1.5).bfloat16()),
    "minimum": torch.fmin,
    "maximum": torch.fmax,
}


@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_rounds_once(op):
    a, b = numbers(4096, 2).bfloat16(), numbers(4096, 3).bfloat16()
    b[::7] = a[::7] * 1.5  # comparable magnitudes: sums that round
    y = torch.zeros(4096, dtype=torch.bfloat16)
    _binary_kernel[(1,)](a, b, y, OP=op, N=4096)
    assert_same_bits(y, BINARY[op](a, b))


def test_negation():
    a = torch.tensor([1.5, -2.0, float("inf"), float("nan")]).bfloat16()
    y = torch.zeros(4, dtype=torch.bfloat16)
    _binary_kernel[(1,)](a, a, y, OP="neg", N=4)
    assert_same_bits(y, -a)


def test_bfloat16_times_float32_is_float32():
    a, b = numbers(4096, 4).bfloat16(), numbers(4096, 5)
    y = torch.zeros(4096)
    _mixed_kernel[(1,)](a, b, y, N=4096)
    assert_same_bits(y, a.float() * b)


def test_dot_accumulates_in_float32():
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    y = torch.zeros(32, 32)
    _dot_kernel[(1,)](a, b, y, N=32)
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_bfloat16_sum_is_refused():
    x, y = torch.ones(64).bfloat16(), torch.zeros(1)
    with pytest.raises(Exception, match="convert to float32 first"):
        _sum_kernel[(1,)](x, y, WIDE=False, N=64)
    _sum_kernel[(1,)](x, y, WIDE=True, N=64)
    assert y == 64


def test_bfloat16_maximum_of_a_block():
    x = torch.tensor([-3.0, -1.5, -2.0, -100.0]).bfloat16()
    y = torch.zeros(1)
    _max_kernel[(1,)](x, y, N=4)
    assert y == -1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_min_max_and_clamp_drop_nan(dtype):
    """What `fminf` and `fmaxf` do on a GPU: NaN only where both operands are NaN."""
    nan = float("nan")
    a, b = (torch.tensor(v).to(dtype) for v in ([nan, 1.0, nan, -3.0], [2.0, nan, nan, 0.5]))
    y = torch.zeros(4, dtype=dtype)
    for op, want in (("maximum", torch.fmax(a, b)), ("minimum", torch.fmin(a, b))):
        _binary_kernel[(1,)](a, b, y, OP=op, N=4)
        assert_same_bits(y, want)
    _binary_kernel[(1,)](a, b, y, OP="clamp", N=4)
    assert y.tolist() == [-1.0, 1.0, -1.0, -1.0]


def test_scalar_comparison_in_a_mask():
    x, y = torch.ones(8), torch.zeros(8)
    _scalar_mask_kernel[(1,)](x, y, 1, N=8)
    assert (y == 1).all()
    _scalar_mask_kernel[(1,)](x, y, 0, N=8)
    assert (y == 2).all()
