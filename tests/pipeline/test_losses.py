"""PPO's losses against a loop over tokens in float64, and what must not change their gradient.

Shape legend: B sequence, T response token.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from pipeline.masking import length_mask

LENGTHS = [6, 1, 4, 3, 5]
TOKENS = sum(LENGTHS)
CLIP = 0.2


def batch(padding: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New, old and third tensor with differences well beyond the clip range, in float64; and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask_BT = length_mask(torch.tensor(LENGTHS), max(LENGTHS) + 2)
    old_BT = -2 * torch.rand(mask_BT.shape, generator=generator).double()
    new_BT = old_BT + 0.4 * torch.randn(mask_BT.shape, generator=generator).double()
    third_BT = torch.randn(mask_BT.shape, generator=generator).double()
    new_BT, old_BT, third_BT = (torch.where(mask_BT, x, padding) for x in (new_BT, old_BT, third_BT))
    return new_BT.requires_grad_(), old_BT, third_BT, mask_BT


def clipped_policy(new_BT, old_BT, advantages_BT, mask_BT, *, normalizer: float = TOKENS) -> PolicyLoss:
    return policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip_range=CLIP, normalizer=normalizer)


def clipped_value(new_BT, old_BT, returns_BT, mask_BT, *, normalizer: float = TOKENS) -> ValueLoss:
    return value_loss(new_BT, old_BT, returns_BT, mask_BT, clip_range=CLIP, normalizer=normalizer)


BOTH = pytest.mark.parametrize("loss_function", [clipped_policy, clipped_value])


def real_tokens(*tensors: Tensor) -> list[tuple[float, ...]]:
    """One tuple of numbers for each real token."""
    return [
        tuple(tensor[row, t].item() for tensor in tensors) for row, length in enumerate(LENGTHS) for t in range(length)
    ]


def test_policy_loss_and_its_sums_equal_a_loop_over_tokens():
    new_BT, old_BT, advantages_BT, mask_BT = batch()
    found = clipped_policy(new_BT, old_BT, advantages_BT, mask_BT)
    loss = clipped = k1 = k3 = 0.0
    ratios = []
    for new, old, advantage in real_tokens(new_BT, old_BT, advantages_BT):
        ratio = math.exp(new) / math.exp(old)
        bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
        loss -= min(ratio * advantage, bounded * advantage)
        # A token stops pushing once it has left the range in the direction its advantage asks for.
        clipped += ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP
        k1 += old - new
        k3 += ratio - 1 - math.log(ratio)
        ratios.append(ratio)
    assert 0 < clipped < TOKENS
    assert found.loss.item() == pytest.approx(loss / TOKENS)
    assert found.clip_fraction_sum.item() == clipped
    assert found.approx_kl_k1_sum.item() == pytest.approx(k1)
    assert found.approx_kl_k3_sum.item() == pytest.approx(k3)
    assert found.ratio_sum.item() == pytest.approx(sum(ratios))
    assert found.ratio_max.item() == pytest.approx(max(ratios))


def test_value_loss_and_its_sum_equal_a_loop_over_tokens():
    new_BT, old_BT, returns_BT, mask_BT = batch()
    found = clipped_value(new_BT, old_BT, returns_BT, mask_BT)
    loss = clipped = 0.0
    for new, old, wanted in real_tokens(new_BT, old_BT, returns_BT):
        near = min(max(new, old - CLIP), old + CLIP)
        loss += 0.5 * max((new - wanted) ** 2, (near - wanted) ** 2)
        clipped += (near - wanted) ** 2 > (new - wanted) ** 2
    assert 0 < clipped < TOKENS
    assert found.loss.item() == pytest.approx(loss / TOKENS)
    assert found.clip_fraction_sum.item() == clipped


def test_value_loss_without_clip_range_is_half_the_squared_error():
    new_BT, old_BT, returns_BT, mask_BT = batch()
    found = value_loss(new_BT, old_BT, returns_BT, mask_BT, clip_range=None, normalizer=TOKENS)
    expected = sum(0.5 * (new - wanted) ** 2 for new, wanted in real_tokens(new_BT, returns_BT)) / TOKENS
    assert found.loss.item() == pytest.approx(expected)
    assert found.clip_fraction_sum.item() == 0
    found.loss.backward()
    expected_BT = torch.where(mask_BT, new_BT.detach() - returns_BT, 0) / TOKENS
    torch.testing.assert_close(new_BT.grad, expected_BT)


@BOTH
def test_gradient_agrees_with_finite_differences(loss_function):
    new_BT, *constants = batch()
    assert torch.autograd.gradcheck(lambda new_BT: loss_function(new_BT, *constants).loss, (new_BT,))


def test_first_step_is_the_plain_policy_gradient():
    # Where the policy is still the sampling one, the gradient is -A and nothing counts as clipped.
    _, old_BT, advantages_BT, mask_BT = batch()
    new_BT = old_BT.clone().requires_grad_()
    found = clipped_policy(new_BT, old_BT, advantages_BT, mask_BT)
    found.loss.backward()
    torch.testing.assert_close(new_BT.grad, -torch.where(mask_BT, advantages_BT, 0) / TOKENS)
    assert found.clip_fraction_sum == found.approx_kl_k1_sum == found.approx_kl_k3_sum == 0
    assert found.ratio_sum == TOKENS and found.ratio_max == 1


def test_a_token_gets_no_gradient_exactly_where_it_counts_as_clipped():
    new_BT, old_BT, advantages_BT, mask_BT = batch()
    found = clipped_policy(new_BT, old_BT, advantages_BT, mask_BT)
    found.loss.backward()
    assert found.clip_fraction_sum.item() == new_BT.grad[mask_BT].eq(0).sum().item()


def test_values_inside_the_range_never_count_as_clipped():
    # In float32, old + (new - old) is not new: rounding alone would count as clipping.
    generator = torch.Generator().manual_seed(0)
    new_BT, old_BT, returns_BT = CLIP * (torch.rand(3, 50, 50, generator=generator) - 0.5)
    found = clipped_value(new_BT, old_BT, returns_BT, torch.ones(50, 50, dtype=torch.bool))
    assert found.clip_fraction_sum.item() == 0


@BOTH
@pytest.mark.parametrize("split", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1], [1, 3, 1]])
def test_microbatches_add_up_to_the_whole_however_they_are_cut(loss_function, split):
    new_BT, *constants = batch()
    whole = loss_function(new_BT, *constants)
    (expected_BT,) = torch.autograd.grad(whole.loss, new_BT)

    parts = []
    for rows in torch.arange(len(LENGTHS)).split(split):
        width = max(LENGTHS[row] for row in rows)  # each microbatch is padded to its own longest row
        parts.append(loss_function(new_BT[rows, :width], *(x[rows, :width] for x in constants)))
        parts[-1].loss.backward()
    torch.testing.assert_close(new_BT.grad, expected_BT)
    for name, total in vars(whole).items():
        shares = torch.stack([getattr(part, name) for part in parts])
        torch.testing.assert_close(shares.max() if name == "ratio_max" else shares.sum(), total)


@BOTH
@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_the_padding_changes_nothing(loss_function, padding):
    clean_BT, *clean_constants = batch()
    clean = loss_function(clean_BT, *clean_constants)
    clean.loss.backward()
    dirty_BT, *dirty_constants = batch(padding)
    dirty = loss_function(dirty_BT, *dirty_constants)
    dirty.loss.backward()
    assert torch.equal(dirty_BT.grad, clean_BT.grad)
    for name, expected in vars(clean).items():
        assert torch.equal(getattr(dirty, name), expected), name


def test_an_overflowing_ratio_in_the_padding_has_no_gradient():
    new_BT, old_BT, advantages_BT, mask_BT = batch()
    new_BT = torch.where(mask_BT, new_BT.detach(), 1e4).requires_grad_()
    clipped_policy(new_BT, old_BT, advantages_BT, mask_BT).loss.backward()
    assert new_BT.grad[~mask_BT].eq(0).all() and new_BT.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_a_microbatch_without_tokens_gives_zeros(loss_function, shape):
    x_BT = torch.full(shape, math.nan, requires_grad=True)
    constant_BT = x_BT.detach()
    found = loss_function(x_BT, constant_BT, constant_BT, torch.zeros(shape, dtype=torch.bool))
    found.loss.backward()
    assert all(value == 0 for value in vars(found).values())
    assert x_BT.grad.eq(0).all()


@BOTH
def test_only_the_loss_carries_a_gradient(loss_function):
    found = vars(loss_function(*batch()))
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]


@BOTH
def test_constants_with_a_gradient_are_a_programming_error(loss_function):
    new_BT, old_BT, third_BT, mask_BT = batch()
    with pytest.raises(AssertionError, match="constants"):
        loss_function(new_BT, old_BT.requires_grad_(), third_BT, mask_BT)
    with pytest.raises(AssertionError, match="constants"):
        loss_function(new_BT, old_BT.detach(), third_BT.requires_grad_(), mask_BT)


@BOTH
def test_wrong_arguments_are_named(loss_function):
    new_BT, old_BT, third_BT, mask_BT = batch()
    with pytest.raises(ValueError, match="normalizer"):
        loss_function(new_BT, old_BT, third_BT, mask_BT, normalizer=0)
    with pytest.raises(ValueError, match=r"old_.*shape"):
        loss_function(new_BT, old_BT[:, :1], third_BT, mask_BT)
    with pytest.raises(ValueError, match="boolean"):
        loss_function(new_BT, old_BT, third_BT, mask_BT.double())


@pytest.mark.parametrize(
    ("loss_function", "clip_range"),
    [(policy_loss, 0), (policy_loss, 1.0), (policy_loss, math.nan), (value_loss, 0), (value_loss, -0.1)],
)
def test_an_impossible_clip_range_is_refused(loss_function, clip_range):
    with pytest.raises(ValueError, match="clip_range"):
        loss_function(*batch(), clip_range=clip_range, normalizer=TOKENS)
