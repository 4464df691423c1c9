"""The offline annotator against its definition, and against chance."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fastdiff.annotation.baseline import NAME, UNINTERPRETABLE, annotate_baseline

CATEGORIES = ["code", "law", "math"]


def annotate(fired, documents, *, count=None, tokens=None, categories=None, min_count=1, min_lift=2.0):
    fired = np.asarray(fired)
    return annotate_baseline(
        fired,
        np.asarray(documents),
        categories or [f"c{i}" for i in range(fired.shape[1])],
        np.full(len(fired), 100) if count is None else np.asarray(count),
        tokens or [["x"]] * len(fired),
        min_count=min_count,
        min_lift=min_lift,
    )


def by_definition(fired: list[int], documents: list[int], min_lift: float) -> tuple[int | None, float]:
    """Category and confidence of one latent, in rational arithmetic with sums over every outcome."""
    n, total, half = sum(fired), sum(documents), Fraction(1, 2)
    rate = (n + half) / (total + 1)
    lifts, chances, confidences = [], [], []
    for n_c, total_c in zip(fired, documents, strict=True):
        inside = (n_c + half) / (total_c + half / rate)
        outside = (n - n_c + half) / (total - total_c + half / rate)
        lifts.append(inside / outside)
        confidences.append(inside / (inside + outside))
        tail = sum(math.comb(total_c, i) * math.comb(total - total_c, n - i) for i in range(n_c, min(n, total_c) + 1))
        chances.append(Fraction(tail, math.comb(total, n)))
    sure = [i for i in range(len(fired)) if lifts[i] >= min_lift and len(fired) * chances[i] < 0.05]
    best = max(sure or range(len(fired)), key=lambda i: lifts[i])
    return (best if sure else None), float(confidences[best])


def test_it_equals_its_definition():
    rng = np.random.default_rng(0)
    labelled = 0
    for _ in range(60):
        documents = rng.integers(0, 30, size=4)
        weights = rng.dirichlet([0.4] * 4)
        fired = np.array([rng.binomial(n, min(1.0, 2 * w)) for n, w in zip(documents, weights, strict=True)])
        min_lift = float(rng.uniform(1.1, 6))
        (label,) = annotate([fired], documents, min_lift=min_lift)
        category, confidence = by_definition(fired.tolist(), documents.tolist(), min_lift)
        assert label.category == (UNINTERPRETABLE if category is None else f"c{category}"), (fired, documents)
        assert label.confidence == pytest.approx(confidence, abs=6e-5)
        labelled += category is not None
    assert 15 < labelled < 55


def test_a_latent_gets_the_category_whose_documents_it_fires_in():
    fired = [[80, 1, 0], [0, 60, 1], [2, 0, 20]]
    labels = annotate(fired, [100, 100, 100], categories=CATEGORIES, tokens=[["def", " ("], ["whereas"], [" ", "="]])
    assert [label.category for label in labels] == CATEGORIES
    assert [label.label for label in labels] == ["code: def, (", "law: whereas", "math: ' ', ="]
    assert all(label.confidence > 0.85 and label.annotator == NAME for label in labels)
    assert labels[0].top_tokens == ["def", " ("]


def test_uneven_category_sizes_do_not_decide():
    (rare, common) = annotate([[9, 90], [2, 150]], [30, 1000])
    assert rare.category == "c0"  # 30 % against 9 %
    assert common.category == UNINTERPRETABLE  # 7 % against 15 %: most firings, but not twice the rate


@pytest.mark.parametrize("documents", [[500] * 12, [100] * 3, [3000, 3000, 5, 0], [20, 20]])
@pytest.mark.parametrize("n_fired", [1, 2, 5, 10, 20, 40])
def test_a_latent_that_fires_anywhere_is_uninterpretable(documents, n_fired):
    rng = np.random.default_rng(1)
    fired = rng.multivariate_hypergeometric(documents, n_fired, size=400)
    labels = annotate(fired, documents)
    # Bonferroni at 5 %, plus three standard errors
    assert np.mean([label.category != UNINTERPRETABLE for label in labels]) <= 0.05 + 3 * 0.011


@pytest.mark.parametrize("documents", [[1000, 1000, 0], [1000, 1000, 1], [1000, 1000, 4]])
def test_a_category_with_few_or_no_documents_does_not_attract_latents_that_never_fire_in_it(documents):
    labels = annotate([[20, 20, 0], [40, 1, 0], [1, 0, 0], [0, 0, 0]], documents)
    assert [label.category for label in labels] == [UNINTERPRETABLE, "c0", UNINTERPRETABLE, UNINTERPRETABLE]


def test_one_long_document_does_not_decide():
    # 5000 firings, all in one document of code; and the same document beside an even spread
    labels = annotate([[1, 0, 0], [11, 10, 10]], [100, 100, 100], count=[5000, 5030])
    assert [label.category for label in labels] == [UNINTERPRETABLE, UNINTERPRETABLE]


def test_firing_everywhere_is_uninterpretable():
    (label,) = annotate([[100, 100, 100]], [100, 100, 100])
    assert label.category == UNINTERPRETABLE and label.confidence == 0.5


def test_the_threshold_is_on_the_lift():
    fired, documents = [60, 30], [100, 100]
    exact = 60.5 / 30.5  # equal numbers of documents, so what is added to them cancels
    assert annotate([fired], documents, min_lift=exact - 1e-9)[0].category == "c0"
    assert annotate([fired], documents, min_lift=exact + 1e-9)[0].category == UNINTERPRETABLE


def test_too_rare_a_latent_gets_no_label():
    labels = annotate([[50, 0]] * 4, [100, 100], count=[9, 10, 0, 11], min_count=10)
    assert [label.latent for label in labels] == [1, 3]


def test_without_categories_nothing_can_be_said():
    labels = annotate([[50], [1]], [100], categories=["all text"])
    assert [label.category for label in labels] == [UNINTERPRETABLE] * 2


def test_the_order_of_categories_does_not_matter():
    rng = np.random.default_rng(2)
    documents = np.array([50, 80, 20, 200])
    fired = rng.binomial(documents, rng.dirichlet([0.5] * 4, size=50))
    order = np.array([2, 0, 3, 1])
    names = [f"c{i}" for i in range(4)]
    plain = annotate(fired, documents, categories=names)
    shuffled = annotate(fired[:, order], documents[order], categories=[names[i] for i in order])
    assert plain == shuffled
