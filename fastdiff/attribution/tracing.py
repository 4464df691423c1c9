"""Measuring the documents of a run: nats of some, cross entropies of more, with as many midpoints as each needs."""

import math
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.attribution.choose import ANSWER, Choice, scored_at, unigram_entropy
from fastdiff.attribution.nats import Pair, Parts, Side, cross_entropies, measure, try_out
from fastdiff.config import AttributeConfig
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.device import resolve_device
from fastdiff.errors import ResourceError
from fastdiff.patching.documents import Batch, Document, DocumentIndex, batches
from fastdiff.patching.halves import Halves, UpperHalf
from fastdiff.patching.opening import Target, check_fits, open_model
from fastdiff.progress import Progress, Task
from fastdiff.results.attribution import (
    FEW_DOCUMENTS,
    GAP_MOST,
    Attribution,
    DocumentTable,
    Summary,
    text_number,
)
from fastdiff.store.reader import ActivationStore

# what refusals name
CALLER = "fastdiff attribute"
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


class Tracer:
    """Both models of a run, its crosscoders, and the documents that were chosen once."""

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
        return Side(target, UpperHalf(Halves(model, CALLER), target.layer, target.hook))

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
            f"{len(self._categories())} categories{fewer}; with {_STEPS[0]} midpoints "
            "each, and more for some"
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
