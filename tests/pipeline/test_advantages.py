"""Rewards and advantages against their definitions, summed token by token in float64.

Shape legend: B sequence, T response token.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.advantages import generalized_advantages, token_rewards
from pipeline.masking import length_mask

LENGTHS = [5, 1, 3]
WIDTH = 6


def random_tokens(seed: int, padding: float = math.nan) -> Tensor:
    x_BT = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    return torch.where(length_mask(torch.tensor(LENGTHS), WIDTH), x_BT, padding)


def test_rewards_are_minus_beta_kl_with_the_score_on_the_last_real_token():
    kl_BT = random_tokens(0)
    scores = [10.0, -20.0, 30.0]
    rewards_BT = token_rewards(torch.tensor(scores), kl_BT, torch.tensor(LENGTHS), kl_coefficient=0.3)
    for row, length in enumerate(LENGTHS):
        expected = [-0.3 * kl_BT[row, t].item() for t in range(length)] + [0.0] * (WIDTH - length)
        expected[length - 1] += scores[row]
        # Scores come in float32 here; these are exact in it.
        assert rewards_BT[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_of_a_response_sum_to_its_penalised_score():
    kl_BT, lengths_B = random_tokens(0), torch.tensor(LENGTHS)
    scores_B = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rewards_BT = token_rewards(scores_B, kl_BT, lengths_B, kl_coefficient=0.05)
    torch.testing.assert_close(rewards_BT.sum(dim=1), scores_B - 0.05 * kl_BT.nansum(dim=1))


def test_without_coefficient_only_the_score_is_left():
    rewards_BT = token_rewards(torch.tensor([7.0]), torch.randn(1, 4), torch.tensor([4]), kl_coefficient=0)
    assert rewards_BT.tolist() == [[0, 0, 0, 7]]


@pytest.mark.parametrize(
    ("scores", "lengths", "coefficient", "message"),
    [
        ([1.0], [2, 3], 0.1, "scores_B"),
        ([1.0, 2.0], [2, 0], 0.1, "empty response"),
        ([1.0, 2.0], [2, 5], 0.1, "lengths"),
        ([1.0, 2.0, 3.0], [1, 2, 3], 0.1, "kl_BT"),
        ([1.0, 2.0], [2, 3], -0.1, "kl_coefficient"),
        ([1.0, 2.0], [2, 3], math.nan, "kl_coefficient"),
    ],
)
def test_rewards_refuse_wrong_arguments(scores, lengths, coefficient, message):
    with pytest.raises(ValueError, match=message):
        token_rewards(torch.tensor(scores), torch.zeros(2, 4), torch.tensor(lengths), kl_coefficient=coefficient)


def defined_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}: the series itself, not the recursion."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]


UNIT = st.floats(0, 1)
EPISODES = st.lists(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), max_size=6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(EPISODES, UNIT, UNIT)
def test_advantages_equal_the_series_and_returns_add_the_values(episodes, gamma, lam):
    width = max(map(len, episodes)) + 1
    filled = [episode + [(math.nan, math.nan)] * (width - len(episode)) for episode in episodes]
    rewards_BT, values_BT = torch.tensor(filled, dtype=torch.float64).unbind(dim=-1)
    mask_BT = length_mask(torch.tensor([len(episode) for episode in episodes]), width)
    advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for row, episode in enumerate(episodes):
        values = [value for _, value in episode]
        expected = defined_advantages([reward for reward, _ in episode], values, gamma, lam)
        rest = [0.0] * (width - len(episode))
        assert advantages_BT[row].tolist() == pytest.approx(expected + rest, abs=1e-9)
        returns = [advantage + value for advantage, value in zip(expected, values, strict=True)]
        assert returns_BT[row].tolist() == pytest.approx(returns + rest, abs=1e-9)


def test_defaults_are_gamma_1_and_lambda_095():
    rewards_BT, values_BT = random_tokens(1), random_tokens(2)
    mask_BT = length_mask(torch.tensor(LENGTHS), WIDTH)
    explicit = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=0.95)
    assert all(map(torch.equal, generalized_advantages(rewards_BT, values_BT, mask_BT), explicit))


def test_lambda_1_makes_the_returns_the_rewards_to_go_whatever_the_critic_says():
    rewards_BT, mask_BT = random_tokens(1), length_mask(torch.tensor(LENGTHS), WIDTH)
    _, returns_BT = generalized_advantages(rewards_BT, random_tokens(2), mask_BT, lam=1.0)
    for row, length in enumerate(LENGTHS):
        to_go = [sum(rewards_BT[row, t:length].tolist()) for t in range(length)]
        assert returns_BT[row, :length].tolist() == pytest.approx(to_go)


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_garbage_after_the_last_token_has_no_influence(padding):
    mask_BT = length_mask(torch.tensor(LENGTHS), WIDTH)
    clean = generalized_advantages(random_tokens(1, 0.0), random_tokens(2, 0.0), mask_BT)
    dirty = generalized_advantages(random_tokens(1, padding), random_tokens(2, padding), mask_BT)
    assert all(map(torch.equal, dirty, clean))
    rewards_BT = [
        token_rewards(torch.ones(3), random_tokens(3, filler), torch.tensor(LENGTHS), kl_coefficient=0.1)
        for filler in (0.0, padding)
    ]
    assert torch.equal(*rewards_BT)


def test_more_padding_changes_nothing():
    rewards_BT, values_BT = random_tokens(1), random_tokens(2)
    mask_BT = length_mask(torch.tensor(LENGTHS), WIDTH)
    wide = generalized_advantages(rewards_BT, values_BT, mask_BT)
    narrow = generalized_advantages(rewards_BT[:, :5], values_BT[:, :5], mask_BT[:, :5])
    assert all(torch.equal(w[:, :5], n) for w, n in zip(wide, narrow, strict=True))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        ([[True, False, True]], {}, "hole"),
        ([[False, True, True]], {}, "hole"),
        ([[True, True]], {}, "shape"),
        ([[True, True, True]], {"gamma": 1.1}, "gamma"),
        ([[True, True, True]], {"lam": -0.1}, "lam"),
    ],
)
def test_advantages_refuse_wrong_arguments(mask, options, message):
    with pytest.raises(ValueError, match=message):
        generalized_advantages(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor(mask), **options)
