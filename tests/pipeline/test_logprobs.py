"""Chunked log-probabilities against all logits at once, in float64.

Shape legend: N token, D width, V vocabulary.
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.logprobs import token_logprobs

N, D, V = 23, 5, 11


class Head(torch.nn.Module):
    """An lm_head with bias and soft-capping that counts how often it is called, and on how many tokens."""

    def __init__(self, width: int = D, vocabulary: int = V) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator).double())
        self.bias = torch.nn.Parameter(torch.randn(vocabulary, generator=generator).double())
        self.calls: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(len(hidden))
        return 3 * torch.tanh((hidden @ self.weight.T + self.bias) / 3)


def tokens(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, D, generator=generator).double().requires_grad_()
    return hidden_ND, torch.randint(V, (n,), generator=generator)


def reference(hidden_ND: Tensor, targets_N: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by softmax of all logits, token by token."""
    probabilities_NV = torch.softmax(head(hidden_ND) / temperature, dim=-1)
    logprobs = [row[target].log() for row, target in zip(probabilities_NV, targets_N, strict=True)]
    entropies = [-sum(p * p.log() for p in row) for row in probabilities_NV]
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, N, 1024])
def test_values_and_gradients_equal_those_of_full_logits(chunk_tokens, temperature):
    head = Head()
    hidden_ND, targets_N = tokens()
    weights_N = torch.linspace(-1, 2, N, dtype=torch.float64)
    expected_N, entropy_N = reference(hidden_ND, targets_N, head, temperature)
    expected_gradients = torch.autograd.grad((expected_N * weights_N).sum(), hidden_ND)

    found = token_logprobs(
        hidden_ND, targets_N, head, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True
    )
    torch.testing.assert_close(found.logprobs_N, expected_N)
    torch.testing.assert_close(found.entropy_N, entropy_N.detach())
    gradients = torch.autograd.grad((found.logprobs_N * weights_N).sum(), hidden_ND)
    torch.testing.assert_close(gradients, expected_gradients)


def test_gradients_agree_with_finite_differences():
    head, (hidden_ND, targets_N) = Head(), tokens(4)

    def logprobs(hidden_ND: Tensor) -> Tensor:
        return token_logprobs(hidden_ND, targets_N, head, temperature=0.8, chunk_tokens=3).logprobs_N

    assert logprobs(hidden_ND).requires_grad  # gradcheck passes over outputs without a gradient
    assert torch.autograd.gradcheck(logprobs, (hidden_ND,))


def test_entropy_is_left_out_unless_asked_for_and_has_no_gradient():
    head, (hidden_ND, targets_N) = Head(), tokens()
    assert token_logprobs(hidden_ND, targets_N, head).entropy_N is None
    found = token_logprobs(hidden_ND, targets_N, head, with_entropy=True)
    assert found.logprobs_N.requires_grad and not found.entropy_N.requires_grad


def test_each_chunk_is_computed_once():
    """Also where there are gradients: they are found on the way."""
    head, (hidden_ND, targets_N) = Head(), tokens()
    with torch.no_grad():
        token_logprobs(hidden_ND, targets_N, head, chunk_tokens=10)
    assert head.calls == [10, 10, 3]
    head.calls.clear()
    found = token_logprobs(hidden_ND, targets_N, head, chunk_tokens=10)
    assert head.calls == [10, 10, 3]
    found.logprobs_N.sum().backward()
    assert head.calls == [10, 10, 3]
    assert head.weight.grad is None, "the head stands still"


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_logits_exist_for_one_chunk_at_a_time_forward_and_backward():
    n, vocabulary, chunk_tokens = 60, 100, 8
    head, (hidden_ND, targets_N) = Head(vocabulary=vocabulary), tokens(n)
    logits: list[weakref.ref[Tensor]] = []
    own = head.forward

    def remembered(hidden: Tensor) -> Tensor:
        result = own(hidden)
        logits.append(weakref.ref(result))
        return result

    with LargestTensor() as largest:
        head.forward = remembered
        found = token_logprobs(hidden_ND, targets_N, head, chunk_tokens=chunk_tokens, with_entropy=True)
        # Eight chunks' logits held until backward would be n * V as well; only a slope a token is.
        assert len(logits) == 8 and not any(reference() is not None for reference in logits)
        assert sum(tensor.numel() for tensor in found.logprobs_N.grad_fn.saved_tensors) == n * D
        found.logprobs_N.sum().backward()
    assert largest.numel <= chunk_tokens * vocabulary


def test_low_precision_logits_are_normalised_in_float32():
    hidden_ND, targets_N = (x.detach() for x in tokens())
    head = Head()

    def low_precision(hidden: Tensor) -> Tensor:
        return head(hidden).bfloat16()

    found = token_logprobs(hidden_ND, targets_N, low_precision, temperature=0.7, with_entropy=True)
    exact_N = (low_precision(hidden_ND).double() / 0.7).log_softmax(-1)[torch.arange(N), targets_N]
    assert found.logprobs_N.dtype == found.entropy_N.dtype == torch.float32
    # Float32 rounds at 1e-7; bfloat16 would be off by 1e-2.
    torch.testing.assert_close(found.logprobs_N.double(), exact_N, atol=1e-6, rtol=0)


def test_an_impossible_token_makes_neither_value_nor_gradient_nan():
    hidden_ND = torch.zeros(2, V, requires_grad=True)
    forbidden_V = torch.zeros(V)
    forbidden_V[3] = -math.inf
    found = token_logprobs(
        hidden_ND,
        torch.tensor([0, 1]),
        lambda hidden: hidden + forbidden_V,
        with_entropy=True,
    )
    torch.testing.assert_close(found.entropy_N, torch.full((2,), math.log(V - 1)))
    found.logprobs_N.sum().backward()
    assert hidden_ND.grad.isfinite().all()


def test_a_certain_token_has_logprob_0_and_no_entropy():
    found = token_logprobs(
        torch.tensor([[1000.0, 0.0, -1000.0]]), torch.tensor([0]), lambda hidden: hidden, with_entropy=True
    )
    assert found.logprobs_N.item() == 0 and found.entropy_N.item() == 0


def test_no_tokens_give_empty_results_that_still_backpropagate():
    head, (hidden_ND, targets_N) = Head(), tokens(0)
    found = token_logprobs(hidden_ND, targets_N, head, with_entropy=True)
    assert found.logprobs_N.shape == found.entropy_N.shape == (0,)
    found.logprobs_N.sum().backward()
    assert hidden_ND.grad.shape == (0, D)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (torch.zeros(N - 1, dtype=torch.long), {}, "shapes"),
        (torch.zeros(N, 1, dtype=torch.long), {}, "shapes"),
        (torch.zeros(N, dtype=torch.long), {"temperature": 0.0}, "temperature"),
        (torch.zeros(N, dtype=torch.long), {"temperature": math.nan}, "temperature"),
        (torch.zeros(N, dtype=torch.long), {"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_wrong_arguments_are_named(targets, options, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(N, D), targets, lambda hidden: hidden, **options)
