"""Scores that are hard to select from, and what a selection must look like whatever selects it."""

import torch

from fastdiff.kernels.selection import Selection
from fastdiff.kernels.slots import ALL_FINITE, Slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["normal", "ties", "few_positive", "all_negative", "constant", "not_finite", "one_row", "tiny"]


def scores(kind: str, B: int, F: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(B * 1000 + F)
    score = torch.randn(B, F, generator=generator, dtype=torch.float64)
    if kind == "ties":
        score = (score * 2).round()
    elif kind == "few_positive":
        score = torch.where(torch.rand(B, F, generator=generator) < 0.05, score.abs(), -score.abs())
    elif kind == "all_negative":
        score = -score.abs() - 1
    elif kind == "constant":
        score = torch.ones(B, F, dtype=torch.float64)
    elif kind == "not_finite":
        score.view(-1)[:: max(3, B)] = torch.nan
        score.view(-1)[1 :: max(4, B)] = torch.inf
        score.view(-1)[2 :: max(5, B)] = -torch.inf
    elif kind == "one_row":
        score[1:] = -1
        score[:1] = score[:1].abs() + 5
    elif kind == "tiny":
        # subnormal float32, with zeros of both signs
        score = score.round() * 1e-44
    return score.to(dtype).to(DEVICE)


def mask_of(selection: Selection) -> torch.Tensor:
    mask = torch.zeros(selection.n_tokens, selection.dict_size, dtype=torch.bool, device=selection.col.device)
    mask[selection.row, selection.col] = True
    return mask


def assert_well_formed(selection: Selection) -> None:
    for index in (selection.crow, selection.col, selection.row):
        assert index.dtype == torch.int64
    assert selection.crow[0] == 0 and selection.crow[-1] == len(selection.col) == len(selection.row)
    counts = torch.bincount(selection.row, minlength=selection.n_tokens)
    assert torch.equal(selection.crow.diff(), counts)
    flat = selection.row * selection.dict_size + selection.col
    assert bool((flat.diff() > 0).all()), "entries must ascend by token, then latent, without repeats"


def garbage_slots(B: int, k_max: int) -> Slots:
    """Slots whose every place must be written: what is there now would be noticed."""
    slots = Slots.allocate(B, k_max, torch.device(DEVICE))
    for integers in slots[:4]:
        integers.fill_(-7)
    slots.val.fill_(float("nan"))
    return slots


def assert_slots(slots: Slots, mask: torch.Tensor, f: torch.Tensor, row_offset: int = 0) -> None:
    """The slots hold exactly the pairs of mask [B, F], in order, with activations f [B, F]; the others are clear."""
    B, F = mask.shape
    unused = torch.ones_like(slots.col, dtype=torch.bool)
    for b in range(B):
        start, end = int(slots.start[b]), int(slots.end[b])
        want = mask[b].nonzero().squeeze(1)
        assert slots.col[start:end].tolist() == want.tolist(), f"token {b}"
        assert bool((slots.row[start:end] == b + row_offset).all())
        assert torch.equal(slots.val[start:end], f[b, want])
        assert bool(unused[start:end].all()), "two tokens share a slot"
        unused[start:end] = False
    assert bool((slots.col[unused] == F).all()) and bool((slots.val[unused] == 0).all())


def limits(n_valid: int, k: int) -> torch.Tensor:
    return torch.tensor([n_valid, k], dtype=torch.int32, device=DEVICE)


def no_bad() -> torch.Tensor:
    return torch.full((1,), ALL_FINITE, dtype=torch.int32, device=DEVICE)


def bias_and_scale(F: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Few different ones, which keep ties; one scale is zero, as that of a zero decoder row, and never selected."""
    generator = torch.Generator().manual_seed(F)
    bias = torch.randint(-2, 3, (F,), generator=generator) * 0.5
    scale = torch.tensor([0.75, 1.5, 3.0])[torch.randint(3, (F,), generator=generator)]
    scale[F // 2] = 0.0
    return bias.to(DEVICE), scale.to(DEVICE)


def score_of(
    stored: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and scores [B, F] in float32, rounded as the kernels round them."""
    f = stored.float() if bias is None else stored.float() + bias
    return f, f if scale is None else f * scale
