"""The inputs of every kernel of one training step, each made by the kernels before it, and how one is measured."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmark.ceilings import Ceilings
from fastdiff.benchmark.data import synthetic
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.table import Row
from fastdiff.benchmark.timing import timed
from fastdiff.kernels.batchtopk import BatchTopKWork, batchtopk_slots
from fastdiff.kernels.column_sums import column_sums_work
from fastdiff.kernels.decode_loss import decode_loss, slices, token_gradients
from fastdiff.kernels.latent_order import LatentOrder, order_by_latent
from fastdiff.kernels.matmul import matmul_into
from fastdiff.kernels.normalize import normalize
from fastdiff.kernels.slots import ALL_FINITE, Slots


class Case:
    """A step's tensors at one shape. `low` is what the products multiply: bfloat16 on CUDA, float32 elsewhere."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self.low = torch.bfloat16 if device.type == "cuda" else torch.float32
        data = synthetic(shape, device, n_batches=1, dtype=self.low)
        c = data.crosscoder.requires_grad_(False)
        self.batch, self.mean, self.scale = data.batches[0], c.input_mean, c.input_scale
        B, M, C, F, k = shape.n_tokens, shape.n_models, shape.width, shape.dict_size, shape.k
        self.W_enc, self.W_dec = c.W_enc.view(F, C), c.W_dec.view(F, C)
        self.W_enc_low, self.W_dec_low = self.W_enc.to(self.low), self.W_dec.to(self.low)
        self.b_enc, self.b_dec, self.code_norm = c.b_enc, c.b_dec.view(C), c.code_norm()
        self.limits, self.total = self.integers(B, k), self.integers(B)
        self.bad = self.integers(ALL_FINITE)
        self.x, self.x_squares = self.empty(B, C, dtype=self.low), self.empty(B, M)
        self.scores = self.empty(B, F)
        self.slots, self.lowest = Slots.allocate(B, k, device), self.empty(1)
        self.work = BatchTopKWork.allocate(B, F, k, device)
        n_slices = slices(M, shape.d_model)
        self.resid, self.squares, self.dots = (
            self.empty(B, C, dtype=self.low), self.empty(B, n_slices), self.empty(n_slices, B * k)
        )  # fmt: skip
        self.c, self.errors, self.delta = self.empty(B, M), self.empty(B, M), self.empty(B * k)
        self.order = LatentOrder.allocate(B * k, F, device)
        self.sums, self.sums_work = self.empty(3, C), column_sums_work(B, C, device)
        for launch in (self.normalize, self.encode, self.batchtopk, self.decode, self.gradients, self.by_latent):
            launch()
        if int(self.bad) != ALL_FINITE or int(self.slots.end.max()) != B * k:
            sys.exit(
                f"WRONG RESULT: the step reports token {int(self.bad)}, {int(self.slots.end.max())} of {B * k} pairs"
            )
        rows, latents = self.slots.end - self.slots.start, self.order.start.diff()
        # the longest and the shortest row, the most and the least frequent latent, and some others
        some = torch.randperm(B, generator=torch.Generator().manual_seed(1))[:4].tolist()
        self.tokens = sorted({int(rows.argmax()), int(rows.argmin()), *some})
        some = torch.randperm(F, generator=torch.Generator().manual_seed(1))[:6].tolist()
        self.latents = sorted({int(latents.argmax()), int(latents.argmin()), *some})

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def normalize(self) -> None:
        normalize(self.batch, self.mean, self.scale, self.x, self.x_squares, self.limits, self.bad, row_offset=0)

    def encode(self) -> None:
        matmul_into(self.scores, self.x, self.W_enc_low.T)

    def batchtopk(self) -> None:
        select = (self.scores, self.b_enc, self.code_norm, self.work, self.limits, self.slots, self.lowest, self.bad)
        batchtopk_slots(*select)

    def decode(self) -> None:
        outputs = (self.resid, self.squares, self.dots)
        decode_loss(self.slots, self.W_dec_low, self.b_dec, self.x, *outputs, self.limits, n_models=self.shape.n_models)

    def gradients(self) -> None:
        inputs, outputs = (
            (self.squares, self.dots, self.limits, self.total),
            (self.c, self.errors, self.delta, self.bad),
        )
        sizes = {"n_models": self.shape.n_models, "d_model": self.shape.d_model}
        token_gradients(self.slots, *inputs, *outputs, **sizes, loss="l2norm", row_offset=0)

    def by_latent(self) -> None:
        order_by_latent(self.slots.col, self.slots.row, self.slots.val, self.delta, self.order)

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """Latents and activations (float64) of a token's slots."""
        at = slice(int(self.slots.start[token]), int(self.slots.end[token]))
        return self.slots.col[at].long(), self.slots.val[at].double()

    def column(self, latent: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, activations and their gradients (float64) of a latent's pairs."""
        at = slice(int(self.order.start[latent]), int(self.order.start[latent + 1]))
        return self.order.token[at].long(), self.order.val[at].double(), self.order.delta[at].double()

    def score_rows(self, tokens: Sequence[int] | slice) -> Tensor:
        """The scores that selection goes by, in the kernels' own float32 arithmetic: (stored + bias) · norm."""
        return (self.scores[tokens] + self.b_enc) * self.code_norm


@dataclass
class Cost:
    """What a kernel has to move and compute at least."""

    moved: float = 0.0  # bytes to and from memory, each once
    gathered: float = 0.0  # bytes of rows that are read again and again, from the cache at best
    flop: float = 0.0

    def floor_ms(self, rates: Ceilings) -> float:
        cache = max(rates.cache, rates.gather)
        return 1e3 * max(self.flop / rates.gemm, self.moved / rates.copy, (self.moved + self.gathered) / cache)


@dataclass
class Measure:
    """Checks, then times; collects rows."""

    case: Case
    rates: Ceilings
    n: int
    warmup: int = 2
    rows: list[Row] = field(default_factory=list)

    def kernel(
        self, name: str, call: Callable[[], Any], cost: Cost, *, outputs: Sequence[Tensor], error: Callable[[], float],
        tolerance: float, restore: Callable[[], None] | None = None, graph: bool = True, note: str | None = None,
    ) -> None:  # fmt: skip
        """One of fastdiff's kernels.

        Args:
            name: Of the operation.
            call: Runs it.
            cost: Of one run.
            outputs: All of them; filled with garbage before the run that is checked, unless `restore` says what.
            error: Largest difference from float64 on sampled tokens or latents, over the largest true value.
            tolerance: Most that it may be.
            restore: Puts back what `call` changes in place.
            graph: Time replays of a CUDA graph.
            note: For the table.

        Raises:
            SystemExit: The error is too large, or a second run gives other bits.
        """
        put_back = restore or (lambda: [poison(output) for output in outputs])
        put_back()
        self._synchronize()
        call()
        found = error()
        if not found <= tolerance:
            sys.exit(f"WRONG RESULT: {name} differs from float64 by {found:.1e}, allowed {tolerance:.1e}")
        first = [output.clone() for output in outputs]
        put_back()
        call()
        repeats = all(same_bits(a, b) for a, b in zip(first, outputs, strict=True))
        del first
        row = self._time(name, call, graph, cost) | {"error": found, "repeats": repeats, "note": note}
        row["of_floor"] = cost.floor_ms(self.rates) / row["ms"]
        self.rows.append(row)

    def rival(self, name: str, call: Callable[[], Any], cost: Cost, *, graph: bool = False) -> None:
        """Something else that does the same to the same data; its ratio is to the row of fastdiff's before it."""
        ours = next(row for row in reversed(self.rows) if not row["name"].startswith("  "))
        try:
            row = self._time(f"  {name}", call, graph, cost)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            self.rows.append({"shape": self.case.shape.name, "name": f"  {name}", "note": str(error).split(". ")[0]})
            return
        self.rows.append(row | {"ratio": row["ms"] / ours["ms"]})

    def _time(self, name: str, call: Callable[[], Any], graph: bool, cost: Cost) -> Row:
        row: Row = {"shape": self.case.shape.name, "name": name}
        if self.case.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            self._synchronize()
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        timing = timed(call, self.case.device, n=self.n, warmup=self.warmup, graph=graph)
        row |= {"ms": timing.ms, "how": timing.how}
        if cost.flop:
            row["tflop_per_s"] = cost.flop / timing.ms / 1e9
        else:
            row["gb_per_s"] = (cost.moved + cost.gathered) / timing.ms / 1e6
        return row

    def _synchronize(self) -> None:
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()


def poison(tensor: Tensor) -> None:
    """Fill with what no result is."""
    tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -7)


def same_bits(left: Tensor, right: Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[left.element_size()]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of (found, true) over the largest true value; infinity where something is NaN."""
    worst = max(float((found.double() - true).abs().max()) if true.numel() else 0.0 for found, true in pairs)
    largest = max(float(true.abs().max()) if true.numel() else 0.0 for _, true in pairs)
    return worst / max(largest, 1e-30) if worst == worst else float("inf")
