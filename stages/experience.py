"""One round of PPO up to the update: sample, score, compare with the reference, estimate advantages.

Where memory runs out, the work is done again in smaller parts.

Shape legend: B response of this process, T response token (padded on the right).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.advantages import generalized_advantages, token_rewards
from pipeline.batching import pad_rows
from pipeline.config import PPOSettings
from pipeline.distributed import World
from pipeline.engines import generate
from pipeline.errors import DivergenceError
from pipeline.generation import Response, SamplingSettings
from pipeline.kl import kl_k1, kl_k3
from pipeline.masking import length_mask, whiten
from pipeline.memory import give_back_freed_memory
from pipeline.memory_budget import MemoryBudget
from pipeline.records import Prompt
from pipeline.rewards import Calibration, RewardSum
from pipeline.roles import Roles
from pipeline.scoring import Episode, score_logprobs, score_logprobs_and_values, score_rewards, score_values
from stages.interruption import stop_alone

Result = TypeVar("Result")

_CHECKED_ONE_IN = 16
"""Of so many responses of a round one is scored again, to see whether the sampler computes as the trainer does."""


@dataclass(frozen=True)
class Experience:
    """What a round has found out about its responses; everything that the update needs.

    `scores_B` are in reward units after clipping and penalty, `terms` the unweighted terms they come from,
    `sampler_logprobs_BT` what the sampler said, `checked_B` whose log-probabilities the trainer computed (the others
    have the sampler's), `padding` how many tokens of the scoring passes were padding, and how many there were,
    `seconds` the time of each phase.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    episodes: Sequence[Episode]
    finished_B: Tensor
    lengths_B: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    sampler_logprobs_BT: Tensor
    checked_B: Tensor
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
    padding: Tensor
    seconds: Mapping[str, float]


def sampling_settings(ppo: PPOSettings) -> SamplingSettings:
    """How PPO's config says that responses are drawn."""
    return SamplingSettings(
        max_new_tokens=ppo.max_new_tokens,
        temperature=ppo.temperature,
        top_k=ppo.top_k,
        top_p=ppo.top_p,
        batch_size=ppo.rollout.batch_size,
        weights=ppo.rollout.weights,
        engine=ppo.rollout.engine,
        server=ppo.rollout.server,
        vllm=ppo.rollout.vllm,
    )


@dataclass(frozen=True)
class Budgets:
    """How much goes through the model at once; lowered where memory runs out, and then kept.

    `length_setting` is the key that says how long responses may get, for errors.
    """

    tokens: MemoryBudget
    responses: MemoryBudget
    length_setting: str = "ppo.max_new_tokens"

    @classmethod
    def of(cls, ppo: PPOSettings, say: Callable[[str], None] = print, *, alone: bool = True) -> Budgets:
        """As the settings say; `alone` as in `MemoryBudget`."""
        return cls(
            MemoryBudget("ppo.microbatch_tokens", ppo.microbatch_tokens, say, alone=alone),
            MemoryBudget("ppo.rollout.batch_size", ppo.rollout.batch_size, say, alone=alone),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Both as they are now."""
        return {"tokens": self.tokens.size, "responses": self.responses.size}

    def lower(self, *sizes: Mapping[str, int]) -> None:
        """Take over what was learned of memory before: the smallest of these sizes."""
        for found in sizes:
            self.tokens.size = min(self.tokens.size, int(found["tokens"]))
            self.responses.size = min(self.responses.size, int(found["responses"]))

    def fit_sequences(self, lengths: Sequence[int], work: Callable[[int], Result]) -> Result:
        """Do work on sequences of these lengths in parts of as many tokens as memory allows.

        Args:
            work: takes the tokens of one forward pass; can be done again from its start.

        Raises:
            OutOfMemoryError: a single sequence does not fit.
        """
        longest = max(lengths)
        return self.tokens.fit(
            work,
            smallest=longest,
            whole=longest * len(lengths),
            remedy=f"One sequence of {longest} tokens does not fit: lower ppo.max_prompt_tokens + {self.length_setting}"
            f" to {longest // 2}, or set ppo.gradient_checkpointing=true, base.quantization=nf4.",
        )

    def fit_responses(
        self, sampling: SamplingSettings, count: int, work: Callable[[SamplingSettings], Result]
    ) -> Result:
        """Sample responses, as many at once as memory allows.

        Args:
            count: how many there are to sample.
            work: takes the settings with a batch size that is tried; can be done again from its start.

        Raises:
            OutOfMemoryError: a single response does not fit.
        """
        return self.responses.fit(
            lambda size: work(replace(sampling, batch_size=size)),
            smallest=1,
            whole=count,
            remedy=f"One response does not fit: set {self.length_setting} to {sampling.max_new_tokens // 2}, or lower"
            " ppo.max_prompt_tokens, or set ppo.rollout.weights=adapter.",
        )


def ratio_tolerance(ppo: PPOSettings, arithmetic: str) -> float:
    """How far from 1 the mean probability ratio may be before a round's first step.

    Args:
        arithmetic: the base's, as its identity names it.
    """
    # int8 kernels round activations by what else is in the batch, as coarsely as 16-bit arithmetic does.
    coarse = arithmetic.startswith("int8") or not arithmetic.endswith("float32")
    return ppo.ratio_tolerance or (0.05 if coarse else 1e-4)


def most_reused_gap(ppo: PPOSettings, arithmetic: str, responses: Sequence[Response]) -> float | None:
    """How far the sampler's log-probabilities may be from the trainer's to serve as the old ones: mean, nats a token.

    None where they do not serve at all: it is switched off, or the engine has not read the values that come with them.
    """
    has_all = ppo.critic == "adapter" or all(response.values for response in responses)
    if not (ppo.rollout.reuse_logprobs and has_all):
        return None
    # Half of what the first step's ratio may be off by: it is another part of the round that is measured there.
    return min(ppo.rollout.max_logprob_gap, ratio_tolerance(ppo, arithmetic) / 2)


def reward_model_scores(
    roles: Roles, calibration: Calibration, budgets: Budgets
) -> Callable[[Sequence[Sequence[int]]], Tensor]:
    """The reward adapter as a term of the reward: standardised scores [B] of whole sequences, as memory allows."""

    def scores(sequences: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(ids) for ids in sequences]
        return calibration.apply(
            budgets.fit_sequences(lengths, lambda most: score_rewards(roles, sequences, max_tokens=most))
        )

    return scores


@dataclass(frozen=True)
class Sampled:
    """Responses before anyone has judged them, and how long they took.

    Their values are those of a head on the policy's trunk; empty for another critic, and where the engine reads none.
    """

    episodes: Sequence[Episode]
    responses: Sequence[Response]
    seconds: float

    @property
    def logprobs(self) -> Sequence[Sequence[float]]:
        """What the sampler said of each token, a row a response."""
        return [response.logprobs for response in self.responses]


def sample(
    roles: Roles,
    prompts: Sequence[Prompt],
    *,
    seed: tuple[int | str, ...],
    world: World,
    budgets: Budgets,
    sampling: SamplingSettings,
    with_values: bool = False,
) -> Sampled:
    """Let the policy answer this process's prompts.

    Args:
        prompts: one entry a response (a prompt that is answered twice stands twice); as many in every process.
        seed: parts that the draws follow from; a response's number among those of all processes is added.
        sampling: how to draw; its batch size is `budgets`' to say.
        with_values: let the value head read the policy's states as it samples.

    Raises:
        OutOfMemoryError: a single response does not fit.
        Interrupted: the stage was asked to stop.
    """
    started = time.monotonic()
    prompt_ids = [tuple(roles.base.chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    responses = budgets.fit_responses(
        sampling,
        len(prompts),
        lambda fitting: generate(
            roles,
            "policy",
            prompt_ids,
            fitting,
            seed=seed,
            with_values=with_values,
            numbers=range(world.rank * len(prompts), (world.rank + 1) * len(prompts)),
            on_token=lambda: stop_alone(world),
        ),
    )
    episodes = [Episode(ids, response.ids) for ids, response in zip(prompt_ids, responses, strict=True)]
    give_back_freed_memory()
    return Sampled(episodes, responses, time.monotonic() - started)


@dataclass(frozen=True)
class Judged:
    """What the rewards say of responses. `scores_B` are in reward units after clipping and penalty."""

    completions: Sequence[str]
    finished_B: Tensor
    raw_scores_B: Tensor
    scores_B: Tensor
    terms: Mapping[str, Tensor]


def judge(
    roles: Roles, rewards: RewardSum, prompts: Sequence[Prompt], sampled: Sampled, ppo: PPOSettings, world: World
) -> Judged:
    """Score responses to these prompts.

    Raises:
        DivergenceError: a score is not finite.
        RewardFunctionError: a reward function failed.
        Interrupted: the stage was asked to stop.
    """
    completions = [roles.base.chat.decode(episode.response) for episode in sampled.episodes]
    raw_scores_B, terms = rewards(prompts, completions, [episode.ids for episode in sampled.episodes])
    # Before the clipping, which would make a number of what is infinite.
    rewards_of_terms = {f"rewards of {name}": term_B for name, term_B in terms.items()}
    _require_finite(world, **rewards_of_terms, rewards_before_clipping=raw_scores_B)
    finished_B = torch.tensor([response.finished for response in sampled.responses])
    clipped_B = raw_scores_B if ppo.score_clip is None else raw_scores_B.clamp(-ppo.score_clip, ppo.score_clip)
    # The penalty comes after the clipping, so that it always bites.
    scores_B = clipped_B - ppo.missing_eos_penalty * (~finished_B).float()
    return Judged(completions, finished_B, raw_scores_B, scores_B, terms)


def collect(
    roles: Roles,
    rewards: RewardSum,
    prompts: Sequence[Prompt],
    sampled: Sampled,
    ppo: PPOSettings,
    *,
    kl_coefficient: float,
    world: World,
    budgets: Budgets,
) -> Experience:
    """Judge this process's responses, and find the advantages of their tokens.

    Args:
        prompts: one entry a response (a prompt that is answered twice stands twice).
        sampled: `sample`'s responses to them.
        kl_coefficient: beta, reward units a nat.
        budgets: how much to do at once.

    Raises:
        DivergenceError: a log-probability, value or score is not finite.
        RewardFunctionError: a reward function failed.
        OutOfMemoryError: a single sequence does not fit.
        Interrupted: the stage was asked to stop.
    """
    device = roles.device
    started = time.monotonic()
    episodes = sampled.episodes
    roles.padding.take()

    # 2. Score.
    judged = judge(roles, rewards, prompts, sampled, ppo, world)

    # 3. Log-probabilities under the policy and the reference, values under the critic.
    def as_rows(rows: Sequence[Tensor]) -> Tensor:
        return pad_rows([row.float() for row in rows], size)

    size = max(len(episode.response) for episode in episodes)
    lengths_B = torch.tensor([len(episode.response) for episode in episodes], device=device)
    mask_BT = length_mask(lengths_B, size)
    lengths = [len(episode.ids) for episode in episodes]

    stop_alone(world)
    logprobs, values, checked_B = _policy_opinions(roles, sampled, ppo, world, budgets)
    reference = budgets.fit_sequences(
        lengths, lambda most: score_logprobs(roles, "reference", episodes, temperature=ppo.temperature, max_tokens=most)
    )
    stop_alone(world)
    if ppo.critic == "adapter":
        values = budgets.fit_sequences(lengths, lambda most: score_values(roles, episodes, max_tokens=most))
    logprobs_BT, reference_BT, values_BT = as_rows(logprobs), as_rows(reference), as_rows(values)
    _require_finite(
        world, policy_logprobs=logprobs_BT, reference_logprobs=reference_BT, values=values_BT, scores=judged.scores_B
    )

    # 4. Rewards and advantages.
    kl_BT = kl_k1(logprobs_BT, reference_BT)
    rewards_BT = token_rewards(judged.scores_B.to(device), kl_BT, lengths_B, kl_coefficient=kl_coefficient)
    if ppo.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False, all_reduce=world.sum)
    advantages_BT, returns_BT = generalized_advantages(
        rewards_BT, values_BT, mask_BT, gamma=ppo.gamma, lam=ppo.gae_lambda
    )
    if ppo.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT, shift_mean=True, all_reduce=world.sum)

    return Experience(
        prompts=prompts,
        completions=judged.completions,
        episodes=episodes,
        finished_B=judged.finished_B,
        lengths_B=lengths_B,
        mask_BT=mask_BT,
        logprobs_BT=logprobs_BT,
        sampler_logprobs_BT=as_rows([torch.tensor(row, device=device) for row in sampled.logprobs]),
        checked_B=checked_B,
        reference_logprobs_BT=reference_BT,
        values_BT=values_BT,
        raw_scores_B=judged.raw_scores_B,
        scores_B=judged.scores_B,
        terms=judged.terms,
        kl_BT=kl_BT,
        kl_k3_BT=kl_k3(logprobs_BT, reference_BT),
        rewards_BT=rewards_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
        padding=torch.tensor(roles.padding.take(), dtype=torch.float64),
        seconds={"rollout": sampled.seconds, "score": time.monotonic() - started},
    )


def _policy_opinions(
    roles: Roles, sampled: Sampled, ppo: PPOSettings, world: World, budgets: Budgets
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The policy's log-probabilities, a row a response; with `critic: head` the values of its head too.

    What the sampler said is taken where the trainer finds the same for some of the responses.

    Returns:
        log-probabilities, values (empty rows for a critic of its own), and whose the trainer computed: [B].
    """
    device, count = roles.device, len(sampled.episodes)
    logprobs = [torch.tensor(row, device=device) for row in sampled.logprobs]
    values = [torch.tensor(row, device=device) for row in (response.values for response in sampled.responses)]
    checked_B = torch.zeros(count, dtype=torch.bool)

    def compute(numbers: Sequence[int]) -> float:
        """Let the trainer compute some of the rows; returns how far off they were, in nats."""
        chosen = [sampled.episodes[number] for number in numbers]
        score = score_logprobs_and_values if ppo.critic == "head" else _score_logprobs_alone
        pairs = budgets.fit_sequences(
            [len(episode.ids) for episode in chosen],
            lambda most: score(roles, chosen, temperature=ppo.temperature, max_tokens=most),
        )
        gaps = []
        for number, logprobs_T, values_T in zip(numbers, *pairs, strict=True):
            gaps.append((logprobs[number] - logprobs_T).abs())
            logprobs[number], values[number] = logprobs_T, values_T
        checked_B[list(numbers)] = True
        return float(torch.cat(gaps).mean())

    most = most_reused_gap(ppo, roles.base.identity.quantization, sampled.responses)
    few = -(-count // _CHECKED_ONE_IN) if most is not None else 0
    if most is not None and world.maximum(compute(range(few))) <= most:
        return logprobs, values, checked_B
    if few < count:
        compute(range(few, count))
    return logprobs, values, checked_B


def _score_logprobs_alone(
    roles: Roles, episodes: Sequence[Episode], *, temperature: float, max_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    logprobs = score_logprobs(roles, "policy", episodes, temperature=temperature, max_tokens=max_tokens)
    return logprobs, [torch.empty(0)] * len(episodes)


def _require_finite(world: World, **tensors: Tensor) -> None:
    """Every process stops where one of them must: the others would wait for it."""
    for name, tensor in tensors.items():
        if world.maximum(float(not bool(tensor.isfinite().all()))):
            by_function = name.startswith("rewards of ") and not name.endswith(" model")
            raise DivergenceError(
                f"{name.replace('_', ' ') if not by_function else name} of this round are not finite",
                remedy="Have the function return smaller numbers: they are kept in float32."
                if by_function
                else "Lower ppo.learning_rate; the stage then starts anew.",
            )
