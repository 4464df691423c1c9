"""The attribution stage: how much of what the tuned model does better or worse runs through which latent.

`fastdiff.results.attribution` says what it writes into `<run>/attribution`, `nats` what that means, `choose` of which
documents. Both models are opened again; all seeds of the run share their passes. A run whose models cannot be run as
they were is "not checked", with the reason and what to do about it, and everything else goes on without.
"""

import math
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff import rundir
from fastdiff.attribution.choose import ANSWER, Choice, choice_of, scored_at, unigram_entropy
from fastdiff.attribution.nats import Pair, Parts, Side, cross_entropies, measure, try_out
from fastdiff.config import AttributeConfig
from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.seeds import finished_seeds, store_of
from fastdiff.device import resolve_device
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.extraction.models import quiet
from fastdiff.patching.documents import Batch, Document, DocumentIndex, batches
from fastdiff.patching.halves import Halves, UpperHalf
from fastdiff.patching.opening import Target, check_fits, find_target, open_model
from fastdiff.patching.refusal import CannotRun
from fastdiff.progress import SILENT, Progress, Task
from fastdiff.results.attribution import (
    BRANCHES,
    DIRECTORY,
    FEW_DOCUMENTS,
    GAP_MOST,
    OUTPUTS,
    SCHEMA,
    SUMMARY,
    Attribution,
    DocumentTable,
    Summary,
    read_summary,
    text_number,
    write_attribution,
)
from fastdiff.store.reader import ActivationStore

_CALLER = "fastdiff attribute"
# midpoints of the integral, one after the other while a category's parts do not sum to L
_STEPS = (3, 6, 12, 24, 48, 96)
# Up to as many for all documents of such a category that need them. Of more, only as many documents as take the same
# time: those furthest off, whose loss bends sharply on the way, as where the models' attention sinks are not at the
# same position.
_STEPS_OF_ALL = 12
# documents of each category where more would take too long
_FEWER_DOCUMENTS = 12
# of the time of a document with nats, what scoring it alone takes: 2 forward passes of about 22
_SCORING_SHARE = 2 / 22


def attribute(
    run: Path, config: AttributeConfig, progress: Progress = SILENT, *, store_path: Path | None = None
) -> Path:
    """Trace the change of both models' cross entropy to the latents of all finished seeds of a run.

    Args:
        run: A run directory that `train` has finished.
        config: How.
        progress: Where to report.
        store_path: The store, if it is no longer where `train` read it.

    Returns:
        `<run>/attribution`.

    Raises:
        OptionError: There is no such model or device.
        InputError: A crosscoder or the store is missing, damaged or changed; or the models cannot be run, and an
            earlier result stands.
        ResourceError: Out of memory.
        FastdiffError: A cross entropy or a gradient is NaN or infinite.
        LockedError: Another process writes to the run.
    """
    target, settings = run / DIRECTORY, config.model_dump(exclude={"enabled"})
    with rundir.locked(run) as lock:
        seeds, store_sha256 = _seeds(run, store_path, progress)
        inputs = {"store": store_sha256, **{f"seed-{seed}": sha256 for seed, (_, sha256) in seeds.items()}}
        stage = lock.stage(target, "attribute", settings, inputs, OUTPUTS, schemas={SUMMARY: SCHEMA})
        # models that could not be run may have been put back since
        if stage.up_to_date() and read_summary(target).state == "checked":
            progress.say(f"attribute: {target} is up to date")
            return target
        with ActivationStore(store_path or store_of(run)) as store:
            if store.sha256() != store_sha256:
                raise InputError(f"{store.path}: not the store these crosscoders were trained on (its hash differs)")
            found = _attribute(store, {seed: directory for seed, (directory, _) in seeds.items()}, config, progress)
        checked = found.summary.state == "checked"
        if not checked and _stands(target, inputs):
            raise InputError(f"{found.summary.reason}; {found.summary.remedy}; the earlier result in {target} stands")
        with stage if checked else replace(stage, outputs=(SUMMARY,)):
            write_attribution(target, found)
    return target


def _stands(target: Path, inputs: dict[str, str]) -> bool:
    """Whether there is a whole result of the same store and crosscoders that was checked, by other settings."""
    try:
        done = rundir.require_done(target, "")
    except InputError:
        return False
    return done["inputs"] == inputs and set(done["outputs"]) == set(OUTPUTS)


def _seeds(run: Path, store_path: Path | None, progress: Progress) -> tuple[dict[int, tuple[Path, str]], str]:
    """The finished crosscoders of one store, each with the hash of its weights, and the hash of the store."""
    finished = finished_seeds(run)
    if not finished:
        raise InputError(f"{run}: has no finished crosscoder; run `fastdiff train STORE -o {run}` first")
    trained = {
        seed: rundir.require_done(directory, f"fastdiff train STORE -o {run} --seed {seed}")
        for seed, directory in finished.items()
    }
    stores = {done["inputs"]["store"] for done in trained.values()}
    if len(stores) == 1:
        wanted = stores.pop()
    else:
        with ActivationStore(store_path or store_of(run)) as store:
            wanted = store.sha256()
    seeds = {}
    for seed, done in trained.items():
        if done["inputs"]["store"] == wanted:
            seeds[seed] = finished[seed], done["outputs"]["model.safetensors"]
        else:
            progress.say(f"attribute: {finished[seed]}: of another store, left out")
    if not seeds:
        raise InputError(f"{run}: no crosscoder was trained on this store (its hash differs); give the right --store")
    return seeds, wanted


def _attribute(
    store: ActivationStore, seeds: dict[int, Path], config: AttributeConfig, progress: Progress
) -> Attribution:
    """All of it, or why it cannot be had."""
    models = [info.name for info in store.meta.models]
    tuned = _tuned(config.tuned, models)
    infos = [store.meta.models[number] for number in sorted({0, min(tuned, len(models) - 1)})]
    hook = infos[-1].hook
    about: dict[str, Any] = {
        "branch": hook if hook in BRANCHES else None,
        "models": [info.name for info in infos],
        "layer": infos[-1].layer,
        "hook": hook,
        "tau": config.tau,
    }
    try:
        crosscoders, holdout = _crosscoders(store, seeds, tuned, progress)
        about |= {"seeds": list(crosscoders), "dict_size": next(iter(crosscoders.values())).dict_size}
        targets = [find_target(store, index, number, _CALLER) for index, number in enumerate((0, tuned))]
        if (targets[0].layer, targets[0].hook) != (targets[1].layer, targets[1].hook):
            where = " and ".join(f"{of.source.name} at {of.hook} of layer {of.layer}" for of in targets)
            raise CannotRun(
                f"{store.path}: has {where}, between which there is no path", "extract both at one layer and hook"
            )
        if store.must_be_measured:
            progress.say(f"attribute: {store.path} has no column norms; its rows are measured")
        index = DocumentIndex(store, _CALLER)
        choice = choice_of(store, index, holdout)
        with quiet():
            return _Stage(store, crosscoders, targets, index, choice, config, progress).result(about)
    except CannotRun as error:
        progress.say(f"attribute: not checked: {error}")
        return Attribution(Summary(state="not checked", reason=error.reason, remedy=error.remedy, **about), None, None)


def _tuned(wanted: str, models: Sequence[str]) -> int:
    """Number of the model that is compared with model 0.

    Raises:
        OptionError: There is no such model, or it is the base.
    """
    named = [i for i, name in enumerate(models) if wanted in (name, Path(name).name)]
    number = int(wanted) if wanted.isdecimal() else named[0] if len(named) == 1 else -1
    # a store of one model is not wrong, but cannot be checked
    if number < 1 or (number >= len(models) and (len(models) > 1 or wanted != "1")):
        have = ", ".join(f"{i}: {name}" for i, name in enumerate(models))
        raise OptionError(f"--tuned {wanted}: name one model of the store other than 0, by its number ({have})")
    return number


def _crosscoders(
    store: ActivationStore, seeds: dict[int, Path], tuned: int, progress: Progress
) -> tuple[dict[int, Crosscoder], float]:
    """Those that read both models, on the CPU, and the share of documents that none of them was trained on.

    Raises:
        CannotRun: There is none.
    """
    if store.n_models < 2:
        raise CannotRun(f"{store.path}: holds one model only", "extract a base and a tuned model")
    if store.n_models > 2:
        name = store.meta.models[tuned].name
        progress.say(f"attribute: model {tuned} ({name}) against model 0; --tuned chooses another")
    found: dict[int, Crosscoder] = {}
    holdout, refusals = 1.0, []
    for seed, directory in seeds.items():
        crosscoder, facts = load_crosscoder(directory)
        numbers = chosen_models(crosscoder.inputs, store.n_models)
        first = next(iter(found.values()), crosscoder)
        if len(numbers) < 2:
            why = (f"{directory}: reads one model only", "train with --inputs all or --inputs difference")
        elif not {0, tuned} <= set(numbers):
            why = (f"{directory}: does not read models 0 and {tuned}", "choose another --tuned, or train with both")
        elif crosscoder.dict_size != first.dict_size:
            why = (f"{directory}: has {crosscoder.dict_size} latents, not {first.dict_size}", "train all seeds alike")
        else:
            found[seed] = crosscoder.requires_grad_(False)
            holdout = min(holdout, float(facts["train"]["holdout"]))
            continue
        refusals.append(why)
    if not found:
        raise CannotRun(*refusals[0])
    for reason, remedy in refusals:
        progress.say(f"attribute: {reason}, left out; {remedy}")
    return found, holdout


@dataclass
class _Traced:
    """What is known of the documents with nats; the axes are those of `Parts`, over all of them."""

    places: NDArray[np.int64]
    parts: Parts
    steps: NDArray[np.int64]

    @classmethod
    def empty(cls, places: NDArray[np.int64], n_seeds: int, dict_size: int) -> "_Traced":
        n = len(places)
        per_seed = [np.full((n_seeds, n), np.nan) for _ in range(3)]
        latents, offset, error = per_seed
        layer, left_out, bos = (np.full(n, np.nan) for _ in range(3))
        nats = np.zeros((n_seeds, n, dict_size), np.float32)
        parts = Parts(np.full((n, 2), np.nan), layer, latents, offset, error, left_out, bos, nats)
        return cls(places, parts, np.zeros(n, np.int64))

    def put(self, at: NDArray[np.int64], parts: Parts, steps: int) -> None:
        """Keep the parts of some documents, measured at so many midpoints."""
        self.steps[at] = steps
        for name, whole in self.parts._asdict().items():
            part = getattr(parts, name)
            if name in ("latents", "offset", "error", "nats"):
                whole[:, at] = part
            else:
                whole[at] = part


class _Stage:
    """One run of the stage over documents that are chosen once."""

    def __init__(
        self,
        store: ActivationStore,
        crosscoders: dict[int, Crosscoder],
        targets: Sequence[Target],
        index: DocumentIndex,
        choice: Choice,
        config: AttributeConfig,
        progress: Progress,
    ):
        self._config, self._progress, self._choice, self._index = config, progress, choice, index
        self._answer = None if choice.scored == "all text" else (store.meta.roles or []).index(ANSWER)
        behaviour = choice.take(max(config.documents, config.behaviour_documents))
        self._documents = dict(zip(behaviour.tolist(), index.build(behaviour), strict=True))
        self._scored = {i: scored_at(document, self._answer) for i, document in self._documents.items()}
        self._place = {document.number: i for i, document in self._documents.items()}
        for target in targets:
            check_fits(target.source, list(self._documents.values()))
        device = resolve_device(config.device)
        dtype = {
            "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
        }[config.dtype]
        try:
            base, tuned = (self._side(target, dtype, device) for target in targets)
            self._pair = Pair(store, base, tuned, device)
            self._crosscoders = list(crosscoders.values())
            self._resident = self._fit(device)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(device) from error

    def result(self, about: dict[str, Any]) -> Attribution:
        """Measure everything; `about` is what the summary says anyway."""
        shortest = min(self._documents.values(), key=lambda document: len(document.ids))
        for batch in batches([shortest], self._config.batch_tokens):
            try_out(self._pair, batch, self._scored_of(batch))
        behaviour = np.array(list(self._documents), np.int64)
        places = self._predicted(self._choice.take(self._config.documents, behaviour))
        rest = np.setdiff1d(behaviour, places)
        with self._progress.task("attribute", self._n_tokens([*places, *rest]), "tokens") as task:
            traced, gap = self._trace(places, task)
            ce = self._score(rest, task)
        ce |= dict(zip(places.tolist(), traced.parts.ce, strict=True))
        self._say_what_lacks(places, gap)
        counts = {name: int((self._choice.category[behaviour] == c).sum()) for c, name in self._categories()}
        with_nats = {name: int((self._choice.category[places] == c).sum()) for c, name in self._categories()}
        summary = Summary(
            state="checked",
            scored=self._choice.scored,
            categories=[name for _, name in self._categories()],
            unigram_entropy={name: self._entropy(c) for c, name in self._categories()},
            largest_gap=gap,
            too_short=int((~self._choice.eligible).sum()),
            documents=counts,
            documents_with_nats=with_nats,
            none_long_enough=self._none_long_enough(),
            few_documents=[name for name, n in with_nats.items() if n < FEW_DOCUMENTS],
            **about,
        )
        return Attribution(summary, self._table(behaviour, ce, traced), traced.parts.nats)

    def _side(self, target: Target, dtype: torch.dtype, device: torch.device) -> Side:
        model = open_model(target, dtype, device)
        return Side(target, UpperHalf(Halves(model, _CALLER), target.layer, target.hook))

    def _fit(self, device: torch.device) -> bool:
        """Put the crosscoders on the device if half of what is free holds them; else each comes when it is used."""
        wanted = sum(t.numel() * t.element_size() for c in self._crosscoders for t in c.state_dict().values())
        if device.type == "cuda" and wanted > torch.cuda.mem_get_info(device)[0] / 2:
            return False
        for crosscoder in self._crosscoders:
            crosscoder.to(device)
        return True

    def _out_of_memory(self, device: torch.device) -> ResourceError:
        return ResourceError(
            f"{device}: out of memory with both models; use --device cpu, or leave the stage out with --no-attribute"
        )

    def _categories(self) -> list[tuple[int, str]]:
        """The categories that have documents at all, by their code among all."""
        present = set(self._choice.category[list(self._documents)].tolist())
        return [(c, name) for c, name in enumerate(self._choice.categories) if c in present]

    def _none_long_enough(self) -> list[str]:
        """Categories of the store of which no document can be taken."""
        stored = {self._choice.categories[c] for c in np.unique(self._choice.category)}
        return sorted(stored - {name for _, name in self._categories()})

    def _scored_of(self, batch: Batch) -> list[NDArray[np.bool_]]:
        return [self._scored[self._place[document.number]] for document in batch.documents]

    def _names_of(self, batch: Batch) -> list[str]:
        places = [self._place[document.number] for document in batch.documents]
        return [self._choice.categories[self._choice.category[place]] for place in places]

    def _of(self, places: Iterable[int]) -> list[Document]:
        return [self._documents[int(place)] for place in places]

    def _n_tokens(self, places: Iterable[int]) -> int:
        return sum(len(document.ids) for document in self._of(places))

    def _measure(self, batch: Batch, steps: int) -> list[tuple[Batch, Parts]]:
        """The parts of a batch, in smaller batches where the device has not the memory."""
        try:
            scored, names = self._scored_of(batch), self._names_of(batch)
            found = measure(self._pair, self._crosscoders, batch, scored, steps, names, resident=self._resident)
            return [(batch, found)]
        except torch.OutOfMemoryError as error:
            if len(batch.documents) == 1:
                raise self._out_of_memory(self._pair.device) from error
        half = (len(batch.documents) + 1) // 2
        parts = (batch.documents[:half], batch.documents[half:])
        return [one for part in parts for of in batches(part, 2**62) for one in self._measure(of, steps)]

    def _predicted(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Say how long it will take, by a first small batch; where that is too long, fewer documents."""
        longest = sorted(self._of(places), key=lambda document: -len(document.ids))
        fitting = max(1, self._config.batch_tokens // (4 * len(longest[0].ids)))
        probe = next(batches(longest[:fitting], 2**62))
        before, start = _peak(self._pair.device), time.perf_counter()
        self._measure(probe, _STEPS[0])
        per_token = (time.perf_counter() - start) / probe.ids.size
        # what the small batch added, for a whole one
        whole = max(1.0, min(self._config.batch_tokens, self._n_tokens(places)) / probe.ids.size)
        memory = before + (_peak(self._pair.device) - before) * whole
        rest = self._n_tokens(self._documents) - self._n_tokens(places)
        seconds = per_token * (self._n_tokens(places) + _SCORING_SHARE * rest)
        fewer = ""
        most = 60 * self._config.minutes or math.inf
        if seconds > most and self._config.documents > _FEWER_DOCUMENTS:
            behaviour = np.array(list(self._documents), np.int64)
            places = self._choice.take(_FEWER_DOCUMENTS, behaviour)
            rest = self._n_tokens(self._documents) - self._n_tokens(places)
            fewer = (
                f", with {_FEWER_DOCUMENTS} documents a category instead of {self._config.documents}, "
                f"which would take {_minutes(seconds)} (--minutes 0 takes them all)"
            )
            seconds = per_token * (self._n_tokens(places) + _SCORING_SHARE * rest)
        self._progress.say(
            f"attribute: about {_minutes(seconds)} and {memory / 1e9:.1f} GB for the nats of "
            f"{len(places)} documents and the cross entropy of {len(self._documents)}, over "
            f"{len(self._categories())} categories{fewer}; at {_STEPS[0]} midpoints, "
            "of which some documents may need more"
        )
        return places

    def _trace(self, places: NDArray[np.int64], task: Task) -> tuple[_Traced, float]:
        """Parts of the documents, with as many midpoints as each needs, and the largest gap that a category keeps."""
        traced = _Traced.empty(places, len(self._crosscoders), self._crosscoders[0].dict_size)
        row = {int(place): i for i, place in enumerate(places)}
        wanted = np.arange(len(places))
        for k, more in zip(_STEPS, (*_STEPS[1:], None), strict=True):
            for batch in batches(self._of(places[wanted]), self._config.batch_tokens):
                for of, parts in self._measure(batch, k):
                    at = np.array([row[self._place[document.number]] for document in of.documents])
                    traced.put(at, parts, k)
                if k == _STEPS[0]:
                    task.advance(int(batch.mask.sum()))
            largest, wanted = self._rough(traced, more)
            if not len(wanted):
                break
        return traced, largest

    def _rough(self, traced: _Traced, more: int | None) -> tuple[float, NDArray[np.int64]]:
        """The largest |Σ parts - L| / max(|L|, tau) of a category, and the documents to measure at `more` midpoints."""
        layer, code = traced.parts.layer, self._choice.category[traced.places]
        gap = traced.parts.total() - layer
        largest, rough = 0.0, [np.empty(0, np.int64)]
        for c in np.unique(code):
            mine = np.flatnonzero(code == c)
            whole = max(abs(layer[mine].mean()), self._config.tau)
            largest = max(largest, float(abs(gap[mine].mean()) / whole))
            if more and abs(gap[mine].mean()) > GAP_MOST * whole:
                furthest = mine[np.argsort(-np.abs(gap[mine]), kind="stable")]
                furthest = furthest[: math.ceil(len(mine) * min(1, _STEPS_OF_ALL / more))]
                rough.append(furthest[np.abs(gap[furthest]) > GAP_MOST * whole])
        return largest, np.sort(np.concatenate(rough))

    def _score(self, places: NDArray[np.int64], task: Task) -> dict[int, NDArray[np.float64]]:
        """Cross entropies (2,) of documents without nats, by place."""
        found: dict[int, NDArray[np.float64]] = {}
        for batch in batches(self._of(places), self._config.batch_tokens):
            try:
                ce = cross_entropies(self._pair, batch, self._scored_of(batch), self._names_of(batch))
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(self._pair.device) from error
            found |= {self._place[document.number]: of for document, of in zip(batch.documents, ce, strict=True)}
            task.advance(int(batch.mask.sum()))
        return found

    def _entropy(self, category: int) -> float:
        """Unigram entropy of a category's scored tokens."""
        mine = [i for i in self._documents if self._choice.category[i] == category]
        return unigram_entropy(np.concatenate([self._documents[i].ids[1:][self._scored[i][:-1]] for i in mine]))

    def _table(
        self, behaviour: NDArray[np.int64], ce: dict[int, NDArray[np.float64]], traced: _Traced
    ) -> DocumentTable:
        has_nats = np.isin(behaviour, traced.places)
        present = [c for c, _ in self._categories()]

        def spread(values: NDArray[Any]) -> NDArray[np.float64]:
            whole = np.full((*values.shape[:-1], len(behaviour)), np.nan)
            whole[..., has_nats] = values
            return whole

        parts = traced.parts
        return DocumentTable(
            document=self._index.numbers[behaviour],
            text=np.array([text_number(self._documents[int(i)].ids) for i in behaviour], np.int64),
            category=np.searchsorted(present, self._choice.category[behaviour]).astype(np.int64),
            held_out=self._choice.held_out[behaviour],
            scored=np.array([int(self._scored[int(i)].sum()) for i in behaviour], np.int64),
            ce=np.stack([ce[int(i)] for i in behaviour]),
            has_nats=has_nats,
            steps=np.where(has_nats, spread(traced.steps), 0).astype(np.int64),
            layer=spread(parts.layer),
            latents=spread(parts.latents),
            offset=spread(parts.offset),
            error=spread(parts.error),
            left_out=spread(parts.left_out),
            bos=spread(parts.bos),
        )

    def _say_what_lacks(self, places: NDArray[np.int64], gap: float) -> None:
        """What the reader of the result should know, a line each."""
        say, choice = self._progress.say, self._choice
        if not choice.named:
            say("attribute: the documents have no categories, so there is one per data set; see --category-field")
        if short := int((~choice.eligible).sum()):
            gone = ", ".join(self._none_long_enough())
            rest = f", so that none is left of {gone}: the verdict will have no row of it" if gone else ""
            say(f"attribute: {short:,} documents have fewer than two scored tokens and are left out{rest}")
        counts = {name: int((choice.category[places] == c).sum()) for c, name in self._categories()}
        if few := [name for name, n in counts.items() if n < FEW_DOCUMENTS]:
            say(f"attribute: fewer than {FEW_DOCUMENTS} documents: {', '.join(few)}")
        if gap > GAP_MOST:
            say(
                f"attribute: the parts sum to L only within {gap:.1%}, although the documents that are furthest off "
                f"took {_STEPS[-1]} midpoints"
            )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _peak(device: torch.device) -> int:
    """Most bytes that were in use so far, of the device or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
