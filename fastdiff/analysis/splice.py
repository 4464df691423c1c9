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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdiff.analysis.rebuild import Document, held_out_documents
from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.extraction.models import (
    Hook,
    ModelSource,
    branches,
    capture,
    describe,
    find_layers,
    load,
    quiet,
    weights_sha256,
)
from fastdiff.progress import SILENT, Progress, Task
from fastdiff.rundir import finite
from fastdiff.store.format import TORCH_DTYPES
from fastdiff.store.reader import ActivationStore

# positions of a batch, padding included; a longer document is a batch of its own
_POSITIONS = 4096
# float32 logits of the tokens looked at together; four such arrays exist at a time
_LOGIT_BYTES = 2**28
# mean squared distance of what a model computes to what is stored, as a share of the variance: another precision or
# device stays far below, another token, model or position far above
_MAX_DISTANCE = 0.05

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
                "zeros do no harm"
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
        _target(store, index, number) for index, number in enumerate(chosen_models(crosscoder.inputs, store.n_models))
    ]
    found, name = held_out_documents(store, holdout, tokens)
    documents = [document for document in found if _counted(document.rows).any()]
    if not documents:
        raise InputError(f"{store.path}: no token to predict in {len(found)} documents; raise --splice-tokens")
    for target in targets:
        _check_fits(target.source, documents)
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


@dataclass(frozen=True)
class _Target:
    """A model, and where in it to put what the crosscoder reconstructs."""

    index: int  # among the crosscoder's models
    number: int  # among the store's
    source: ModelSource
    dtype: torch.dtype | Literal["auto"]
    layer: int
    hook: Hook


def _target(store: ActivationStore, index: int, number: int) -> _Target:
    """A model that is what the store recorded.

    Raises:
        InputError: It is not, or the store does not say where the activations were taken.
    """
    info = store.meta.models[number]
    hook = next((hook for hook in get_args(Hook) if hook == info.hook), None)
    if info.layer is None or hook is None:
        raise InputError(
            f"{store.path}: does not say at which layer and hook {info.name} was read; --splice needs both"
        )
    # what was a directory must not be looked for on the Hub
    if info.weights_sha256 is not None and not Path(info.name).is_dir():
        raise InputError(
            f"{info.name}: no such directory, and {store.path} was extracted from it; put it back, or run where "
            "fastdiff extract was run"
        )
    source = describe(info.name)
    if not 0 <= info.layer < source.n_layers or source.d_model != store.d_model:
        raise InputError(
            f"{info.name}: has {source.n_layers} layers of width {source.d_model}, but {store.path} has "
            f"activations of layer {info.layer} and width {store.d_model}"
        )
    recorded = (info.weights_sha256, info.revision)
    # a store of another tool may know neither; then only what the model computes is compared
    if recorded != (None, None) and recorded != (weights_sha256(info.name), source.revision):
        raise InputError(f"{info.name}: has changed since {store.path} was extracted; put it back, or extract again")
    return _Target(index, number, source, TORCH_DTYPES.get(info.dtype or "", "auto"), info.layer, hook)


def _check_fits(source: ModelSource, documents: Sequence[Document]) -> None:
    """Refuse ids and positions that a model has no embedding for; fastdiff's own stores have none."""
    largest = max(int(document.ids.max()) for document in documents)
    longest = max(len(document.ids) for document in documents)
    limit = getattr(source.config, "max_position_embeddings", None) or longest
    if largest >= source.config.vocab_size or longest > limit:
        raise InputError(
            f"{source.name}: embeds {source.config.vocab_size} tokens and {limit} positions, but the store has "
            f"token id {largest} and a document of {longest}; it is not the model that was stored"
        )


def _counted(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Positions [..., T] whose prediction counts, from the row of each position, -1 where it is not replaced."""
    counted = np.zeros(rows.shape, bool)
    counted[..., :-1] = (rows[..., :-1] >= 0) & (rows[..., 1:] >= 0)
    return counted


class _Batch(NamedTuple):
    """Documents, padded on the right.

    Attributes:
        ids: [B, T] token ids, 0 on padding.
        mask: [B, T] attention mask.
        rows: (B, T) row of each position, -1 where it is not replaced.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    rows: NDArray[np.int64]


def _batches(documents: Sequence[Document]) -> Iterator[_Batch]:
    """Documents of about one length together."""
    ordered = sorted(documents, key=lambda document: len(document.ids))
    start = 0
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and (stop + 1 - start) * len(ordered[stop].ids) <= _POSITIONS:
            stop += 1
        part, shape = ordered[start:stop], (stop - start, len(ordered[stop - 1].ids))
        batch = _Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int64))
        for i, document in enumerate(part):
            length = len(document.ids)
            batch.ids[i, :length], batch.mask[i, :length], batch.rows[i, :length] = document.ids, 1, document.rows
        yield batch
        start = stop


class _Halves:
    """A model in two halves: ids to last hidden states, and those to logits, for all logits of a batch may be too many.

    Args:
        model: A whole model.
    """

    def __init__(self, model: PreTrainedModel):
        self.vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self._model = model
        self._output: Any = None

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, T, D]."""
        self._output = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return self._output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of last hidden states [n, D], with its caps and scales: [n, V].

        Raises:
            OptionError: It takes its logits from elsewhere.
        """
        given = replace(self._output, last_hidden_state=hidden[None])
        asked = 0

        def answer(*_args: Any, **_kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            return given

        # OPT calls the decoder inside its base model
        inner = {id(module): module for module in (self._model.base_model, self._model.get_decoder())}
        with ExitStack() as stack:
            for module in inner.values():
                module.forward = answer
                stack.callback(delattr, module, "forward")
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        if asked != 1 or len(logits) != len(hidden):
            name = type(self._model).__name__
            raise OptionError(f"--splice: {name} does not compute its logits from its last hidden states")
        return logits

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[n, V] in float32, from last hidden states [n, D]."""
        return torch.log_softmax(self.logits(hidden).float(), dim=-1)


@torch.inference_mode()
def _figures(
    store: ActivationStore, crosscoder: Crosscoder, target: _Target, documents: Sequence[Document], task: Task
) -> ModelFigures:
    name, layer, hook, device = target.source.name, target.layer, target.hook, crosscoder.b_dec.device
    model = load(name, target.dtype, device, head=True)
    halves, module = _Halves(model), _hooked(model, layer, hook)
    mean = torch.tensor(store.stats().mean[target.number], dtype=torch.float64, device=device)
    ce, kl, n_tokens = dict.fromkeys(_VARIANTS, 0.0), 0.0, 0
    with capture(model, layer, hook) as captured:
        for batch in _batches(documents):
            ids, mask, where, counted = (
                torch.from_numpy(part).to(device)
                for part in (batch.ids, batch.mask, batch.rows >= 0, _counted(batch.rows))
            )
            stored = store.rows(batch.rows[batch.rows >= 0]).to(device)
            hidden = {"original": halves.hidden(ids, mask)[counted]}
            _check_same(store, target, captured.take()[where], stored[:, target.number])
            replacements = {
                "spliced": _reconstruction(crosscoder, stored)[:, target.index],
                "zero": torch.zeros_like(mean),
                "mean": mean,
            }
            for variant, activation in replacements.items():
                with _replaced(module, where, activation):
                    hidden[variant] = halves.hidden(ids, mask)[counted]
            losses, divergence = _compare(halves, hidden, ids.roll(-1, dims=1)[counted])
            ce = {variant: ce[variant] + losses[variant] for variant in _VARIANTS}
            kl += divergence
            n_tokens += int(counted.sum())
            task.advance(int(batch.mask.sum()))
    original, spliced, zero, by_mean = (ce[variant] / n_tokens for variant in _VARIANTS)
    recovered = (zero - spliced) / (zero - original) if zero > original else math.nan
    return ModelFigures(name, layer, hook, original, spliced, zero, by_mean, recovered, kl / n_tokens)


def _check_same(store: ActivationStore, target: _Target, computed: Tensor, stored: Tensor) -> None:
    """Refuse a model, tokens or positions that do not give the stored activations [n, D]."""
    squares = float((computed.double() - stored.double()).square().sum())
    variance = store.stats().variance[target.number] * len(stored)
    if not squares <= _MAX_DISTANCE * variance:
        raise InputError(
            f"{target.source.name}: does not compute what {store.path} holds (squared distance "
            f"{squares / variance if variance else math.inf:.3g} of the variance); extract it again"
        )


def _reconstruction(crosscoder: Crosscoder, stored: Tensor) -> Tensor:
    """x̂ [n, M, D] in the models' own units, of stored activations [n, M_stored, D]."""
    values, selection = crosscoder.encode(crosscoder.normalize(stored))
    return crosscoder.denormalize(crosscoder.decode(values, selection))


def _compare(halves: _Halves, hidden: dict[str, Tensor], targets: Tensor) -> tuple[dict[str, float], float]:
    """Sums over n predictions, from last hidden states [n, D] by variant: cross entropies, and KL of the spliced."""
    size = max(1, _LOGIT_BYTES // (4 * halves.vocab_size))
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


def _hooked(model: PreTrainedModel, layer: int, hook: Hook) -> nn.Module:
    """The module whose output is the activation."""
    block = find_layers(model)[1][layer]
    if hook == "resid_post":
        return block
    attention, mlp = branches(block)
    return block.get_submodule(attention if hook == "attn_out" else mlp)


@contextmanager
def _replaced(module: nn.Module, where: Tensor, activation: Tensor) -> Iterator[None]:
    """Put activations [n, D] or [D] at n positions of what a module gives, for as long as the block lasts."""

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        changed = (out[0] if isinstance(out, tuple) else out).clone()
        changed[where] = activation.to(changed.dtype)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
