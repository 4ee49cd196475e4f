"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

Shape legend: N token, C token of one chunk, D width, V vocabulary.

The logits of a batch, N * V floats, are the largest tensor of RLHF by far. Here only [C, V] of them exist at
a time: in the forward pass, and again in the backward pass, which recomputes each chunk's. The result is
exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    entropy_requires_grad: bool = False,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the targets.

    Args:
        hidden_ND: the trunk's output at the positions that predict the targets. Pass the valid tokens only,
            selected by a mask: every row costs a row of logits.
        targets_N: the token ids to score, int64, within the vocabulary.
        logits_fn: [C, D] -> [C, V], the lm_head with its bias and soft-capping. The backward pass calls it
            again, so it must still mean the same then (the same adapter active). It is called once a chunk,
            and ranks may have different numbers of chunks: it must not communicate.
        temperature: the sampling temperature, above 0.
        chunk_tokens: C, the number of tokens whose logits exist at a time.
        with_entropy: also give the entropy at the same temperature.
        entropy_requires_grad: let the entropy carry a gradient (for a bonus); it is a metric otherwise.

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
    assert with_entropy or not entropy_requires_grad, "a gradient of an entropy that is not computed"

    def one_chunk(hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_CV = logits_fn(hidden_CD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature
        logprobs_CV = logits_CV.log_softmax(dim=-1)
        logprobs_C = logprobs_CV.gather(1, targets_C[:, None]).squeeze(1)
        if not with_entropy:
            return logprobs_C, None
        return logprobs_C, _entropy(logprobs_CV if entropy_requires_grad else logprobs_CV.detach())

    chunks = zip(torch.split(hidden_ND, chunk_tokens), torch.split(targets_N, chunk_tokens), strict=True)
    # Without gradients this is a plain call.
    results = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return TokenLogprobs(
        logprobs_N=torch.cat([logprobs_C for logprobs_C, _ in results]),
        entropy_N=torch.cat([entropy_C for _, entropy_C in results]) if with_entropy else None,
    )


def _entropy(logprobs_CV: Tensor) -> Tensor:
    """-sum p log p, in nats."""
    # A token that cannot be said has log p = -inf, and 0 * -inf would be NaN; its share is 0.
    finite_CV = logprobs_CV.clamp(min=torch.finfo(logprobs_CV.dtype).min)
    return -(logprobs_CV.exp() * finite_CV).sum(dim=-1)
