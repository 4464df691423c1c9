"""What fine-tuning changed, category by category: behaviour gives the sign, nats through the latents the evidence.

    B   behaviour: CE_base - CE_tuned of a document, mean over documents
    L   the part of B that happens up to the crosscoder's layer
    V   the part of L that runs through the latents and their offset, mean over crosscoder seeds

All in nats per scored token, positive = the tuned model does better. Documents are the unit of every interval, never
tokens or latents. A quantity is *up* or *down* if its mean reaches a floor, its q (Benjamini-Hochberg over the
comparison's categories) is below alpha and its interval is off zero; *flat* if the interval lies inside the floor;
else *unsure*. The floor of B is τ. Once B has passed, V and L are held to 0.4 τ: a layer holds only a part of B.

V is a part of B's own difference, so that both agree is a check of completeness and noise and no independent
discovery; the independent checks are nulls, disjoint documents and patching.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from fastdiff.comparison.intervals import Interval, adjusted, mean_interval
from fastdiff.results.verdict import Change, Estimate, Lean, Reason, Tested, TopLatent, Verdict, Word

Array = npt.NDArray[np.float64]
State = Literal["up", "down", "flat", "unsure"]

TAU = 0.05
MIN_DOCUMENTS = 8
MIN_LABELLED = 5
INSIDE_FLOOR = 0.4  # of τ, for V and L once B has passed τ
SHARE_FROM = 0.4  # of τ: shares of a smaller L or B are noise over noise and not printed


@dataclass(frozen=True)
class CategoryEvidence:
    """What is known of one category; nats per scored token, positive = tuned does better."""

    category: str
    ce: Array  # [documents, 2] cross entropy under base and tuned (of a difference: first and second tuned model)
    behaviour: Array  # [documents] CE_base - CE_tuned
    layer: Array  # [documents with nats] L
    latents: Array  # [seeds, documents with nats] what runs through the latents
    offset: Array  # [seeds, documents with nats] what the mean shift carries
    unigram_entropy: float  # of the scored tokens
    text: npt.NDArray[np.int64]  # [documents] the same text has the same number in every run
    text_nats: npt.NDArray[np.int64]  # [documents with nats]
    base_ce: Array  # [documents] CE under base, to see that two runs share it
    norm_ratio: float | None = None
    lean: Lean | None = None
    seeds: tuple[int, ...] = ()
    latent_nats: Array | None = None  # [seeds, latents] mean over the documents with nats


@dataclass(frozen=True)
class LabelledLatents:
    """The latents of one crosscoder seed, for the lean of a store without models."""

    unmatched: Array  # [latents] energy only in tuned minus energy only in base, over all; -1 to 1; NaN = left out
    labels: npt.NDArray[np.int64]  # [latents] index of the category, -1 = none


@dataclass(frozen=True)
class CategoryLean:
    """How the labelled latents of a category lean; says nothing about behaviour."""

    category: str
    labelled: int  # fewest over the seeds
    z: float  # mean over seeds
    q: float
    signs: str
    lean: Lean | None
    cannot_tell: bool  # fewer than five labelled latents in some seed


def evidence(
    category: str,
    ce: npt.ArrayLike,
    layer: npt.ArrayLike,
    latents: npt.ArrayLike,
    offset: npt.ArrayLike,
    unigram_entropy: float,
    text: npt.ArrayLike,
    text_nats: npt.ArrayLike,
    *,
    norm_ratio: float | None = None,
    lean: Lean | None = None,
    seeds: Sequence[int] = (),
    latent_nats: Array | None = None,
) -> CategoryEvidence:
    """Evidence of one run's pair of models; shapes as in `CategoryEvidence`.

    Raises:
        ValueError: Shapes do not fit each other.
    """
    both = np.asarray(ce, dtype=np.float64).reshape(-1, 2)
    parts, shifts = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (latents, offset))
    whole = np.asarray(layer, dtype=np.float64)
    numbers, numbers_nats = np.asarray(text, dtype=np.int64), np.asarray(text_nats, dtype=np.int64)
    if parts.shape != shifts.shape or parts.shape[1] != len(whole) or len(numbers_nats) != len(whole):
        raise ValueError(f"{category}: layer, latents and offset are not of the same documents")
    if len(numbers) != len(both):
        raise ValueError(f"{category}: {len(both)} documents but {len(numbers)} text numbers")
    return CategoryEvidence(
        category=category,
        ce=both,
        behaviour=both[:, 0] - both[:, 1],
        layer=whole,
        latents=parts,
        offset=shifts,
        unigram_entropy=unigram_entropy,
        text=numbers,
        text_nats=numbers_nats,
        base_ce=both[:, 0],
        norm_ratio=norm_ratio,
        lean=lean,
        seeds=tuple(seeds) or tuple(range(len(parts))),
        latent_nats=latent_nats,
    )


def _occurrences(text: npt.NDArray[np.int64]) -> dict[tuple[int, int], int]:
    """Place of the k-th document with a text, by (text, k): a text may stand in a category twice."""
    seen: defaultdict[int, int] = defaultdict(int)
    places = {}
    for place, number in enumerate(text.tolist()):
        places[number, seen[number]] = place
        seen[number] += 1
    return places


def _matched(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Places of the texts that both have, in the first's order."""
    a, b = _occurrences(first), _occurrences(second)
    shared = [key for key in a if key in b]
    return [a[key] for key in shared], [b[key] for key in shared]


def paired(first: Sequence[CategoryEvidence], second: Sequence[CategoryEvidence]) -> list[CategoryEvidence]:
    """Evidence of two runs with one base: the second minus the first, on the documents that both have.

    The two models of the result are the two tuned ones, so that the guard looks at the better of them. Seeds are
    taken in their order, as many as both runs have. Categories that only one run has are left out; the caller
    says so. Latents of two dictionaries cannot be subtracted, so there are no nats per latent.
    """
    others = {item.category: item for item in second}
    found = []
    for a in first:
        if a.category not in others:
            continue
        b = others[a.category]
        here, there = _matched(a.text, b.text)
        nats_here, nats_there = _matched(a.text_nats, b.text_nats)
        seeds = min(len(a.latents), len(b.latents))
        found.append(
            CategoryEvidence(
                category=a.category,
                ce=np.stack([a.ce[here, 1], b.ce[there, 1]], axis=1),
                behaviour=b.behaviour[there] - a.behaviour[here],
                layer=b.layer[nats_there] - a.layer[nats_here],
                latents=b.latents[:seeds, nats_there] - a.latents[:seeds, nats_here],
                offset=b.offset[:seeds, nats_there] - a.offset[:seeds, nats_here],
                unigram_entropy=a.unigram_entropy,
                text=a.text[here],
                text_nats=a.text_nats[nats_here],
                base_ce=a.base_ce[here],
                seeds=a.seeds[:seeds],
            )
        )
    return found


def state(interval: Interval, q: float, floor: float, alpha: float, agree: bool = True) -> State:
    """Whether a quantity went up, down or stayed; `agree` is whether all seeds' signs are equal."""
    if abs(interval.mean) >= floor and q < alpha and agree and interval.off_zero:
        return "up" if interval.mean > 0 else "down"
    return "flat" if interval.inside(floor) else "unsure"


def passes_guard(item: CategoryEvidence, tau: float) -> bool:
    """Whether the better model beats the entropy of single tokens by τ; else nobody has the capability."""
    return bool(len(item.ce)) and float(item.ce.mean(axis=0).min()) <= item.unigram_entropy - tau


@dataclass(frozen=True)
class _Measured:
    """Means, intervals and q of one category."""

    item: CategoryEvidence
    enough: bool
    B: Interval
    L: Interval
    V: Interval
    latents: Interval
    seed_means: list[float]
    q: dict[str, float]

    @property
    def agree(self) -> bool:
        """All seeds' V have one sign."""
        return len(set(np.sign(self.seed_means))) == 1


def _measure(items: Sequence[CategoryEvidence], confidence: float) -> list[_Measured]:
    """Intervals of every category, and q over the categories that have enough documents to be decided."""
    rows = []
    for item in items:
        through = item.latents + item.offset
        enough = len(item.layer) >= MIN_DOCUMENTS and len(item.behaviour) >= MIN_DOCUMENTS and len(through) > 0
        empty: Array = np.zeros(0)
        B, L, V, latents = (
            mean_interval(x, confidence)
            for x in (
                item.behaviour,
                item.layer,
                through.mean(axis=0) if len(through) else empty,
                item.latents.mean(axis=0) if len(through) else empty,
            )
        )
        means = through.mean(axis=1).tolist() if through.size else []
        rows.append(_Measured(item, enough, B, L, V, latents, means, {}))
    family = [row for row in rows if row.enough]
    for name in ("B", "L", "V"):
        for row, q in zip(family, adjusted([getattr(row, name).p for row in family]), strict=True):
            row.q[name] = q
    return rows


def _word(row: _Measured, tau: float, alpha: float) -> tuple[Change, Word, Reason | None]:
    """The verdict of one category; the order of the checks is part of the rule."""
    if not row.enough:
        few = len(row.item.behaviour) < MIN_DOCUMENTS
        return "none", "cannot tell", "too few documents" if few else "too few traced documents"
    b = state(row.B, row.q["B"], tau, alpha)
    if b == "unsure" and row.B.half_width > tau:
        return "none", "cannot tell", "interval too wide"
    v = state(row.V, row.q["V"], tau, alpha, row.agree)
    layer = state(row.L, row.q["L"], tau, alpha)
    if b in ("flat", "unsure"):
        if b == "flat" and v in ("up", "down") and layer == v:
            return "none", "cancelled later", None
        if b == "flat" and v == "flat" and row.item.lean is not None:
            return "none", "composition only", None
        return "none", "no change", None
    if not passes_guard(row.item, tau):
        return "none", "neither has it", None
    change: Change = "gained" if b == "up" else "lost"
    sign = 1 if b == "up" else -1
    floor = INSIDE_FLOOR * tau
    v_low = state(row.V, row.q["V"], floor, alpha, row.agree)
    layer_low = state(row.L, row.q["L"], floor, alpha)
    if v_low == b and layer_low == b:
        own = row.latents.off_zero and row.latents.mean * sign > 0
        return (change, "confirmed", None) if own else (change, "suggestive", "by a mean shift")
    if v in ("up", "down") and v != b and layer == v:
        return change, "both directions", None
    # V against B while L goes with it: what the latents hold is not the change, the crosscoder's error has it
    if layer_low == b and v_low != "unsure":
        return change, "suggestive", "not held by the latents"
    if row.L.inside(floor) or (row.L.off_zero and row.L.mean * sign < 0):
        return change, "suggestive", "not by this layer"
    return change, "suggestive", "inside: cannot tell"


def documents_needed(documents: Array, tau: float, confidence: float) -> int | None:
    """How many would probably decide a category, at least eight; None where the spread is unknown.

    Either an interval of ± τ, (z sd / τ)², or, where that takes fewer, what finds in four of five cases that a mean as
    large as the one seen is not zero, ((z + 0.84) sd / mean)², if it exceeds τ.
    """
    if len(documents) < 2:
        return None
    z, power = float(stats.norm.ppf((1 + confidence) / 2)), float(stats.norm.ppf(0.8))
    sd, mean = float(documents.std(ddof=1)), abs(float(documents.mean()))
    needed = (z * sd / tau) ** 2
    if mean > tau:
        needed = min(needed, ((z + power) * sd / mean) ** 2)
    return max(MIN_DOCUMENTS, math.ceil(needed))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _estimate(found: Interval) -> Estimate:
    return Estimate(mean=_finite(found.mean), low=_finite(found.low), high=_finite(found.high))


def _tested(found: Interval, q: float | None) -> Tested:
    return Tested(mean=_finite(found.mean), low=_finite(found.low), high=_finite(found.high), p=found.p, q=q)


def _ratio(part: float, whole: float, tau: float) -> float | None:
    return _finite(part / whole) if abs(whole) >= SHARE_FROM * tau else None


def top_latents(nats: Array, seeds: Sequence[int], sign: int, count: int = 5) -> list[TopLatent]:
    """The latents with most nats in the direction of a change, over all seeds.

    Args:
        nats: [seeds, latents] mean over the category's documents.
        seeds: Numbers of the seeds.
        sign: 1 for a gain, -1 for a loss, 0 for the largest of either sign.
        count: How many at most; latents without nats in that direction are left out.
    """
    rank = np.abs(nats) if sign == 0 else nats * sign
    order = np.argsort(-rank, axis=None, kind="stable")[:count]
    places = [divmod(int(i), nats.shape[1]) for i in order]
    return [TopLatent(seed=seeds[s], latent=j, nats=float(nats[s, j])) for s, j in places if rank[s, j] > 0]


def decide(
    evidence: Sequence[CategoryEvidence], *, tau: float = TAU, alpha: float = 0.05, confidence: float = 0.95
) -> list[Verdict]:
    """Verdict of every category of one comparison, in the order given.

    Args:
        evidence: The categories of one pair of models, or of two runs (`paired`).
        tau: Nats per scored token below which a difference is no change.
        alpha: Bound on q.
        confidence: Coverage of the intervals.
    """
    verdicts = []
    for row in _measure(evidence, confidence):
        item = row.item
        change, word, reason = _word(row, tau, alpha)
        ce = item.ce.mean(axis=0) if len(item.ce) else np.full(2, math.nan)
        sign = {"gained": 1, "lost": -1, "none": 0}[change]
        verdicts.append(
            Verdict(
                category=item.category,
                change=change,
                verdict=word,
                reason=reason,
                documents=len(item.behaviour),
                documents_nats=len(item.layer),
                # more text does not help where too little of it was traced
                documents_needed=None
                if word != "cannot tell" or reason == "too few traced documents"
                else documents_needed(item.behaviour, tau, confidence),
                ce_base=_finite(float(ce[0])),
                ce_tuned=_finite(float(ce[1])),
                unigram_entropy=_finite(item.unigram_entropy),
                B=_tested(row.B, row.q.get("B")),
                L=_tested(row.L, row.q.get("L")),
                V=_tested(row.V, row.q.get("V")),
                latents=_estimate(row.latents),
                offset=float(item.offset.mean()) if item.offset.size else None,
                seed_means=row.seed_means,
                signs="".join("+" if x > 0 else "-" if x < 0 else "0" for x in row.seed_means),
                share=_ratio(row.V.mean, row.L.mean, tau),
                share_of_B=_ratio(row.V.mean, row.B.mean, tau),
                norm_ratio=item.norm_ratio,
                lean=item.lean,
                better_documents=float((item.behaviour > tau).mean()) if len(item.behaviour) else None,
                worse_documents=float((item.behaviour < -tau).mean()) if len(item.behaviour) else None,
                top_latents=[] if item.latent_nats is None else top_latents(item.latent_nats, item.seeds, sign),
            )
        )
    return verdicts


def tau_from_null(evidence: Iterable[CategoryEvidence], least: float = TAU) -> tuple[float, float | None]:
    """τ from an A/A run, whose models differ by nothing that counts.

    Returns:
        τ = max(least, largest), and largest: the greatest |B| or |V| over the categories of at least eight documents
        that pass the guard; None if there is no such category.
    """
    shown = []
    for item in evidence:
        if len(item.behaviour) >= MIN_DOCUMENTS and passes_guard(item, least):
            shown.append(abs(float(item.behaviour.mean())))
            if item.latents.size:
                shown.append(abs(float((item.latents + item.offset).mean())))
    return max([least, *shown]), max(shown, default=None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentences(verdicts: Sequence[Verdict], *, tuned: str, tau: float) -> list[str]:
    """At most four plain sentences of one comparison: what is confirmed, only suggestive, not counted, and open."""
    found = []
    for word, start in (("confirmed", f"Confirmed: {tuned}"), ("suggestive", f"Only suggestive: {tuned}")):
        halves = []
        for change in ("gained", "lost"):
            rows = [v for v in verdicts if v.change == change and (v.verdict == "confirmed") == (word == "confirmed")]
            if rows:
                names = [v.category if word == "confirmed" else f"{v.category} ({v.reason or v.verdict})" for v in rows]
                halves.append(f"{change} {_listed(names)}")
        if halves:
            found.append(f"{start} {' and '.join(halves)}.")
    open_rows = [v for v in verdicts if v.verdict == "cannot tell"]
    nobodys = [v.category for v in verdicts if v.verdict == "neither has it"]
    poorly = "neither model predicts better than the frequencies of single tokens do"
    if not found and len(open_rows) + len(nobodys) < len(verdicts):
        where = "No other category" if open_rows or nobodys else "No category"
        found.append(f"{where} changed by {tau:g} nats per scored token or more.")
    if nobodys and len(nobodys) + len(open_rows) == len(verdicts):
        found.append(f"Nothing can be said of what was gained or lost in {_listed(nobodys)}, which {poorly}.")
    elif nobodys:
        found.append(f"Nothing can be said of {_listed(nobodys)}, which {poorly}.")
    if open_rows:
        needed = [v.documents_needed for v in open_rows if v.documents_needed is not None]
        remedy = f"; about {max(needed)} documents of each would probably decide that" if needed else ""
        found.append(f"It cannot be told for {_listed([v.category for v in open_rows])}{remedy}.")
    return found


def rank_z(x: Array, y: Array) -> float:
    """Z of the Mann-Whitney test that x lies above y, with the variance for ties; 0 below five values on a side."""
    if min(len(x), len(y)) < MIN_LABELLED:
        return 0.0
    ranks = stats.rankdata(np.concatenate([x, y]))
    n, m, total = len(x), len(y), len(x) + len(y)
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    variance = n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    return float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0


def leans(seeds: Sequence[LabelledLatents], categories: Sequence[str], *, alpha: float = 0.05) -> list[CategoryLean]:
    """Lean of every category by a rank test of unmatched energy: its labelled latents against all others.

    For stores without models. Activations only: no sign of behaviour, so never gained or lost. The mean of z over
    seeds is taken as one z, since seeds are no new evidence; a lean needs q < alpha and all seeds' signs equal.
    """
    measured = []
    for k, _ in enumerate(categories):
        zs, fewest = [], []
        for seed in seeds:
            known = np.isfinite(seed.unmatched)
            own = known & (seed.labels == k)
            zs.append(rank_z(seed.unmatched[own], seed.unmatched[known & ~own]))
            fewest.append(int(own.sum()))
        measured.append((zs, min(fewest, default=0)))
    enough = [n >= MIN_LABELLED for _, n in measured]
    qs = iter(
        adjusted([float(2 * stats.norm.sf(abs(np.mean(zs)))) for (zs, _), k in zip(measured, enough, strict=True) if k])
    )
    found = []
    for name, (zs, fewest_labelled), decided in zip(categories, measured, enough, strict=True):
        q = next(qs) if decided else 1.0
        z = float(np.mean(zs)) if zs else 0.0
        agree = len({np.sign(x) for x in zs}) == 1
        lean: Lean | None = ("tuned" if z > 0 else "base") if decided and q < alpha and agree and z else None
        signs = "".join("+" if x > 0 else "-" if x < 0 else "0" for x in zs)
        found.append(CategoryLean(name, fewest_labelled, z, q, signs, lean, not decided))
    return found


def lean_rows(found: Sequence[CategoryLean], norm_ratios: Sequence[float | None]) -> list[Verdict]:
    """Rows of a comparison that was not checked: nothing is known of behaviour, so every word is `cannot tell`."""
    return [
        Verdict(
            category=row.category,
            change="none",
            verdict="cannot tell",
            reason="too few labelled latents" if row.cannot_tell else None,
            lean=row.lean,
            norm_ratio=ratio,
        )
        for row, ratio in zip(found, norm_ratios, strict=True)
    ]
