"""Run the launchers on tensors of more than 2^31 elements, in Triton's interpreter, and compare with small ones.

`python -P tests/support/beyond_int32.py NAME…` with TRITON_INTERPRET=1 prints the name of each check that passed. An
address computed in 32 bits crashes the process, hence a process of its own. `torch.empty` takes no memory for pages
that nobody touches, so torch's deterministic mode, which fills them, must be off; and only the last program of a grid
over latents is run.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

sys.path.append(str(Path(__file__).resolve().parent))  # python -P leaves it out

from interpreter_bf16 import correct_bf16

from fastdiff.kernels.above import AboveWork, above_slots
from fastdiff.kernels.batchtopk import BatchTopKWork, batchtopk_slots
from fastdiff.kernels.decode_loss import decode_loss, slices
from fastdiff.kernels.dots import dots_into
from fastdiff.kernels.encoder_scores import encoder_scores_into
from fastdiff.kernels.fused_adam import RowState, finish_norms, update_rows
from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.latent_order import LatentOrder
from fastdiff.kernels.row_gradients import norm_rows, row_slices
from fastdiff.kernels.slots import ALL_FINITE, Slots
from fastdiff.kernels.topk import group_size, topk_slots, topk_slots_radix
from fastdiff.kernels.weighted_rows import weighted_rows_into

# F·C = 2.29e9
F, C, M = 140_000, 16_384, 2
CPU = torch.device("cpu")


@triton.jit
def _planted_kernel(rows_ptr, out_ptr, row, C, BLOCK: tl.constexpr):
    """The fault that the checks look for: row · C in 32 bits."""
    offsets = tl.arange(0, BLOCK)
    row = tl.load(row)
    tl.store(out_ptr + offsets, tl.load(rows_ptr + row * C + offsets).to(tl.float32))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tall(rows: torch.Tensor, n: int = F) -> torch.Tensor:
    """[n, C] whose last rows are these; the others are no memory yet."""
    out = torch.empty(n, rows.shape[1], dtype=rows.dtype)
    out[n - len(rows) :] = rows
    return out


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got, want), (got, want)


@contextlib.contextmanager
def last_program_only() -> Iterator[None]:
    """Launches run the program with the highest numbers, and no other."""
    init = interpreter.GridExecutor.__init__
    real: list[int] = []

    def one_program(executor, fn, arg_names, grid, *rest):
        real[:] = (*grid, 1, 1)[:3]
        init(executor, fn, arg_names, (1,), *rest)

    def set_dim(builder, *_):
        builder.grid_dim = tuple(real)

    def set_index(builder, *_):
        builder.grid_idx = tuple(n - 1 for n in real)

    with (
        mock.patch.object(interpreter.GridExecutor, "__init__", one_program),
        mock.patch.object(interpreter.InterpreterBuilder, "set_grid_dim", set_dim),
        mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", set_index),
    ):
        yield


def planted() -> None:
    rows = random(1, C, dtype=torch.bfloat16)
    out = torch.zeros(1024)
    _planted_kernel[(1,)](tall(rows), out, integers(F - 1), C, BLOCK=1024)
    same(out, rows[0, :1024].float())


def decode() -> None:
    """Gathered decoder rows, and inner products with them."""
    rows = random(2, C, dtype=torch.bfloat16)
    weight, start = random(2), torch.tensor([0, 2])
    got, want = torch.zeros(2, 1, C)
    with last_program_only():
        weighted_rows_into(torch.tensor([F - 2, F - 1]), tall(rows), start, weight, got)
        weighted_rows_into(torch.tensor([0, 1]), rows, start, weight, want)
    assert want[0, -1] != 0
    same(got, want)
    x = random(1, C, dtype=torch.bfloat16, seed=1)
    got, want = torch.zeros(2, 2)
    dots_into(start, torch.tensor([F - 2, F - 1]), x, tall(rows), got)
    dots_into(start, torch.tensor([0, 1]), x, rows, want)
    same(got, want)


def loss() -> None:
    rows, x = random(2, C, dtype=torch.bfloat16), random(1, C, dtype=torch.bfloat16, seed=1)
    results = []
    for W_dec, latents in ((tall(rows), integers(F - 2, F - 1)), (rows, integers(0, 1))):
        slots = Slots(integers(0), integers(2), latents, integers(0, 0), random(2))
        n = slices(M, C // M)
        resid, squares, dots = torch.zeros_like(x), torch.zeros(1, n), torch.zeros(n, 2)
        with last_program_only():
            decode_loss(slots, W_dec, random(C), x, resid, squares, dots, integers(1, 2), n_models=M)
        assert resid[0, -1] != 0
        results.append((resid, squares, dots))
    for got, want in zip(*results, strict=True):
        same(got, want)


def far_rows(scores: torch.Tensor) -> torch.Tensor:
    """The same scores [2, n], their rows 2^31 + 64 elements apart."""
    stride = 2**31 + 64
    out = torch.empty(stride + scores.shape[1], dtype=scores.dtype).as_strided(scores.shape, (stride, 1))
    return out.copy_(scores)


def selection() -> None:
    """Scores of many tokens: B·F beyond 2^31."""
    n, k = 500, 5
    near = random(2, n)
    bias, scale, limits = random(n, seed=1), random(n, seed=2).abs(), integers(2, k)
    results = []
    for scores in (far_rows(near), near):
        bad = integers(ALL_FINITE)
        maxima = torch.zeros(2, -(-n // group_size(k, n)))
        group_max(scores, bias, scale, maxima, limits, bad, group=group_size(k, n))
        every = [maxima]
        select = (scores, bias, scale)
        slots = [Slots.allocate(2, k, CPU) for _ in range(3)]
        topk_slots(*select, maxima, limits, slots[0], k_max=k, group=group_size(k, n))
        topk_slots_radix(*select, limits, bad, slots[1], k_max=k)
        lowest, total = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        batchtopk_slots(*select, BatchTopKWork.allocate(2, n, k, CPU), limits, slots[2], lowest, bad)
        slots.append(Slots.allocate(2, n, CPU))
        above_slots(*select, random(n, seed=3), AboveWork.allocate(2, n, CPU), limits, bad, slots[3], total)
        results.append([*every, lowest, total, *(tensor for each in slots for tensor in each)])
    for got, want in zip(*results, strict=True):
        same(got, want)
    assert total > 0 and lowest.isfinite()


def encoder() -> None:
    """The last tile of latents; F is a multiple of none."""
    rows, x = random(300, C, dtype=torch.bfloat16), random(1, C, dtype=torch.bfloat16, seed=1)
    out = torch.zeros(1, F)
    with last_program_only():
        encoder_scores_into(x, tall(rows), out)
    want = x.float() @ rows[-1:].float().T
    torch.testing.assert_close(out[:, -1:], want, rtol=1e-4, atol=1e-2)


def update() -> None:
    """Gradient norm and Adam of the last latent, with moments of both types."""
    x, resid = random(2, C, dtype=torch.bfloat16), random(2, C, dtype=torch.bfloat16, seed=1)
    token, val, delta, c = integers(0, 1), random(2), random(2, seed=2), random(2, M, seed=3)
    T = row_slices(M, C // M)
    for moments in (torch.float32, torch.bfloat16):
        results = []
        for n in (F, 1):
            start = torch.zeros(n + 1, dtype=torch.int32)
            start[n] = 2
            order = LatentOrder(start, torch.arange(n, dtype=torch.int32), integers(0, 1), token, val, delta)
            matrices = [random(1, C, seed=4), *(random(1, C, dtype=moments, seed=s).abs() for s in (5, 6))]
            dec, enc = ([tall(matrix, n) for matrix in matrices] for _ in range(2))
            shadows = [tall(torch.zeros(1, C, dtype=torch.bfloat16), n) for _ in range(2)]
            state = RowState(*dec, shadows[0], *enc, shadows[1], *torch.zeros(3, n))
            squares, norms, code_norm = torch.zeros(n, T), torch.zeros(n, T, M), torch.zeros(n)
            batch = (order, c, resid, x)
            with last_program_only():
                norm_rows(*batch, None, squares, n_models=M)
            got = [squares[-1, -1].clone()]
            rates, counter = torch.tensor([1e-3, 0.1, 0.001]), torch.zeros(1, dtype=torch.int64)
            bad = integers(ALL_FINITE)
            how = {"n_models": M, "betas": (0.9, 0.999), "eps": 1e-8, "seed": 0}
            with last_program_only():
                update_rows(*batch, state, None, rates, torch.ones(1), counter, bad, norms, squares, **how)
                finish_norms(norms, code_norm, bad)
            width = C // M // T
            parts = [tensor[-1].view(M, T, width)[:, -1].clone() for tensor in (*dec, *enc, *shadows)]
            results.append([*got, norms[-1, -1], *parts, code_norm[-1:]])
            assert not torch.equal(parts[0], matrices[0][0].view(M, T, width)[:, -1])
        # the rounding of bfloat16 moments depends on where an element is, so only float32 ones agree
        agree = slice(None) if moments == torch.float32 else slice(1)
        for got, want in zip(results[0][agree], results[1][agree], strict=True):
            same(got, want)
        assert all(tensor.isfinite().all() for tensor in results[0])


CHECKS = {check.__name__: check for check in (planted, decode, loss, selection, encoder, update)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with correct_bf16():
        for name in sys.argv[1:]:
            CHECKS[name]()
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
