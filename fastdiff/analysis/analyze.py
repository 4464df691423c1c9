"""The analysis stage: one pass over the store measures every latent; then the chosen ones get examples.

<run>/analysis/
    latents.csv          one row per latent; `results.analysis.LATENT_COLUMNS` says what each column means
    summary.json         counts by class, `left_out` (rows out of use besides BOS), quality on held-out rows, Δ_norm
                         histogram, how many latents other seeds have too, `splice` (see there), what the columns mean
    seeds.safetensors    latents that one model alone has, in the run's other crosscoders; see `fastdiff.results.seeds`
    firing.safetensors   count_by_source [F, S], documents_by_source [F, S], count_by_role [F, R], all int64; float64
                         [F, S] mean_by_source, squares_by_source, peaks_by_source, see `fastdiff.analysis.firing`
    examples.sqlite      see `fastdiff.analysis.examples`

A run that `fastdiff attribute` has been through gets examples also of the latents with most nats in each category, of
either sign: the report shows them for the category's row. `by_nats` of summary.json lists them.

`stability` of summary.json, null without other seeds to compare with: {"seeds": [1, 2], "tokens": 50000,
"min_cosine": 0.7, "min_coactivation": 0.5, "observed": latents that fired on those tokens, "stable": those of them that
at least half of the seeds have, "exclusive": latents of one model (by class or latent scaling) among the observed,
"exclusive_stable": among the stable}.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fastdiff import rundir
from fastdiff.analysis.classes import CLASSES
from fastdiff.analysis.examples import display, write_examples
from fastdiff.analysis.firing import Firing
from fastdiff.analysis.measure import concepts_of_sides, latent_table, one_pass
from fastdiff.analysis.other_seeds import other_seeds
from fastdiff.analysis.stability import SAMPLE, stability
from fastdiff.config import AnalyzeConfig
from fastdiff.crosscoder.metrics import Quality
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.rows import evaluation_rows, spread_rows
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.seeds import comparable, finished_seeds, store_of
from fastdiff.crosscoder.train import directory_of
from fastdiff.device import resolve_device
from fastdiff.errors import InputError
from fastdiff.progress import SILENT, Progress
from fastdiff.results.analysis import LATENT_COLUMNS, LATENTS, SUMMARY, SUMMARY_SCHEMA, write_latents
from fastdiff.results.nats import LatentNats, read_latent_nats
from fastdiff.results.seeds import SEEDS, write_seed_latents
from fastdiff.store.reader import ActivationStore

# tensors of firing.safetensors, attributes of `Firing`
TABLES = {
    "count_by_source": "by_source",
    "documents_by_source": "documents_by_source",
    "count_by_role": "by_role",
    "mean_by_source": "mean_by_source",
    "squares_by_source": "squares_by_source",
    "peaks_by_source": "peaks_by_source",
}
OUTPUTS = [LATENTS, SUMMARY, "firing.safetensors", "examples.sqlite", SEEDS]
# share of the cards that show latents both models have, as a control for the reader and the annotator
_CONTROL_SHARE = 0.2
_TOP_TOKENS = 5
# a latent is stable if this share of the other seeds has it too: one that failed to train decides nothing among many
_STABLE_SHARE = 0.5
_WITHOUT = {
    "sequence_ids": "every row counts as a document of its own, and no examples are shown",
    "token_ids": "no examples are shown",
    "sources": "there are no categories to compare",
}


def analyze(run: Path, config: AnalyzeConfig, progress: Progress = SILENT, *, store_path: Path | None = None) -> Path:
    """Measure every latent of a run's crosscoder.

    Args:
        run: A run directory that `train` has finished.
        config: How.
        progress: Where to report.
        store_path: The store, if it is no longer where `train` read it.

    Returns:
        `<run>/analysis`.

    Raises:
        InputError: The crosscoder or the store is missing, changed, or not of two models.
        LockedError: Another process writes to the run.
    """
    source, target = directory_of(run, config.train_seed), run / "analysis"
    settings = config.model_dump()
    with rundir.locked(run) as lock:
        finished = finished_seeds(run)
        if finished and config.train_seed not in finished:
            seeds = ", ".join(map(str, finished))
            raise InputError(f"{run}: has no crosscoder of seed {config.train_seed}; choose --train-seed {seeds}")
        trained = rundir.require_done(source, f"fastdiff train STORE -o {run} --seed {config.train_seed}")
        inputs = {"model": trained["outputs"]["model.safetensors"], "store": trained["inputs"]["store"]}
        others, hashes = comparable(run, finished, config.train_seed, inputs["store"], progress)
        nats, attributed = read_latent_nats(run, config.train_seed, inputs["model"])
        # an analysis by a version that wrote other tables is not up to date
        inputs |= hashes | attributed | {"tables": rundir.sha256_text(rundir.canonical_json([TABLES, LATENT_COLUMNS]))}
        stage = lock.stage(target, "analyze", settings, inputs, OUTPUTS, schemas={SUMMARY: SUMMARY_SCHEMA})
        if stage.up_to_date():
            progress.say(f"analyze: {target} is up to date")
            return target
        crosscoder, facts = load_crosscoder(source)
        crosscoder.to(resolve_device(config.device))
        if facts["n_models"] != 2:
            raise InputError(f"{source}: a crosscoder of {facts['n_models']} models; analyze compares exactly two")
        with ActivationStore(store_path or store_of(run)) as store:
            if store.sha256() != inputs["store"]:
                raise InputError(f"{store.path}: not the store this crosscoder was trained on (its hash differs)")
            with stage:
                _analyze(store, crosscoder, facts, others, nats, config, target, progress)
    return target


def _analyze(
    store: ActivationStore,
    crosscoder: Crosscoder,
    facts: dict[str, Any],
    others: dict[int, Path],
    nats: LatentNats | None,
    config: AnalyzeConfig,
    target: Path,
    progress: Progress,
) -> None:
    n_rows = min(store.n_rows, config.max_tokens or store.n_rows)
    for column, lack in _WITHOUT.items():
        if store.column(column) is None:
            progress.say(f"analyze: the store has no {column}: {lack}")
    if store.must_be_measured:
        progress.say(f"analyze: {store.path} has no column norms; its rows are measured")
    rows = _usable(store, n_rows)
    # first: what it refuses should not cost a pass
    spliced = _splice(store, crosscoder, facts, config, progress) if config.splice else None
    sums, firing, totals = one_pass(store, crosscoder, n_rows, rows, config.batch_size, config.examples, progress)
    table = latent_table(crosscoder, sums, firing, len(rows), config)
    table["top_tokens"] = _top_tokens(store, firing)
    table["stability"], stable = _stability(store, crosscoder, others, rows, table, config, progress)
    table["concept"] = concepts_of_sides(store, crosscoder, rows, table, config, progress)
    counted = others if config.all_seeds else {}
    of_others = other_seeds(store, counted, n_rows, rows, config, progress)
    quality, held_out = _quality(store, crosscoder, facts, config)
    by_nats = [] if nats is None else nats.of_any_row()
    chosen = _choose(table, by_nats, config)
    write_examples(
        target / "examples.sqlite",
        store,
        crosscoder,
        chosen,
        firing.top_value,
        firing.top_row,
        context=config.context,
        batch_size=config.batch_size,
    )
    write_latents(target.parent, table)
    with rundir.atomic_path(target / "firing.safetensors") as temporary:
        save_file({name: getattr(firing, of) for name, of in TABLES.items()}, temporary)
    write_seed_latents(target, of_others)
    delta, fired = table["delta_norm"], firing.count > 0
    counts, edges = np.histogram(delta[fired & np.isfinite(delta)], bins=40, range=(0, 1))
    rundir.write_json(
        target / SUMMARY,
        {
            "schema": SUMMARY_SCHEMA,
            "n_tokens": len(rows),
            "dict_size": crosscoder.dict_size,
            "activation": crosscoder.activation,
            "k": crosscoder.k,
            "models": [model.model_dump() for model in store.meta.models],
            "classes": {name: int((table["class"][fired] == name).sum()) for name in CLASSES},
            "specific": {side: int((table["specific"] == side).sum()) for side in ("base", "tuned")},
            "never_fired": int((~fired).sum()),
            "stability": stable,
            "seeds": {"analysed": config.train_seed, "others": list(counted)},
            "splice": spliced,
            "left_out": store.left_out_facts(),
            "by_nats": by_nats,
            "quality": {**quality.facts(), "rows": held_out},
            "delta_norm_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "sources": [s.model_dump() for s in store.meta.sources or []],
            "tokens_by_source": totals["tokens"],
            "documents_by_source": totals["documents"],
            "energy_by_source": totals["energy"],
            "roles": store.meta.roles or [],
            "thresholds": {
                "nu_error_max": config.nu_error_max,
                "nu_reconstruction_max": config.nu_reconstruction_max,
            },
            "columns": LATENT_COLUMNS,
        },
    )
    classes = ", ".join(f"{(table['class'][fired] == name).sum()} {name}" for name in CLASSES)
    n_specific = {side: int((table["specific"] == side).sum()) for side in ("tuned", "base")}
    progress.say(
        f"analyze: {classes}; by latent scaling {n_specific['tuned']} only tuned, {n_specific['base']} only base"
    )


def _usable(store: ActivationStore, n_rows: int) -> NDArray[np.int64]:
    """Which of the first rows are in use."""
    rows = store.usable_rows()
    rows = np.arange(n_rows) if rows is None else rows[rows < n_rows]
    if not len(rows):
        raise InputError(f"{store.path}: no row to analyse among the first {n_rows}; raise --max-tokens")
    return rows


def _top_tokens(store: ActivationStore, firing: Firing) -> np.ndarray:
    token_ids = store.column("token_ids")
    lists = []
    for value, row in zip(firing.top_value, firing.top_row, strict=True):
        ids = [] if token_ids is None else token_ids[row[value > 0]].tolist()
        tokens = dict.fromkeys(display(store.vocabulary, token) for token in ids)
        lists.append(json.dumps(list(tokens)[:_TOP_TOKENS], ensure_ascii=False))
    return np.array(lists)


def _stability(
    store: ActivationStore,
    crosscoder: Crosscoder,
    others: dict[int, Path],
    rows: NDArray[np.int64],
    table: dict[str, np.ndarray],
    config: AnalyzeConfig,
    progress: Progress,
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The column, and what summary.json says of it."""
    if not others:
        return np.full(crosscoder.dict_size, np.nan), None
    rows = spread_rows(rows, SAMPLE)
    share = stability(
        crosscoder,
        list(others.values()),
        store,
        rows,
        batch_size=config.batch_size,
        min_cosine=config.stable_cosine,
        min_coactivation=config.stable_coactivation,
        progress=progress,
    )
    observed = np.isfinite(share)
    exclusive = observed & (_exclusive(table, "base") | _exclusive(table, "tuned"))
    counts = {
        "observed": int(observed.sum()),
        "stable": int((share[observed] >= _STABLE_SHARE).sum()),
        "exclusive": int(exclusive.sum()),
        "exclusive_stable": int((share[exclusive] >= _STABLE_SHARE).sum()),
    }
    progress.say(
        f"analyze: compared with seed {', '.join(map(str, others))}, {counts['exclusive_stable']} of "
        f"{counts['exclusive']} latents of one model are stable, {counts['stable']} of {counts['observed']} of all"
    )
    thresholds = {"min_cosine": config.stable_cosine, "min_coactivation": config.stable_coactivation}
    return share, {"seeds": list(others), "tokens": len(rows), **thresholds, **counts}


def _exclusive(table: dict[str, np.ndarray], side: str) -> np.ndarray:
    """Latents that fire and that only one model has, by class or by latent scaling."""
    return (table["count"] > 0) & ((table["specific"] == side) | (table["class"] == f"{side}_only"))


def _choose(table: dict[str, np.ndarray], by_nats: list[int], config: AnalyzeConfig) -> dict[int, str]:
    """Latents that get a card: exclusive ones, the most often active first, a control of shared ones, and by nats."""
    fired = table["count"] > 0
    chosen: dict[int, str] = {}
    n_control = int(config.cards * _CONTROL_SHARE)
    mass = np.nan_to_num(table["count"] * table["mean_activation"])
    for side in ("tuned", "base"):
        picked = np.flatnonzero(_exclusive(table, side))
        picked = picked[np.argsort(-mass[picked], kind="stable")][: (config.cards - n_control) // 2]
        chosen |= {int(latent): side for latent in picked}
    shared = np.flatnonzero(fired & (table["class"] == "shared") & (table["specific"] == ""))
    if len(shared):
        # spread evenly over the range of frequencies
        shared = shared[np.argsort(-mass[shared], kind="stable")]
        picked = shared[np.unique(np.linspace(0, len(shared) - 1, min(n_control, len(shared))).astype(int))]
        chosen |= {int(latent): "shared" for latent in picked}
    for latent in by_nats:
        sides = [side for side in ("tuned", "base") if _exclusive(table, side)[latent]]
        chosen.setdefault(latent, sides[0] if sides else "nats")
    return chosen


def _quality(
    store: ActivationStore, crosscoder: Crosscoder, facts: dict[str, Any], config: AnalyzeConfig
) -> tuple[Quality, str]:
    rows = evaluation_rows(store, facts["train"]["holdout"])
    return rows.measure(crosscoder, config.batch_size), "held out" if rows.name == "held-out" else "all"


def _splice(
    store: ActivationStore, crosscoder: Crosscoder, facts: dict[str, Any], config: AnalyzeConfig, progress: Progress
) -> dict[str, Any]:
    """What the reconstructions are worth to the models themselves, which are opened for it."""
    # opens transformers, which takes 1.7 s
    from fastdiff.analysis.splice import splice

    holdout = facts["train"]["holdout"]
    found = splice(store, crosscoder, holdout=holdout, tokens=config.splice_tokens, progress=progress)
    for line in found.lines():
        progress.say(f"analyze: {line}")
    return found.facts()
