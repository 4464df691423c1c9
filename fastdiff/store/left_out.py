"""Which rows of a store are left out of use: BOS, first positions without BOS, and sinks.

A few rows are many times as long as the others: the first position, which attention uses as a place to put what it
does not need, and tokens such as a blank that models use in the same way. They swamp mean and scale, the loss and the
share of variance explained, while they say nothing about the text. They stay in the store, so that documents can be
put together again, but statistics, training, evaluation and analysis do without them:

    bos      the role is "bos"
    first    position 0 of a document whose first token is no BOS; in a store with positions and roles
    sink     the norm in any model is more than `max_norm` times that model's median over the first 50,000 rows that
             are not BOS

A row counts under the first of these that fits. `max_norm` 0 turns `first` and `sink` off. Norms are those of the
column `norms`, or measured. A model whose median is 0 has no sinks, and a norm that is not finite makes none: such a
row stays in use, where it is refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.store.format import ROWS_OF_MEDIAN, StoreMeta

USED, BOS, FIRST, SINK = range(4)


class LeftOutRows(NamedTuple):
    """Rows that are left out of use, no row in two of them.

    Attributes:
        bos: (N,) bool, rows with the role "bos".
        sinks: (N,) bool, rows whose norm is over the limit.
        first: (N,) bool, rows at position 0 that are not BOS.
    """

    bos: NDArray[np.bool_]
    sinks: NDArray[np.bool_]
    first: NDArray[np.bool_]


def default_max_norm(hook: str | None) -> float:
    """`--max-norm` where it is not given, by what the activations are; None is an imported store."""
    return 6.0 if hook in ("mlp_out", "attn_out") else 3.0


def norms_of(rows: Tensor) -> NDArray[np.float32]:
    """The L2 norm of each model's part of rows [n, M, D] of any float type, summed in float64: (n, M)."""
    n, n_models, d_model = rows.shape
    if not n:
        return np.empty((0, n_models), np.float32)
    # the bits of float16 are not widened natively
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    data = rows.detach().to(device="cpu", dtype=dtype).contiguous().view(torch.uint8).numpy()
    return _native.row_norms(data, str(dtype).removeprefix("torch."), n_models, d_model)


class Medians:
    """The median norm of each model over the first 50,000 rows that are not BOS, given piece by piece."""

    def __init__(self, n_models: int):
        self._norms: list[NDArray[np.float32]] = [np.empty((0, n_models), np.float32)]
        self._left = ROWS_OF_MEDIAN

    @property
    def complete(self) -> bool:
        """No further row counts."""
        return self._left == 0

    def add(self, norms: NDArray[np.float32], bos: NDArray[np.bool_]) -> None:
        """Take the next rows.

        Args:
            norms: (n, M).
            bos: (n,), rows that do not count.
        """
        if self._left:
            taken = norms[~bos][: self._left].copy()
            self._norms.append(taken)
            self._left -= len(taken)

    def result(self) -> list[float] | None:
        """(M,), or None if there was no row."""
        norms = np.concatenate(self._norms).astype(np.float64)
        return np.median(norms, axis=0).tolist() if len(norms) else None


class Rule:
    """What `max_norm` leaves out of a store.

    Args:
        meta: Its metadata.
        max_norm: The limit, 0 for none.
    """

    def __init__(self, meta: StoreMeta, max_norm: float):
        roles = meta.roles
        self.max_norm = max_norm
        self._bos = roles.index("bos") if roles and "bos" in roles else None
        self._has_roles = roles is not None

    def bos(self, columns: Mapping[str, NDArray[Any]], n_rows: int) -> NDArray[np.bool_]:
        """Which rows are BOS, (n_rows,)."""
        if self._bos is None or "roles" not in columns:
            return np.zeros(n_rows, bool)
        return np.asarray(columns["roles"] == self._bos)

    def codes(
        self, columns: Mapping[str, NDArray[Any]], norms: NDArray[np.float32] | None, median: list[float] | None, n: int
    ) -> NDArray[np.uint8]:
        """Why each row is left out: (n,) of USED, BOS, FIRST and SINK.

        Args:
            columns: `roles` and `positions` of the rows, (n,) each, as far as there are any.
            norms: (n, M); read only where the rule is on.
            median: Of each model; None if no row is anything but BOS.
            n: Number of rows.
        """
        codes = np.zeros(n, np.uint8)
        if self.max_norm:
            if norms is not None and median is not None:
                limit = self.max_norm * np.array(median)
                limit[limit == 0] = np.inf
                codes[((norms > limit) & np.isfinite(norms)).any(axis=1)] = SINK
            if self._has_roles and "roles" in columns and "positions" in columns:
                codes[columns["positions"] == 0] = FIRST
        codes[self.bos(columns, n)] = BOS
        return codes
