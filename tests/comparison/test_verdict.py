"""Every word of the verdict is reached by evidence made for it, and missed by evidence that just falls short."""

import numpy as np
import pytest

from fastdiff.comparison.verdict import (
    CategoryEvidence,
    decide,
    documents_needed,
    evidence,
    paired,
    passes_guard,
    sentences,
    tau_from_null,
    top_latents,
)

TAU = 0.05
N = 20


def documents(mean, n=N, sd=0.005):
    """(n,) values with exactly this mean and about this spread, symmetric about it."""
    noise = np.linspace(-1, 1, n) * sd * np.sqrt(3)
    return mean + noise - noise.mean()


def made(
    B=0.5, L=0.4, latents=0.3, offset=0.02, *, n=N, sd=0.005, category="c", better=2.0, entropy=5.0, signs=(1, 1, 1),
    lean=None,
) -> CategoryEvidence:  # fmt: skip
    """Evidence of three seeds; `better` is the cross entropy of the better model."""
    b = documents(B, n, sd)
    tuned = np.full(n, better) if B > 0 else better - b
    return evidence(
        category,
        np.stack([tuned + b, tuned], axis=1),
        documents(L, n, sd),
        np.stack([sign * documents(latents, n, sd) for sign in signs]),
        np.full((3, n), offset),
        entropy,
        np.arange(n),
        np.arange(n),
        lean=lean,
        seeds=(0, 1, 2),
    )


def word(item):
    found = decide([item], tau=TAU)[0]
    return found.change, found.verdict, found.reason


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        (made(), ("gained", "confirmed", None)),
        (made(B=-0.5, L=-0.4, latents=-0.3, offset=-0.02), ("lost", "confirmed", None)),
        # once B has passed τ, V and L are held to 0.4 τ
        (made(B=0.09, L=0.036, latents=0.025, offset=0.0), ("gained", "confirmed", None)),
        (made(B=0.09, L=0.036, latents=0.015, offset=0.0), ("gained", "suggestive", "not held by the latents")),
        (made(B=0.045, L=0.04, latents=0.03, offset=0.0), ("none", "no change", None)),
        (made(latents=-0.01, offset=0.2), ("gained", "suggestive", "by a mean shift")),
        (made(latents=0.0, offset=0.0), ("gained", "suggestive", "not held by the latents")),
        (made(L=0.005, latents=0.004, offset=0.0), ("gained", "suggestive", "not by this layer")),
        (made(L=-0.03, latents=-0.01, offset=0.0), ("gained", "suggestive", "not by this layer")),
        (made(L=-0.3, latents=-0.2, offset=0.0), ("gained", "both directions", None)),
        # seeds that disagree are no evidence
        (made(signs=(1, 1, -1), offset=0.0), ("gained", "suggestive", "inside: cannot tell")),
        (made(better=4.96), ("none", "neither has it", None)),
        (made(better=4.94), ("gained", "confirmed", None)),
        (made(B=0.01, L=0.3, latents=0.2), ("none", "cancelled later", None)),
        (made(B=0.01, L=0.0, latents=0.2, offset=0.0), ("none", "no change", None)),
        (made(B=0.01, L=0.0, latents=0.0, offset=0.0, lean="tuned"), ("none", "composition only", None)),
        (made(B=0.01, L=0.0, latents=0.0, offset=0.0), ("none", "no change", None)),
        (made(n=7), ("none", "cannot tell", "too few documents")),
        (made(n=8), ("gained", "confirmed", None)),
        (made(B=0.1, sd=0.5), ("none", "cannot tell", "interval too wide")),
    ],
)
def test_every_word(item, wanted):
    assert word(item) == wanted


def test_swapping_base_and_tuned_flips_the_change_and_no_word():
    for B, L, latents, offset in ((0.5, 0.4, 0.3, 0.02), (0.3, 0.0, 0.0, 0.0), (0.2, -0.2, -0.1, 0.0), (0, 0, 0, 0)):
        here, there = word(made(B, L, latents, offset)), word(made(-B, -L, -latents, -offset))
        flipped = {"gained": "lost", "lost": "gained", "none": "none"}
        assert there == (flipped[here[0]], *here[1:])


def test_figures_of_a_row():
    row = decide([made(B=0.5, L=0.4, latents=0.3, offset=0.02)], tau=TAU)[0]
    assert row.B.mean == pytest.approx(0.5) and row.L.mean == pytest.approx(0.4) and row.V.mean == pytest.approx(0.32)
    assert row.latents.mean == pytest.approx(0.3) and row.offset == pytest.approx(0.02)
    assert row.share == pytest.approx(0.8) and row.share_of_B == pytest.approx(0.64) and row.signs == "+++"
    assert row.ce_base == pytest.approx(2.5) and row.ce_tuned == pytest.approx(2.0)
    assert row.better_documents == 1 and row.worse_documents == 0 and row.documents_needed is None


def test_documents_needed_are_those_of_an_interval_of_tau_or_of_the_mean_seen():
    item = made(B=0.1, sd=0.5)
    sd, mean = item.behaviour.std(ddof=1), item.behaviour.mean()
    needed = decide([item], tau=TAU)[0].documents_needed
    assert needed == int(np.ceil(((1.959964 + 0.841621) * sd / mean) ** 2)) < (1.959964 * sd / TAU) ** 2
    small = item.behaviour - mean + 0.4 * TAU
    assert documents_needed(small, TAU, 0.95) == int(np.ceil((1.959964 * sd / TAU) ** 2))
    # too few of a large change need no more than the least
    assert documents_needed(np.array([3.0, 3.5, 2.9]), TAU, 0.95) == 8
    assert documents_needed(np.array([3.0]), TAU, 0.95) is None


def test_with_the_documents_needed_four_of_five_such_categories_are_decided():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=12)
    seen = 0.3 + (seen - seen.mean()) / seen.std(ddof=1)
    n = documents_needed(seen, TAU, 0.95)
    later = rng.normal(0.3, 1, (2000, n))
    decided = np.abs(later.mean(axis=1)) > 1.96 * later.std(axis=1, ddof=1) / np.sqrt(n)
    assert decided.mean() == pytest.approx(0.8, abs=0.03)


def test_two_runs_are_compared_on_the_documents_that_both_have():
    first, second = made(B=0.5), made(B=0.9, better=1.6)
    # the second run has the documents in another order, and one that the first lacks
    order = np.arange(N)[::-1]
    moved = evidence(
        "c", second.ce[order], second.layer[order], second.latents[:, order], second.offset[:, order], 5.0,
        np.r_[second.text[order][:-1], 99], np.r_[second.text_nats[order][:-1], 99],
    )  # fmt: skip
    found = paired([first], [moved])[0]
    shared = np.arange(1, N)  # document 0 was replaced
    assert np.array_equal(found.text, shared)
    np.testing.assert_allclose(found.behaviour, (second.behaviour - first.behaviour)[shared])
    np.testing.assert_allclose(found.latents, (second.latents - first.latents)[:, shared])
    # the guard looks at the two tuned models
    assert found.ce.mean(axis=0).min() == pytest.approx(1.6)
    assert decide([found], tau=TAU)[0].documents == N - 1


def test_a_category_of_one_run_only_is_not_compared():
    assert [of.category for of in paired([made(category="a"), made(category="b")], [made(category="b")])] == ["b"]


def test_a_null_raises_tau_to_what_it_shows_where_either_model_masters_the_text():
    masters = made(B=0.07, L=0.0, latents=-0.09, offset=0.0)
    neither = made(B=3.0, better=4.99)
    assert passes_guard(masters, TAU) and not passes_guard(neither, TAU)
    assert tau_from_null([masters, neither]) == pytest.approx((0.09, 0.09))
    assert tau_from_null([made(B=0.01, L=0.0, latents=0.0, offset=0.0)])[0] == TAU


def test_sentences_name_what_is_confirmed_first_and_no_q():
    lost = made(category="b", B=-0.5, L=-0.4, latents=-0.3, offset=-0.02)
    elsewhere = made(category="d", L=0.0, latents=0.0, offset=0.0)
    rows = decide([made(category="a"), lost, elsewhere, made(category="e", n=3)], tau=TAU)
    said = sentences(rows, tuned="it", tau=TAU)
    assert said[0] == "Confirmed: it gained a and lost b."
    assert said[1].startswith("Only suggestive: it gained d (") and said[2].startswith("It cannot be told for e")
    assert len(said) <= 3 and not any("q =" in sentence for sentence in said)
    nothing = decide([made(B=0.0, L=0.0, latents=0.0, offset=0.0)], tau=TAU)
    assert sentences(nothing, tuned="it", tau=TAU)[0].startswith("No category changed by 0.05 nats")


def test_what_neither_model_has_is_named_and_is_no_answer_where_there_is_nothing_else():
    nobodys, same = made(category="n", B=3.0, better=4.99), made(category="s", B=0.0, L=0.0, latents=0.0, offset=0.0)

    def said(*items):
        rows = decide(list(items), tau=TAU)
        assert [row.verdict for row in rows if row.category == "n"] == ["neither has it"]
        return sentences(rows, tuned="it", tau=TAU)

    poorly = "neither model predicts better than the frequencies of single tokens do."
    assert said(nobodys) == [f"Nothing can be said of what was gained or lost in n, which {poorly}"]
    assert said(nobodys, made(category="e", n=3))[0].startswith("Nothing can be said")
    assert said(nobodys, same) == [
        "No other category changed by 0.05 nats per scored token or more.", f"Nothing can be said of n, which {poorly}"
    ]  # fmt: skip
    assert said(made(category="a"), nobodys) == ["Confirmed: it gained a.", f"Nothing can be said of n, which {poorly}"]


def test_top_latents_are_those_in_the_direction_of_the_change():
    nats = np.array([[0.1, -0.5, 0.3], [0.2, 0.0, -0.1]])
    assert [(t.seed, t.latent) for t in top_latents(nats, [3, 4], 1, 3)] == [(3, 2), (4, 0), (3, 0)]
    assert [(t.seed, t.latent, t.nats) for t in top_latents(nats, [3, 4], -1, 5)] == [(3, 1, -0.5), (4, 2, -0.1)]


@pytest.mark.slow
@pytest.mark.parametrize("concept", [1, 2, 3])
def test_nulls_confirm_next_to_nothing(concept):
    """2,000 categories in which nothing changed; latents come in concepts that fire together."""
    rng = np.random.default_rng(concept)
    false = 0
    for _ in range(200):
        items = []
        for k in range(10):
            n = int(rng.integers(20, 41))
            scale = rng.uniform(0.05, 0.4)
            b = rng.standard_normal(n) * scale
            L = 0.6 * b + rng.standard_normal(n) * scale / 3
            # latents of one concept have one value, so that their sum is as noisy as that of fewer latents
            firing = np.repeat(rng.standard_normal((n, 12 // concept)), concept, axis=1).sum(axis=1) * scale / 12
            parts = np.stack([0.5 * L + firing + rng.standard_normal(n) * scale / 10 for _ in range(3)])
            ce = np.stack([2 + b, np.full(n, 2.0)], axis=1)
            items.append(evidence(f"c{k}", ce, L, parts, np.zeros((3, n)), 5.0, np.arange(n), np.arange(n)))
        rows = decide(items, tau=TAU)
        false += any(row.verdict == "confirmed" for row in rows)
    assert false <= 0.05 * 200
