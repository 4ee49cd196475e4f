"""Prompts -> responses, with the log-probability that each token was sampled with.

Shape legend: B sequence, Q prompt token, T response token, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.errors import DivergenceError
from pipeline.roles import Role, Roles


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn. The defaults sample purely, as PPO's KL estimate requires."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 64
    ignore_eos: bool = False
    """Sample on after an EOS, so that every response has all its tokens: for benchmarks of a fixed size."""


@dataclass(frozen=True)
class Response:
    """One sampled answer. `ids` end with the first EOS if `finished`; `logprobs` has one entry a token."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of its parts alone: (seed, "rollout", iteration, rank, batch)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generate(
    roles: Roles,
    role: Role | None,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    seed: tuple[int | str, ...],
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[], None] | None = None,
) -> list[Response]:
    """Sample one response a prompt with transformers' `generate`.

    Args:
        roles: the base and its adapters.
        role: whose adapter samples; None for the bare base.
        prompts: token ids, one sequence a prompt.
        sampling: how to draw.
        seed: parts of the seed; the draw depends on nothing else. The global generators are left untouched.
        on_batch: told the number of responses after each batch.
        on_token: called before each token of a batch; what it raises ends the sampling.

    Returns:
        the responses in the order of the prompts.
    """
    roles.inference_mode()
    responses: list[Response | None] = [None] * len(prompts)
    # Prompts of like length go together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    devices = [roles.device] if roles.device.type == "cuda" else []
    with torch.inference_mode(), roles.active(role), torch.random.fork_rng(devices=devices):
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            torch.manual_seed(derive_seed(*seed, start))
            batch = _generate_batch(roles, [prompts[index] for index in chosen], sampling, on_token)
            for index, response in zip(chosen, batch, strict=True):
                responses[index] = response
            if on_batch is not None:
                on_batch(len(chosen))
    return cast(list[Response], responses)


def _generate_batch(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    on_token: Callable[[], None] | None,
) -> list[Response]:
    eos = roles.base.chat.eos_token_id
    longest = max(len(prompt) for prompt in prompts)
    input_ids_BQ = torch.full((len(prompts), longest), eos, dtype=torch.long)
    mask_BQ = torch.zeros_like(input_ids_BQ)
    for row, prompt in enumerate(prompts):
        input_ids_BQ[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BQ[row, longest - len(prompt) :] = 1
    recorder = _LogprobRecorder(sampling.temperature, on_token)
    output: Any = roles.model.generate(
        input_ids=input_ids_BQ.to(roles.device),
        attention_mask=mask_BQ.to(roles.device),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_id=None if sampling.ignore_eos else eos,
            pad_token_id=eos,  # never read back: responses are cut at their first EOS
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([recorder]),
    )
    ids_BT = output[:, longest:]
    logprobs_BT = recorder.finish(ids_BT[:, -1])
    responses = []
    for ids, logprobs in zip(ids_BT.tolist(), logprobs_BT.tolist(), strict=True):
        finished = eos in ids and not sampling.ignore_eos
        length = ids.index(eos) + 1 if finished else len(ids)
        responses.append(Response(tuple(ids[:length]), tuple(logprobs[:length]), finished))
    return responses


class _LogprobRecorder(LogitsProcessor):
    """Notes each sampled token's log-probability, one step late, so that only one step's logits are kept.

    The logits pass through unchanged.
    """

    def __init__(self, temperature: float, on_token: Callable[[], None] | None) -> None:
        self._temperature, self._on_token = temperature, on_token
        self._previous_BV: Tensor | None = None
        self._normalizer_B = torch.empty(0)
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._on_token is not None:
            self._on_token()
        if self._previous_BV is not None:
            self._record(input_ids[:, -1])
        self._previous_BV = scores.float() / self._temperature
        self._normalizer_B = torch.logsumexp(self._previous_BV, dim=1)
        if not bool(self._normalizer_B.isfinite().all()):
            raise DivergenceError(
                "the logits that responses are sampled from are not finite",
                remedy="Train with a lower learning rate; with 16 bits, try base.dtype=float32.",
            )
        return scores

    def _record(self, sampled_B: Tensor) -> None:
        assert self._previous_BV is not None
        chosen_B = self._previous_BV.gather(1, sampled_B[:, None]).squeeze(1)
        self._columns.append(chosen_B - self._normalizer_B)

    def finish(self, last_B: Tensor) -> Tensor:
        """Record the last step's tokens; returns the log-probabilities [B, T]."""
        self._record(last_B)
        return torch.stack(self._columns, dim=1)
