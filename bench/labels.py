"""Do labels hold on contexts that they have not seen? On runs that `fastdiff analyze` and `annotate` have finished.

    python -P bench/labels.py RUN ... [--store DIR] [--out RESULTS]

The documents of a run's store are split in two by a seeded draw within each category. Every latent is labelled from one
half, with the run's own options, and held against the eight documents of the other half in which it is strongest (what
a card would show): right if the label's category is the most frequent of them, on its own; then the halves change
places. Two more counts say what that is worth: how many latents have a label that names a category at all, and how many
have one where the categories are shuffled over the documents.

Also measured: how many of the run's own labels are contradicted by the eight contexts that a card shows (another
category is more frequent), and how they hold on the next contexts, those of ranks 9 to 16, which no card shows but
which the label has seen. Each is said of all latents, of the run's cards, and of the latents of the verdict's rows
(`by_nats`).

Fails where fewer than 90 % of the cards' labels that name a category hold on the other half.
"""

import argparse
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# read when torch loads OpenMP; threads that spin take the other core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the folder of this script, never the checkout above it (see CONTRIBUTING)
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from measure import device, versions

from fastdiff import rundir
from fastdiff.analysis.firing import Firing
from fastdiff.annotation.baseline import Activity, annotate_baseline
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.seeds import store_of
from fastdiff.crosscoder.train import directory_of
from fastdiff.results.analysis import read_analysis_summary
from fastdiff.results.labels import UNINTERPRETABLE, read_labels
from fastdiff.store.reader import ActivationStore

SHOWN = 8
AIM = 0.9
SHUFFLES = 3


@dataclass(frozen=True)
class Firings:
    """Every firing of a run's crosscoder on the rows in use.

    Attributes:
        latent: [nnz].
        value: [nnz] f·s.
        row: [nnz].
        document: [nnz] number of its document, 0 to D - 1.
        tokens: [D] tokens in use.
        category: [D] index into the names.
        names: Of the categories.
        dict_size: F.
    """

    latent: np.ndarray
    value: np.ndarray
    row: np.ndarray
    document: np.ndarray
    tokens: np.ndarray
    category: np.ndarray
    names: list[str]
    dict_size: int

    def measured(self, chosen: np.ndarray, category: np.ndarray, n_top: int) -> Firing:
        """What analyze would find of some documents, [D] bool, with their categories [D] as sources."""
        firing = Firing.zeros(self.dict_size, len(self.names), 1, n_top)
        mine = chosen[self.document]
        document = self.document[mine]
        firing.add(
            latent=self.latent[mine],
            value=self.value[mine],
            row=self.row[mine],
            document=document,
            source=category[document],
            role=np.zeros(len(document), np.int64),
            tokens=self.tokens[document],
        )
        return firing

    def labels(self, chosen: np.ndarray, category: np.ndarray, **thresholds: Any) -> np.ndarray:
        """Category of each latent by these documents, [F], -1 where none is named."""
        firing = self.measured(chosen, category, 0)
        activity = Activity(
            documents=np.bincount(category[chosen], minlength=len(self.names)),
            fired=firing.documents_by_source,
            means=firing.mean_by_source,
            squares=firing.squares_by_source,
            peaks=firing.peaks_by_source,
        )
        found = np.full(self.dict_size, -1)
        empty: list[list[str]] = [[]] * self.dict_size
        for label in annotate_baseline(activity, self.names, firing.count, empty, **thresholds):
            if label.category != UNINTERPRETABLE:
                found[label.latent] = self.names.index(label.category)
        return found

    def contexts(self, chosen: np.ndarray, first: int, document_of: np.ndarray) -> np.ndarray:
        """How many of each latent's eight strongest documents, from a rank on, are of each category, [F, C]."""
        firing = self.measured(chosen, self.category, first + SHOWN)
        counts = np.zeros((self.dict_size, len(self.names)), np.int64)
        for latent, (values, rows) in enumerate(zip(firing.top_value, firing.top_row, strict=True)):
            shown = rows[first:][values[first:] > 0]
            counts[latent] = np.bincount(self.category[document_of[shown]], minlength=len(self.names))
        return counts


def read_firings(run: Path, seed: int, store_path: Path | None) -> tuple[Firings, np.ndarray]:
    """Encode the whole store.

    Returns:
        The firings, and the document of each row of the store.

    Raises:
        SystemExit: The store has no categories or documents.
    """
    crosscoder, _ = load_crosscoder(directory_of(run, seed))
    norm = crosscoder.code_norm().detach().double()
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with ActivationStore(store_path or store_of(run)) as store, torch.no_grad():
        sources, numbers = store.column("sources"), store.column("sequence_ids")
        if sources is None or numbers is None or not store.meta.sources:
            raise SystemExit(f"{store.path}: has no sources or no sequence ids, so no categories to check")
        usable = store.usable_rows()
        rows = np.arange(store.n_rows) if usable is None else usable
        for at in batches(rows):
            values, selection = crosscoder.encode(crosscoder.normalize(store.rows(at)))
            latent = selection.col
            parts.append((latent.numpy(), (values.double() * norm[latent]).numpy(), at[selection.row.numpy()]))
        first = np.r_[True, numbers[1:] != numbers[:-1]]
        document_of = np.cumsum(first) - 1
        of_source = [source.category or source.dataset for source in store.meta.sources]
        names = sorted(set(of_source))
        category = np.array([names.index(name) for name in of_source])[sources[np.flatnonzero(first)]]
    latent, value, row = (np.concatenate(part) for part in zip(*parts, strict=True))
    tokens = np.bincount(document_of[rows], minlength=len(category))
    return Firings(latent, value, row, document_of[row], tokens, category, names, crosscoder.dict_size), document_of


def batches(rows: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
    """Rows in pieces."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def right(labels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which latents have a label that can be held against contexts, and whose label's category leads alone; [F]."""
    checked = (labels >= 0) & (counts.sum(axis=1) > 0)
    latents = np.arange(len(labels))
    others = counts.copy()
    others[latents, labels] = -1
    return checked, checked & (counts[latents, labels] > others.max(axis=1))


def led_by_another(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Latents whose label names a category and of whose contexts more are of another one, [F]."""
    return (labels >= 0) & (counts[np.arange(len(labels)), labels] < counts.max(axis=1))


def check(run: Path, store_path: Path | None, seed: int = 0) -> dict[str, Any]:
    """All counts of a run."""
    analysis = rundir.require_done(run / "analysis", f"fastdiff analyze {run}")
    options = rundir.require_done(run / "annotate", f"fastdiff annotate {run}")["config"]
    thresholds = {name: options[name] for name in ("min_count", "min_lift")}
    firings, document_of = read_firings(run, analysis["config"]["train_seed"], store_path)
    rng = np.random.default_rng(seed)
    everything = np.ones(len(firings.category), bool)
    half = np.zeros(len(everything), bool)
    for code in range(len(firings.names)):
        mine = rng.permutation(np.flatnonzero(firings.category == code))
        half[mine[: len(mine) // 2]] = True
    groups = latent_groups(run, firings.dict_size)
    found: dict[str, Any] = {"run": run.name, "categories": len(firings.names), "documents": len(everything)}
    own = np.full(firings.dict_size, -1)
    for latent, label in read_labels(run).items():
        own[latent] = firings.names.index(label.category) if label.category != UNINTERPRETABLE else -1
    halves = [
        right(firings.labels(one, firings.category, **thresholds), firings.contexts(~one, 0, document_of))
        for one in (half, ~half)
    ]
    contradicted = led_by_another(own, firings.contexts(everything, 0, document_of))
    following = right(own, firings.contexts(everything, SHOWN, document_of))
    for name, group in groups.items():
        found[name] = {
            "latents": int(group.sum()),
            "named": int((own[group] >= 0).sum()),
            "other_half": [[int(good[group].sum()), int(checked[group].sum())] for checked, good in halves],
            "contradicted": int(contradicted[group].sum()),
            "next": [int(following[1][group].sum()), int(following[0][group].sum())],
        }
    found["shuffled"] = [
        int((firings.labels(everything, rng.permutation(firings.category), **thresholds) >= 0).sum())
        for _ in range(SHUFFLES)
    ]
    return found


def latent_groups(run: Path, dict_size: int) -> dict[str, np.ndarray]:
    """[F] bool of all latents, of those with a card, and of those of the verdict's rows."""
    with sqlite3.connect(run / "analysis" / "examples.sqlite") as db:
        cards = [latent for (latent,) in db.execute("SELECT latent FROM latents")]
    summary = read_analysis_summary(run)
    groups = {"all": np.arange(dict_size), "cards": np.array(cards), "by_nats": np.array(summary["by_nats"])}
    return {name: np.isin(np.arange(dict_size), chosen) for name, chosen in groups.items()}


def share(counts: list[int]) -> str:
    """Right of checked."""
    good, checked = counts
    return f"{good}/{checked} = {good / checked:.3f}" if checked else "–"


def added(pairs: list[list[int]]) -> list[int]:
    """Sums of pairs of counts."""
    return [sum(column) for column in zip(*pairs, strict=True)]


def lines(results: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    head = ["run", "latents", "named", "other half", "contradicted by shown", "next contexts", "named when shuffled"]
    found = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for result in results:
        for name in ("all", "cards", "by_nats"):
            of = result[name]
            named = f"{of['named']} of {of['latents']}"
            shuffled = ", ".join(map(str, result["shuffled"])) if name == "all" else ""
            cells = [result["run"], name, named, share(added(of["other_half"]))]
            cells += [str(of["contradicted"]), share(of["next"]), shuffled]
            found.append(f"| {' | '.join(cells)} |")
    return found


def main() -> None:
    """Check every run, print the table, fail where the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--store", type=Path, help="of the runs, if it is no longer where they were trained")
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    given = parser.parse_args()
    results = [check(run, given.store) for run in given.runs]
    table = lines(results)
    pooled = added([counts for result in results for counts in result["cards"]["other_half"]])
    if not pooled[1]:
        raise SystemExit("no card's label names a category, so there is nothing to check")
    named, latents = added([[result["cards"]["named"], result["cards"]["latents"]] for result in results])
    said = (
        f"Cards: {named} of {latents} name a category; {share(pooled)} of the labels made of a half hold on the other."
    )
    of_runs = {result["run"]: added(result["cards"]["other_half"]) for result in results}
    least = min((run for run in of_runs if of_runs[run][1]), key=lambda run: of_runs[run][0] / of_runs[run][1])
    said += f" Least in a run: {least}, {share(of_runs[least])}."
    print("\n".join([*table, "", said]))
    if given.out is not None:
        command = "python -P bench/labels.py " + " ".join(run.name for run in given.runs)
        text = "\n".join(["# Labels on documents they have not seen", "", f"`{command}`", "", *table, "", said, ""])
        rundir.write_text(given.out.with_suffix(".md"), text)
        facts = {"schema": 1, **device(), "versions": versions("fastdiff", "torch", "numpy", "scipy"), "runs": results}
        rundir.write_text(given.out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    if pooled[0] < AIM * pooled[1]:
        raise SystemExit(f"fewer than {AIM:.0%} of the cards' labels hold")


if __name__ == "__main__":
    main()
