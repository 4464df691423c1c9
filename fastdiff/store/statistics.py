"""Float64 mean, variance and mean norm of activations, in one pass of csrc/statistics.hpp.

Kept per model and unit are n, the mean and M2 = Σ(x − mean)², per model the sum of norms; variance = Σ_D M2 / n.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import _native
from fastdiff.store.format import Stats


class RunningStats:
    """Statistics of the rows seen so far."""

    def __init__(self, n_models: int, d_model: int):
        self._n = 0
        self._mean = np.zeros((n_models, d_model))
        self._m2 = np.zeros((n_models, d_model))
        self._norms = np.zeros(n_models)

    def to_bytes(self) -> bytes:
        """The exact state: n, mean [M, D], M2 [M, D] and the sum of norms [M] as little-endian float64."""
        parts = (np.array([self._n]), self._mean.ravel(), self._m2.ravel(), self._norms)
        return np.concatenate(parts, dtype="<f8").tobytes()

    @classmethod
    def from_bytes(cls, state: bytes, n_models: int, d_model: int) -> "RunningStats":
        """Continue from `to_bytes()`.

        Raises:
            ValueError: The state is not one of `n_models` models of width `d_model`.
        """
        made = cls(n_models, d_model)
        n, mean, m2, norms = np.split(np.frombuffer(state, "<f8"), np.cumsum([1, made._mean.size, made._m2.size]))
        if len(state) % 8 or len(norms) != n_models:
            raise ValueError(f"{len(state)} bytes are no statistics of {n_models} models of width {d_model}")
        made._n = int(n[0])
        made._mean[:] = mean.reshape(made._mean.shape)
        made._m2[:] = m2.reshape(made._m2.shape)
        made._norms[:] = norms
        return made

    def add(self, activations: Tensor) -> None:
        """Count rows in.

        Args:
            activations: [n, M, D], any float type; the values as they are stored.
        """
        dtype = torch.bfloat16 if activations.dtype == torch.bfloat16 else torch.float32
        values = activations.detach().to(device="cpu", dtype=dtype).contiguous()
        name = str(dtype).removeprefix("torch.")
        data = values.view(torch.uint8).numpy()
        self._n = _native.add_statistics(data, name, self._n, self._mean, self._m2, self._norms)

    @property
    def n_rows(self) -> int:
        """Rows so far."""
        return self._n

    @property
    def mean(self) -> NDArray[np.float64]:
        """[M, D]; 0 without rows."""
        return self._mean

    def spread_about(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Σ‖x − mean‖² of each model, (M,), about any mean [M, D]."""
        return np.asarray(self._m2.sum(axis=1) + self._n * ((self._mean - mean) ** 2).sum(axis=1))

    def result(self) -> Stats | None:
        """The statistics, or None if there were no rows."""
        if self._n == 0:
            return None
        return Stats(
            n_rows=self._n,
            mean=self._mean.tolist(),
            variance=(self._m2.sum(axis=1) / self._n).tolist(),
            mean_norm=(self._norms / self._n).tolist(),
        )


class PartedStats:
    """Statistics of the rows in use and, apart from them, of those that are left out of use though they are not BOS."""

    def __init__(self, n_models: int, d_model: int):
        self._shape = (n_models, d_model)
        self._used, self._left_out = RunningStats(n_models, d_model), RunningStats(n_models, d_model)

    def to_bytes(self) -> bytes:
        """The exact state: that of the rows in use, and that of the others behind it."""
        return self._used.to_bytes() + self._left_out.to_bytes()

    @classmethod
    def from_bytes(cls, state: bytes, n_models: int, d_model: int) -> "PartedStats":
        """Continue from `to_bytes()`.

        Raises:
            ValueError: The state is not one of `n_models` models of width `d_model`.
        """
        made, middle = cls(n_models, d_model), len(state) // 2
        made._used = RunningStats.from_bytes(state[:middle], n_models, d_model)
        made._left_out = RunningStats.from_bytes(state[middle:], n_models, d_model)
        return made

    def add(self, activations: Tensor, used: NDArray[np.bool_], left_out: NDArray[np.bool_]) -> None:
        """Count rows in.

        Args:
            activations: [n, M, D], any float type; the values as they are stored.
            used: (n,), those in use.
            left_out: (n,), those of the other part; rows in neither are not counted.
        """
        self._used.add(activations if used.all() else activations[torch.from_numpy(used)])
        if left_out.any():
            self._left_out.add(activations[torch.from_numpy(left_out)])

    def result(self) -> Stats | None:
        """Those of the rows in use, or None if there were none."""
        return self._used.result()

    @property
    def n_left_out(self) -> int:
        """Rows of the other part."""
        return self._left_out.n_rows

    def variance_share(self) -> list[float]:
        """The other part's share of Σ‖x − mean‖² over both, for each model; 0 where nothing varies."""
        n = self._used.n_rows + self._left_out.n_rows
        if not self._left_out.n_rows:
            return [0.0] * self._shape[0]
        mean = self._used.mean + (self._left_out.mean - self._used.mean) * (self._left_out.n_rows / n)
        there, apart = self._used.spread_about(mean), self._left_out.spread_about(mean)
        both = there + apart
        return np.divide(apart, both, out=np.zeros_like(both), where=both > 0).tolist()
