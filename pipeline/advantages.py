"""From scores to advantages: per-token rewards, and generalized advantage estimation.

Shape legend: B sequence, T response token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.masking import check_shapes, length_mask


def token_rewards(scores_B: Tensor, kl_BT: Tensor, lengths_B: Tensor, *, kl_coefficient: float) -> Tensor:
    """-beta * KL at every response token, plus the score at the last one (Ouyang et al. 2022, equation 2).

    Args:
        scores_B: one score a response, reward units.
        kl_BT: k1 estimate log policy - log reference at each response token, nats.
        lengths_B: number of response tokens, EOS included, at least 1.
        kl_coefficient: beta, reward units per nat.

    Returns:
        rewards_BT; 0 after the last real token, which is found from the length alone.

    Raises:
        ValueError: shapes that do not fit, an empty response, a negative coefficient.
    """
    mask_BT = length_mask(lengths_B, kl_BT.shape[-1])
    check_shapes(mask_BT, kl_BT=kl_BT)
    if scores_B.shape != lengths_B.shape:
        raise ValueError(f"scores_B has shape {tuple(scores_B.shape)}, lengths_B {tuple(lengths_B.shape)}")
    if bool((lengths_B == 0).any()):
        raise ValueError(f"an empty response has no token to carry its score, got {lengths_B.tolist()}")
    if not kl_coefficient >= 0:
        raise ValueError(f"kl_coefficient must be at least 0, got {kl_coefficient}")
    rewards_BT = torch.where(mask_BT, -kl_coefficient * kl_BT, 0)
    return rewards_BT.scatter_add(1, lengths_B[:, None] - 1, scores_B[:, None].to(rewards_BT.dtype))


def generalized_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE(gamma, lambda) over response tokens (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns = A + V

    Args:
        rewards_BT: reward units.
        values_BT: the critic's prediction before each response token is said.
        mask_BT: True at response tokens, which stand at the beginning of each row. The value after the last
            of them is 0: a response that ended, also by the length limit, earns nothing more.
        gamma: discount a token, 0..1.
        lam: lambda, 0..1: 0 trusts the critic (bias), 1 the sampled rewards (variance).

    Returns:
        advantages_BT, returns_BT; 0 at masked-out places, whose contents have no influence.

    Raises:
        ValueError: shapes that differ, a mask with holes, gamma or lambda out of bounds.
    """
    check_shapes(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError("mask_BT has a hole: response tokens must stand at the beginning of each row")
    for name, number in {"gamma": gamma, "lam": lam}.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie within 0..1, got {number}")
    rewards_BT = torch.where(mask_BT, rewards_BT, 0)
    values_BT = torch.where(mask_BT, values_BT, 0)

    advantages_BT = torch.zeros_like(values_BT)
    advantage_B = next_value_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # Rewards and values of 0 keep both running quantities at 0 until the last real token.
        advantage_B = delta_B + gamma * lam * advantage_B
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = advantage_B
    return advantages_BT, advantages_BT + values_BT
