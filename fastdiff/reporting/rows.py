"""The latents that stand for each row of the verdict: those with most nats in its category, in its direction.

They are of the crosscoder seed that was analysed, since only its latents have labels and contexts. A difference between
two runs shows those of both: nats of two dictionaries cannot be subtracted.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from fastdiff.reporting.schema import Findings, Run
from fastdiff.reporting.text import visible

_SIGNS = {"gained": 1, "lost": -1, "none": 0}


@dataclass(frozen=True)
class RowLatent:
    """A latent of a row."""

    run: int  # index into the findings' runs
    latent: int
    nats: float  # per scored token, mean over the category's documents
    label: str
    has_card: bool
    href: Markup


def row_latents(findings: Findings, run: int) -> dict[str, list[RowLatent]]:
    """By category of a run's own comparison, most nats first; empty where its latents have no nats."""
    of = findings.runs[run]
    if of.nats is None:
        return {}
    cards = {card.latent for card in of.cards}
    several = len(findings.runs) > 1
    found = {}
    for category, change in _changes(findings, of).items():
        row = []
        for latent in of.nats.of_row(category, _SIGNS[change]):
            label = of.labels[latent].label if latent in of.labels else ""
            nats = float(of.nats.nats[of.nats.categories.index(category), latent])
            href = _fragment("latent", str(latent), of.name if several else None)
            row.append(RowLatent(run, latent, nats, label, latent in cards, href))
        found[category] = row
    return found


def row_href(findings: Findings, category: str, run: int | None) -> Markup:
    """What opens the cards of a row; without a run those of the category's rows of all runs."""
    name = None if run is None or len(findings.runs) == 1 else findings.runs[run].name
    return _fragment("row", category, name)


def nats_of(run: Run, latent: int) -> dict[str, float | None]:
    """Nats of a latent by category, None for a category without documents; empty where there are none at all."""
    if run.nats is None:
        return {}
    values = run.nats.nats[:, latent].tolist()
    return {name: value if value == value else None for name, value in zip(run.nats.categories, values, strict=True)}


def facts(findings: Findings) -> list[dict[str, Any]]:
    """The same for scripts: of every row its latents, each with its nats per category and its own measures."""
    found = []
    for i, run in enumerate(findings.runs):
        measures = {name: run.latents.numbers(name) for name in _MEASURES}
        for category, latents in row_latents(findings, i).items():
            described = []
            for one in latents:
                label = run.labels.get(one.latent)
                values = {name: float(values[one.latent]) for name, values in measures.items()}
                described.append(
                    {
                        "latent": one.latent,
                        "label": one.label,
                        "category": label.category if label else "",
                        "nats": nats_of(run, one.latent),
                        **{name: value if value == value else None for name, value in values.items()},
                        "contexts": next((len(c.examples) for c in run.cards if c.latent == one.latent), 0),
                    }
                )
            change = _changes(findings, run)[category]
            found.append(
                {"run": run.name, "seed": run.seed, "category": category, "change": change, "latents": described}
            )
    return found


_MEASURES = ("delta_norm", "nu_error", "nu_reconstruction", "nu_activation", "cosine")


def _changes(findings: Findings, run: Run) -> dict[str, str]:
    """Change by category of a run's own comparison."""
    own = (c for c in findings.verdict.comparisons if c.kind == "pair" and c.runs == [run.name])
    return {row.category: row.change for comparison in own for row in comparison.rows}


def _fragment(kind: str, value: str, run: str | None) -> Markup:
    """As the page's script reads it; names as the page shows them."""
    where = "" if run is None else f"&amp;run={quote(visible(run), safe='')}"
    return Markup(f"#{kind}={quote(visible(value), safe='')}{where}")
