"""Sums, means and moments over the tokens that count.

Shape legend: B sequence, T response token.

A mask is boolean and True where a token is real. It comes from lengths, never from comparing ids with
the pad id: where pad = eos, or a model says the pad token, such a comparison hides real tokens.
What lies at masked-out places (garbage, NaN, infinity) never reaches a result or a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a small tensor over all ranks; every rank calls it equally often."""

WHITENING_EPSILON = 1e-8  # Ziegler et al. 2019; a standard deviation well below 1e-4 is left unamplified


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless `mask` is boolean and every named tensor has its shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean, got {mask.dtype}: build it with length_mask(lengths, size)")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its mask has {tuple(mask.shape)}")


def length_mask(lengths_B: Tensor, size: int) -> Tensor:
    """True at the first `lengths_B[b]` of `size` places of row b.

    Returns:
        mask_BT, boolean, with T = `size`.

    Raises:
        ValueError: lengths that are not a vector of integers within 0..size.
    """
    if lengths_B.ndim != 1 or lengths_B.is_floating_point() or lengths_B.dtype == torch.bool:
        raise ValueError(f"lengths are a vector of integers, got {lengths_B.dtype} {tuple(lengths_B.shape)}")
    if bool(((lengths_B < 0) | (lengths_B > size)).any()):
        raise ValueError(f"lengths must lie within 0..{size}, got {lengths_B.tolist()}")
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is True, over all places or along `dim`; 0 where nothing counts."""
    check_shapes(mask, x=x)
    # Selected, not multiplied: NaN * 0 is NaN.
    return torch.where(mask, x, 0).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True, over all places or along `dim`; 0 where nothing counts."""
    return masked_sum(x, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> Tensor:
    """Population variance (divided by the count, not by count - 1) of `x` where `mask` is True.

    Args:
        all_reduce: sums a tensor over ranks; with it the variance is that of all ranks' tokens together.

    Returns:
        A scalar tensor, at least float32; 0 where nothing counts.
    """
    return _moments(x, mask, all_reduce)[1]


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool, all_reduce: AllReduce | None = None) -> Tensor:
    """Scale `x` to population variance 1 under the mask, over all ranks' tokens together.

    Args:
        x: rewards or advantages, constants of the update.
        mask: which places count.
        shift_mean: True moves the mean to 0 (advantages); False leaves the mean where it was (rewards,
            whose mean tells good from bad).
        all_reduce: sums a tensor over ranks; None on a single process.

    Returns:
        The whitened tensor, 0 at masked-out places. Values that do not vary stay finite: they become 0
        with `shift_mean`, and stay what they are without.
    """
    mean, variance = _moments(x, mask, all_reduce)
    whitened = (x - mean) * torch.rsqrt(variance + WHITENING_EPSILON)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> Tensor:
    """How much of the returns' variance the critic predicts: 1 - Var(returns - values) / Var(returns).

    Args:
        values: the critic's predictions.
        returns: what it should have predicted.
        mask: which places count.
        all_reduce: sums a tensor over ranks; None on a single process.

    Returns:
        A scalar tensor: 1 for a perfect critic, 0 for a constant one, negative for a worse one; 0 where
        the returns do not vary and the ratio has no meaning.
    """
    check_shapes(mask, values=values, returns=returns)
    mean, variance = _moments(returns, mask, all_reduce)
    residual = masked_variance(returns - values, mask, all_reduce=all_reduce)
    # Equal returns have a variance of rounding errors, not of 0: their mean is rounded.
    varies = variance > (1e-6 * mean).square()
    return torch.where(varies, 1 - residual / variance, 0)


def _moments(x: Tensor, mask: Tensor, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
    """Mean and population variance under the mask, over all ranks.

    Two passes, since E[x^2] - E[x]^2 cancels in float32. A rank without tokens takes part all the same:
    the others wait for it.
    """
    reduce = all_reduce or (lambda tensor: tensor)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total, count = reduce(torch.stack([masked_sum(wide, mask), mask.sum().to(wide.dtype)]))
    count = count.clamp(min=1)
    mean = total / count
    squares = reduce(masked_sum((wide - mean).square(), mask))
    return mean, squares / count
