"""Which policy of a run to publish, and when to stop: measured on held-out prompts, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.config import GuardSettings, PPOSettings
from pipeline.distributed import World
from pipeline.kl import kl_k1
from pipeline.records import Prompt
from pipeline.rewards import RewardSum
from pipeline.roles import Role, Roles
from pipeline.scoring import require_finite, score_logprobs
from stages.experience import Budgets, judge, sample, sampling_settings
from stages.held_out_answers import as_row


def measure_held_out(
    roles: Roles,
    rewards: RewardSum,
    prompts: Sequence[Prompt],
    ppo: PPOSettings,
    *,
    seed: int,
    world: World,
    budgets: Budgets,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, float]:
    """Score the policy on held-out prompts, which are answered with the same seeds every time.

    Args:
        prompts: all held-out prompts, at least as many as processes; the last `ppo.held_out.prompts` of them are
            used. The evaluation takes the first ones, so that where there are enough of them it judges on prompts
            that nothing was chosen by.
        keep: called in the main process with all answers, as rows of `held_out_answers.as_row`.

    Returns:
        means over responses: `held_out/score` (as PPO's objective/score), `held_out/kl` from the reference in nats,
        `held_out/length` in tokens.

    Raises:
        RewardFunctionError: a reward function failed.
        Interrupted: the stage was asked to stop.
    """
    few = prompts[-ppo.held_out.prompts :]
    # As many in every process, since they may pass in step; what is answered to fill up the last ones does not count.
    mine = world.share([*few, *few[: -len(few) % world.size]])
    counted = min(len(mine), len(few) - world.rank * len(mine))
    found = sample(roles, mine, seed=(seed, "held out"), world=world, budgets=budgets, sampling=sampling_settings(ppo))
    judged = judge(roles, rewards, mine, found, ppo, world)

    def logprobs(role: Role) -> list[torch.Tensor]:
        return budgets.fit_sequences(
            [len(episode.ids) for episode in found.episodes],
            lambda most: score_logprobs(roles, role, found.episodes, temperature=ppo.temperature, max_tokens=most),
        )

    pairs = zip(logprobs("policy"), logprobs("reference"), strict=True)
    kl = [float(kl_k1(ours, theirs).sum()) for ours, theirs in pairs]
    lengths = [len(episode.response) for episode in found.episodes]
    rows = [judged.scores_B.tolist(), kl, lengths]
    sums = world.sum(torch.tensor([sum(row[:counted]) for row in rows] + [counted], dtype=torch.float64))
    require_finite(sums, "score or KL of the answers to held-out prompts", where="ppo")
    score, divergence, length, count = sums.tolist()
    first = len(prompts) - len(few) + world.rank * len(mine)
    answers = zip(mine, judged.completions, rows[0], kl, strict=True)
    kept = world.gather([as_row(first + place, *answer) for place, answer in enumerate(answers)][:counted])
    if keep is not None and world.is_main:
        keep(kept)
    return {
        "held_out/score": score / count,
        "held_out/kl": divergence / count,
        "held_out/length": length / count,
    }


def is_better(found: Mapping[str, float], best: Mapping[str, float] | None, guard: GuardSettings) -> bool:
    """Whether held-out figures beat the best so far without leaving the bound on the KL."""
    if guard.max_kl is not None and not found["held_out/kl"] <= guard.max_kl:
        return False
    return best is None or found["held_out/score"] > best["held_out/score"]


def violations(metrics: Mapping[str, float], guard: GuardSettings) -> Iterator[str]:
    """Each bound that an iteration's figures leave, as a sentence; a figure that was not measured leaves none."""
    for name, least, most in (
        ("kl/policy_reference_k1", None, guard.max_kl),
        ("policy/ratio_max", None, guard.max_ratio),
        ("policy/entropy", guard.min_entropy, guard.max_entropy),
    ):
        value = metrics.get(name)
        if value is None:
            continue
        if most is not None and not value <= most:
            yield f"{name} is {value:.3g}, above {most:g}"
        if least is not None and not value >= least:
            yield f"{name} is {value:.3g}, below {least:g}"
