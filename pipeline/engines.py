"""The ways to sample, behind one interface. All give ids and the log-probability that each was sampled with.

| engine | chance | values | where |
|---|---|---|---|
| generate | ours: a response follows from (seed, number) | yes | everywhere |
| paged | ours | where the architecture computes logits of chosen tokens alone | a whole base; meant for GPUs |
| vllm | vLLM's, seeded by (seed, number) | no | trivet[vllm] or a server |

What an engine says is never trusted unseen: see `sampler/logprob_gap_mean` in `stages.round_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Required, TypedDict, Unpack

from pipeline import generation
from pipeline.config import EngineChoice, RolloutSettings
from pipeline.generation import Response, SamplingSettings
from pipeline.paged_engine import require_pageable, sample_paged
from pipeline.roles import Role, Roles
from pipeline.vllm_engine import require_vllm, sample_with_vllm

EngineName = Literal["generate", "paged", "vllm"]


class Options(TypedDict, total=False):
    """What an engine takes by name; each as `pipeline.generation.generate` says."""

    seed: Required[tuple[int | str, ...]]
    numbers: Sequence[int] | None
    with_values: bool
    on_batch: Callable[[int], None] | None
    on_token: Callable[[], None] | None


class Engine(Protocol):
    """How an engine is called; the arguments are those of `pipeline.generation.generate`."""

    def __call__(
        self,
        roles: Roles,
        role: Role | None,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        **options: Unpack[Options],
    ) -> list[Response]: ...


ENGINES: dict[EngineName, Engine] = {"generate": generation.generate, "paged": sample_paged, "vllm": sample_with_vllm}


def chosen_engine(roles: Roles, engine: EngineChoice) -> EngineName:
    """The engine that a choice comes to: `auto` is paged over flash attention on CUDA, where the base is whole."""
    if engine != "auto":
        return engine
    fast = roles.device.type == "cuda" and roles.uses_flash_attention and roles.shards is None
    return "paged" if fast else "generate"


def require_engine(rollout: RolloutSettings) -> None:
    """Refuse an engine that is not there, before a model is loaded.

    Raises:
        ConfigError: vLLM is not installed, or its server does not answer.
    """
    if rollout.engine == "vllm":
        require_vllm(rollout.server)


def require_engine_for(roles: Roles, sampling: SamplingSettings) -> None:
    """Refuse an engine that cannot sample from this base.

    Raises:
        ConfigError: says why.
    """
    if chosen_engine(roles, sampling.engine) == "paged":
        require_pageable(roles, sampling)


def generate(
    roles: Roles,
    role: Role | None,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    **options: Unpack[Options],
) -> list[Response]:
    """Sample one response a prompt with the chosen engine; arguments as for the engine of this name.

    Returns:
        the responses in the order of the prompts; without values where the engine reads none.
    """
    return ENGINES[chosen_engine(roles, sampling.engine)](roles, role, prompts, sampling, **options)
