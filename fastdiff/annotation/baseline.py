"""The offline annotator: a latent is about the category where it is most active, by tokens weighted by activation.

Of each document two numbers count, so that a document counts once however long it is: the mean activation of the latent
over the document's tokens in use, m, and its largest activation in it, p (the context that a card would show).

    rate_c = (Σ m + r/2) / (N_c + ½)     over the N_c documents of category c; r is the same mean over all documents
    peak_c = the same of p²              strong contexts decide, as they decide what a card shows
    t_c    = p of Welch's test that the mean of m is larger in c than in all other documents, or of the normal test
             under exchange of documents, whichever is larger

A latent's category is the one with the largest rate, if its rate *and* its peak are at least `min_lift` times those of
every other category, C·t_c < 0.05 (Bonferroni over C categories), and it fires in at least three of its documents.
Otherwise no one category stands out, and the label says so instead of picking one. Half a document at the overall rate
keeps a category of few documents from winning by luck. Confidence is rate_c / (rate_c + the next largest rate).

A category never wins by its size, since rates are means. Counting documents with any firing instead, however weak, says
nothing of a latent that fires in most documents. It needs the data set's own categories, and it never learns which
model a latent belongs to, so it cannot favour one.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fastdiff.results.labels import UNINTERPRETABLE, Label

NAME = "baseline-2"
# how a label begins that names no category
NO_CATEGORY = "no one category"
_CHANCE = 0.05
_LEAST_DOCUMENTS = 3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Activity:
    """Where F latents are active: sums over the documents of each of C categories.

    Attributes:
        documents: (C,) int64, all documents.
        fired: (F, C) int64, documents in which the latent fires.
        means: (F, C) Σ m.
        squares: (F, C) Σ m².
        peaks: (F, C) Σ p².
    """

    documents: NDArray[np.int64]
    fired: NDArray[np.int64]
    means: Array
    squares: Array
    peaks: Array

    def merged(self, member: NDArray[np.int64]) -> "Activity":
        """The same of groups of the columns; `member` is (C, groups), 1 where a column belongs to a group."""
        return Activity(**{field.name: getattr(self, field.name) @ member for field in fields(self)})


def annotate_baseline(
    activity: Activity,
    categories: list[str],
    count: NDArray[np.int64],
    top_tokens: list[list[str]],
    *,
    min_count: int,
    min_lift: float,
    shown: Collection[int] = (),
) -> list[Label]:
    """Label every latent that fires often enough.

    Args:
        activity: Of F latents.
        categories: C names.
        count: Tokens on which each latent fires, [F].
        top_tokens: Per latent.
        min_count: Latents below this count get no label.
        min_lift: Smallest ratio to the next category that counts as one category.
        shown: Latents that get a label even if they fire more rarely; it names no category.

    Returns:
        Labels by ascending latent.
    """
    best, clear, confidence = _categories(activity, min_lift)
    often = count >= min_count
    wanted = often.copy()
    wanted[[latent for latent in shown if count[latent] > 0]] = True
    labels = []
    for latent in np.flatnonzero(wanted).tolist():
        named = bool(clear[latent] and often[latent])
        category = categories[best[latent]]
        tokens = ", ".join(token.strip() or repr(token) for token in top_tokens[latent])
        labels.append(
            Label(
                latent=latent,
                label=f"{category if named else NO_CATEGORY}: {tokens}",
                category=category if named else UNINTERPRETABLE,
                confidence=round(float(confidence[latent]), 4),
                annotator=NAME,
                top_tokens=top_tokens[latent],
            )
        )
    return labels


def _categories(activity: Activity, min_lift: float) -> tuple[NDArray[np.int64], NDArray[np.bool_], Array]:
    """Of each latent the category of the largest rate, whether it stands out, and the confidence; all (F,)."""
    latents = np.arange(len(activity.means))
    # a category without documents says nothing
    known = activity.documents > 0
    rate, peak = (np.where(known, _rate(sums, activity.documents), -1.0) for sums in (activity.means, activity.peaks))
    best = rate.argmax(axis=1)
    own, own_peak = rate[latents, best], peak[latents, best]
    rate[latents, best] = peak[latents, best] = -1.0
    next_rate, next_peak = rate.max(axis=1, initial=-1.0), peak.max(axis=1, initial=-1.0)
    clear = (own > 0) & (next_rate >= 0) & (own >= min_lift * next_rate) & (own_peak >= min_lift * next_peak)
    clear &= activity.fired[latents, best] >= _LEAST_DOCUMENTS
    clear &= known.sum() * _chance(activity, best) < _CHANCE
    with np.errstate(divide="ignore", invalid="ignore"):
        confidence = np.where(next_rate >= 0, own / (own + next_rate), 0.5)
    return best, clear, np.nan_to_num(confidence, nan=0.5)


def _rate(sums: Array, documents: NDArray[np.int64]) -> Array:
    """Mean over the documents of each category, (F, C), with half a document at the overall mean added."""
    overall = sums.sum(axis=1, keepdims=True) / documents.sum()
    return (sums + overall / 2) / (documents + 0.5)


def _chance(activity: Activity, best: NDArray[np.int64]) -> Array:
    """The larger p of two tests that the mean is larger in a category than elsewhere, (F,); 1 where none can be made.

    Welch's test takes the spread of the category as it was seen, which means nothing where all of few documents happen
    to be alike; that of exchanged documents takes the spread of all documents, which hides that of a large category.
    """
    latents = np.arange(len(best))
    n, total = activity.documents[best].astype(np.float64), float(activity.documents.sum())
    m = total - n
    inside, inside_squares = activity.means[latents, best], activity.squares[latents, best]
    outside, outside_squares = (s.sum(axis=1) - s[latents, best] for s in (activity.means, activity.squares))
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = inside / n, outside / m
        # variances of the two means, and of the category's under exchange; rounding may make a zero negative
        va = np.maximum(inside_squares - n * a**2, 0) / (n - 1) / n
        vb = np.maximum(outside_squares - m * b**2, 0) / (m - 1) / m
        mean = (inside + outside) / total
        spread = (inside_squares + outside_squares) / total - mean**2
        freedom = (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (m - 1))
        freedom = np.where(va + vb == 0, total - 2, freedom)  # no spread on either side
        welch = stats.t.sf((a - b) / np.sqrt(va + vb), freedom)
        exchanged = stats.norm.sf((a - mean) / np.sqrt(np.maximum(spread, 0) * m / n / (total - 1)))
    return np.maximum(np.nan_to_num(welch, nan=1.0), np.nan_to_num(exchanged, nan=1.0))
