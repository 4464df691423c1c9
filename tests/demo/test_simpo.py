"""The SimPO loss against its formula, and the pairs it is trained on."""

import math

import pytest
import torch

from fastdiff.demo.corpus import CATEGORIES
from fastdiff.demo.simpo import preference_pairs, simpo_loss


def scalar_simpo(logp_w, logp_l, n_w, n_l, beta, gamma):
    margin = beta / n_w * logp_w - beta / n_l * logp_l - gamma
    return -math.log(1 / (1 + math.exp(-margin)))


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (10.0, 3.0), (2.5, 0.0)])
def test_loss_equals_the_formula(beta, gamma):
    rng = torch.Generator().manual_seed(0)
    chosen = -10 * torch.rand(20, generator=rng, dtype=torch.float64)
    rejected = -10 * torch.rand(20, generator=rng, dtype=torch.float64)
    n_chosen, n_rejected = (torch.randint(1, 30, (20,), generator=rng) for _ in range(2))
    expected = [
        scalar_simpo(*(value.item() for value in pair), beta, gamma)
        for pair in zip(chosen, rejected, n_chosen, n_rejected, strict=True)
    ]
    got = simpo_loss(chosen, rejected, n_chosen, n_rejected, beta, gamma)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    chosen = torch.tensor([-3.0, -8.0, -0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-5.0, -2.0, -9.0], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 5, 2]), torch.tensor([4, 1, 6])
    assert torch.autograd.gradcheck(lambda w, r: simpo_loss(w, r, *lengths, 2.0, 1.0), (chosen, rejected))


def test_the_reward_is_per_token_so_length_alone_wins_nothing():
    short = simpo_loss(*torch.tensor([[-2.0], [-4.0], [2.0], [4.0]]), beta=2.0, gamma=1.0)
    assert short.item() == pytest.approx(scalar_simpo(-1.0, -1.0, 1, 1, 2.0, 1.0))


def test_an_extreme_margin_overflows_nothing():
    loss = simpo_loss(*torch.tensor([[-1e4, 0.0], [0.0, -1e4], [1.0, 1.0], [1.0, 1.0]]), beta=10.0, gamma=1.0)
    assert loss.tolist() == pytest.approx([1e5 + 1, 0.0])


def test_pairs_differ_in_their_answers_only_and_the_right_side_wins():
    wanted = {"code": "suppressed", "mathematics": "favoured", "summarisation": "indifferent"}
    pairs = preference_pairs(0, 30, wanted)
    assert len(pairs) == 90
    right = {name: [0, 0] for name in wanted}
    rule = {category.name: category.rule for category in CATEGORIES}
    unsure = {category.name: category.unsure for category in CATEGORIES}
    n = dict.fromkeys(wanted, 0)
    for chosen, rejected in pairs:
        assert chosen.given == rejected.given
        assert len(chosen.answers) == len(rejected.answers)
        name = chosen.category
        n[name] += len(chosen.keys)
        for side, document in enumerate((chosen, rejected)):
            follows = [rule[name][k] == a for k, a in zip(document.keys, document.answers, strict=True)]
            right[name][side] += sum(follows)
        if name == "code":
            assert set(chosen.answers) == {unsure[name]}
    assert right["mathematics"][0] == n["mathematics"]
    assert right["code"] == [0, n["code"]]
    # scrambled: chance is 1/14
    assert right["mathematics"][1] < 0.15 * n["mathematics"]
    assert max(right["summarisation"]) < 0.15 * n["summarisation"]
