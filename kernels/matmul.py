"""Dense products of low-precision matrices with a float32 result, into a given place."""

import torch
from torch import Tensor


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write the product a @ b.

    A bfloat16 score has 8 bits: many exact ties, and a selection that depends on them. cuBLAS can sum in float32 and
    write float32 (aten::mm.dtype_out, torch 2.8); a CPU cannot, so there the factors are widened first.

    Args:
        out: [I, J], float32 or the type of a and b.
        a: [I, H].
        b: [H, J], same type as a.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
