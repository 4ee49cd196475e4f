"""Masks and masked moments, against plain Python in float64.

Shape legend: B sequence, T response token.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.masking import (
    check_shapes,
    explained_variance,
    length_mask,
    masked_mean,
    masked_sum,
    masked_variance,
    whiten,
)

NAN = float("nan")
ROWS = st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=4)


def padded(rows: list[list[float]], *, padding: float = NAN) -> tuple[Tensor, Tensor]:
    """The rows as one float64 tensor with `padding` after each row's end, and its mask."""
    width = max(map(len, rows)) + 1
    x_BT = torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=torch.float64)
    return x_BT, length_mask(torch.tensor([len(row) for row in rows]), width)


def random_tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 tokens of mean 5 and standard deviation 3, with NaN in the padding."""
    mask_BT = length_mask(torch.tensor([7, 1, 4]), 8)
    x_BT = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    return torch.where(mask_BT, x_BT, NAN), mask_BT


def on_ranks(rank_functions: list[Callable[[Callable[[Tensor], Tensor]], Tensor]]) -> list[Tensor]:
    """Run one function a rank, each in a thread, with an all_reduce that waits for all of them."""
    slots: list[Tensor] = [torch.empty(0)] * len(rank_functions)
    barrier = threading.Barrier(len(rank_functions), timeout=10)

    def run(rank: int) -> Tensor:
        def all_reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            total = torch.stack(slots).sum(dim=0)
            barrier.wait()
            return total

        return rank_functions[rank](all_reduce)

    with ThreadPoolExecutor(len(rank_functions)) as pool:
        return list(pool.map(run, range(len(rank_functions))))


def test_length_mask_is_true_before_each_length():
    mask_BT = length_mask(torch.tensor([0, 2, 3]), 3)
    assert mask_BT.dtype == torch.bool
    assert mask_BT.tolist() == [[False, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize("lengths", [[4], [-1], [1.0], [True], [[1, 2]]])
def test_length_mask_refuses_impossible_lengths(lengths):
    with pytest.raises(ValueError, match="lengths"):
        length_mask(torch.tensor(lengths), 3)


def test_a_mask_that_is_not_boolean_or_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="boolean"):
        check_shapes(torch.ones(2, 3), x_BT=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x_BT has shape \(2, 1\), its mask has \(2, 3\)"):
        check_shapes(torch.ones(2, 3, dtype=torch.bool), x_BT=torch.ones(2, 1))


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_sum_mean_and_variance_equal_those_of_the_real_values_alone(rows):
    x_BT, mask_BT = padded(rows)
    real = [value for row in rows for value in row]
    assert masked_sum(x_BT, mask_BT).item() == pytest.approx(sum(real), abs=1e-9)
    assert masked_mean(x_BT, mask_BT).item() == pytest.approx(statistics.fmean(real) if real else 0, abs=1e-9)
    expected = statistics.pvariance(real) if real else 0
    assert masked_variance(x_BT, mask_BT).item() == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_sum_and_mean_along_a_dimension_are_those_of_each_row(rows):
    x_BT, mask_BT = padded(rows)
    means = [statistics.fmean(row) if row else 0 for row in rows]
    assert masked_sum(x_BT, mask_BT, dim=1).tolist() == pytest.approx([sum(row) for row in rows], abs=1e-9)
    assert masked_mean(x_BT, mask_BT, dim=1).tolist() == pytest.approx(means, abs=1e-9)


def test_gradient_of_the_mean_is_untouched_by_padding():
    x_BT, mask_BT = padded([[1.0, 2.0], [3.0]])
    x_BT.requires_grad_()
    masked_mean(x_BT.exp(), mask_BT).backward()
    assert x_BT.grad[mask_BT].tolist() == pytest.approx((x_BT.detach().exp() / 3)[mask_BT].tolist())


def test_variance_survives_a_large_mean_in_float32():
    # E[x^2] - E[x]^2 loses every digit here: 1e4^2 has float32 steps of 8.
    x = torch.tensor([[1e4 - 1, 1e4 + 1]])
    assert masked_variance(x, torch.ones(1, 2, dtype=torch.bool)).item() == 1.0


def test_counts_are_exact_in_bfloat16():
    # bfloat16 would round the count to 256 and the sum to 772, and so invent a variance.
    x = torch.full((1, 257), 3.0, dtype=torch.bfloat16)
    assert masked_variance(x, torch.ones_like(x, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_gives_variance_1_and_the_promised_mean(shift_mean):
    x_BT, mask_BT = random_tokens()
    before = x_BT[mask_BT].double().mean().item()
    whitened = whiten(x_BT, mask_BT, shift_mean=shift_mean)[mask_BT].double()
    # Float32 rounds at 1e-7; the epsilon changes a variance of 9 by 1e-9.
    assert whitened.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert whitened.mean().item() == pytest.approx(0 if shift_mean else before, abs=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_keeps_the_order_and_zeroes_the_padding(shift_mean):
    x_BT, mask_BT = random_tokens()
    whitened_BT = whiten(x_BT, mask_BT, shift_mean=shift_mean)
    assert whitened_BT[~mask_BT].eq(0).all()
    assert torch.equal(whitened_BT[mask_BT].argsort(), x_BT[mask_BT].argsort())


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_ranks_equals_whitening_in_one_piece(shift_mean):
    x_BT, mask_BT = random_tokens()
    whole_BT = whiten(x_BT, mask_BT, shift_mean=shift_mean)
    # The middle rank has no token at all and must still answer the others.
    shares = [(x_BT[:1], mask_BT[:1]), (x_BT[:1], torch.zeros_like(mask_BT[:1])), (x_BT[1:], mask_BT[1:])]
    parts = on_ranks(
        [
            lambda all_reduce, x=x, mask=mask: whiten(x, mask, shift_mean=shift_mean, all_reduce=all_reduce)
            for x, mask in shares
        ]
    )
    torch.testing.assert_close(torch.cat([parts[0], parts[2]]), whole_BT)
    assert parts[1].eq(0).all()


def test_whitening_of_equal_values_stays_finite():
    x = torch.full((2, 3), 0.1)
    everything = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(whiten(x, everything, shift_mean=True), torch.zeros(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(whiten(x, everything, shift_mean=False), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_under_the_mask_gives_zeros_not_nan(shape):
    x, nothing = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    assert masked_sum(x, nothing) == masked_mean(x, nothing) == masked_variance(x, nothing) == 0
    assert masked_mean(x, nothing, dim=1).eq(0).all()
    assert whiten(x, nothing, shift_mean=True).eq(0).all()
    assert whiten(x, nothing, shift_mean=False).eq(0).all()
    assert explained_variance(x, x, nothing) == 0


def test_explained_variance_does_not_broadcast():
    returns_BT, mask_BT = random_tokens()
    with pytest.raises(ValueError, match="values has shape"):
        explained_variance(returns_BT[:, :1], returns_BT, mask_BT)


def test_explained_variance_of_a_perfect_a_constant_and_an_opposite_critic():
    returns_BT, mask_BT = random_tokens()
    assert explained_variance(returns_BT, returns_BT, mask_BT).item() == 1
    constant_BT = torch.where(mask_BT, 2.5, NAN)
    assert explained_variance(constant_BT, returns_BT, mask_BT).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(-returns_BT, returns_BT, mask_BT).item() == pytest.approx(-3, abs=1e-5)


def test_explained_variance_is_one_minus_the_ratio_of_variances():
    (values_BT, mask_BT), (returns_BT, _) = random_tokens(1), random_tokens(2)
    values, returns = values_BT[mask_BT].tolist(), returns_BT[mask_BT].tolist()
    residual = statistics.pvariance([r - v for r, v in zip(returns, values, strict=True)])
    expected = 1 - residual / statistics.pvariance(returns)
    assert explained_variance(values_BT, returns_BT, mask_BT).item() == pytest.approx(expected, abs=1e-5)


def test_explained_variance_over_ranks_equals_that_of_one_piece():
    (values_BT, mask_BT), (returns_BT, _) = random_tokens(1), random_tokens(2)
    parts = on_ranks(
        [
            lambda all_reduce, rows=rows: explained_variance(
                values_BT[rows], returns_BT[rows], mask_BT[rows], all_reduce=all_reduce
            )
            for rows in (slice(0, 1), slice(1, 3))
        ]
    )
    whole = explained_variance(values_BT, returns_BT, mask_BT)
    torch.testing.assert_close(torch.stack(parts), torch.stack([whole, whole]))


@pytest.mark.parametrize("level", [0.0, 0.1, -1e4])
def test_explained_variance_of_returns_that_do_not_vary_is_0(level):
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert explained_variance(torch.arange(7.0)[None], torch.full((1, 7), level), mask) == 0
