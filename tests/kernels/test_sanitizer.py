"""The sanitizer finds each planted misuse of memory, and nothing in kernels that are right."""

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CUDA: about the interpreter")

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter_sanitizer import SanitizerError, sanitized


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n_load, n_store, N: tl.constexpr):
    offsets = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n_load, other=0.0), mask=offsets < n_store)


@triton.jit
def _store_at_kernel(y_ptr, offset):
    tl.store(y_ptr + offset, 1.0)


@triton.jit
def _load_at_kernel(x_ptr, y_ptr, offset):
    tl.store(y_ptr, tl.load(x_ptr + offset))


@triton.jit
def _same_place_kernel(y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), tl.program_id(0).to(tl.float32))


@triton.jit
def _neighbour_kernel(x_ptr, STEP: tl.constexpr):
    own = 1 + tl.program_id(0)
    tl.store(x_ptr + own, tl.load(x_ptr + own + STEP) + 1)


@triton.jit
def _duplicates_kernel(y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N) // 2, tl.arange(0, N).to(tl.float32))


@triton.jit
def _store_then_load_kernel(x_ptr, scratch_ptr, y_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(scratch_ptr + offsets, tl.load(x_ptr + offsets))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + offsets, tl.load(scratch_ptr + (N - 1 - offsets)))


@triton.jit
def _reverse_kernel(x_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    offsets = tl.arange(0, N)
    value = tl.load(x_ptr + (N - 1 - offsets))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offsets, value)


@triton.jit
def _sum_without_other_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < n)))


@triton.jit
def _count_kernel(x_ptr, n_ptr, N: tl.constexpr):
    tl.atomic_add(n_ptr + tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N)), 1)


@triton.jit
def _float_sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))))


@triton.jit
def _atomic_and_plain_kernel(n_ptr, y_ptr, LOAD: tl.constexpr, STORE: tl.constexpr):
    program = tl.program_id(0)
    if program == 0:
        tl.atomic_min(n_ptr, 3)
    elif LOAD:
        tl.store(y_ptr, tl.load(n_ptr))
    elif STORE:
        tl.store(n_ptr, 4)


@triton.jit
def _exchange_kernel(n_ptr, CAS: tl.constexpr):
    if CAS:
        tl.atomic_cas(n_ptr, 0, tl.program_id(0))
    else:
        tl.atomic_xchg(n_ptr, tl.program_id(0))


@triton.jit
def _scale_in_place_kernel(x_ptr, n, stride, N: tl.constexpr):
    offsets = tl.arange(0, N)
    pointers = x_ptr + tl.program_id(0).to(tl.int64) * stride + offsets
    value = tl.load(pointers, mask=offsets < n, other=0.0)
    tl.store(pointers, value / tl.sum(value), mask=offsets < n)


@triton.jit
def _two_widths_kernel(word_ptr, byte_ptr, OFFSET: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(word_ptr, 7)
    else:
        tl.store(byte_ptr + OFFSET, 1)


@triton.jit
def _misaligned_kernel(byte_ptr):
    tl.store((byte_ptr + 1).to(tl.pointer_type(tl.int32)), 7)


def found(text, kernel, grid, *args, **constants):
    with sanitized(), pytest.raises(SanitizerError, match=text) as caught:
        kernel[grid](*args, **constants)
    assert kernel.fn.__name__ in str(caught.value)
    assert "test_sanitizer.py:" in str(caught.value)


def clean(kernel, grid, *args, **constants):
    with sanitized():
        kernel[grid](*args, **constants)


def test_store_one_past_the_end():
    x, y = torch.ones(100), torch.zeros(100)
    found(r"store out of bounds.* element 100 of y_ptr with 100", _copy_kernel, (4,), x, y, 100, 101, N=32)
    clean(_copy_kernel, (4,), x, y, 100, 100, N=32)


def test_load_one_past_the_end():
    x, y = torch.ones(100), torch.zeros(128)
    found(r"load out of bounds.* element 100 of x_ptr", _copy_kernel, (4,), x, y, 101, 100, N=32)


@pytest.mark.parametrize("offset", [-1, 10, 12, 2**33, -(2**33)])
def test_address_outside_its_argument(offset):
    found("load out of bounds", _load_at_kernel, (1,), torch.zeros(10), torch.zeros(1), offset)
    found("store out of bounds", _store_at_kernel, (1,), torch.zeros(10), offset)


def test_address_that_belongs_to_another_argument():
    both = torch.zeros(2, 10)
    found("load out of bounds.* element 10 of x_ptr", _load_at_kernel, (1,), both[0], both[1], 10)
    found("load out of bounds.* element -1 of x_ptr", _load_at_kernel, (1,), both[1], both[0], -1)
    clean(_load_at_kernel, (1,), both[0], both[1], 9)


def test_gap_of_a_strided_view():
    view = torch.zeros(4, 10)[:, :7]
    found("element 8 of x_ptr with 37, a gap", _load_at_kernel, (1,), view, torch.zeros(1), 8)
    clean(_load_at_kernel, (1,), view, torch.zeros(1), 36)
    clean(_load_at_kernel, (1,), torch.zeros(1, 1).expand(3, 5), torch.zeros(1), 0)
    clean(_load_at_kernel, (1,), torch.zeros(3, 5).T, torch.zeros(1), 14)


def test_empty_argument_has_no_element():
    found("load out of bounds", _load_at_kernel, (1,), torch.zeros(0), torch.zeros(1), 0)


def test_misaligned_address():
    found("misaligned", _misaligned_kernel, (1,), torch.zeros(16, dtype=torch.int8))


def test_two_programs_store_to_one_address():
    y = torch.zeros(32)
    found("race: two programs store: element 0 of y_ptr", _same_place_kernel, (2,), y, N=32)
    clean(_same_place_kernel, (1,), y, N=32)


def test_load_of_what_another_program_stores():
    """Whichever of the two programs runs first."""
    x = torch.zeros(10)
    found("race: load of what another program stores: element 1 of x_ptr", _neighbour_kernel, (8,), x, STEP=-1)
    found("race: store to what another program loads: element 2 of x_ptr", _neighbour_kernel, (8,), x, STEP=1)
    clean(_neighbour_kernel, (8,), x, STEP=0)


def test_overlapping_stores_of_different_width():
    storage = torch.zeros(16, dtype=torch.int8)
    found("race: two programs store", _two_widths_kernel, (2,), storage.view(torch.int32), storage, OFFSET=3)
    clean(_two_widths_kernel, (2,), storage.view(torch.int32), storage, OFFSET=4)


def test_two_lanes_store_to_one_address():
    found("duplicates", _duplicates_kernel, (1,), torch.zeros(16), N=16)


def test_load_after_store_without_barrier():
    x, y, scratch = torch.arange(32.0), torch.zeros(32), torch.zeros(32)
    found("missing barrier: load after a store", _store_then_load_kernel, (1,), x, scratch, y, N=32, BARRIER=False)
    clean(_store_then_load_kernel, (1,), x, scratch, y, N=32, BARRIER=True)
    torch.testing.assert_close(y, x.flip(0))


def test_store_to_what_another_lane_loaded_without_barrier():
    x = torch.arange(32.0)
    found("missing barrier: store to what another lane", _reverse_kernel, (1,), x, N=32, BARRIER=False)
    clean(_reverse_kernel, (1,), x, N=32, BARRIER=True)


def test_masked_lanes_are_poisoned():
    x, y = torch.ones(8), torch.zeros(1)
    clean(_sum_without_other_kernel, (1,), x, y, 5, N=8)
    assert y.isnan()
    clean(_sum_without_other_kernel, (1,), x, y, 8, N=8)
    assert y == 8
    clean(_sum_without_other_kernel, (1,), x.to(torch.int8), y, 5, N=8)
    assert y != 5


def test_integer_atomics_on_one_address_are_fine():
    n = torch.zeros(4, dtype=torch.int32)
    clean(_count_kernel, (4,), torch.arange(32, dtype=torch.int32) % 4, n, N=8)
    assert n.tolist() == [8, 8, 8, 8]


def test_float_atomics_depend_on_order():
    found("order-dependent: atomic addition of floats", _float_sum_kernel, (2,), torch.ones(16), torch.zeros(1), N=8)


@pytest.mark.parametrize("cas", [False, True])
def test_exchange_depends_on_order(cas):
    found("order-dependent", _exchange_kernel, (2,), torch.zeros(1, dtype=torch.int32), CAS=cas)


def test_atomic_and_plain_access_to_one_address():
    n, y = torch.full((1,), 9, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    found("mixed access: plain load", _atomic_and_plain_kernel, (2,), n, y, LOAD=True, STORE=False)
    found("mixed access: plain store", _atomic_and_plain_kernel, (2,), n, y, LOAD=False, STORE=True)
    clean(_atomic_and_plain_kernel, (2,), n, y, LOAD=False, STORE=False)


def test_next_launch_may_read_what_the_last_one_wrote():
    x, y = torch.ones(32), torch.zeros(32)
    with sanitized():
        _copy_kernel[(1,)](x, y, 32, 32, N=32)
        _copy_kernel[(1,)](y, x, 32, 32, N=32)
        _same_place_kernel[(1,)](x, N=32)


def test_in_place_update_of_own_rows_is_clean():
    x = torch.rand(5, 40)[:, :33]
    clean(_scale_in_place_kernel, (5,), x, 33, x.stride(0), N=64)
    torch.testing.assert_close(x.sum(1), torch.ones(5))


def test_nothing_stays_patched():
    with sanitized():
        pass
    y = torch.zeros(32)
    _same_place_kernel[(2,)](y, N=32)
    assert (y == 1).all()


@pytest.fixture(autouse=True)
def gpu_like_interpreter():
    """Launches outside `found` and `clean` are not checked here."""
