"""How fast the multiprocessors read what the GPU's L2 cache holds: pieces of one kilobyte, in order or gathered."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 MiB: within what all multiprocessors share of an L2 of 40 to 60 MB, far more than their own caches
BUFFER_BYTES = 16 * 2**20
_BLOCK = 256


@triton.jit
def _read_kernel(
    data_ptr,  # [n_pieces, BLOCK]
    piece_ptr,  # [programs, reads]
    out_ptr,  # [programs]
    reads,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    # one program: `reads` pieces, PIECES of them in flight, past the multiprocessor's own cache
    program = tl.program_id(0)
    total = tl.zeros([PIECES, BLOCK], dtype=tl.float32)
    for first in range(0, reads, PIECES):
        i = first + tl.arange(0, PIECES)
        piece = tl.load(piece_ptr + program * reads + i, mask=i < reads, other=0)
        place = piece[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        total += tl.load(data_ptr + place, mask=(i < reads)[:, None], other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + program, tl.sum(total))


def read_pieces(data: Tensor, piece: Tensor, out: Tensor) -> None:
    """Add up pieces.

    Args:
        data: [n_pieces, 256] float32.
        piece: Which ones each program reads, [programs, reads] int32, each in [0, n_pieces).
        out: Their sums, [programs] float32.
    """
    _read_kernel[(len(piece),)](data, piece, out, piece.shape[1], BLOCK=_BLOCK, PIECES=8, num_warps=4)


def pieces(
    device: torch.device, *, gathered: bool, programs: int, reads: int, n_bytes: int = BUFFER_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments for `read_pieces`: every program begins elsewhere and goes on in order, or jumps about."""
    n = n_bytes // (4 * _BLOCK)
    generator = torch.Generator(device).manual_seed(0)
    data = torch.randn(n, _BLOCK, generator=generator, device=device)
    if gathered:
        piece = torch.randint(n, (programs, reads), generator=generator, device=device, dtype=torch.int32)
    else:
        begin = torch.arange(programs, device=device)[:, None] * reads
        piece = ((begin + torch.arange(reads, device=device)) % n).to(torch.int32)
    return data, piece, torch.empty(programs, device=device)
