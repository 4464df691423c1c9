"""The offline annotator against its definition, against chance, and on contexts it has not seen."""

import math

import numpy as np
import pytest
from scipy import stats

from fastdiff.annotation.baseline import NAME, NO_CATEGORY, Activity, annotate_baseline
from fastdiff.results.labels import UNINTERPRETABLE

CATEGORIES = ["code", "law", "math"]


def activity(means, category, n_categories, peaks=None) -> Activity:
    """Of every document's mean activation and peak, [F, documents]."""
    means = np.asarray(means, float)
    peaks = means * 10 if peaks is None else np.asarray(peaks, float)
    member = np.eye(n_categories, dtype=np.int64)[category]
    return Activity(
        member.sum(axis=0), (means > 0).astype(np.int64) @ member, means @ member, means**2 @ member, peaks**2 @ member
    )


def label(of: Activity, *, count=None, tokens=None, categories=None, min_count=1, min_lift=2.0, shown=()):
    n, n_categories = of.means.shape
    return annotate_baseline(
        of,
        categories or [f"c{i}" for i in range(n_categories)],
        np.full(n, 100) if count is None else np.asarray(count),
        tokens or [["x"]] * n,
        min_count=min_count,
        min_lift=min_lift,
        shown=shown,
    )


def spread(documents: list[int]) -> np.ndarray:
    """Category of each document."""
    return np.repeat(np.arange(len(documents)), documents)


def by_definition(means, peaks, category, n_categories, min_lift) -> tuple[int | None, float]:
    """Category and confidence of one latent, document by document."""

    def rates(values):
        overall = sum(values) / len(values)
        return [
            (sum(v for v, c in zip(values, category, strict=True) if c == k) + overall / 2)
            / (sum(c == k for c in category) + 0.5)
            for k in range(n_categories)
        ]

    rate, peak = rates(means), rates([p * p for p in peaks])
    best = max(range(n_categories), key=lambda k: rate[k])
    others = [k for k in range(n_categories) if k != best]
    mine = [m for m, c in zip(means, category, strict=True) if c == best]
    rest = [m for m, c in zip(means, category, strict=True) if c != best]
    confidence = rate[best] / (rate[best] + max(rate[k] for k in others))
    error = np.std(means) * math.sqrt(len(rest) / len(mine) / (len(means) - 1))
    exchanged = stats.norm.sf((np.mean(mine) - np.mean(means)) / error)
    welch = stats.ttest_ind(mine, rest, equal_var=False, alternative="greater").pvalue
    stands_out = (
        all(rate[best] >= min_lift * rate[k] and peak[best] >= min_lift * peak[k] for k in others)
        and n_categories * max(exchanged, welch) < 0.05
        and sum(m > 0 for m in mine) >= 3
    )
    return (best if stands_out else None), confidence


def test_it_equals_its_definition():
    rng = np.random.default_rng(0)
    labelled = 0
    for _ in range(150):
        documents = rng.integers(2, 30, size=4).tolist()
        category = spread(documents)
        chance = np.clip(rng.dirichlet([0.4] * 4) * 2, 0.05, 1)
        means = (rng.random(len(category)) < chance[category]) * rng.gamma(2, 1, len(category))
        peaks = means * rng.uniform(5, 20, len(category))
        min_lift = float(rng.uniform(1.1, 3))
        (found,) = label(activity([means], category, 4, [peaks]), min_lift=min_lift)
        best, confidence = by_definition(means.tolist(), peaks.tolist(), category.tolist(), 4, min_lift)
        assert found.category == (UNINTERPRETABLE if best is None else f"c{best}")
        assert found.confidence == pytest.approx(confidence, abs=6e-5)
        labelled += best is not None
    assert 30 < labelled < 120


def test_a_latent_that_fires_everywhere_gets_the_category_where_it_is_strong():
    """Firing in every document, as a typical latent of long documents does, it still has a category."""
    rng = np.random.default_rng(1)
    category = spread([40, 40, 40])
    means = 0.1 + 0.05 * rng.random((3, 120)) + np.eye(3)[:, category]
    labels = label(activity(means, category, 3), categories=CATEGORIES, tokens=[["def", " ("], ["whereas"], [" ", "="]])
    assert [found.category for found in labels] == CATEGORIES
    assert [found.label for found in labels] == ["code: def, (", "law: whereas", "math: ' ', ="]
    assert all(found.confidence > 0.85 and found.annotator == NAME for found in labels)
    assert labels[0].top_tokens == ["def", " ("]


def test_firing_alike_everywhere_is_no_one_category():
    (found,) = label(activity(np.ones((1, 120)), spread([40, 40, 40]), 3))
    assert found.category == UNINTERPRETABLE and found.confidence == 0.5
    assert found.label == f"{NO_CATEGORY}: x"


def test_two_categories_alike_are_no_one_category():
    category = spread([40, 40, 40])
    rng = np.random.default_rng(2)
    (found,) = label(activity([rng.gamma(2, 1, 120) * (category < 2)], category, 3))
    assert found.category == UNINTERPRETABLE


def test_a_large_category_does_not_win_by_its_size():
    category = spread([30, 1000])
    rng = np.random.default_rng(3)
    # a sum of 30 against about 300; then twice as many documents of the large one, at a lower rate
    rare = np.where(category == 0, 1.0, (rng.random(1030) < 0.3) * 1.0)
    common = np.where(category == 0, 1.0, 1.5) * (rng.random(1030) < 0.2)
    first, second = label(activity([rare, common], category, 2))
    assert first.category == "c0"
    assert second.category == UNINTERPRETABLE


def test_the_strongest_contexts_must_agree():
    """Most of its activation is in one category, its strongest contexts in another: a card would contradict it."""
    category = spread([40, 40])
    means = np.where(category == 0, 1.0, 0.2) * np.linspace(0.9, 1.1, 80)
    agree, differ = np.where(category == 0, 5.0, 1.0), np.where(category == 0, 5.0, 9.0)
    labels = label(activity([means, means], category, 2, [agree, differ]))
    assert [found.category for found in labels] == ["c0", UNINTERPRETABLE]


@pytest.mark.parametrize("documents", [[500] * 12, [100] * 3, [3000, 3000, 5, 2], [20, 20]])
@pytest.mark.parametrize("n_fired", [3, 10, 40])
def test_a_latent_that_fires_anywhere_is_no_one_category(documents, n_fired):
    rng = np.random.default_rng(4)
    category = spread(documents)
    means = np.zeros((400, len(category)))
    for row in means:
        where = rng.choice(len(category), n_fired, replace=False)
        row[where] = rng.gamma(0.5, 1, n_fired)
    labels = label(activity(means, category, len(documents)))
    # Bonferroni at 5 %, plus three standard errors
    assert np.mean([found.category != UNINTERPRETABLE for found in labels]) <= 0.05 + 3 * 0.011


@pytest.mark.parametrize("few", [0, 1, 4])
def test_a_category_with_few_or_no_documents_neither_attracts_nor_hides(few):
    category = spread([1000, 1000, few])
    means = np.zeros((3, len(category)))
    means[0, :20] = means[0, 1000:1020] = 1.0
    means[1, :40] = 1.0
    means[2, 0] = 1.0
    labels = label(activity(means, category, 3))
    assert [found.category for found in labels] == [UNINTERPRETABLE, "c0", UNINTERPRETABLE]


def test_one_document_does_not_decide_however_strong():
    category = spread([100, 100, 100])
    means = np.zeros((2, 300))
    means[0, 0] = 1000.0
    means[1] = 1.0
    means[1, 0] = 1000.0
    labels = label(activity(means, category, 3))
    assert [found.category for found in labels] == [UNINTERPRETABLE] * 2


def test_the_threshold_is_on_the_ratio_to_the_next_category():
    category = spread([50, 50])
    means = np.where(category == 0, 2.5, 1.0) * np.tile(np.linspace(0.9, 1.1, 50), 2)
    of = activity([means], category, 2, [np.where(category == 0, 3.0, 1.0)])
    exact = (125 + 175 / 200) / (50 + 175 / 200)
    assert label(of, min_lift=exact * (1 - 1e-9))[0].category == "c0"
    assert label(of, min_lift=exact * (1 + 1e-9))[0].category == UNINTERPRETABLE


def test_too_rare_a_latent_gets_no_label_or_if_it_is_shown_one_without_a_category():
    category = spread([50, 50])
    of = activity(np.tile((category == 0) * 1.0, (5, 1)), category, 2)
    counts = [9, 10, 0, 11, 9]
    labels = label(of, count=counts, min_count=10)
    assert [found.latent for found in labels] == [1, 3]
    assert {found.category for found in labels} == {"c0"}
    labels = label(of, count=counts, min_count=10, shown=[2, 3, 4])
    assert [(found.latent, found.category) for found in labels] == [(1, "c0"), (3, "c0"), (4, UNINTERPRETABLE)]
    assert labels[2].label == f"{NO_CATEGORY}: x"


def test_without_categories_nothing_can_be_said():
    labels = label(activity([[1.0] * 50, [0.0] * 49 + [1.0]], spread([50]), 1), categories=["all text"])
    assert [(found.category, found.confidence) for found in labels] == [(UNINTERPRETABLE, 0.5)] * 2


def test_the_order_of_categories_does_not_matter():
    rng = np.random.default_rng(5)
    category = spread([50, 80, 20, 200])
    rates = rng.dirichlet([0.3] * 4, size=50)[:, category]
    means = (rng.random((50, 350)) < 2 * rates) * rng.gamma(2, 1, (50, 350))
    order = np.array([2, 0, 3, 1])
    names = [f"c{i}" for i in range(4)]
    plain = label(activity(means, category, 4), categories=names)
    shuffled = label(activity(means, order.argsort()[category], 4), categories=[names[i] for i in order])
    assert plain == shuffled
    assert len({found.category for found in plain}) == 5


def test_on_contexts_it_has_not_seen_its_category_is_the_most_frequent():
    """A made dictionary: latents of one category, of two, and of none, all firing in most documents."""
    rng = np.random.default_rng(6)
    n_documents, n_categories = 640, 8
    category = rng.permutation(np.arange(n_documents) % n_categories)
    own = rng.integers(n_categories, size=300)
    strength = np.full((300, n_categories), 1.0)
    strength[np.arange(100), own[:100]] = rng.uniform(1.5, 6, 100)
    strength[np.arange(100, 200), own[100:200]] = strength[np.arange(100, 200), (own[100:200] + 1) % n_categories] = 4
    scale = strength[:, category]
    fires = rng.random((300, n_documents)) < 0.84
    means = fires * scale * rng.gamma(2, 0.05, (300, n_documents))
    peaks = fires * scale * rng.gamma(3, 1, (300, n_documents))
    half = rng.permutation(n_documents) % 2 == 0
    labels = label(activity(means[:, half], category[half], n_categories, peaks[:, half]))
    named = [found for found in labels if found.category != UNINTERPRETABLE]
    right = 0
    for found in named:
        shown = np.argsort(-peaks[found.latent, ~half])[:8]
        seen = np.bincount(category[~half][shown], minlength=n_categories)
        mine = int(found.category[1:])
        right += seen[mine] > np.delete(seen, mine).max()
    assert right >= 0.9 * len(named)
    # the strong ones of one category have a label, hardly any of two or none
    strong = np.flatnonzero(strength[np.arange(100), own[:100]] >= 3)
    assert np.mean([labels[i].category == f"c{own[i]}" for i in strong]) >= 0.95
    assert sum(found.latent >= 100 for found in named) <= 6


def test_counting_documents_would_not_have_found_it():
    """The same dictionary's documents with any firing are alike in all categories: that is why activation counts."""
    rng = np.random.default_rng(7)
    category = spread([80] * 8)
    means = (rng.random((50, 640)) < 0.84) * np.where(category == 3, 4.0, 1.0) * rng.gamma(2, 1, (50, 640))
    of = activity(means, category, 8)
    assert (of.fired[:, 3] / 80 < 1.25 * of.fired.sum(axis=1) / 640).all()
    assert {found.category for found in label(of)} == {"c3"}
