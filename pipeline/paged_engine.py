"""Responses by transformers' continuous batching: a finished one makes room for the next, and nothing is padded.

Keys and values lie in pages; prompts that begin alike share theirs. Chance stays ours: the engine takes the likeliest
token, and before it does, a processor of logits leaves it the one that the response's own numbers draw. The same
processor notes log-probabilities and values, so that they are those of the draws.

Without flash attention the engine masks all pairs of tokens of all responses, which costs more than padding: it is
meant for GPUs, and on a CPU there to be tested.

Shape legend: B response, T response token, V vocabulary, D width, P place of a token: B x T, and one for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from pipeline.errors import BaseModelError, ConfigError
from pipeline.generation import Response, SamplingSettings, TokenDrawer, only, require_finite_logprobs, uniforms
from pipeline.memory import is_out_of_memory
from pipeline.roles import Role, Roles

_POLL_SECONDS = 0.1
_FLASH_PAGE, _MASKED_PAGE = 256, 16
"""Tokens in a page: what flash attention's kernels read, and otherwise little enough to waste none."""
_FLASH_TOKENS, _MASKED_TOKENS = 4096, 256
"""Tokens in a forward pass at the most; a mask takes as many rows."""


def sample_paged(
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
) -> list[Response]:
    """As `pipeline.generation.generate`; at most `sampling.batch_size` responses are under way at one time.

    `on_token` is called some times a second instead.

    Raises:
        ConfigError: the base cannot be sampled from in this way.
        BaseModelError: the engine failed.
    """
    require_pageable(roles, sampling)
    roles.inference_mode()
    draws = _Draws(roles, prompts, sampling, uniforms(seed, numbers or range(len(prompts)), sampling), with_values)
    # Not inference mode: the engine computes in a thread of its own, which would not be in it.
    with torch.no_grad(), roles.sampling_model(role, sampling.weights) as model, draws.reading_states():
        finished = _run(cast(Any, model), roles, prompts, sampling, draws, on_batch, on_token)
    eos = None if sampling.ignore_eos else roles.base.chat.eos_token_id
    return draws.responses([finished[row] for row in range(len(prompts))], eos)


def require_pageable(roles: Roles, sampling: SamplingSettings) -> None:
    """Refuse a base, or weights, that continuous batching would compute wrongly or not at all.

    Raises:
        ConfigError: says why, and what else there is.
    """
    config = roles.base.model.config.get_text_config()
    problem = None
    if not hasattr(roles.base.model, "init_continuous_batching"):
        problem = "this transformers has no continuous batching"
    elif roles.shards is not None and not roles.merges(sampling.weights):
        problem = "the base is shared out among processes, and continuous batching needs it whole"
    elif not roles.base.model._supports_attention_backend:
        problem = f"the architecture {config.model_type} has an attention of its own, which knows no pages"
    elif getattr(config, "attn_logit_softcapping", None) and not roles.uses_flash_attention:
        problem = f"the architecture {config.model_type} caps its attention, which pages without flash attention ignore"
    if problem is not None:
        raise ConfigError(
            problem, where="ppo.rollout.engine=paged", remedy="Set ppo.rollout.engine=generate, or leave it at auto."
        )


def _run(
    model: Any,
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    draws: _Draws,
    on_batch: Callable[[int], None] | None,
    on_token: Callable[[], None] | None,
) -> dict[int, list[int]]:
    """The token ids of each response by its row."""
    eos = None if sampling.ignore_eos else roles.base.chat.eos_token_id
    generation = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=eos)
    finished: dict[int, list[int]] = {}
    with _global_chance_kept(roles.device), _manager(model, roles, prompts, sampling, generation, draws) as manager:
        while len(finished) < len(prompts):
            result = manager.get_result(timeout=_POLL_SECONDS)
            if on_token is not None:
                on_token()
            if result is not None:
                _require_success(manager, result.error)
                finished[int(result.request_id)] = result.generated_tokens
                if on_batch is not None:
                    on_batch(1)
            elif not manager.is_running():
                _require_success(manager, "it stopped before its responses were finished")
    return finished


@contextmanager
def _manager(
    model: Any,
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    generation: GenerationConfig,
    draws: _Draws,
) -> Iterator[Any]:
    """The engine with all requests in it, running; it is stopped, and its pages are freed, at the end."""
    manager = model.init_continuous_batching(generation, _settings(roles, prompts, sampling))
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([cast(Any, draws)]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    # All of them before the start, and those with a common beginning side by side: which ones are computed together
    # then follows from the requests alone, not from how fast a thread is.
    for row in sorted(range(len(prompts)), key=lambda row: (list(prompts[row]), row)):
        manager.add_request(
            list(prompts[row]),
            request_id=str(row),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=generation.eos_token_id,
            row=row,
        )
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(hard_stop=True)
        manager.destroy()


def _settings(roles: Roles, prompts: Sequence[Sequence[int]], sampling: SamplingSettings) -> ContinuousBatchingConfig:
    """As many pages as the responses that are under way at one time can fill."""
    flash = roles.uses_flash_attention
    page = _FLASH_PAGE if flash else _MASKED_PAGE
    at_once = min(sampling.batch_size, len(prompts))
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=at_once * (-(-longest // page) + 1),
        max_batch_tokens=max(at_once, _FLASH_TOKENS if flash else _MASKED_TOKENS),
        max_requests_per_batch=at_once,
        safety_margin=0.0,  # there is room for all
        auto_switch_to_flash=False,  # the base's attention is what was asked for
        seed=0,  # never used: chance is ours
        disable_nccl_graph_mixing=False,  # a switch in the environment of the whole process
    )


def _require_success(manager: Any, error: str | None) -> None:
    """Raise what ended the engine: lack of memory as such, so that less is tried.

    Raises:
        BaseModelError: anything else.
    """
    if error is None:
        return
    fatal = manager.background_thread_status.fatal_error
    if fatal is not None and is_out_of_memory(fatal):
        raise fatal
    raise BaseModelError(
        f"continuous batching failed: {str(error).splitlines()[0]}",
        where="ppo.rollout.engine=paged",
        remedy="Set ppo.rollout.engine=generate.",
    )


@contextmanager
def _global_chance_kept(device: torch.device) -> Iterator[None]:
    """The engine seeds torch's global generators; put them back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class _Draws(ContinuousBatchingLogitsProcessor):
    """Leaves the engine the token that each response's own numbers draw, and notes what was thought of it.

    All state is in tensors that stay where they are, as CUDA graphs ask for. The engine hands a response's row, and a
    token's place is known from how far the response has come: that also holds where it prepares a step before it has
    seen the last one's tokens.
    """

    supported_kwargs = {"row": int}  # noqa: RUF012 - the engine's own way to declare it
    ignored_kwargs = ()

    def __init__(
        self,
        roles: Roles,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        uniforms_BT: Tensor,
        with_values: bool,
    ) -> None:
        self._roles, self._draw = roles, TokenDrawer(sampling)
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self._tokens, self._at_once = sampling.max_new_tokens, min(sampling.batch_size, len(prompts))
        self._nowhere = uniforms_BT.numel()
        self._uniforms_P = torch.cat([uniforms_BT.flatten(), torch.zeros(1).double()]).to(roles.device)
        self._logprobs_P = torch.zeros(self._nowhere + 1, device=roles.device)
        # Values are read from the states that go into the output head: those of next tokens alone, where the model
        # can leave the others out.
        keeps_few = with_values and roles.base.model._supports_logits_to_keep()
        self._values_P = torch.zeros(self._nowhere + 1, device=roles.device) if keeps_few else None
        self._states_BD: Tensor | None = None

    @contextmanager
    def reading_states(self) -> Iterator[None]:
        """Let the value head see what goes into the output head."""
        if self._values_P is None:
            yield
            return
        hook = self._roles.base.model.get_output_embeddings().register_forward_pre_hook(self._read)
        try:
            yield
        finally:
            hook.remove()

    def _read(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._states_BD = arguments[0].flatten(0, -2)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows without a response draw for nobody."""
        int32_tensor.fill_(self._nowhere)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """The place of the token that each response gets in this step; rows behind the last one have none."""
        places = [self._place(request.state) for request in requests_with_new_token]
        return torch.tensor(places + [self._nowhere] * (self._at_once - len(places)), dtype=torch.int32)

    def _place(self, state: Any) -> int:
        row = state.logit_processor_kwargs.get("row")
        if row is None:  # a request that the engine made up
            return self._nowhere
        number = state.position_offset - self._prompt_lengths[row]
        # A step that was prepared before the response's end was known is behind it.
        return row * self._tokens + number if 0 <= number < self._tokens else self._nowhere

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        place_B = tensor_arg[: len(scores)].long()
        tokens_B, logprobs_B = self._draw(scores, self._uniforms_P[place_B])
        self._logprobs_P[place_B] = logprobs_B
        if self._values_P is not None and self._states_BD is not None:
            self._values_P[place_B] = self._roles.head_values("value", self._states_BD[: len(scores)])
        return only(scores, tokens_B)

    def responses(self, ids: Sequence[Sequence[int]], eos: int | None) -> list[Response]:
        """What came of each request.

        Raises:
            DivergenceError: logits were not finite.
        """
        shape = (len(ids), self._tokens)
        logprobs_BT = self._logprobs_P[:-1].view(shape).cpu()
        values_BT = None if self._values_P is None else self._values_P[:-1].view(shape).cpu()
        found = []
        for row, tokens in enumerate(ids):
            count = len(tokens)
            require_finite_logprobs(logprobs_BT[row, :count])
            values = () if values_BT is None else tuple(values_BT[row, :count].tolist())
            finished = tokens[-1] == eos
            found.append(Response(tuple(tokens), tuple(logprobs_BT[row, :count].tolist()), finished, values))
        return found
