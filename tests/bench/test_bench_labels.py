"""The check of labels counts what it says: labels of some documents, contexts of the others."""

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "labels.py"
N_DOCUMENTS, LENGTH, F = 120, 10, 6
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def made(bench):
    """Latents 0 to 2 are strong in their category, 3 to 5 alike everywhere; all fire in most documents."""
    rng = np.random.default_rng(0)
    category = rng.permutation(np.arange(N_DOCUMENTS) % 3)
    of_row = np.repeat(np.arange(N_DOCUMENTS), LENGTH)
    strength = np.where(category[of_row][:, None] == np.array([0, 1, 2, -1, -1, -1]), 6.0, 1.0)
    value = (rng.random((len(of_row), F)) < 0.3) * strength * rng.gamma(3, 1, (len(of_row), F))
    row, latent = np.nonzero(value)
    firings = bench["Firings"](
        latent=latent,
        value=value[row, latent],
        row=row,
        document=of_row[row],
        tokens=np.full(N_DOCUMENTS, LENGTH),
        category=category,
        names=NAMES,
        dict_size=F,
    )
    return firings, of_row, value


def test_labels_are_of_the_chosen_documents_alone(made):
    firings, *_ = made
    half = np.arange(N_DOCUMENTS) < 60
    wanted = firings.labels(half, firings.category, min_count=10, min_lift=2.0)
    assert wanted.tolist() == [0, 1, 2, -1, -1, -1]
    # what the other half says makes no difference
    other = firings.category.copy()
    other[~half] = 0
    assert firings.labels(half, other, min_count=10, min_lift=2.0).tolist() == wanted.tolist()
    shuffled = np.random.default_rng(1).permutation(firings.category)
    assert (firings.labels(half, shuffled, min_count=10, min_lift=2.0) == -1).all()


@pytest.mark.parametrize("first", [0, 8])
def test_contexts_are_the_strongest_documents_from_a_rank_on(made, first):
    firings, of_row, value = made
    chosen = np.arange(N_DOCUMENTS) >= 40
    peaks = np.array([value[of_row == d].max(axis=0) for d in range(N_DOCUMENTS)])  # [documents, F]
    peaks[~chosen] = 0
    counts = firings.contexts(chosen, first, of_row)
    for latent in range(F):
        shown = np.argsort(-peaks[:, latent])[first : first + 8]
        assert counts[latent].tolist() == np.bincount(firings.category[shown], minlength=3).tolist()


def test_right_is_a_category_that_leads_alone(bench):
    counts = np.array([[5, 3, 0], [4, 4, 0], [0, 1, 7], [0, 0, 0], [8, 0, 0]])
    checked, good = bench["right"](np.array([0, 0, 1, 2, -1]), counts)
    assert checked.tolist() == [True, True, True, False, False]
    assert good.tolist() == [True, False, False, False, False]
    another = bench["led_by_another"](np.array([0, 0, 1, 2, -1]), counts)
    assert another.tolist() == [False, False, True, False, False]
