"""Where latents fire: counts, strengths, and the strongest place in each of the best documents.

A latent's activation is reported as f·s, s = Σ_m ‖W_dec[j, m]‖, so that rescaling f against W_dec changes nothing.
Documents are what `sequence_ids` says; without them every row is its own document.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Firing:
    """Running counts of F latents over S sources and R roles; `top_*` hold the n best documents of each.

    The three sums over documents are what labels rest on: a document counts once, however long it is.
    """

    count: np.ndarray  # [F] int64, tokens
    total: np.ndarray  # [F] float64, Σ f·s
    largest: np.ndarray  # [F] float64, max f·s, 0 if it never fired
    by_source: np.ndarray  # [F, S] int64, tokens
    documents_by_source: np.ndarray  # [F, S] int64, documents with at least one firing
    mean_by_source: np.ndarray  # [F, S] float64, Σ over documents of the mean of f·s over the document's tokens
    squares_by_source: np.ndarray  # [F, S] float64, Σ over documents of the square of that mean
    peaks_by_source: np.ndarray  # [F, S] float64, Σ over documents of the square of its largest f·s
    by_role: np.ndarray  # [F, R] int64, tokens
    top_value: np.ndarray  # [F, n] float64, descending, 0 where there are fewer
    top_row: np.ndarray  # [F, n] int64

    @staticmethod
    def zeros(dict_size: int, n_sources: int, n_roles: int, n_examples: int) -> "Firing":
        """Nothing seen yet."""
        return Firing(
            count=np.zeros(dict_size, np.int64),
            total=np.zeros(dict_size),
            largest=np.zeros(dict_size),
            by_source=np.zeros((dict_size, n_sources), np.int64),
            documents_by_source=np.zeros((dict_size, n_sources), np.int64),
            mean_by_source=np.zeros((dict_size, n_sources)),
            squares_by_source=np.zeros((dict_size, n_sources)),
            peaks_by_source=np.zeros((dict_size, n_sources)),
            by_role=np.zeros((dict_size, n_roles), np.int64),
            top_value=np.zeros((dict_size, n_examples)),
            top_row=np.zeros((dict_size, n_examples), np.int64),
        )

    def add(
        self,
        latent: np.ndarray,
        value: np.ndarray,
        row: np.ndarray,
        document: np.ndarray,
        source: np.ndarray,
        role: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        """Take in the firings of a batch of whole documents; all are [nnz], `tokens` the length of the document."""
        F = len(self.count)
        self.count += np.bincount(latent, minlength=F)
        self.total += np.bincount(latent, weights=value, minlength=F)
        np.maximum.at(self.largest, latent, value)
        self.by_source += _table(latent, source, self.by_source.shape)
        self.by_role += _table(latent, role, self.by_role.shape)

        # the strongest firing of each latent in each document, then the strongest documents of each latent
        order = np.lexsort((row, -value, document, latent))
        latent, value, row, document, source, tokens = (
            a[order] for a in (latent, value, row, document, source, tokens)
        )
        first = _starts_a_run(latent) | _starts_a_run(document)
        total = np.add.reduceat(value, np.flatnonzero(first)) if len(value) else value
        latent, value, row, source, tokens = (a[first] for a in (latent, value, row, source, tokens))
        mean, shape = total / tokens, self.documents_by_source.shape
        self.documents_by_source += _table(latent, source, shape)
        self.mean_by_source += _table(latent, source, shape, mean)
        self.squares_by_source += _table(latent, source, shape, mean**2)
        self.peaks_by_source += _table(latent, source, shape, value**2)
        n = self.top_value.shape[1]
        order = np.lexsort((row, -value, latent))
        latent, value, row = latent[order], value[order], row[order]
        starts = np.flatnonzero(_starts_a_run(latent))
        rank = np.arange(len(latent)) - np.repeat(starts, np.diff([*starts, len(latent)]))
        latent, value, row, rank = (a[rank < n] for a in (latent, value, row, rank))
        touched, slot = np.unique(latent, return_inverse=True)
        merged_value = np.concatenate((self.top_value[touched], np.zeros((len(touched), n))), axis=1)
        merged_row = np.concatenate((self.top_row[touched], np.zeros((len(touched), n), np.int64)), axis=1)
        merged_value[slot, n + rank] = value
        merged_row[slot, n + rank] = row
        best = np.argsort(-merged_value, axis=1, kind="stable")[:, :n]  # stable: earlier rows win ties
        self.top_value[touched] = np.take_along_axis(merged_value, best, axis=1)
        self.top_row[touched] = np.take_along_axis(merged_row, best, axis=1)


def _starts_a_run(values: np.ndarray) -> np.ndarray:
    return np.concatenate(([True], values[1:] != values[:-1])) if len(values) else np.zeros(0, bool)


def _table(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], weights: np.ndarray | None = None
) -> np.ndarray:
    """How often each (row, column) pair occurs, or the sum of its weights."""
    return np.bincount(rows * shape[1] + columns, weights, minlength=shape[0] * shape[1]).reshape(shape)
