"""Concepts against pairs that are compared one by one."""

import numpy as np
import pytest
import torch

from fastdiff.analysis.concepts import LEAST, concepts
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.store.format import COLUMNS
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter

F, M, D, N = 40, 2, 6, 300


@pytest.fixture
def store(tmp_path):
    x = torch.randn(N, M, D, generator=torch.Generator().manual_seed(0))
    meta = {"models": ["a", "b"]}
    with StoreWriter(
        tmp_path / "s", n_rows=N, n_models=M, d_model=D, dtype="float32", shard_rows=N, meta=meta
    ) as writer:
        writer.append(x, **dict.fromkeys(COLUMNS, np.zeros(N, np.int64)))
    with ActivationStore(tmp_path / "s") as opened:
        yield opened


def split_latents(seed: int) -> Crosscoder:
    """Ten directions, each of four latents that are near to it to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    c = Crosscoder(F, M, D, activation="relu", k=1)
    with torch.no_grad():
        direction = torch.randn(10, M, D, generator=generator).repeat_interleave(4, dim=0)
        noise = torch.tensor([0.1, 0.4, 0.8, 1.2]).repeat(10)[:, None, None]
        for weights in (c.W_dec, c.W_enc):
            weights.copy_(direction + noise * torch.randn(F, M, D, generator=generator))
        c.b_enc.copy_(-torch.rand(F, generator=generator))
    return c


def by_definition(c: Crosscoder, x: torch.Tensor, members: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        f = torch.relu(
            torch.einsum("nmd,fmd->nf", c.normalize(x).double(), c.W_enc.double()) + c.b_enc.double()
        ).numpy()
        d = c.W_dec.double().flatten(1).numpy()
    found = np.where(members, np.arange(F), -1)
    changed = True
    while changed:
        changed = False
        for i in np.flatnonzero(members):
            for j in np.flatnonzero(members):
                cosine = d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
                norms = np.linalg.norm(f[:, i]) * np.linalg.norm(f[:, j])
                together = norms > 0 and f[:, i] @ f[:, j] / norms >= LEAST
                if cosine >= LEAST and together and found[j] < found[i]:
                    found[i], changed = found[j], True
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_hangs_together_is_a_concept(store, seed):
    c = split_latents(seed)
    members = np.random.default_rng(seed).random(F) < 0.8
    wanted = by_definition(c, store.slice(0, N), members)
    found = concepts(c, store, np.arange(N), members, batch_size=64)
    assert found.tolist() == wanted.tolist()
    sizes = np.unique(found[found >= 0], return_counts=True)[1]
    assert sizes.max() >= 3 and (sizes == 1).any()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_latents_are_concepts_of_their_own(store, n):
    members = np.arange(F) < n
    assert concepts(split_latents(0), store, np.arange(N), members, batch_size=64).tolist() == [0] * n + [-1] * (F - n)
