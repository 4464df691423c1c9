"""The least time a step can take on a machine with given rates.

Counted are the floating-point operations of the encoder's product and the bytes that any sparse step must move, each
at the best rate this machine was seen to reach; nothing is counted for launches, sorting or waiting. With
g = B·k·C values' bytes for the selected rows and P = 2·F·C weights:

    encoder    2·B·C·F / gemm
    selection  group maxima of 64 scores written and read, the k groups of a token that can hold winners read / copy
    decode     g / cache + x and the residual once / copy
    clip       2·g / cache + x and the residual once / copy; exact clip only: the norm before the update
    update     the larger of (P·s + x, residual) / copy and (P·s + x, residual + 2·g) / cache; s bytes per weight
    auxk       4 products 2·B·C·n_dead / gemm
"""

from dataclasses import dataclass

from fastdiff.benchmark.ceilings import Ceilings
from fastdiff.benchmark.shapes import Shape

_GROUP = 64


@dataclass(frozen=True)
class Floor:
    """Milliseconds by part."""

    encoder: float
    selection: float
    decode: float
    clip: float
    update: float
    auxk: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.encoder + self.selection + self.decode + self.clip + self.update + self.auxk


def state_bytes(*, moments: str, shadow: bool) -> int:
    """Bytes per weight that Adam reads and writes: weight, two moments, and the bfloat16 copy that is written."""
    return 8 + 2 * (8 if moments == "float32" else 4) + (2 if shadow else 0)


def step_floor(
    shape: Shape, ceilings: Ceilings, *, clip: str, n_dead: int = 0, moments: str = "float32", shadow: bool = True
) -> Floor:
    """The floor of a step.

    Args:
        shape: Sizes.
        ceilings: Rates.
        clip: "exact"; "previous" and "none" need no norm before the update.
        n_dead: Latents that AuxK works on.
        moments: "float32" or "bfloat16".
        shadow: Products read bfloat16 copies of the weights, of x and of the residual; else float32.
    """
    B, C, F, k = shape.n_tokens, shape.width, shape.dict_size, shape.k
    value = 2 if shadow else 4
    cache = max(ceilings.cache, ceilings.gather)
    gathered = B * k * C * value
    once = 2 * B * C * value
    adam = shape.n_weights * state_bytes(moments=moments, shadow=shadow)
    scores = 2 * B * F / _GROUP * 4 + B * min(k * _GROUP, F) * 4
    seconds = Floor(
        encoder=2 * B * C * F / ceilings.gemm,
        selection=scores / ceilings.copy,
        decode=gathered / cache + once / ceilings.copy,
        clip=2 * gathered / cache + once / ceilings.copy if clip == "exact" else 0.0,
        update=max((adam + once) / ceilings.copy, (adam + once + 2 * gathered) / cache),
        auxk=4 * 2 * B * C * n_dead / ceilings.gemm,
    )
    return Floor(*(1e3 * part for part in vars(seconds).values()))
