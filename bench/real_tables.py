"""What `bench/real_pairs.py` reads from runs, counts and prints. No models here."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from real_truth import Cell
from safetensors.numpy import load_file
from scipy import stats

# a share V/L is only worth a look where the layer changed something, in nats per token
CLEAR_LAYER = 0.05
# what V needs once behaviour has passed tau, as a share of tau
FLOOR = 0.4
# the largest gap between the parts and the layer's share that counts as complete
COMPLETE = 0.03


@dataclass(frozen=True)
class Attribution:
    """The files of `fastdiff attribute`, of the documents that have nats.

    Attributes:
        categories: Names.
        seeds: Of the crosscoders.
        tau: The smallest change that counts, nats per scored token.
        category: (N,) index into categories.
        held_out: (N,) bool, whether the crosscoder did not train on the document.
        document: (N,) its number in the store.
        layer: (N,) what the layer does to cross entropy.
        through: (S, N) what runs through the latents and the offset.
        latents: (S, N) through the latents alone.
        parts: (S, N) all parts together, which should be `layer`.
    """

    categories: list[str]
    seeds: list[int]
    tau: float
    category: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    document: NDArray[np.int64]
    layer: NDArray[np.float64]
    through: NDArray[np.float64]
    latents: NDArray[np.float64]
    parts: NDArray[np.float64]

    def only_held_out(self) -> "Attribution":
        """The same of the documents that no crosscoder trained on."""
        keep = self.held_out
        return Attribution(
            self.categories, self.seeds, self.tau, self.category[keep], keep[keep], self.document[keep],
            self.layer[keep], self.through[:, keep], self.latents[:, keep], self.parts[:, keep],
        )  # fmt: skip


def read_attribution(run: Path) -> Attribution:
    """Read a run's attribution.

    Raises:
        SystemExit: It says that it was not checked.
    """
    summary = json.loads((run / "attribution" / "summary.json").read_text(encoding="utf-8"))
    if summary["state"] != "checked":
        raise SystemExit(f"{run}: attribution is {summary['state']}: {summary['reason']}")
    found = load_file(run / "attribution" / "documents.safetensors")
    has = found["has_nats"].astype(bool)
    latents, offset, error = (found[name][:, has].astype(float) for name in ("latents", "offset", "error"))
    rest = found["left_out"][has] + found["bos"][has]
    return Attribution(
        list(summary["categories"]), list(summary["seeds"]), float(summary["tau"]), found["category"][has],
        found["held_out"][has].astype(bool), found["document"][has], found["layer"][has].astype(float),
        latents + offset, latents, latents + offset + error + rest,
    )  # fmt: skip


def by_category(of: Attribution, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the documents of each category, (…, C); NaN for one without documents."""
    means = np.full((*values.shape[:-1], len(of.categories)), np.nan)
    for c in np.unique(of.category):
        means[..., c] = values[..., of.category == c].mean(axis=-1)
    return means


def share(of: Attribution, *, latents_alone: bool = False) -> float:
    """V/L pooled over categories with |L| above `CLEAR_LAYER`: Σ V·sign(L) / Σ |L|; NaN if there is none."""
    layer = by_category(of, of.layer)
    through = by_category(of, of.latents if latents_alone else of.through).mean(axis=0)
    clear = np.abs(layer) > CLEAR_LAYER  # NaN is not
    if not clear.any():
        return float("nan")
    return float((through * np.sign(layer))[clear].sum() / np.abs(layer[clear]).sum())


def largest_gap(of: Attribution) -> float:
    """Largest |Σ parts - L| / max(|L|, τ) over categories and seeds."""
    layer = by_category(of, of.layer)
    gaps = np.abs(by_category(of, of.parts) - layer) / np.maximum(np.abs(layer), of.tau)
    return float(np.nanmax(gaps))


def contrast_claims(of: Attribution, category: NDArray[np.int64]) -> list[str]:
    """Categories whose V differs from that of all the others.

    A claim needs q < 0.05 (Welch's t-test on the mean over seeds, Benjamini and Hochberg over categories), the same
    sign in all seeds and a difference of 0.4 τ.

    Args:
        of: The documents' V.
        category: (N,) their categories, perhaps shuffled.
    """
    names, effects, p = [], [], []
    for c in np.unique(category):
        inside, outside = of.through[:, category == c], of.through[:, category != c]
        names.append(of.categories[c])
        effects.append(inside.mean(axis=1) - outside.mean(axis=1))
        p.append(stats.ttest_ind(inside.mean(axis=0), outside.mean(axis=0), equal_var=False).pvalue)
    # documents that are all alike have no p
    q = stats.false_discovery_control(np.nan_to_num(p, nan=1.0))
    return [
        name
        for name, effect, one in zip(names, effects, q, strict=True)
        if one < 0.05 and abs(np.sign(effect).sum()) == len(effect) and abs(effect.mean()) >= FLOOR * of.tau
    ]


def shuffled_claims(of: Attribution, times: int, seed: int = 0) -> int:
    """In how many of so many shuffles of the categories over the documents something is claimed."""
    rng = np.random.default_rng(seed)
    return sum(bool(contrast_claims(of, rng.permutation(of.category))) for _ in range(times))


def word(row: dict[str, Any]) -> str:
    """A row's verdict with its reason."""
    return row["verdict"] + (f" ({row['reason']})" if row["reason"] else "")


@dataclass
class Tally:
    """Cells of one kind of truth: how many, what was confirmed, and the words of the others."""

    cells: int = 0
    right: int = 0
    opposite: int = 0
    rest: Counter[str] | None = None

    def add(self, cell: Cell, row: dict[str, Any]) -> None:
        """Count a cell beside the row of the verdict; one that is confirmed has the sign of the truth or the other."""
        if self.rest is None:
            self.rest = Counter()
        self.cells += 1
        if row["verdict"] != "confirmed":
            self.rest[word(row)] += 1
        elif (row["change"] == "gained") == (cell.change > 0):
            self.right += 1
        else:
            self.opposite += 1

    @property
    def confirmed(self) -> int:
        """With either sign."""
        return self.right + self.opposite

    def words(self) -> str:
        """The other verdicts and how often, the most frequent first."""
        return "; ".join(f"{name} {n}" for name, n in (self.rest or Counter()).most_common()) or "none"


KINDS = ("clear, scorable", "clear, neither model has it", "small", "none", "all cells of null pairs")


def kind_of(cell: Cell) -> str:
    """Which tally a cell belongs to."""
    if cell.level != "clear":
        return cell.level
    return KINDS[0] if cell.scorable else KINDS[1]


def tally(results: list[dict[str, Any]], nulls: set[str]) -> dict[str, Tally]:
    """Hold the verdicts of all pairs against the truth. Cells of null pairs are counted again on their own.

    Args:
        results: Records of pairs, with `truth` and `rows`.
        nulls: Names of pairs in which nothing was taught.

    Raises:
        SystemExit: A category of the text has no row, or a row no category.
    """
    found = {kind: Tally() for kind in KINDS}
    for result in results:
        for cell, row in matched(result):
            found[kind_of(cell)].add(cell, row)
            if result["pair"] in nulls:
                found[KINDS[-1]].add(cell, row)
    return found


def matched(result: dict[str, Any]) -> list[tuple[Cell, dict[str, Any]]]:
    """Truth and verdict of every category of a pair."""
    cells = {one["category"]: Cell(**one) for one in result["truth"]}
    rows = {row["category"]: row for row in result["rows"]}
    if set(cells) != set(rows):
        raise SystemExit(f"{result['pair']}: the text has {sorted(cells)}, the verdict {sorted(rows)}")
    return [(cells[category], rows[category]) for category in cells]


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def figure(value: float | None, form: str = "+.3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or np.isnan(value) else format(value, form)


def estimate(of: dict[str, Any]) -> str:
    """A mean with its interval."""
    return f"{figure(of['mean'])} [{figure(of['low'])}, {figure(of['high'])}]"


def pair_table(result: dict[str, Any]) -> str:
    """Verdicts of a pair beside the truth."""
    lines = []
    for cell, row in matched(result):
        scorable = "" if cell.scorable else ", neither has it"
        truth = f"{cell.change:+.3f} [{cell.low:+.3f}, {cell.high:+.3f}]"
        lines.append(
            [
                cell.category, truth, cell.level + scorable, row["change"], word(row), estimate(row["B"]),
                estimate(row["L"]), estimate(row["V"]), row["signs"], figure(row["latents"]["mean"]),
                figure(row["offset"]), figure(row["share"], ".2f"), figure(row["share_of_B"], ".2f"),
            ]
        )  # fmt: skip
    head = [
        "category",
        "truth",
        "level",
        "change",
        "verdict",
        "B",
        "L",
        "V",
        "signs",
        "latents",
        "offset",
        "V/L",
        "V/B",
    ]
    return table(head, lines)


def figures_table(results: list[dict[str, Any]]) -> str:
    """What each pair cost and how much the latents hold."""
    lines = []
    for result in results:
        costs = {name: stage["cost"] for name, stage in result["stages"].items()}
        cpu = {name: cost and cost["cpu"] for name, cost in costs.items()}
        whole = None if None in cpu.values() else sum(cpu.values())
        lines.append(
            [
                result["pair"], figure(mean(result["fve"]), ".3f"), figure(result["share"], ".2f"),
                figure(result["latents_share"], ".2f"), figure(result["held_out_share"], ".2f"),
                str(result["documents"]), figure(result["gap"], ".2%"),
                *(figure(cpu.get(name), ".0f") for name in ("extract", "train", "attribute")),
                figure(whole, ".0f"), result["stages"]["compare"]["commit"],
            ]
        )  # fmt: skip
    head = ["pair", "FVE", "V/L", "latents/L", "V/L held out", "documents", "gap"]
    head += [f"{name}, CPU s" for name in ("extract", "train", "attribute", "all stages")]
    return table([*head, "commit"], lines)


def tally_lines(found: dict[str, Tally]) -> list[str]:
    """A sentence for each kind of cell."""
    lines = []
    for kind, of in found.items():
        if kind in ("none", KINDS[-1]):
            lines.append(f"- {kind}: {of.confirmed} of {of.cells} confirmed; the others: {of.words()}")
        else:
            lines.append(
                f"- {kind}: {of.right} of {of.cells} confirmed with the right sign, {of.opposite} opposite; "
                f"the others: {of.words()}"
            )
    return lines


def missed(found: dict[str, Tally], results: list[dict[str, Any]]) -> list[str]:
    """Aims that were not reached: at most 2 of 26 clear cells unconfirmed, nothing false, parts that add up."""
    problems = []
    clear = found[KINDS[0]]
    if clear.right < clear.cells * 24 / 26:
        problems.append(f"{clear.right} of {clear.cells} clear cells confirmed (24 of 26)")
    opposite = sum(of.opposite for kind, of in found.items() if kind != KINDS[-1])
    if opposite:
        problems.append(f"{opposite} confirmed with the opposite sign")
    for kind in ("none", KINDS[-1]):
        if found[kind].confirmed:
            problems.append(f"{found[kind].confirmed} confirmed in {kind}")
    problems += [f"{r['pair']}: parts miss L by {r['gap']:.1%}" for r in results if not r["gap"] <= COMPLETE]
    return problems


def mean(values: Sequence[float | None]) -> float:
    """Their mean; NaN if one of them is not there."""
    return float("nan") if None in values else sum(value for value in values if value is not None) / len(values)
