"""Where to cut a store in two without splitting a document."""

import numpy as np
from numpy.typing import NDArray


def cut_before_holdout(sequence_ids: NDArray[np.int64], holdout: float) -> int:
    """First row of the last `holdout` share of documents.

    Documents count in the order in which they end. One is never on both sides, not even where a foreign store
    has interleaved them. At least one document is held out and at least one is not; with a single document
    nothing is held out.

    Args:
        sequence_ids: (N,), the document of each row.
        holdout: Share of documents after the cut, more than 0 and less than 1.

    Returns:
        The cut: rows [0, cut) are before it. N if there is no place to cut.
    """
    n_rows = len(sequence_ids)
    starts = np.flatnonzero(np.r_[True, sequence_ids[1:] != sequence_ids[:-1]])
    ids, run_document = np.unique(sequence_ids[starts], return_inverse=True)
    last_run = np.zeros(len(ids), np.int64)
    last_run[run_document] = np.arange(len(starts))  # the last assignment wins
    # a run ends a span when no document seen so far goes on after it
    reach = np.maximum.accumulate(last_run[run_document])
    ends = np.flatnonzero(reach == np.arange(len(starts)))
    documents_before = np.searchsorted(np.sort(last_run), ends, side="right")
    inner = documents_before < len(ids)
    if not inner.any():
        return n_rows
    wanted = len(ids) - min(max(1, round(holdout * len(ids))), len(ids) - 1)
    best = np.argmin(np.abs(documents_before[inner] - wanted))
    return int(starts[ends[inner][best] + 1])
