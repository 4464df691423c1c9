"""The planted generator is what it says, and the score counts what it says."""

import numpy as np
import torch

from fastdiff.demo.planted import planted_activations, recovered


def draw(**changes):
    values = {"n_tokens": 20_000, "d_model": 16, "shared": 10, "exclusive": {0.05: 3, 0.01: 2}}
    return planted_activations(0, **(values | changes))


def test_exclusive_directions_exist_in_one_model_only():
    planted = draw()
    assert planted.owner == ["shared"] * 10 + ["base"] * 3 + ["tuned"] * 3 + ["base"] * 2 + ["tuned"] * 2
    norms = planted.directions.norm(dim=-1)
    for owner, norm in zip(planted.owner, norms, strict=True):
        want = {"shared": [1, 1], "base": [1, 0], "tuned": [0, 1]}[owner]
        assert np.allclose(norm, want, atol=1e-6)
    cosine = (planted.directions[:10, 0] * planted.directions[:10, 1]).sum(-1)
    assert 0.9 < float(cosine.min()) < 1


def test_a_direction_fires_as_often_as_it_says():
    planted = draw(shared=0, exclusive={0.05: 1}, noise=0.001)
    for j, model in ((0, 0), (1, 1)):
        fired = (planted.activations[:, model] @ planted.directions[j, model]) > 0.5
        assert abs(float(fired.double().mean()) - 0.05) < 0.005
    assert float(planted.activations[:, 0].norm(dim=-1).quantile(0.5)) < 0.01


def test_the_same_seed_gives_the_same_tokens():
    assert torch.equal(draw().activations, draw().activations)


def test_score_of_a_perfect_and_of_a_wrong_answer():
    planted = draw()
    W_dec = planted.directions.clone() * 3
    truth = {side: torch.tensor([o == side for o in planted.owner]) for side in ("base", "tuned")}
    for found in recovered(planted, W_dec, truth).values():
        assert found == {0.05: 1.0, 0.01: 1.0, 0.0: 1.0}
    swapped = {"base": truth["tuned"], "tuned": truth["base"]}
    for found in recovered(planted, W_dec, swapped).values():
        assert found == {0.05: 0.0, 0.01: 0.0, 0.0: 0.0}
    nothing = {side: torch.zeros(20, dtype=torch.bool) for side in ("base", "tuned")}
    assert recovered(planted, W_dec, nothing)["base"] == {0.05: 0.0, 0.01: 0.0, 0.0: 1.0}
    shared_too = {side: truth[side] | torch.tensor([o == "shared" for o in planted.owner]) for side in truth}
    assert recovered(planted, W_dec, shared_too)["tuned"] == {0.05: 1.0, 0.01: 1.0, 0.0: 5 / 15}
