"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

Shape legend: N token, C token of one chunk, D width, V vocabulary.

The logits of a batch, N * V floats, are the largest tensor of RLHF by far. Here only [C, V] of them exist at
a time, and only in the forward pass, which leaves the backward pass nothing to compute again: two products with the
output head in all, where a chunk that is recomputed takes three. The result is exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """One number a token, at least float32.

    `logprobs_N`: log-probability of the given token, nats. `entropy_N`: entropy of the distribution that it
    was taken from, nats; None unless asked for.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    logits_fn: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the targets.

    Args:
        hidden_ND: the trunk's output at the positions that predict the targets. Pass the valid tokens only,
            selected by a mask: every row costs a row of logits. The only input that gets a gradient.
        targets_N: the token ids to score, int64, within the vocabulary.
        logits_fn: [C, D] -> [C, V], the lm_head with its bias and soft-capping, each row by itself. It stands still:
            what it holds gets no gradient. It is called once a chunk, and ranks may have different numbers of chunks:
            it must not communicate.
        temperature: the sampling temperature, above 0.
        chunk_tokens: C, the number of tokens whose logits exist at a time.
        with_entropy: also give the entropy at the same temperature, without a gradient.

    Raises:
        ValueError: shapes that do not fit, a temperature or chunk size out of bounds.
    """
    if hidden_ND.ndim != 2 or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            "hidden states and targets must have shapes [N, D] and [N], "
            f"got {tuple(hidden_ND.shape)} and {tuple(targets_N.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")

    def one_chunk(hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = logits_fn(hidden_CD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature
        logprobs_CV = logits_CV.log_softmax(dim=-1)
        logprobs_C = logprobs_CV.gather(1, targets_C[:, None]).squeeze(1)
        return logprobs_C, _entropy(logprobs_CV.detach()) if with_entropy else logprobs_C.new_empty(0)

    logprobs_N, entropy_N = _InChunks.apply(hidden_ND, targets_N, one_chunk, chunk_tokens)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs_N, entropy_N if with_entropy else None)


class _InChunks(torch.autograd.Function):
    """One number a token, each a function of the token's own state: its slope is a vector [D], found on the way.

    So the backward pass needs no logits. It multiplies each slope by the gradient of its number, which is exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        one_chunk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        with_slopes = ctx.needs_input_grad[0]
        numbers: list[Tensor] = []
        entropies: list[Tensor] = []
        slopes: list[Tensor] = []
        chunks = zip(torch.split(hidden_ND, chunk_tokens), torch.split(targets_N, chunk_tokens), strict=True)
        for hidden_CD, targets_C in chunks:
            with torch.set_grad_enabled(with_slopes):
                leaf_CD = hidden_CD.detach().requires_grad_(with_slopes)
                numbers_C, entropy_C = one_chunk(leaf_CD, targets_C)
                if with_slopes:
                    slopes += torch.autograd.grad(numbers_C.sum(), leaf_CD)
            numbers.append(numbers_C.detach())
            entropies.append(entropy_C)
        ctx.save_for_backward(*slopes)
        entropy_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(numbers), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        slopes_ND = torch.cat(ctx.saved_tensors)
        return (gradients[0][:, None] * slopes_ND).to(slopes_ND.dtype), None, None, None


def _entropy(logprobs_CV: Tensor) -> Tensor:
    """-sum p log p, in nats."""
    # A token that cannot be said has log p = -inf, and 0 * -inf would be NaN; its share is 0.
    finite_CV = logprobs_CV.clamp(min=torch.finfo(logprobs_CV.dtype).min)
    return -(logprobs_CV.exp() * finite_CV).sum(dim=-1)
