"""One round of PPO up to the update: sample, score, compare with the reference, estimate advantages.

Shape legend: B response of this process, T response token (padded on the right).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.advantages import generalized_advantages, token_rewards
from pipeline.batching import pad_rows
from pipeline.config import PPOSettings
from pipeline.distributed import World
from pipeline.errors import DivergenceError
from pipeline.generation import SamplingSettings, generate
from pipeline.kl import kl_k1, kl_k3
from pipeline.masking import length_mask, whiten
from pipeline.records import Prompt
from pipeline.rewards import RewardSum
from pipeline.roles import Role, Roles
from pipeline.scoring import Episode, score_logprobs, score_values


@dataclass(frozen=True)
class Experience:
    """What a round has found out about its responses; everything that the update needs.

    `scores_B` are in reward units after clipping and penalty, `terms` the unweighted terms they come from,
    `sampler_logprobs_BT` what the sampler said, `seconds` the time of each phase.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    episodes: Sequence[Episode]
    finished_B: Tensor
    lengths_B: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    sampler_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    values_BT: Tensor
    raw_scores_B: Tensor
    scores_B: Tensor
    terms: Mapping[str, Tensor]
    kl_BT: Tensor
    kl_k3_BT: Tensor
    rewards_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    seconds: Mapping[str, float]


def sampling_settings(ppo: PPOSettings) -> SamplingSettings:
    """How PPO's config says that responses are drawn."""
    return SamplingSettings(
        max_new_tokens=ppo.max_new_tokens,
        temperature=ppo.temperature,
        top_k=ppo.top_k,
        top_p=ppo.top_p,
        batch_size=ppo.generation_batch_size,
    )


def value_trunk(ppo: PPOSettings) -> Role:
    """Whose hidden states the value head reads."""
    return "value" if ppo.critic == "adapter" else "policy"


def collect(
    roles: Roles,
    rewards: RewardSum,
    prompts: Sequence[Prompt],
    ppo: PPOSettings,
    *,
    kl_coefficient: float,
    seed: tuple[int | str, ...],
    world: World,
    sampling: SamplingSettings | None = None,
) -> Experience:
    """Answer this process's prompts and judge the answers.

    Args:
        prompts: one entry a response (a prompt that is answered twice stands twice).
        kl_coefficient: beta, reward units a nat.
        seed: parts that the draws follow from.
        sampling: how to draw; None is as `ppo` says.

    Raises:
        DivergenceError: a log-probability, value or score is not finite.
        RewardFunctionError: a reward function failed.
    """
    chat, device = roles.base.chat, roles.device
    started = time.monotonic()

    # 1. Sample.
    prompt_ids = [tuple(chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    responses = generate(roles, "policy", prompt_ids, sampling or sampling_settings(ppo), seed=seed)
    episodes = [Episode(ids, response.ids) for ids, response in zip(prompt_ids, responses, strict=True)]
    sampled = time.monotonic()

    # 2. Score. The penalty comes after the clipping, so that it always bites.
    completions = [chat.decode(response.ids) for response in responses]
    raw_scores_B, terms = rewards(prompts, completions, [episode.ids for episode in episodes])
    finished_B = torch.tensor([response.finished for response in responses])
    clipped_B = raw_scores_B if ppo.score_clip is None else raw_scores_B.clamp(-ppo.score_clip, ppo.score_clip)
    scores_B = clipped_B - ppo.missing_eos_penalty * (~finished_B).float()

    # 3. Log-probabilities under the policy and the reference, values under the critic.
    def as_rows(rows: Sequence[Tensor]) -> Tensor:
        return pad_rows([row.float() for row in rows], size)

    size = max(len(response.ids) for response in responses)
    lengths_B = torch.tensor([len(response.ids) for response in responses], device=device)
    mask_BT = length_mask(lengths_B, size)
    scoring = {"temperature": ppo.temperature, "max_tokens": ppo.microbatch_tokens}
    logprobs_BT = as_rows(score_logprobs(roles, "policy", episodes, **scoring))  # type: ignore[arg-type]
    reference_BT = as_rows(score_logprobs(roles, "reference", episodes, **scoring))  # type: ignore[arg-type]
    values_BT = as_rows(score_values(roles, episodes, trunk=value_trunk(ppo), max_tokens=ppo.microbatch_tokens))
    _require_finite(
        world, policy_logprobs=logprobs_BT, reference_logprobs=reference_BT, values=values_BT, scores=scores_B
    )

    # 4. Rewards and advantages.
    kl_BT = kl_k1(logprobs_BT, reference_BT)
    rewards_BT = token_rewards(scores_B.to(device), kl_BT, lengths_B, kl_coefficient=kl_coefficient)
    if ppo.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False, all_reduce=world.sum)
    advantages_BT, returns_BT = generalized_advantages(
        rewards_BT, values_BT, mask_BT, gamma=ppo.gamma, lam=ppo.gae_lambda
    )
    if ppo.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT, shift_mean=True, all_reduce=world.sum)

    return Experience(
        prompts=prompts,
        completions=completions,
        episodes=episodes,
        finished_B=finished_B,
        lengths_B=lengths_B,
        mask_BT=mask_BT,
        logprobs_BT=logprobs_BT,
        sampler_logprobs_BT=as_rows([torch.tensor(response.logprobs, device=device) for response in responses]),
        reference_logprobs_BT=reference_BT,
        values_BT=values_BT,
        raw_scores_B=raw_scores_B,
        scores_B=scores_B,
        terms=terms,
        kl_BT=kl_BT,
        kl_k3_BT=kl_k3(logprobs_BT, reference_BT),
        rewards_BT=rewards_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
        seconds={"rollout": sampled - started, "score": time.monotonic() - sampled},
    )


def _require_finite(world: World, **tensors: Tensor) -> None:
    """Every process stops where one of them must: the others would wait for it."""
    for name, tensor in tensors.items():
        if world.maximum(float(not bool(tensor.isfinite().all()))):
            raise DivergenceError(
                f"{name.replace('_', ' ')} of this round are not finite",
                remedy="Lower ppo.learning_rate; the checkpoint before this round is intact.",
            )
