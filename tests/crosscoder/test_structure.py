"""Latents that are not free stay so to the last bit; what does not fit is refused."""

import pytest
import torch
from objectives import B, F, batch, make

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.fused_trainer import make_trainer
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.structure import Structure, structure_of
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import OptionError


def numbered(F: int, M: int, D: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + F * M * D).view(F, M, D)


def test_owned_latents_are_the_last():
    assert Structure(2, 3).owned(11, 3) == [slice(2, 5), slice(5, 8), slice(8, 11)]
    assert Structure(0, 0).owned(11, 2) == [slice(11, 11), slice(11, 11)]


@pytest.mark.parametrize("M", [2, 3])
def test_impose_zeroes_what_is_absent_and_ties_the_first(M):
    W_enc, W_dec = numbered(8, M, 2), -numbered(8, M, 2)
    Structure(shared=2, exclusive=1).impose(W_enc, W_dec)
    for got, free in ((W_enc, numbered(8, M, 2)), (W_dec, -numbered(8, M, 2))):
        for j in range(8):
            for m in range(M):
                owner = j - (8 - M)
                want = free[j, 0] if j < 2 else free[j, m] if owner in (m, *range(-8, 0)) else torch.zeros(2)
                assert torch.equal(got[j, m], want), (j, m)


@pytest.mark.parametrize("M", [2, 3])
def test_project_zeroes_what_is_absent_and_sums_tied_gradients_of_the_decoder(M):
    g_enc, g_dec = numbered(8, M, 2), -numbered(8, M, 2)
    Structure(shared=2, exclusive=1).project(g_enc, g_dec)
    for got, free, tied in ((g_enc, numbered(8, M, 2), False), (g_dec, -numbered(8, M, 2), True)):
        for j in range(8):
            for m in range(M):
                owner = j - (8 - M)
                want = free[j, m] if owner in (m, *range(-8, 0)) else torch.zeros(2)
                if tied and j < 2:
                    want = free[j].sum(dim=0)
                assert torch.equal(got[j, m], want), (j, m)


def test_a_free_structure_changes_nothing():
    W_enc, W_dec = numbered(4, 2, 3), -numbered(4, 2, 3)
    Structure(0, 0).impose(W_enc, W_dec)
    Structure(0, 0).project(W_enc, W_dec)
    assert torch.equal(W_enc, numbered(4, 2, 3)) and torch.equal(W_dec, -numbered(4, 2, 3))


@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "batchtopk", "auxk_coef": 1 / 32, "dead_tokens": 3 * B, "delta_coef": 0.5},
        {"activation": "relu", "micro_batch": 6},
        {"activation": "jumprelu", "preact_coef": 0.01},
    ],
    ids=str,
)
def test_twenty_steps_keep_it_to_the_last_bit(M, options):
    trainer = make(M, kind=make_trainer, exclusive=0.1, shared_latents=6, clip=0.5, **options)
    c = trainer.crosscoder
    for step in range(20):
        trainer.step(batch(M, step))
    state = trainer.state()
    for m in range(M):
        own = slice(F - 4 * (M - m), F - 4 * (M - m - 1))
        others = [n for n in range(M) if n != m]
        for name in ("W_enc", "W_dec"):
            tensors = (getattr(c, name), state[f"{name}.exp_avg"], state[f"{name}.exp_avg_sq"])
            for tensor in tensors:
                assert not tensor[own][:, others].any(), (name, m)
                assert tensor[own, m].any(), (name, m)
    for m in range(1, M):
        assert torch.equal(c.W_dec[:6, m], c.W_dec[:6, 0])
        assert not torch.equal(c.W_enc[:6, m], c.W_enc[:6, 0]), "each model is read along its own directions"
        assert not torch.equal(c.W_dec[6, m], c.W_dec[6, 0])


@pytest.mark.parametrize(("dict_size", "M", "d_model"), [(7, 2, 10), (9, 3, 7), (4, 3, 3)])
def test_tied_rows_at_the_end_of_a_tensor_stay_equal(dict_size, M, d_model):
    """Adam's vector code and its scalar code for the last elements round differently."""
    config = TrainConfig(activation="topk", dict_size=dict_size, k=2, steps=40, batch_size=B, lr=2e-3, warmup_steps=0,
                         shared_latents=dict_size)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(B, M, d_model, generator=generator) for _ in range(30)]
    c = Crosscoder(dict_size, M, d_model, activation="topk", k=2)
    c.initialize(data[0], init="independent", seed=0, structure=structure_of(config, M))
    trainer = Trainer(c, config)
    for x in data:
        trainer.step(x)
    for m in range(1, M):
        assert torch.equal(c.W_dec[:, m], c.W_dec[:, 0])


def test_decoder_norms_of_an_absent_row_have_a_finite_gradient():
    """‖W_dec[j, m]‖ has no derivative at 0."""
    trainer = make(activation="relu", exclusive=0.2, l1_coef=1.0)
    trainer.step(batch())
    assert all(bool(p.grad.isfinite().all()) for p in trainer.crosscoder.parameters())


@pytest.mark.parametrize(
    ("M", "options", "message"),
    [
        (1, {"exclusive": 0.1}, "--exclusive 0.1 needs two models; this crosscoder has 1"),
        (1, {"shared_latents": 3}, "--shared-latents 3 needs two models"),
        (2, {"exclusive": 0.01}, "--exclusive 0.01 of --dict-size 40 is less than one latent"),
        (2, {"exclusive": 0.4, "shared_latents": 9}, "more than --dict-size 40; lower one"),
        (3, {"exclusive": 0.4}, "more than --dict-size 40; lower one"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(M, options, message):
    config = TrainConfig(dict_size=F, k=3, **options)
    with pytest.raises(OptionError, match=message):
        structure_of(config, M)
    with pytest.raises(OptionError, match=message):
        make_trainer(Crosscoder(F, M, 4, activation="batchtopk", k=3), config)


def test_a_structure_that_just_fits_is_taken():
    assert structure_of(TrainConfig(dict_size=F, k=3, exclusive=0.4, shared_latents=8), 2) == Structure(8, 16)
    assert structure_of(TrainConfig(dict_size=F, k=3), 1) == Structure(0, 0)
