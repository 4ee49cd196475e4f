"""Prompts -> responses, with the log-probability that each token was sampled with, by transformers' `generate`.

`pipeline.engines` has the other ways, and chooses.

Shape legend: B sequence, Q prompt token, T response token, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config import EngineChoice
from pipeline.errors import DivergenceError
from pipeline.roles import Role, Roles, SamplingWeights


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn. The defaults sample purely, as PPO's KL estimate requires."""

    max_new_tokens: int
    temperature: float = 1.0
    """Logits are divided by it. 0: the likeliest token, whatever the seed; log-probabilities are then those at 1."""
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 64
    weights: SamplingWeights = "adapter"
    engine: EngineChoice = "auto"
    server: str | None = None
    """Address of a vLLM server; None is vLLM in this process."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Further options of vLLM's `LLM`."""
    ignore_eos: bool = False
    """Sample on after an EOS, so that every response has all its tokens: for benchmarks of a fixed size."""


@dataclass(frozen=True)
class Response:
    """One sampled answer. `ids` end with the first EOS if `finished`; `logprobs` has one entry a token.

    `values` are what the value head said before each token, where it was asked.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    values: tuple[float, ...] = ()


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of its parts alone: (seed, "rollout", iteration, number)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generate(
    roles: Roles,
    role: Role | None,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    seed: tuple[int | str, ...],
    numbers: Sequence[int] | None = None,
    with_values: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[], None] | None = None,
    on_drawn: Callable[[list[int]], None] | None = None,
) -> list[Response]:
    """Sample one response a prompt with transformers' `generate`.

    Args:
        roles: the base and its adapters.
        role: whose adapter samples; None for the bare base.
        prompts: token ids, one sequence a prompt.
        sampling: how to draw.
        seed: parts of the seed. A response's draws depend on them and on its number alone: neither on the responses
            beside it, nor on the batch size, nor on the process. The global generators are left untouched.
        numbers: of the responses under this seed; None counts from 0.
        with_values: let the value head read the states that the tokens are drawn from.
        on_batch: told the number of responses after each batch.
        on_token: called before each token of a batch; what it raises ends the sampling.
        on_drawn: told the tokens that a batch has just drawn, one a response, also after a response's EOS.

    Returns:
        the responses in the order of the prompts.
    """
    roles.inference_mode()
    eos = roles.base.chat.eos_token_id
    responses: list[Response | None] = [None] * len(prompts)
    numbers = range(len(prompts)) if numbers is None else numbers
    # Prompts of like length go together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    # Layers that are gathered in inference mode could not be learned through afterwards.
    without_gradients = torch.inference_mode() if roles.shards is None else torch.no_grad()
    in_step = roles.samples_in_step(sampling.weights)
    with without_gradients, roles.sampling_model(role, sampling.weights) as model:
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            chances_BT = uniforms(seed, [numbers[index] for index in chosen], sampling)
            sampler = _Sampler(sampling, chances_BT, on_token, on_drawn)
            with _StateReader(roles) if with_values else nullcontext() as reader:
                chosen_prompts = [prompts[index] for index in chosen]
                batch = _generate_batch(model, eos, chosen_prompts, sampling, sampler, in_step=in_step)
            if reader is not None:
                batch = [
                    replace(response, values=tuple(values[: len(response.ids)]))
                    for response, values in zip(batch, reader.values().tolist(), strict=True)
                ]
            for index, response in zip(chosen, batch, strict=True):
                responses[index] = response
            if on_batch is not None:
                on_batch(len(chosen))
    return cast(list[Response], responses)


def uniforms(seed: tuple[int | str, ...], numbers: Sequence[int], sampling: SamplingSettings) -> Tensor:
    """The chance in each response's tokens: [B, T] in float64, uniform on [0, 1), a row a number."""
    rows = [
        torch.rand(
            sampling.max_new_tokens,
            generator=torch.Generator().manual_seed(derive_seed(*seed, number)),
            dtype=torch.float64,
        )
        for number in numbers
    ]
    return torch.stack(rows)


def draw(probabilities_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The tokens [B] at which the cumulated probabilities pass `uniforms_B` (inverse transform sampling).

    Cumulated in float64, where a vocabulary's worth of additions keeps every token's share; a token of probability 0
    is never drawn. Half of the time that `torch.multinomial` takes, which draws a number a token of the vocabulary.

    Args:
        probabilities_BV: not negative; rows need not sum to 1.
        uniforms_B: in [0, 1).
    """
    cumulated_BV = probabilities_BV.cumsum(dim=1, dtype=torch.float64)
    reached_B1 = uniforms_B.to(cumulated_BV)[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, reached_B1, right=True).squeeze(1)


def _generate_batch(
    model: Any,
    eos: int,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    sampler: _Sampler,
    *,
    in_step: bool,
) -> list[Response]:
    longest = max(len(prompt) for prompt in prompts)
    input_ids_BQ = torch.full((len(prompts), longest), eos, dtype=torch.long)
    mask_BQ = torch.zeros_like(input_ids_BQ)
    for row, prompt in enumerate(prompts):
        input_ids_BQ[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BQ[row, longest - len(prompt) :] = 1
    output: Any = model.generate(
        input_ids=input_ids_BQ.to(model.device),
        attention_mask=mask_BQ.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the sampler has drawn when `generate` takes the likeliest
            eos_token_id=None if sampling.ignore_eos else eos,
            pad_token_id=eos,  # never read back: responses are cut at their first EOS
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([sampler]),
        synced_gpus=in_step,  # go on until the last process has its last token
    )
    ids_BT = output[:, longest:]
    responses = []
    for ids, logprobs in zip(ids_BT.tolist(), sampler.logprobs().tolist(), strict=True):
        finished = eos in ids and not sampling.ignore_eos
        length = ids.index(eos) + 1 if finished else len(ids)
        responses.append(Response(tuple(ids[:length]), tuple(logprobs[:length]), finished))
    return responses


class _StateReader:
    """Lets the value head read each state that goes into the output head for a next token."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._columns: list[Tensor] = []

    def __enter__(self) -> Self:
        output_head = self._roles.base.model.get_output_embeddings()
        self._hook = output_head.register_forward_pre_hook(self._read)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _read(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._columns.append(self._roles.head_values("value", arguments[0][:, -1]))

    def values(self) -> Tensor:
        """The value before each token: [B, T]."""
        return torch.stack(self._columns, dim=1)


class TokenDrawer:
    """Draws tokens from logits as the settings say, one uniform number each."""

    def __init__(self, sampling: SamplingSettings) -> None:
        self._greedy, self._temperature = sampling.temperature == 0, sampling.temperature or 1.0
        self._filters = LogitsProcessorList()
        if sampling.top_k > 0:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, scores: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] -> tokens [B] and the log-probability [B] that each had before filters, in nats.

        Where logits are not finite, neither is the log-probability.
        """
        logits_BV = scores.float() / self._temperature
        logprobs_BV = logits_BV - torch.logsumexp(logits_BV, dim=1, keepdim=True)
        if self._greedy:
            tokens_B1 = scores.argmax(dim=1, keepdim=True)
        else:
            tokens_B = draw(self._filters(cast(Any, None), logprobs_BV).exp(), uniforms_B)
            tokens_B1 = tokens_B.clamp(max=logits_BV.shape[1] - 1)[:, None]  # what is no number sorts behind the last
        return tokens_B1.squeeze(1), logprobs_BV.gather(1, tokens_B1).squeeze(1)


def require_finite_logprobs(logprobs: Tensor) -> None:
    """Refuse what was drawn from logits that are not finite.

    Raises:
        DivergenceError: a log-probability is infinite or NaN.
    """
    if not bool(logprobs.isfinite().all()):
        raise DivergenceError(
            "the logits that responses are sampled from are not finite",
            remedy="Train with a lower learning rate; with 16 bits, try base.dtype=float32.",
        )


class _Sampler(LogitsProcessor):
    """Draws each token, leaves `generate` no other, and notes the log-probability that it had unfiltered."""

    def __init__(
        self,
        sampling: SamplingSettings,
        uniforms_BT: Tensor,
        on_token: Callable[[], None] | None,
        on_drawn: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._draw, self._on_token, self._on_drawn = TokenDrawer(sampling), on_token, on_drawn
        self._uniforms_TB = uniforms_BT.T
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._on_token is not None:
            self._on_token()
        tokens_B, logprobs_B = self._draw(scores, self._uniforms_TB[len(self._columns)])
        require_finite_logprobs(logprobs_B)
        self._columns.append(logprobs_B)
        if self._on_drawn is not None:
            self._on_drawn(tokens_B.tolist())
        return only(scores, tokens_B)

    def logprobs(self) -> Tensor:
        """Log-probability of each token that was drawn, nats: [B, T]."""
        return torch.stack(self._columns, dim=1)


def only(scores: Tensor, tokens_B: Tensor) -> Tensor:
    """Logits [B, V] of which the likeliest, and the only possible, are these tokens."""
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)
