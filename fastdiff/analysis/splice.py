"""What a crosscoder's reconstruction is worth to the models: they go on computing from it instead of the activation.

    original        model m as it is
    spliced         the activation at the store's layer and hook becomes x̂_m, in the model's own units
    zero, mean      it becomes 0, or its mean over the store

    CE              mean of -log p(next token), in nats
    KL              mean of Σ_v p_v (log p_v - log q_v), p the original's prediction and q the spliced one's, in nats
    loss_recovered  (CE_zero - CE_spliced) / (CE_zero - CE): 1 for a perfect reconstruction, 0 for one no better than 0

Replaced is every position that has a row in the store, but for BOS; what was run and not stored (BOS, `--skip-first`)
keeps its activation. A prediction counts if the position it is made at and the token predicted are both such ones.

x̂_m is computed from the rows of the store and not from a pass through all models: those are the numbers that the
crosscoder learned from and is evaluated on, rounding included, and one model at a time is in memory. That row and
position belong together is checked: what the model computes there must be what is stored.

Source: Rajamanoharan et al. 2024, arXiv:2404.16014 (loss recovered).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.extraction.models import capture, quiet
from fastdiff.patching.documents import Document, batches, held_out_documents
from fastdiff.patching.halves import Halves, hooked, replaced
from fastdiff.patching.opening import Target, check_fits, check_same, find_target, open_model
from fastdiff.progress import SILENT, Progress, Task
from fastdiff.rundir import finite
from fastdiff.store.reader import ActivationStore

# positions of a batch, padding included; a longer document is a batch of its own
_POSITIONS = 4096
# who asks, in messages of what is asked
_CALLER = "--splice"

_VARIANTS = ("original", "spliced", "zero", "mean")


@dataclass(frozen=True)
class ModelFigures:
    """Of one model; see the module. NaN for a loss recovered where zeros do no harm."""

    name: str
    layer: int
    hook: str
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    loss_recovered: float
    kl: float


@dataclass(frozen=True)
class SpliceFigures:
    """Of all models of a crosscoder, on the same predictions."""

    tokens: int  # predictions that count
    documents: int
    rows: Literal["held out", "all"]
    models: list[ModelFigures]

    def facts(self) -> dict[str, Any]:
        """All of it for JSON, which has no NaN: null."""
        facts: dict[str, Any] = finite(asdict(self))
        return facts

    def lines(self) -> list[str]:
        """A sentence for each model."""
        return [
            f"with its reconstruction {of.name} has cross entropy {of.ce_spliced:.4f} instead of {of.ce:.4f} "
            f"({of.ce_mean:.4f} with the mean, {of.ce_zero:.4f} with zeros): "
            + (
                "NaN or infinity, so nothing is known"
                if not math.isfinite(of.ce + of.ce_spliced)
                else "zeros do no harm"
                if math.isnan(of.loss_recovered)
                else f"{of.loss_recovered:.2%} of the loss recovered"
            )
            + f", KL {of.kl:.4f}; {self.tokens:,} tokens, {self.rows}"
            for of in self.models
        ]


def splice(
    store: ActivationStore,
    crosscoder: Crosscoder,
    *,
    holdout: float,
    tokens: int,
    progress: Progress = SILENT,
) -> SpliceFigures:
    """Run each model of a crosscoder with its reconstructions spliced in.

    Args:
        store: The activations that the crosscoder was trained on, with the models it names still in place.
        crosscoder: On the device to compute on.
        holdout: Share of documents that training held out; where that gives none, all documents are used.
        tokens: About how many rows, of whole documents, evenly spread.
        progress: Where to report.

    Returns:
        Figures in the order of the crosscoder's models.

    Raises:
        OptionError: The crosscoder reconstructs a difference, or a model has no such hook.
        InputError: The store does not say what was run, a model is gone or has changed, or computes something else
            than is stored.
        ResourceError: A model does not fit the device.
    """
    if crosscoder.inputs == "difference":
        raise OptionError("--splice: this crosscoder reconstructs the difference of two models, which neither computes")
    targets = [
        find_target(store, index, number, _CALLER)
        for index, number in enumerate(chosen_models(crosscoder.inputs, store.n_models))
    ]
    found, name = held_out_documents(store, holdout, tokens, _CALLER)
    documents = [document for document in found if _counted(document.rows).any()]
    if not documents:
        raise InputError(f"{store.path}: no token to predict in {len(found)} documents; raise --splice-tokens")
    for target in targets:
        check_fits(target.source, documents)
    figures = []
    work = sum(len(document.ids) for document in documents) * len(targets)
    with progress.task("splice", work, "tokens") as task, quiet():
        for target in targets:
            try:
                figures.append(_figures(store, crosscoder, target, documents, task))
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{crosscoder.b_dec.device}: out of memory with the whole of {target.source.name}; "
                    "use --device cpu, or leave out --splice"
                ) from error
    n_tokens = sum(int(_counted(document.rows).sum()) for document in documents)
    return SpliceFigures(n_tokens, len(documents), name, figures)


def _counted(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Positions [..., T] whose prediction counts, from the row of each position, -1 where it is not replaced."""
    counted = np.zeros(rows.shape, bool)
    counted[..., :-1] = (rows[..., :-1] >= 0) & (rows[..., 1:] >= 0)
    return counted


@torch.inference_mode()
def _figures(
    store: ActivationStore, crosscoder: Crosscoder, target: Target, documents: Sequence[Document], task: Task
) -> ModelFigures:
    name, layer, hook, device = target.source.name, target.layer, target.hook, crosscoder.b_dec.device
    model = open_model(target, target.dtype, device)
    halves, module = Halves(model, _CALLER), hooked(model, layer, hook)
    mean = torch.tensor(store.stats().mean[target.number], dtype=torch.float64, device=device)
    ce, kl, n_tokens = dict.fromkeys(_VARIANTS, 0.0), 0.0, 0
    with capture(model, layer, hook) as captured:
        for batch in batches(documents, _POSITIONS):
            ids, mask, where, counted = (
                torch.from_numpy(part).to(device)
                for part in (batch.ids, batch.mask, batch.rows >= 0, _counted(batch.rows))
            )
            stored = store.rows(batch.rows[batch.rows >= 0]).to(device)
            hidden = {"original": halves.hidden(ids, mask)[counted]}
            check_same(store, target, captured.take()[where], stored[:, target.number])
            replacements = {
                "spliced": _reconstruction(crosscoder, stored)[:, target.index],
                "zero": torch.zeros_like(mean),
                "mean": mean,
            }
            for variant, activation in replacements.items():
                with replaced(module, activation, where):
                    hidden[variant] = halves.hidden(ids, mask)[counted]
            losses, divergence = _compare(halves, hidden, ids.roll(-1, dims=1)[counted])
            ce = {variant: ce[variant] + losses[variant] for variant in _VARIANTS}
            kl += divergence
            n_tokens += int(counted.sum())
            task.advance(int(batch.mask.sum()))
    original, spliced, zero, by_mean = (ce[variant] / n_tokens for variant in _VARIANTS)
    recovered = (zero - spliced) / (zero - original) if zero > original else math.nan
    return ModelFigures(name, layer, hook, original, spliced, zero, by_mean, recovered, kl / n_tokens)


def _reconstruction(crosscoder: Crosscoder, stored: Tensor) -> Tensor:
    """x̂ [n, M, D] in the models' own units, of stored activations [n, M_stored, D]."""
    values, selection = crosscoder.encode(crosscoder.normalize(stored))
    return crosscoder.denormalize(crosscoder.decode(values, selection))


def _compare(halves: Halves, hidden: dict[str, Tensor], targets: Tensor) -> tuple[dict[str, float], float]:
    """Sums over n predictions, from last hidden states [n, D] by variant: cross entropies, and KL of the spliced."""
    size = halves.n_together
    ce, kl = dict.fromkeys(hidden, 0.0), 0.0
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        log_p = halves.log_probabilities(hidden["original"][part])
        for variant, states in hidden.items():
            log_q = log_p if variant == "original" else halves.log_probabilities(states[part])
            ce[variant] -= float(log_q.gather(1, targets[part, None]).double().sum())
            if variant == "spliced":
                kl += float((log_p.exp() * (log_p - log_q)).sum(dim=1).double().sum())
    return ce, kl
