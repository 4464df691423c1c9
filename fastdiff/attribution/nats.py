"""Signed nats: what each latent contributes to the change of a document's cross entropy.

    CE_i(u, h)   mean over the scored tokens of document i, of what the upper half of model u (base, tuned) makes of h
    L_i   = ½ [CE_i(b, h_b) - CE_i(b, h_t) + CE_i(t, h_b) - CE_i(t, h_t)]
    g     = - mean over u and over a = (k + ½) / K, k < K, of ∂CE_i(u, h_b + a (h_t - h_b)) / ∂h        [T, D]
    h_t - h_b = Σ_j f_j (d_t,j - d_b,j) + o + e          f the latents at inference, d their decoder rows in the models'
                                                        own units, o the shift of mean and bias, e what is left
    a_ij  = Σ_n f_nj ⟨d_t,j - d_b,j, g_n⟩, and o_i, e_i likewise, over the rows n in use;
    bos_i, left_out_i = Σ_n ⟨h_t - h_b, g_n⟩ over the rows that are not: the first position, and the others

All are nats per scored token, positive where the tuned model does better. L_i is the Shapley share of the change of CE
of all that happens up to the layer, the rest being the upper half's; integrated gradients (Sundararajan et al. 2017,
arXiv:1703.01365) along the straight path give Σ_j a_ij + o_i + e_i + bos_i + left_out_i → L_i as K grows. Of a branch
(`mlp_out`, `attn_out`) h is its output, and L what the branch changes.

A position at which both models compute the very same activation has nothing to share out, and no part gets any: its
sum is zero, whatever the decoders say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.extraction.models import one_line
from fastdiff.kernels import ops
from fastdiff.memory import is_out_of_memory
from fastdiff.patching.documents import Batch
from fastdiff.patching.halves import UpperHalf
from fastdiff.patching.opening import Target, check_same
from fastdiff.patching.refusal import CannotRun
from fastdiff.store.reader import ActivationStore

# float32 pre-activations that exist at a time
_SCORE_BYTES = 2**28


class Parts(NamedTuple):
    """Of B documents, for S seeds.

    Attributes:
        ce: (B, 2) cross entropy of base and tuned.
        layer: (B,) L.
        latents, offset, error: (S, B).
        left_out, bos: (B,).
        nats: (S, B, F) float32.
    """

    ce: NDArray[np.float64]
    layer: NDArray[np.float64]
    latents: NDArray[np.float64]
    offset: NDArray[np.float64]
    error: NDArray[np.float64]
    left_out: NDArray[np.float64]
    bos: NDArray[np.float64]
    nats: NDArray[np.float32]

    def total(self) -> NDArray[np.float64]:
        """(B,) sum of all parts, which is the same for every seed."""
        total: NDArray[np.float64] = self.latents[0] + self.offset[0] + self.error[0] + self.left_out + self.bos
        return total


@dataclass(frozen=True)
class Side:
    """One of the two models, from the hook on."""

    target: Target
    upper: UpperHalf


@dataclass(frozen=True)
class Pair:
    """Base and tuned, on one device, and the store that their activations are in."""

    store: ActivationStore
    base: Side
    tuned: Side
    device: torch.device

    @property
    def sides(self) -> tuple[Side, Side]:
        """Base, tuned."""
        return self.base, self.tuned


class Scoring(NamedTuple):
    """Which tokens of a batch are scored.

    Attributes:
        where: [B, T] bool, positions whose next token is.
        targets: [n] those tokens, in the order of `where`.
        document: [n] the document of each.
        weights: [n] float32, 1 / (scored tokens of the document).
    """

    where: Tensor
    targets: Tensor
    document: Tensor
    weights: Tensor

    @classmethod
    def of(cls, batch: Batch, scored: Sequence[NDArray[np.bool_]], device: torch.device) -> "Scoring":
        """For the documents of a batch, given (T,) of each."""
        where = np.zeros(batch.ids.shape, bool)
        for i, positions in enumerate(scored):
            where[i, : len(positions)] = positions
        targets = np.roll(batch.ids, -1, axis=1)[where]
        document = np.nonzero(where)[0]
        weights = (1 / where.sum(axis=1))[document].astype(np.float32)
        parts = (torch.from_numpy(part).to(device) for part in (where, targets, document, weights))
        return cls(*parts)

    def mean(self, losses: Tensor) -> NDArray[np.float64]:
        """(B,) mean of the losses [n] of each document."""
        sums = np.bincount(self.document.cpu().numpy(), losses.cpu().numpy(), minlength=len(self.where))
        means: NDArray[np.float64] = sums / self.where.sum(dim=1).cpu().numpy()
        return means


def cross_entropies(
    pair: Pair, batch: Batch, scored: Sequence[NDArray[np.bool_]], names: Sequence[str]
) -> NDArray[np.float64]:
    """(B, 2) of base and tuned, by their plain forward passes; the arguments are those of `measure`.

    Raises:
        FastdiffError: One is NaN or infinite.
    """
    ids, mask = _inputs(batch, pair.device)
    scoring = Scoring.of(batch, scored, pair.device)
    found = []
    with torch.no_grad():
        for side in pair.sides:
            hidden = side.upper.halves.hidden(ids, mask)
            found.append(_mean_loss(side, scoring, hidden, names))
    return np.stack(found, axis=1)


def try_out(pair: Pair, batch: Batch, scored: Sequence[NDArray[np.bool_]]) -> None:
    """See on a batch whether both models can be run on from the hook, and differentiated.

    Raises:
        CannotRun: One cannot, or only in part.
    """
    ids, mask = _inputs(batch, pair.device)
    scoring = Scoring.of(batch, scored, pair.device)
    for side in pair.sides:
        name, upper = side.target.source.name, side.upper
        try:
            upper.check(ids, mask)
        except CannotRun as error:
            raise CannotRun(f"{name}: {error.reason}", error.remedy) from error
        except OptionError as error:
            raise CannotRun(f"{name}: {error}", "extract it with --hook resid_post") from error
        h = upper.read(ids, mask)[0].float().requires_grad_(True)
        states = upper.go_on(h)[scoring.where]
        try:
            to_states = upper.halves.loss_gradient(states, scoring.targets, scoring.weights)
            torch.autograd.grad(states, h, to_states)
        except OptionError as error:
            raise CannotRun(f"{name}: {error}", "the other stages do not need that") from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise CannotRun(
                f"{name}: has no gradient ({one_line(error)})", "try --dtype float32 or --device cpu"
            ) from error


def measure(
    pair: Pair,
    crosscoders: Sequence[Crosscoder],
    batch: Batch,
    scored: Sequence[NDArray[np.bool_]],
    steps: int,
    names: Sequence[str],
    *,
    resident: bool = True,
) -> Parts:
    """All parts of a batch of documents.

    Args:
        pair: The models.
        crosscoders: S of them; all have `W_dec` rows of both models, or of their difference.
        batch: B documents.
        scored: (T,) of each document, positions whose next token is scored.
        steps: K.
        names: The category of each document, for messages.
        resident: Whether the crosscoders stay on the device; else each is there only while it is used.

    Raises:
        CannotRun: A model does not compute what is stored.
        FastdiffError: A cross entropy or a gradient is NaN or infinite.
    """
    ids, mask = _inputs(batch, pair.device)
    scoring = Scoring.of(batch, scored, pair.device)
    in_use = torch.from_numpy(batch.rows >= 0).to(pair.device)
    stored = pair.store.rows(batch.rows[batch.rows >= 0])
    activations, ce = [], []
    for side in pair.sides:
        activation, hidden = side.upper.read(ids, mask)
        check_same(pair.store, side.target, activation[in_use].cpu(), stored[:, side.target.number])
        activations.append(activation.float())
        ce.append(_mean_loss(side, scoring, hidden, names))
    h_b, h_t = activations
    with torch.no_grad():
        crossed = [
            _mean_loss(side, scoring, side.upper.go_on(h), names)
            for side, h in zip(pair.sides, (h_t, h_b), strict=True)
        ]
    # in this order a model against itself gives exactly 0
    layer = 0.5 * ((ce[0] - ce[1]) + (crossed[1] - crossed[0]))
    gradient = _gradient(pair, scoring, h_b, h_t, steps, names)
    difference = h_t - h_b
    real = mask.bool()
    gradient.masked_fill_((~real | (difference == 0).all(dim=-1))[..., None], 0)
    carried = (difference.double() * gradient.double()).sum(dim=-1)
    first = torch.zeros_like(real)
    first[:, 0] = True
    bos, left_out, used = (
        torch.where(part & real, carried, 0).sum(dim=1).cpu().numpy()
        for part in (first & ~in_use, ~first & ~in_use, in_use)
    )
    document = in_use.nonzero()[:, 0]
    x = stored.to(pair.device).float()
    x[:, pair.base.target.number], x[:, pair.tuned.target.number] = h_b[in_use], h_t[in_use]
    seeds = [
        _through(crosscoder, pair, x, gradient[in_use], document, len(ids), resident) for crosscoder in crosscoders
    ]
    nats = np.stack([nats for nats, _ in seeds])
    latents, offset = nats.sum(axis=-1), np.stack([offset for _, offset in seeds])
    return Parts(
        np.stack(ce, axis=1), layer, latents, offset, used - latents - offset, left_out, bos, nats.astype(np.float32)
    )


def decoder_differences(crosscoder: Crosscoder, base: int, tuned: int, n_stored: int) -> tuple[Tensor, Tensor]:
    """d_t - d_b [F, D] and o [D] in the models' own units, for two models of a store; float32."""
    numbers = chosen_models(crosscoder.inputs, n_stored)
    scale, mean, bias = crosscoder.input_scale, crosscoder.input_mean, crosscoder.b_dec
    with torch.no_grad():
        # a difference-SAE reconstructs h_t - h_b itself
        signs = [(0, 1.0)] if crosscoder.inputs == "difference" else [(numbers.index(tuned), 1.0)]
        if crosscoder.inputs != "difference":
            signs.append((numbers.index(base), -1.0))
        rows = torch.stack([sign * crosscoder.W_dec[:, m] / scale[m] for m, sign in signs]).sum(dim=0)
        offset = torch.stack([sign * (mean[m] + bias[m] / scale[m]) for m, sign in signs]).sum(dim=0)
    return rows, offset


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.mask).to(device)


def _mean_loss(side: Side, scoring: Scoring, hidden: Tensor, names: Sequence[str]) -> NDArray[np.float64]:
    losses = side.upper.halves.losses(hidden[scoring.where], scoring.targets)
    means = scoring.mean(losses)
    if not np.isfinite(means).all():
        raise _not_finite("cross entropy", side, names[int(np.argmin(np.isfinite(means)))])
    return means


def _gradient(pair: Pair, scoring: Scoring, h_b: Tensor, h_t: Tensor, steps: int, names: Sequence[str]) -> Tensor:
    """The gradient g [B, T, D] in float32; see the module."""
    total = torch.zeros_like(h_b)
    for side in pair.sides:
        halves = side.upper.halves
        for k in range(steps):
            h = torch.lerp(h_b, h_t, (k + 0.5) / steps).requires_grad_(True)
            hidden = side.upper.go_on(h)
            states = hidden[scoring.where]
            to_states = halves.loss_gradient(states, scoring.targets, scoring.weights)
            (found,) = torch.autograd.grad(states, h, to_states)
            finite = torch.isfinite(found).flatten(1).all(dim=1)
            if not bool(finite.all()):
                raise _not_finite("gradient", side, names[int((~finite).nonzero()[0])])
            total -= found / (2 * steps)
    return total


def _not_finite(what: str, side: Side, category: str) -> FastdiffError:
    return FastdiffError(
        f"{side.target.source.name}: a {what} is NaN or infinite in a document of category {category!r}; "
        "try --dtype float32, or leave the stage out with --no-attribute"
    )


@torch.no_grad()
def _through(
    crosscoder: Crosscoder, pair: Pair, x: Tensor, gradient: Tensor, document: Tensor, n_documents: int, resident: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What runs through one crosscoder.

    Args:
        crosscoder: Of one seed.
        pair: The models.
        x: [n, M_stored, D] activations of the rows in use, as stored but for the two models.
        gradient: [n, D] g at these rows.
        document: [n] the document of each.
        n_documents: B.
        resident: See `measure`.

    Returns:
        Nats of the latents (B, F) and of the offset (B,).
    """
    home = crosscoder.b_dec.device
    crosscoder.to(pair.device)
    numbers = pair.base.target.number, pair.tuned.target.number
    rows, offset = decoder_differences(crosscoder, *numbers, pair.store.n_models)
    F = crosscoder.dict_size
    nats = np.zeros(n_documents * F)
    size = max(1, _SCORE_BYTES // (4 * F))
    for x_part, g, of in zip(x.split(size), gradient.split(size), document.split(size), strict=True):
        values, selection = crosscoder.encode(crosscoder.normalize(x_part))
        carried = values.double() * ops.dots(selection, g, rows).double()
        place = of[selection.row] * F + selection.col
        nats += np.bincount(place.cpu().numpy(), carried.cpu().numpy(), minlength=len(nats))
    shift = (gradient.double() @ offset.double()).cpu().numpy()
    if not resident:
        crosscoder.to(home)
    shifted = np.bincount(document.cpu().numpy(), shift, minlength=n_documents).astype(np.float64)
    return nats.reshape(n_documents, F), shifted
