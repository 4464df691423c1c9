"""How good a shuffle is: what an order does to the batches made of it, beside what a perfect shuffle would do.

Tokens of one document are alike, so a batch that holds more of them than chance would tells the optimizer less.
An order that moves blocks of b neighbouring rows into a pool of P rows and mixes them there puts about B·(b - 1)/P
extra rows of its own document beside each row of a batch of B. With a share rho of the variance between documents,
the variance of a batch mean grows by the fraction rho·B·(b - 1)/P. Where a row lands says nothing about this: block
orders put every row anywhere with equal probability, and displacement and chi-square only find a biased order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# (position, count) -> (count,) row numbers of the stream positions [position, position + count)
Order = Callable[[int, int], NDArray[np.int64]]

# source and target of a row fall into this many equal parts each for the chi-square figure
_PARTS = 16


@dataclass(frozen=True)
class ShuffleQuality:
    """What `shuffle_quality` measures over one epoch.

    Attributes:
        n_rows: n, rows in whole batches.
        batch_size: B.
        partners: Other rows of the same document in a row's batch, mean over rows.
        partners_exact: Its expectation for a uniformly random order.
        adjacent: Share of neighbours in the order that are of one document.
        adjacent_exact: Its expectation for a uniformly random order.
        deff: Var(batch mean)·B/Var(x) for values with a document effect, mean over simulated values; 1 for a
            uniformly random order.
        deff_error: Standard error of `deff`.
        deff_expected: What `deff` should be from `partners` alone: 1 + rho·(partners - partners_exact).
        displacement: Mean |position - row|/n; 1/3 for a uniformly random order.
        chi_square: Chi-square per degree of freedom over 16 × 16 parts of source and position. 1 for a uniformly
            random order, about b for blocks of b rows (the rows of a block share a part), huge for an order that
            follows the source.
    """

    n_rows: int
    batch_size: int
    partners: float
    partners_exact: float
    adjacent: float
    adjacent_exact: float
    deff: float
    deff_error: float
    deff_expected: float
    displacement: float
    chi_square: float


def shuffle_quality(
    order: Order | NDArray[np.int64],
    sequence_ids: NDArray[np.integer],
    *,
    batch_size: int,
    rho: float = 0.2,
    n_effects: int = 8,
    seed: int = 0,
) -> ShuffleQuality:
    """Measure one epoch of an order.

    Args:
        order: (n,) row numbers in the order they are delivered, or a function that gives those of stream positions.
        sequence_ids: (n,) document of each row, in source order; rows of a document need not be neighbours.
        batch_size: B. Rows after the last whole batch are left out.
        rho: Share of the simulated variance that lies between documents, in [0, 1].
        n_effects: How many sets of values are simulated for `deff`, at least 1.
        seed: Of the simulated values.

    Returns:
        The figures, each beside its expectation for a uniformly random order.

    Raises:
        ValueError: The order is not one of the n rows, each once; or B, rho or n_effects cannot work.
    """
    n = len(sequence_ids)
    if not 1 <= batch_size <= n or n < 2:
        raise ValueError(f"{batch_size=} with {n} rows: it must be from 1 to the number of rows, and that at least 2")
    if not 0 <= rho <= 1 or n_effects < 1:
        raise ValueError(f"{rho=} must lie in [0, 1] and {n_effects=} must be at least 1")
    rows = order if isinstance(order, np.ndarray) else order(0, n)
    if rows.shape != (n,) or not np.array_equal(np.bincount(rows, minlength=n), np.ones(n, np.int64)):
        raise ValueError(f"the order does not hold each of the {n} rows once")
    document = np.unique(sequence_ids, return_inverse=True)[1]
    same = _same_document(document)
    in_order = document[rows]
    whole = n // batch_size * batch_size
    partners = _partners(in_order[:whole].reshape(-1, batch_size))
    partners_exact = (batch_size - 1) * same
    deff, deff_error = _deff(rows[:whole], document, batch_size, rho, n_effects, seed)
    return ShuffleQuality(
        n_rows=whole,
        batch_size=batch_size,
        partners=partners,
        partners_exact=partners_exact,
        adjacent=float((in_order[1:] == in_order[:-1]).mean()),
        adjacent_exact=same,
        deff=deff,
        deff_error=deff_error,
        deff_expected=1 + rho * (partners - partners_exact),
        displacement=float(np.abs(rows - np.arange(n)).mean() / n),
        chi_square=_chi_square(rows),
    )


def block_excess(rho: float, batch_size: int, block_rows: int, pool_rows: float) -> float:
    """The law: by which fraction mixing blocks in a pool raises the variance of a batch mean.

    It holds for documents much longer than a block and pools much smaller than the data; shorter documents and
    larger pools do less harm.

    Args:
        rho: Share of the variance that lies between documents.
        batch_size: B.
        block_rows: b; 1 is an exact shuffle.
        pool_rows: P.

    Returns:
        rho·B·(b - 1)/P.
    """
    return rho * batch_size * (block_rows - 1) / pool_rows


def _same_document(document: NDArray[np.int64]) -> float:
    """Probability that two different rows are of one document."""
    n = len(document)
    length = np.bincount(document).astype(np.float64)
    return float((length * (length - 1)).sum() / n / (n - 1))


def _partners(batches: NDArray[np.int64]) -> float:
    """Mean over rows of the other rows of its document in its batch; batches: (n_batches, B) documents."""
    n_batches, batch_size = batches.shape
    n_documents = int(batches.max()) + 1
    cell = np.sort((np.arange(n_batches)[:, None] * n_documents + batches).ravel())
    edges = np.flatnonzero(np.concatenate(([True], cell[1:] != cell[:-1], [True])))
    count = np.diff(edges).astype(np.float64)
    return float((count * (count - 1)).sum() / (n_batches * batch_size))


def _deff(
    rows: NDArray[np.int64], document: NDArray[np.int64], batch_size: int, rho: float, n_effects: int, seed: int
) -> tuple[float, float]:
    """Mean of Var(batch mean)·B/Var(x) over simulated values, and its standard error."""
    n_documents = int(document.max()) + 1
    found = np.empty(n_effects)
    for i in range(n_effects):
        random = np.random.default_rng([seed, i])
        effect = random.standard_normal(n_documents, np.float32)[document]
        x = np.sqrt(rho, dtype=np.float32) * effect
        x += np.sqrt(1 - rho, dtype=np.float32) * random.standard_normal(len(document), np.float32)
        mean = x[rows].reshape(-1, batch_size).mean(axis=1, dtype=np.float64)
        found[i] = ((mean - x.mean(dtype=np.float64)) ** 2).mean() * batch_size / x.var(dtype=np.float64)
    # one set of values: the spread of a variance estimated from so many batch means
    spread = found.std(ddof=1) if n_effects > 1 else found[0] * np.sqrt(2 * batch_size / len(rows))
    return float(found.mean()), float(spread / np.sqrt(n_effects))


def _chi_square(rows: NDArray[np.int64]) -> float:
    """Chi-square per degree of freedom of source part against position part."""
    n = len(rows)
    part = np.arange(n) * _PARTS // n
    size = np.bincount(part, minlength=_PARTS).astype(np.float64)
    expected = size[:, None] * size[None, :] / n
    found = np.bincount(part[rows] * _PARTS + part, minlength=_PARTS**2).reshape(_PARTS, _PARTS)
    filled = expected > 0  # fewer rows than parts leave some empty
    chi_square = ((found - expected)[filled] ** 2 / expected[filled]).sum()
    return float(chi_square / max(1, (np.count_nonzero(size) - 1) ** 2))
