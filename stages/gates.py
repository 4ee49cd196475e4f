"""PPO's start-up gates: in every run, in seconds, before the first iteration.

Each one is a silent failure of some well-known trainer. They use a few of the run's own prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import BaseIdentity, Manifest, read_manifest, require_same_base
from pipeline.config import PipelineConfig, PPOSettings
from pipeline.engines import generate, require_engine_for
from pipeline.errors import StartupGateError
from pipeline.records import Prompt
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory, StageName
from pipeline.scoring import Episode, batch_episodes, score_logprobs, score_rewards
from stages.experience import Budgets, most_reused_gap, ratio_tolerance, sampling_settings
from stages.inputs import parents_of

_PROMPTS = 4
_NEW_TOKENS = 16
_HEAD_TOKENS = 16
"""Of one sequence, whose logits are compared for the whole vocabulary."""
_REWARD_TOLERANCE = 1e-3
"""Of a raw score, relative to 1 + its size: another device or torch may round otherwise, another model differs more."""


def check_startup(
    roles: Roles,
    prompts: Sequence[Prompt],
    ppo: PPOSettings,
    *,
    seed: int,
    policy_is_reference: bool,
    budgets: Budgets,
) -> dict[str, float]:
    """Run the gates that need only the roles.

    Args:
        policy_is_reference: True before the first update: the policy is still a copy of the reference.
        budgets: how much to do at once.

    Returns:
        what was measured: `kl` (nats, largest of any token), `logits_gap`, `sampler_gap` (mean, nats), and
        `sampler_serves`, 1 where the sampler's log-probabilities can be the old ones and else 0.

    Raises:
        StartupGateError: naming the gate, what it measured, and what that means.
        OutOfMemoryError: a single sequence does not fit.
    """
    _check_trainable(roles)
    chat = roles.base.chat
    prompt_ids = [tuple(chat.prompt_ids(prompt.prompt)) for prompt in prompts[:_PROMPTS]]
    sampling = replace(sampling_settings(ppo), max_new_tokens=min(_NEW_TOKENS, ppo.max_new_tokens))
    require_engine_for(roles, sampling)
    responses = budgets.fit_responses(
        sampling,
        len(prompt_ids),
        lambda fitting: generate(
            roles, "policy", prompt_ids, fitting, seed=(seed, "gates"), with_values=ppo.critic == "head"
        ),
    )
    episodes = [Episode(ids, response.ids) for ids, response in zip(prompt_ids, responses, strict=True)]

    def logprobs(role: Role) -> torch.Tensor:
        rows = budgets.fit_sequences(
            [len(episode.ids) for episode in episodes],
            lambda most: score_logprobs(roles, role, episodes, temperature=ppo.temperature, max_tokens=most),
        )
        return torch.cat(rows)

    policy_N = logprobs("policy")
    measured = {"logits_gap": _check_logits(roles, episodes)}
    if roles.packs:
        measured["packing_gap"] = _check_packing(roles, policy_N, lambda: logprobs("policy"), ppo)
    if policy_is_reference:
        measured["kl"] = float((policy_N - logprobs("reference")).abs().max())
        if measured["kl"] != 0.0:
            raise StartupGateError(
                f"policy and reference differ by {measured['kl']:.3g} nats before the first update",
                remedy="They should be the same adapter in the same arithmetic: this is a bug, please report it.",
            )
    sampled_N = torch.tensor([value for response in responses for value in response.logprobs])
    measured["sampler_gap"] = float((policy_N.cpu() - sampled_N).abs().mean())
    most = most_reused_gap(ppo, roles.base.identity.quantization, responses)
    measured["sampler_serves"] = float(most is not None and measured["sampler_gap"] <= most)
    return measured


def require_fitting_parents(stage: StageName, config: PipelineConfig, run: RunDirectory, base: BaseIdentity) -> None:
    """Refuse, before the base is loaded, the results of stages that were trained on another one.

    Raises:
        ArtifactError: a parent stage has no verified result.
        IncompatibleAdapterError: naming the field that differs and both values.
    """
    for parent in parents_of(stage, config):
        require_same_base(read_manifest(run.stage(parent)), base, run.stage(parent))


def _check_trainable(roles: Roles) -> None:
    """What learns is what was declared, under every role that is active in an update."""
    for role in roles.model.peft_config:
        with roles.active(role):  # type: ignore[arg-type]
            learning, declared = roles.trainable_names(), roles.declared_names()
            if learning != declared:
                odd = sorted(learning ^ declared)[0]
                state = "learns, but should not" if odd in learning else "should learn, but does not"
                raise StartupGateError(f"with the role '{role}' active, the parameter {odd} {state}")


def _check_logits(roles: Roles, episodes: Sequence[Episode]) -> float:
    """The output head as PPO applies it to hidden states gives the model's own logits, of a few tokens."""
    ids = episodes[0].ids[:_HEAD_TOKENS]
    batch = batch_episodes([Episode(ids[:-1], ids[-1:])], roles.device)
    roles.inference_mode()
    with torch.no_grad(), roles.active("policy"):
        ours = roles.logits(roles.hidden_states(batch.ids_BL, batch.mask_BL)).float()
        theirs = roles.model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long()).logits.float()
    gap = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    if not gap <= 1e-2:
        raise StartupGateError(
            f"the logits from hidden states differ from the model's own by {gap:.3g} (relative)",
            remedy="This architecture scales its logits in a way that trivet does not know; please report it.",
        )
    return gap


def _check_packing(roles: Roles, packed_N: torch.Tensor, score: Callable[[], torch.Tensor], ppo: PPOSettings) -> float:
    """Sequences that stand one behind the other in a pass do not see each other.

    Returns:
        the mean difference of log-probabilities from those of padded sequences, nats a token.
    """
    roles.pack("never")
    try:
        gap = float((packed_N - score()).abs().mean())
    finally:
        roles.pack("always")
    tolerance = ratio_tolerance(ppo, roles.base.identity.quantization)
    if not gap <= tolerance:
        raise StartupGateError(
            f"packed sequences differ from padded ones by {gap:.3g} nats a token, which is above {tolerance:g}",
            where="ppo.packing",
            remedy="This architecture does not keep packed sequences apart; set ppo.packing=never.",
        )
    return gap


def check_reward_round_trip(roles: Roles, manifest: Manifest, folder: Path) -> float:
    """The reward adapter scores its own probe as it did when it was trained.

    Returns:
        the largest difference from the stored scores; 0 on the machine that trained it.

    Raises:
        StartupGateError: it does not.
    """
    probe = manifest.extra.get("probe")
    if not probe:
        raise StartupGateError(
            "the reward adapter keeps no scored sequences to check it by",
            where=str(folder),
            remedy="Train it again: trivet reward CONFIG --force.",
        )
    gap = 0.0
    for entry, score in zip(probe, _scores_one_by_one(roles, [entry["ids"] for entry in probe]), strict=True):
        difference = abs(score - entry["score"])
        if not difference <= _REWARD_TOLERANCE * (1 + abs(entry["score"])):
            raise StartupGateError(
                f"the reward adapter scores a sequence {score:.6g} that it scored {entry['score']:.6g} when trained",
                where=str(folder),
                remedy="Train it again: trivet reward CONFIG --force.",
            )
        gap = max(gap, difference)
    return gap


def reward_probe(roles: Roles, sequences: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A few sequences with their raw scores, for the manifest of a reward adapter: what the gate compares with."""
    few = [list(sequence) for sequence in sequences[:_PROMPTS]]
    scores = _scores_one_by_one(roles, few)
    return [{"ids": ids, "score": score} for ids, score in zip(few, scores, strict=True)]


def _scores_one_by_one(roles: Roles, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Raw scores without padding, so that nothing but the adapter and the base decides their rounding."""
    return [float(score_rewards(roles, [sequence], max_tokens=1)) for sequence in sequences]
