"""How good a crosscoder is on rows it may not have seen.

    fve_m         1 - Σ‖e_m‖² / Σ‖x̃_m - mean‖², e_m = x̃_m - x̂_m; the same per group of rows, about the group's own mean
    fve_all_m     the same with the rows that are left out of use (sinks), about the mean of all; BOS stays out
    cosine_m      mean of ⟨x̃_m, x̂_m⟩ / (‖x̃_m‖·‖x̂_m‖), 0 where x̂_m = 0
    norm_ratio_m  mean of ‖x̂_m‖ / ‖x̃_m‖
    bias_m        Σ‖x̂_m‖² / Σ⟨x̃_m, x̂_m⟩: x̂_m divided by it would be nearest to x̃_m, so below 1 it is too short

Every figure is made of sums over all rows in float64, never a mean of batches. Rows with x̃_m = 0 are left out of the
last three. NaN stands for what the rows cannot tell.

Source: Rajamanoharan et al. 2024, arXiv:2404.16014 (relative reconstruction bias).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.crosscoder.model import Crosscoder
from fastdiff.errors import InputError
from fastdiff.kernels.selection import row_chunks
from fastdiff.rundir import finite

# stored activations [B, M_stored, D], alone or with the group of each row by grouping, (B,) integers each
Batch = Tensor | tuple[Tensor, Mapping[str, NDArray[Any]]]

_N_STATISTICS = 7  # of `_statistics`
_DENSE = 10  # fires on more than one row in ten
_EDGES = np.arange(-8, 0.5, 0.5)
# rounding leaves this much of Σ‖x̃‖² when equal rows are centred; rows that differ in float32's last bits vary more
_NO_VARIANCE = 1e-12
# scores of all latents that a CPU holds at a time: 4 MB of memory are used again, 8 MB are mapped anew, which makes an
# evaluation a seventh slower; and fewer rows multiply more slowly
_SCORES, _ROWS = 1 << 20, 256


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; what equals an edge counts above it, but for the last."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class GroupQuality:
    """Of the rows of one group."""

    n_rows: int
    fve: list[float]  # per model
    fve_pooled: float
    l0_mean: float


@dataclass(frozen=True)
class Quality:
    """Whole-set figures at inference; see the module. NaN if there are no rows."""

    n_rows: int
    fve: list[float]  # per model; NaN for fewer than 2 rows and for a model that does not vary
    fve_all: list[float]  # per model, with rows that are left out of use; `fve` where there are none
    fve_pooled: float  # the sums of all models together
    l0_mean: float  # latents that fire on a row
    l0_p5: float  # percentiles over rows, linear between two
    l0_p50: float
    l0_p95: float
    train_l0: float  # what the selection of training, made on each batch, takes of it; see `evaluate`
    silent_fraction: float  # share of latents that fired on none of the rows
    dense_fraction: float  # share of latents that fired on more than a tenth of the rows
    never_fired: int  # latents that are in no bin of `frequency`
    frequency: Histogram  # of log10(share of the rows on which a latent fires)
    cosine: list[float]  # per model
    norm_ratio: list[float]  # per model
    bias: list[float]  # per model
    groups: dict[str, dict[str, GroupQuality]]  # by grouping and name, those without rows too

    def facts(self) -> dict[str, Any]:
        """All of it for JSON, which has no NaN: null."""
        facts: dict[str, Any] = finite(asdict(self))
        return facts


def l0_gap(quality: Quality) -> float:
    """By which share more latents fire at inference than training selects; NaN if it selects none."""
    return quality.l0_mean / quality.train_l0 - 1 if quality.train_l0 else math.nan


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder,
    batches: Iterable[Batch],
    group_names: Mapping[str, Sequence[str]] | None = None,
    *,
    left_out: Iterable[Tensor] = (),
) -> Quality:
    """Measure a crosscoder, changing nothing of it.

    Args:
        crosscoder: With its inference threshold.
        batches: Stored activations [B, M_stored, D] each, or pairs of them and what `group_names` asks for: by
            grouping, the number of each row's group. Only `train_l0` depends on how rows are split into batches:
            BatchTopK takes the B·k largest positive scores of each, the others what they take at inference.
        group_names: By grouping ("source", "role"), the names of its groups, in the order of their numbers.
        left_out: Stored activations of rows that only `fve_all` looks at.

    Returns:
        Quality.

    Raises:
        InputError: A row holds NaN or infinity, or its group has no name.
        ValueError: A batch brings other groupings than `group_names`, or a name is there twice.
    """
    names = {grouping: list(of) for grouping, of in (group_names or {}).items()}
    for grouping, of in names.items():
        if len(set(of)) < len(of):
            raise ValueError(f"groups of {grouping} must have different names, got {of}")
    sums = _Sums(crosscoder, 1 + sum(map(len, names.values())))
    for batch in batches:
        stored, codes = batch if isinstance(batch, tuple) else (batch, {})
        sums.add(stored, _members(len(stored), codes, names).to(sums.total.device))
    others = _Sums(crosscoder, 1)
    for stored in left_out:
        others.add(stored, torch.ones(len(stored), 1, dtype=torch.float64, device=others.total.device))
    return sums.quality(names, others)


class _Sums:
    """Running sums over rows, on the crosscoder's device: group 0 has all rows, the others those of one group each."""

    def __init__(self, crosscoder: Crosscoder, n_groups: int):
        M, D = crosscoder.b_dec.shape
        F, device = crosscoder.dict_size, crosscoder.b_dec.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._crosscoder, self._code_norm = crosscoder, crosscoder.code_norm()
        self.n = zeros(n_groups)
        self.active = zeros(n_groups)
        self.total = zeros(n_groups, M * D)
        self.statistics = zeros(n_groups, M * _N_STATISTICS)
        self.fired = zeros(F, dtype=torch.int64)  # rows by latent
        self.counts = zeros(F + 1, dtype=torch.int64)  # rows by how many latents fire
        self.taken = zeros(dtype=torch.int64)  # pairs that the selection of training takes

    def add(self, stored: Tensor, members: Tensor) -> None:
        """Take in stored activations [B, M_stored, D] and which groups each row belongs to, [B, G] of 0 and 1."""
        c = self._crosscoder
        step = max(_ROWS, _SCORES // c.dict_size) if self.total.device.type == "cpu" else max(1, len(stored))
        positive, wanted = torch.zeros_like(self.taken), len(stored) * c.k
        for part, member in zip(stored.split(step), members.split(step), strict=True):
            x = c.normalize(part)
            pre = c.pre_activations(x)
            selection = c.select(pre)
            out = c.decode(pre[selection.row, selection.col], selection)
            if c.activation == "batchtopk":
                _count_positive(positive, pre, self._code_norm, wanted)
            count = selection.crow.diff()
            self.fired.scatter_add_(0, selection.col, torch.ones_like(selection.col))
            self.counts.scatter_add_(0, count, torch.ones_like(count))
            x, by_group = x.double(), member.T
            self.n += by_group.sum(dim=1)
            self.active += by_group @ count.double()
            self.total += by_group @ x.flatten(1)
            self.statistics += by_group @ _statistics(x, out.double()).flatten(1)
        self.taken += positive.clamp(max=wanted)

    def quality(self, names: dict[str, list[str]], others: "_Sums") -> Quality:
        """What the sums say; `others` are those of rows that are left out of use.

        Raises:
            InputError: A row held NaN or infinity.
        """
        c = self._crosscoder
        M, D = c.b_dec.shape
        n, active, total, statistics, fired, counts = (
            sums.cpu() for sums in (self.n, self.active, self.total, self.statistics, self.fired, self.counts)
        )
        total, statistics = total.view(-1, M, D), statistics.view(-1, M, _N_STATISTICS)
        squares, errors, cosine, ratio, output, overlap, there = statistics.unbind(dim=-1)
        # float64 holds the squares of all finite float32
        if not bool(squares[0].isfinite().all()):
            raise InputError("an activation to evaluate on is NaN or infinite; extract the store again")
        groups = [_group(*sums) for sums in zip(n, total, squares, errors, active, strict=True)]
        rows, everything, of_group = int(n[0]), groups[0], iter(groups[1:])
        l0 = _percentiles(counts.numpy(), (0.05, 0.5, 0.95))
        n_latents = c.dict_size if rows else math.nan
        never_fired = int((fired == 0).sum())
        often = (fired[fired > 0].double() / rows).log10().clamp(min=float(_EDGES[0]))
        return Quality(
            n_rows=rows,
            fve=everything.fve,
            fve_all=self._fve_with(others),
            fve_pooled=everything.fve_pooled,
            l0_mean=everything.l0_mean,
            l0_p5=l0[0],
            l0_p50=l0[1],
            l0_p95=l0[2],
            train_l0=float(self.taken.double() / rows) if c.activation == "batchtopk" else everything.l0_mean,
            silent_fraction=never_fired / n_latents,
            dense_fraction=int((fired * _DENSE > rows).sum()) / n_latents,
            never_fired=never_fired,
            frequency=Histogram(_EDGES.tolist(), np.histogram(often.numpy(), _EDGES)[0].tolist()),
            cosine=(cosine[0] / there[0]).tolist(),
            norm_ratio=(ratio[0] / there[0]).tolist(),
            bias=(output[0] / overlap[0]).tolist(),
            groups={grouping: {name: next(of_group) for name in of} for grouping, of in names.items()},
        )

    def _fve_with(self, others: "_Sums") -> list[float]:
        """FVE per model on the rows of both.

        Raises:
            InputError: A row of the others held NaN or infinity.
        """
        n, active, total, statistics = (
            (mine[0] + theirs[0]).cpu()
            for mine, theirs in (
                (self.n, others.n),
                (self.active, others.active),
                (self.total, others.total),
                (self.statistics, others.statistics),
            )
        )
        M, D = self._crosscoder.b_dec.shape
        squares, errors = statistics.view(M, _N_STATISTICS).T[:2]
        if not bool(squares.isfinite().all()):
            raise InputError("an activation to evaluate on is NaN or infinite; extract the store again")
        return _group(n, total.view(M, D), squares, errors, active).fve


def _statistics(x: Tensor, out: Tensor) -> Tensor:
    """Of each row and model, [B, M, 7]: what `_Sums.quality` names, from x̃ and x̂ [B, M, D] in float64."""
    squares, output, overlap = ((a * b).sum(dim=-1) for a, b in ((x, x), (out, out), (x, out)))
    there = squares > 0
    ratio = torch.where(there, (output / squares).sqrt(), 0.0)
    cosine = torch.where(there & (output > 0), overlap / (squares * output).sqrt(), 0.0)
    errors = (x - out).square().sum(dim=-1)
    return torch.stack((squares, errors, cosine, ratio, output * there, overlap, there.double()), dim=-1)


def _count_positive(found: Tensor, pre: Tensor, code_norm: Tensor, enough: int) -> None:
    """Add to `found` [] how many scores of pre-activations [B, F] BatchTopK could take; on a CPU until it is enough."""
    for _, score in row_chunks(pre, code_norm):
        if found.device.type == "cpu" and int(found) >= enough:
            return
        found += torch.count_nonzero((score > 0) & (score < torch.inf))


def _members(n_rows: int, codes: Mapping[str, NDArray[Any]], names: dict[str, list[str]]) -> Tensor:
    """Which groups each row belongs to, [n_rows, 1 + groups] float64 of 0 and 1; all rows to the first."""
    if codes.keys() != names.keys():
        raise ValueError(f"a batch brings the groupings {sorted(codes)}, expected {sorted(names)}")
    members = np.zeros((n_rows, 1 + sum(map(len, names.values()))))
    members[:, 0] = 1
    begin, row = 1, np.arange(n_rows)
    for grouping, of in names.items():
        code = np.asarray(codes[grouping]).astype(np.int64)
        if code.shape != (n_rows,):
            raise ValueError(f"{grouping} must be ({n_rows},), one for each row, got {code.shape}")
        wrong = code[(code < 0) | (code >= len(of))]
        if len(wrong):
            raise InputError(
                f"a row to evaluate on has {grouping} {wrong[0]}, but there are {len(of)}; "
                "run fastdiff verify on the store"
            )
        members[row, begin + code] = 1
        begin += len(of)
    return torch.from_numpy(members)


def _group(n: Tensor, total: Tensor, squares: Tensor, errors: Tensor, active: Tensor) -> GroupQuality:
    """Of n [] rows with Σx̃ [M, D], Σ‖x̃‖² and Σ‖e‖² [M], on which `active` [] latents fired."""
    # 0 for one row, NaN for none
    spread = squares - total.square().sum(dim=1) / n
    return GroupQuality(
        n_rows=int(n),
        fve=_explained(errors, spread, squares).tolist(),
        fve_pooled=float(_explained(errors.sum(), spread.sum(), squares.sum())),
        l0_mean=float(active / n),
    )


def _explained(errors: Tensor, spread: Tensor, squares: Tensor) -> Tensor:
    return torch.where(spread > _NO_VARIANCE * squares, 1 - errors / spread, torch.nan)


def _percentiles(counts: NDArray[np.int64], shares: Sequence[float]) -> list[float]:
    """Percentiles of a number that has the value i counts[i] times, linear between two, as numpy's."""
    ends = counts.cumsum()
    if not ends[-1]:
        return [math.nan] * len(shares)
    found = []
    for share in shares:
        rank = share * (ends[-1] - 1)
        low, high = np.searchsorted(ends, (math.floor(rank), math.ceil(rank)), side="right").tolist()
        found.append(low + (high - low) * (rank - math.floor(rank)))
    return found
