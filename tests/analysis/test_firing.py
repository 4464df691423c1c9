"""Counts and strongest places against plain loops over all firings."""

from collections import defaultdict

import numpy as np

from fastdiff.analysis.firing import Firing

F, S, R, N_BEST = 9, 3, 2, 3


def test_running_tables_equal_loops():
    rng = np.random.default_rng(0)
    n_rows = 240
    document = np.repeat(np.arange(40), 6)
    # tokens in use: of some documents not all rows are
    length = rng.integers(6, 9, 40)
    source, role = document % S, rng.integers(0, R, n_rows)
    fires = rng.random((n_rows, F)) < 0.2
    fires[:, 4] = False
    value = np.round(rng.random((n_rows, F)), 1) + 0.1  # with ties
    firing = Firing.zeros(F, S, R, N_BEST)
    for start, stop in ((0, 60), (60, 66), (66, 240)):  # whole documents
        row, latent = np.nonzero(fires[start:stop])
        row += start
        firing.add(latent, value[row, latent], row, document[row], source[row], role[row], length[document[row]])

    for j in range(F):
        rows = np.flatnonzero(fires[:, j])
        assert firing.count[j] == len(rows)
        assert np.isclose(firing.total[j], value[rows, j].sum())
        assert firing.largest[j] == (value[rows, j].max() if len(rows) else 0)
        assert firing.by_source[j].tolist() == [int((source[rows] == s).sum()) for s in range(S)]
        assert firing.by_role[j].tolist() == [int((role[rows] == r).sum()) for r in range(R)]
        documents = np.unique(document[rows])
        assert firing.documents_by_source[j].tolist() == [int((documents % S == s).sum()) for s in range(S)]
        sums = np.zeros((3, S))
        for d in documents:
            values = value[rows[document[rows] == d], j]
            sums[:, d % S] += [values.sum() / length[d], (values.sum() / length[d]) ** 2, values.max() ** 2]
        assert np.allclose([firing.mean_by_source[j], firing.squares_by_source[j], firing.peaks_by_source[j]], sums)
        strongest = defaultdict(lambda: (0.0, 0))  # per document: largest value, lowest row among equals
        for r in rows:
            if value[r, j] > strongest[document[r]][0]:
                strongest[document[r]] = (value[r, j], r)
        want = sorted(strongest.values(), key=lambda pair: (-pair[0], pair[1]))[:N_BEST]
        n = len(want)
        assert firing.top_value[j, :n].tolist() == [v for v, _ in want]
        assert firing.top_row[j, :n].tolist() == [r for _, r in want]
        assert (firing.top_value[j, n:] == 0).all()


def test_a_batch_without_firings_changes_nothing():
    firing = Firing.zeros(F, S, R, N_BEST)
    nothing = np.zeros(0, np.int64)
    firing.add(nothing, nothing.astype(float), nothing, nothing, nothing, nothing, nothing)
    assert not firing.count.any() and not firing.top_value.any()


def test_no_examples_wanted():
    firing = Firing.zeros(F, S, R, 0)
    one = np.ones(1, np.int64)
    firing.add(one, one.astype(float), one, one, one, one, one)
    assert firing.count[1] == 1 and firing.top_value.shape == (F, 0)
