"""The rates this machine reaches at what a step is made of: copies, gathered rows, the encoder's product."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.timing import timed


@dataclass(frozen=True)
class Ceilings:
    """Rates, per second."""

    copy: float  # bytes read and written, of a copy larger than any cache
    cache: float  # bytes read from L2 by all multiprocessors, in order; on a CPU equal to `gather`
    gather: float  # bytes read, of kilobytes picked from L2; on a CPU decoder rows by embedding_bag
    gemm: float  # floating-point operations of the encoder's product
    precision: str  # of that product's factors, "bfloat16" or "float32"

    def lines(self) -> list[str]:
        """In words."""
        return [
            f"copy {self.copy / 1e9:,.0f} GB/s read and written",
            f"cache {self.cache / 1e9:,.0f} GB/s in order, {self.gather / 1e9:,.0f} GB/s gathered",
            f"encoder product in {self.precision} {self.gemm / 1e12:,.2f} TFLOP/s",
        ]


def measure_ceilings(shape: Shape, device: torch.device, precision: str, *, n: int = 10) -> Ceilings:
    """Measure, in about a second on a GPU.

    Args:
        shape: Whose encoder product is timed.
        device: Where.
        precision: "bfloat16" or "float32", of that product's factors; on CUDA the result is float32.
        n: Samples.
    """
    copy = _copy(device, n)
    if device.type == "cuda":
        cache, gather = (_l2(device, gathered, n) for gathered in (False, True))
    else:
        cache = gather = _rows(shape, device, n)
    return Ceilings(copy, cache, gather, _gemm(shape, device, getattr(torch, precision), n), precision)


def _copy(device: torch.device, n: int) -> float:
    n_bytes = min(2**31, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else 2**28
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    # a fresh page costs more than a copy
    target.copy_(source)
    ms = timed(lambda: target.copy_(source), device, n=n).ms
    return 2 * source.nbytes / (ms / 1e3)


def _l2(device: torch.device, gathered: bool, n: int) -> float:
    # only where there is a GPU: triton takes 0.3 s to load
    from fastdiff.benchmark.l2 import pieces, read_pieces

    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    data, piece, out = pieces(device, gathered=gathered, programs=programs, reads=512)
    ms = timed(lambda: read_pieces(data, piece, out), device, n=n, graph=True).ms
    return piece.numel() * data.shape[1] * data.element_size() / (ms / 1e3)


def _rows(shape: Shape, device: torch.device, n: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(shape.dict_size, shape.width, generator=generator, device=device)
    index = torch.randint(shape.dict_size, (shape.n_tokens, shape.k), generator=generator, device=device)
    weight = torch.rand(index.shape, generator=generator, device=device)
    ms = timed(lambda: functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight), device, n=n).ms
    return index.numel() * rows.shape[1] * rows.element_size() / (ms / 1e3)


def _gemm(shape: Shape, device: torch.device, dtype: torch.dtype, n: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.n_tokens, shape.width, generator=generator, device=device).to(dtype)
    W = torch.randn(shape.dict_size, shape.width, generator=generator, device=device).to(dtype)
    wide = device.type == "cuda" and dtype == torch.bfloat16
    out = torch.empty(shape.n_tokens, shape.dict_size, device=device, dtype=torch.float32 if wide else dtype)
    if wide:
        ms = timed(lambda: torch.mm(x, W.T, out_dtype=torch.float32, out=out), device, n=n).ms
    else:
        ms = timed(lambda: torch.mm(x, W.T, out=out), device, n=n).ms
    return 2 * shape.n_tokens * shape.dict_size * shape.width / (ms / 1e3)
