"""The two losses of PPO (Schulman et al. 2017; Ouyang et al. 2022, appendix C).

Shape legend: B sequence, T response token.

A loss is the masked SUM over a microbatch divided by `normalizer`, the number of valid tokens of the whole
minibatch over all ranks. Summed over microbatches and ranks it is the token mean, wherever their
boundaries lie. Wrappers that average gradients over ranks (DDP, FSDP) need it times the world size.

Beside the loss come detached sums over the tokens: add them up over microbatches and ranks, then divide by
the token count.

Left out: the entropy bonus and dual clipping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kl import kl_k1, kl_k3
from pipeline.masking import check_shapes, masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """A microbatch's share of the policy loss, and what to log of it; scalar tensors."""

    loss: Tensor
    """Carries the gradient; add over microbatches."""
    clip_fraction_sum: Tensor
    """Number of tokens at which the clipped term is in force, so that they push the policy no further."""
    approx_kl_k1_sum: Tensor
    """Sum of log old - log new: estimates KL(old || new), nats."""
    approx_kl_k3_sum: Tensor
    """Sum of (ratio - 1) - log ratio: estimates the same, never negative."""
    ratio_sum: Tensor
    """Sum of new / old probability; its mean stays near 1."""
    ratio_max: Tensor
    """The largest ratio; combine by maximum, not by sum. 0 without tokens."""


@dataclass(frozen=True)
class ValueLoss:
    """A microbatch's share of the value loss, and what to log of it; scalar tensors."""

    loss: Tensor
    """Carries the gradient; add over microbatches."""
    clip_fraction_sum: Tensor
    """Number of tokens at which the clipped error is in force, so that they push the critic no further."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_range: float,
    normalizer: float,
) -> PolicyLoss:
    """-sum min(r A, clip(r, 1 - c, 1 + c) A) / normalizer (Schulman et al. 2017, equation 7).

    Args:
        logprobs_BT: log-probabilities of the sampled tokens under the policy being trained.
        old_logprobs_BT: the same under the policy that sampled; constants.
        advantages_BT: constants, usually whitened.
        mask_BT: True at response tokens; whatever lies elsewhere has no influence.
        clip_range: c, between 0 and 1.
        normalizer: number of valid tokens of the whole minibatch over all ranks.

    Raises:
        ValueError: shapes that differ, a mask that is not boolean, a range or normalizer out of bounds.
    """
    check_shapes(mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT)
    _check_normalizer(normalizer)
    if not 0 < clip_range < 1:
        raise ValueError(f"the policy's clip_range must lie between 0 and 1, got {clip_range}")
    assert not (old_logprobs_BT.requires_grad or advantages_BT.requires_grad), "constants carry a gradient"

    # Masked before exp: what overflows there comes back as 0 * inf in the gradient, whatever is masked after.
    ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0).exp()
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_sum(torch.maximum(unclipped_BT, clipped_BT), mask_BT) / normalizer

    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            clip_fraction_sum=masked_sum(clipped_BT > unclipped_BT, mask_BT),
            approx_kl_k1_sum=masked_sum(kl_k1(old_logprobs_BT, logprobs_BT), mask_BT),
            approx_kl_k3_sum=masked_sum(kl_k3(old_logprobs_BT, logprobs_BT), mask_BT),
            ratio_sum=masked_sum(ratio_BT, mask_BT),
            # The appended 0 gives an empty microbatch a maximum.
            ratio_max=functional.pad(torch.where(mask_BT, ratio_BT, 0).flatten(), (0, 1)).max(),
        )


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_range: float | None,
    normalizer: float,
) -> ValueLoss:
    """0.5 * sum max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / normalizer.

    The clipping stems from OpenAI's code (baselines; Ziegler et al. 2019), not from the PPO paper.

    Args:
        values_BT: predictions of the critic being trained.
        old_values_BT: its predictions at rollout; constants.
        returns_BT: what to predict; constants.
        mask_BT: True at response tokens; whatever lies elsewhere has no influence.
        clip_range: c, in units of the reward; None leaves the plain squared error.
        normalizer: number of valid tokens of the whole minibatch over all ranks.

    Raises:
        ValueError: shapes that differ, a mask that is not boolean, a range or normalizer out of bounds.
    """
    check_shapes(mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    _check_normalizer(normalizer)
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"the value's clip_range must be above 0, or None for no clipping; got {clip_range}")
    assert not (old_values_BT.requires_grad or returns_BT.requires_grad), "constants carry a gradient"

    # Masked at the entrance: the square's derivative, 2 * error, would let a NaN back into the gradient.
    values_BT = torch.where(mask_BT, values_BT, 0)
    error_BT = (values_BT - returns_BT).square()
    clipped_error_BT = error_BT
    if clip_range is not None:
        # Clamping the value, not its difference from the old one, is exact inside the range: a rounded
        # V_old + (V - V_old) would count as clipped.
        near_BT = values_BT.clamp(old_values_BT - clip_range, old_values_BT + clip_range)
        clipped_error_BT = (near_BT - returns_BT).square()
    return ValueLoss(
        loss=0.5 * masked_sum(torch.maximum(error_BT, clipped_error_BT), mask_BT) / normalizer,
        clip_fraction_sum=masked_sum(clipped_error_BT > error_BT, mask_BT),
    )


def _check_normalizer(normalizer: float) -> None:
    if not normalizer > 0:
        raise ValueError(f"normalizer is the minibatch's number of valid tokens, above 0; got {normalizer}")
