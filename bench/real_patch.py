"""Do the latents that have most nats carry the change?

They are chosen on half of a category's documents and patched on the other half: the difference that they alone write,
Σ_j f_j (d_tuned,j - d_base,j), is added to the base model's hidden states and taken from the tuned model's. The effect
is the mean of what both do to the cross entropy, so that the effect of the whole difference between the models is L.
Beside them as many latents by mass, by Δ_norm, by their own label and by chance.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from real_tables import Attribution, figure, table
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fastdiff.analysis.classes import delta_norm
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.extraction.models import find_layers
from fastdiff.results.labels import read_labels
from fastdiff.store.reader import ActivationStore

DRAWS = 5  # of latents by chance; their effects are averaged
# how far an effect may be from what the nats predicted, either way
FAITHFUL = (0.6, 1.67)


@dataclass(frozen=True)
class Patched:
    """One category of one pair.

    Attributes:
        pair: Name.
        category: Name.
        latents: How many were patched.
        documents: How many they were patched in; those that chose them are others.
        change: CE_base - CE_tuned in these documents, nats per token.
        effects: By what chose the latents, nats per token; positive: gained.
        predicted: What the nats of the latents with most nats add up to in these documents.
    """

    pair: str
    category: str
    latents: int
    documents: int
    change: float
    effects: dict[str, float]
    predicted: float

    @property
    def towards(self) -> dict[str, float]:
        """Effects in the direction in which the latents with most nats were chosen to go."""
        sign = 1.0 if self.predicted >= 0 else -1.0
        return {name: effect * sign for name, effect in self.effects.items()}

    @property
    def leads(self) -> bool:
        """Whether the latents with most nats move more than all others."""
        others = [effect for name, effect in self.towards.items() if name not in ("nats", "all")]
        return all(self.towards["nats"] > other for other in others)

    @property
    def twice_delta(self) -> bool:
        """Whether they move at least twice as much as those by Δ_norm."""
        return self.towards["nats"] >= 2 * self.towards["Δ_norm"]

    @property
    def ratio(self) -> float:
        """Effect by what was predicted."""
        return self.effects["nats"] / self.predicted


@contextmanager
def replaced(model: Any, layer: int, hidden: Tensor | None) -> Iterator[list[Tensor]]:
    """Put hidden states behind a layer while the block lasts; the yielded list gets what the layer gave by itself."""
    given: list[Tensor] = []

    def hook(_module: Any, _inputs: Any, out: Any) -> Any:
        given.append(out[0] if isinstance(out, tuple) else out)
        if hidden is None:
            return out
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = find_layers(model)[1][layer].register_forward_hook(hook)
    try:
        yield given
    finally:
        handle.remove()


def scored(model: Any, layer: int, ids: Tensor, hidden: Tensor | None = None) -> tuple[float, Tensor]:
    """Cross entropy of one document (1, T) and the layer's own hidden states (1, T, D)."""
    with replaced(model, layer, hidden) as given:
        logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]).item(), given[0]


def activations(crosscoder: Crosscoder, base: Tensor, tuned: Tensor) -> Tensor:
    """All latents' activations (T, F) at hidden states (T, D) of both models."""
    x = torch.stack([base, tuned], dim=1).float()
    values, selection = crosscoder.encode(crosscoder.normalize(x))
    dense = torch.zeros(len(x), crosscoder.dict_size)
    dense[selection.row.long(), selection.col.long()] = values
    return dense


def written(crosscoder: Crosscoder) -> Tensor:
    """What a unit of each latent writes into tuned and not into base, in the models' own units, (F, D)."""
    return crosscoder.W_dec[:, 1] / crosscoder.input_scale[1] - crosscoder.W_dec[:, 0] / crosscoder.input_scale[0]


@dataclass(frozen=True)
class Read:
    """A document as the models read it.

    Attributes:
        ids: (1, T) token ids.
        used: (T, 1) 1 where the crosscoder is used, 0 at BOS and at rows that are left out of use.
    """

    ids: Tensor
    used: Tensor


def read_again(store: ActivationStore, numbers: NDArray[np.int64], bos: int | None) -> list[Read]:
    """Documents of a store, with the BOS token that was not stored.

    Raises:
        SystemExit: The store lacks positions of one.
    """
    columns = (store.column(name) for name in ("token_ids", "sequence_ids", "positions"))
    ids, of, positions = (column for column in columns if column is not None)
    usable, chosen = np.ones(store.n_rows, bool), store.usable_rows()
    if chosen is not None:
        usable[:] = False
        usable[chosen] = True
    found = []
    for number in numbers:
        rows = np.flatnonzero(of == number)
        rows = rows[np.argsort(positions[rows])]
        own, used = ids[rows].astype(np.int64), usable[rows]
        if positions[rows[0]] == 1 and bos is not None:
            own, used = np.r_[bos, own], np.r_[False, used]
        if len(own) != positions[rows[-1]] + 1:
            raise SystemExit(f"{store.path}: document {number} lacks positions")
        found.append(Read(torch.from_numpy(own)[None], torch.from_numpy(used).float()[:, None]))
    return found


def choose(
    nats: NDArray[np.float64], sign: float, mass: NDArray[np.float64], delta: NDArray[np.float64],
    own: NDArray[np.bool_], count: int, rng: np.random.Generator,
) -> dict[str, list[NDArray[np.int64]]]:  # fmt: skip
    """Sets of latents by what they are chosen for; several by chance, and all of them.

    Args:
        nats: (F,) mean nats in the documents that choose.
        sign: Of the change that is looked for.
        mass: (F,) activation mass there.
        delta: (F,) Δ_norm.
        own: (F,) whether a latent's label is this category.
        count: Latents in a set; by label there may be fewer.
        rng: Draws by chance.
    """
    live = np.flatnonzero(mass > np.median(mass))
    labelled = np.flatnonzero(own)
    return {
        "nats": [np.argsort(-nats * sign)[:count]],
        "mass": [np.argsort(-mass)[:count]],
        "Δ_norm": [live[np.argsort(-np.abs(delta[live] - 0.5))[:count]]],
        "own label": [labelled[np.argsort(-mass[labelled])[:count]]],
        "chance": [rng.choice(live, min(count, len(live)), replace=False) for _ in range(DRAWS)],
        "all": [np.arange(len(nats))],
    }


@torch.no_grad()
def patch(
    pair: str, run: Path, store_path: Path, models: tuple[Path, Path], layer: int, of: Attribution,
    categories: list[str], count: int,
) -> list[Patched]:  # fmt: skip
    """Patch latents of the first seed of a run.

    Args:
        pair: Its name.
        run: The run, attributed and annotated.
        store_path: Its store.
        models: Directories of base and tuned.
        layer: 0-based index of the layer.
        of: The run's attribution.
        categories: Which to patch.
        count: Latents in a set.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    base, tuned = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in models)
    crosscoder, _ = load_crosscoder(run / "crosscoder" / f"seed-{of.seeds[0]}")
    nats = load_file(run / "attribution" / "latents.safetensors")["nats"][0].astype(float)
    labels = read_labels(run)
    delta = delta_norm(crosscoder.W_dec).numpy()
    writes, norms = written(crosscoder), crosscoder.W_dec.norm(dim=-1).sum(dim=1)
    found = []
    with ActivationStore(store_path) as store:
        for category in categories:
            inside = np.flatnonzero(of.category == of.categories.index(category))
            chosen_on, patched_in = inside[::2], inside[1::2]
            mass = np.zeros(crosscoder.dict_size)
            for one in read_again(store, of.document[chosen_on], tokenizer.bos_token_id):
                _, h_base = scored(base, layer, one.ids)
                _, h_tuned = scored(tuned, layer, one.ids)
                f = activations(crosscoder, h_base[0], h_tuned[0]) * one.used
                mass += (f * norms).double().sum(dim=0).numpy()
            own = np.array([j in labels and labels[j].category == category for j in range(crosscoder.dict_size)])
            sign = float(np.sign(of.layer[chosen_on].mean()))
            sets = choose(nats[chosen_on].mean(axis=0), sign, mass, delta, own, count, np.random.default_rng(0))
            effects: dict[str, list[float]] = {name: [] for name in sets}
            changes = []
            for one in read_again(store, of.document[patched_in], tokenizer.bos_token_id):
                ids = one.ids
                ce_base, h_base = scored(base, layer, ids)
                ce_tuned, h_tuned = scored(tuned, layer, ids)
                changes.append(ce_base - ce_tuned)
                f = activations(crosscoder, h_base[0], h_tuned[0]) * one.used
                for name, choices in sets.items():
                    for latents in map(torch.from_numpy, choices):
                        difference = (f[:, latents] @ writes[latents])[None]
                        into_base = ce_base - scored(base, layer, ids, h_base + difference)[0]
                        out_of_tuned = scored(tuned, layer, ids, h_tuned - difference)[0] - ce_tuned
                        effects[name].append((into_base + out_of_tuned) / 2)
            found.append(
                Patched(
                    pair, category, count, len(patched_in), float(np.mean(changes)),
                    {name: float(np.mean(effects[name])) for name in sets},
                    float(nats[patched_in].mean(axis=0)[sets["nats"][0]].sum()),
                )
            )  # fmt: skip
    return found


def patch_table(found: list[Patched]) -> str:
    """Markdown."""
    names = list(found[0].effects)
    lines = [
        [
            f"{one.pair} {one.category}", str(one.documents), figure(one.change),
            *(figure(one.effects[name]) for name in names), figure(one.predicted), figure(one.ratio, ".2f"),
        ]
        for one in found
    ]  # fmt: skip
    head = ["cell", "documents", "change", *(f"by {name}" if name != "all" else name for name in names)]
    return table([*head, "predicted", "by nats / predicted"], lines)


def patch_missed(found: list[Patched]) -> list[str]:
    """Aims that were not reached: nats lead everywhere, twice Δ_norm's in all but two, and as predicted."""
    problems = [f"{one.pair} {one.category}: others move more" for one in found if not one.leads]
    twice = sum(one.twice_delta for one in found)
    if twice < len(found) - 2:
        problems.append(f"at least twice Δ_norm's effect in {twice} of {len(found)} cells")
    low, high = FAITHFUL
    problems += [
        f"{one.pair} {one.category}: {one.ratio:.2f} of what was predicted"
        for one in found
        if not low <= one.ratio <= high
    ]
    return problems


def facts(found: list[Patched]) -> Any:
    """For JSON."""
    return json.loads(json.dumps([asdict(one) for one in found]))
