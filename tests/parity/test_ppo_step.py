"""One PPO iteration against a plain reference in float64: no adapters, no microbatches, no chunks, loops over tokens.

The reference knows the responses that were sampled and in which order the minibatches came. Everything else it works
out again: each role is the base with its low-rank update merged into the weights, run on one sequence at a time with
full logits; rewards, advantages, losses, clipping and AdamW are written out.

Shape legend: L token of one sequence, T response token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import loaded_tiny_base
from tiny_ppo import CALIBRATION, LORA, Round, favour_token, perturb, sharp_base, tiny_round
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

BETA, CLIP, VALUE_CLIP, GAMMA, LAMBDA = 0.07, 0.2, 0.2, 0.98, 0.9
LEARNING_RATE, CRITIC_LEARNING_RATE, BETAS, EPSILON, MAX_NORM = 1e-3, 2e-3, (0.9, 0.95), 1e-5, 0.5
TEMPERATURE, SCORE_CLIP, MISSING_EOS, VALUE_COEFFICIENT = 0.8, 1.5, 0.75, 0.3
EOS_BONUS = {"llama": 9.0, "gpt2": 4.0}
"""Added to the EOS logit, so that responses have different lengths."""

Parameters = dict[str, Tensor]


class Reference:
    """The plain model in float64, to which a role's parameters are handed at every call."""

    def __init__(self, folder: Path, eos: int, eos_bonus: float) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.eos, self.eos_bonus = eos, eos_bonus

    def forward(self, adapter: Mapping[str, Tensor], ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [L, V] of the next token at the sampling temperature, and last hidden states [L, D]."""
        weights = dict(self.model.named_parameters())
        for name in [name for name in adapter if ".lora_A." in name]:
            target = name.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight"
            update = adapter[name.replace(".lora_A.", ".lora_B.")] @ adapter[name]
            fan_in_first = weights[target].shape != update.shape or "c_" in target  # GPT-2 keeps them transposed
            weights[target] = weights[target] + LORA.alpha / LORA.rank * (update.T if fan_in_first else update)
        output: Any = functional_call(
            self.model, weights, args=(), kwargs={"input_ids": torch.tensor([ids]), "output_hidden_states": True}
        )
        logits_LV = output.logits[0].clone()
        logits_LV[:, self.eos] = logits_LV[:, self.eos] + self.eos_bonus
        return (logits_LV / TEMPERATURE).log_softmax(dim=-1), output.hidden_states[-1][0]

    def logprobs(self, adapter: Parameters, episode: Any) -> list[Tensor]:
        logprobs_LV, _ = self.forward(adapter, episode.ids)
        first = len(episode.prompt) - 1
        return [logprobs_LV[first + t, token] for t, token in enumerate(episode.response)]

    def values(self, adapter: Parameters, head: Parameters, episode: Any) -> list[Tensor]:
        _, hidden_LD = self.forward(adapter, episode.ids)
        first = len(episode.prompt) - 1
        weight, bias = head["heads.value.weight"][0], head["heads.value.bias"][0]
        return [hidden_LD[first + t] @ weight + bias for t in range(len(episode.response))]


def doubled(found: Round, role: Any) -> tuple[Parameters, Parameters]:
    """A role's adapter and its head in float64, as leaves."""
    parameters = {name: value.double().requires_grad_() for name, value in found.parameters(role).items()}
    head = {name: value for name, value in parameters.items() if name.startswith("heads.")}
    return {name: value for name, value in parameters.items() if name not in head}, head


def advantages_of(rewards: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    advantages = [0.0] * len(rewards)
    for t in range(len(rewards)):  # the definition: a sum over all later errors, not a recursion
        for later in range(t, len(rewards)):
            next_value = values[later + 1] if later + 1 < len(rewards) else 0.0
            error = rewards[later] + GAMMA * next_value - values[later]
            advantages[t] += (GAMMA * LAMBDA) ** (later - t) * error
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def adam(parameters: Parameters, moments: dict[str, tuple[Tensor, Tensor]], step: int, rate: float) -> float:
    """One AdamW step without weight decay on clipped gradients; returns the norm before clipping."""
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None))
    assert norm > 0, "a step without a gradient proves nothing"
    factor = min(1.0, MAX_NORM / norm)
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            gradient = factor * parameter.grad
            first, second = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
            moments[name] = (first, second)
            unbiased = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
            parameter -= rate * unbiased[0] / (unbiased[1].sqrt() + EPSILON)
            parameter.grad = None
    return norm


@pytest.mark.parametrize(("architecture", "critic"), [("llama", "adapter"), ("llama", "head"), ("gpt2", "adapter")])
def test_an_iteration_equals_the_plain_one(tmp_path, monkeypatch, architecture, critic):
    base = sharp_base(tmp_path) if architecture == "llama" else loaded_tiny_base(tmp_path, architecture)
    found = tiny_round(
        base,
        critic=critic,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        critic_learning_rate=CRITIC_LEARNING_RATE,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        max_grad_norm=MAX_NORM,
        score_clip=SCORE_CLIP,
        missing_eos_penalty=MISSING_EOS,
        value_loss_coefficient=VALUE_COEFFICIENT,
        clip_range=CLIP,
        value_clip_range=VALUE_CLIP,
        adam_betas=BETAS,
        adam_epsilon=EPSILON,
        microbatch_tokens=70,
    )
    eos, eos_bonus = base.chat.eos_token_id, EOS_BONUS[architecture]
    favour_token(found.roles, eos, eos_bonus)
    perturb(found.roles, "policy", 0.05, seed=8)
    perturb(found.roles, "value", 0.02, seed=9)
    reference = Reference(tmp_path / f"{architecture}-base", eos, eos_bonus)
    policy, _ = doubled(found, "policy")
    value_adapter, value_head = doubled(found, "value")
    frozen, _ = doubled(found, "reference")
    reward_adapter, reward_head = doubled(found, "reward")
    trunk = value_adapter if critic == "adapter" else policy

    # ---- trivet
    experience = found.collect(kl_coefficient=BETA)
    order: list[list[int]] = []
    own_step = found.updater._step
    monkeypatch.setattr(
        found.updater,
        "_step",
        lambda exp, rows, *rest, **named: (order.append(rows), own_step(exp, rows, *rest, **named))[1],
    )
    statistics = found.updater.update(experience, 0, critic_only=False)
    assert len(order) == 4  # two epochs of two minibatches

    # ---- the reference: scores, rewards, advantages
    episodes = experience.episodes
    old, old_values, rewards, scores = [], [], [], []
    with torch.no_grad():
        for episode in episodes:
            old.append([float(x) for x in reference.logprobs(policy, episode)])
            old_values.append([float(x) for x in reference.values(trunk, value_head, episode)])
            _, hidden_LD = reference.forward(reward_adapter, episode.ids)
            raw = float(hidden_LD[-1] @ reward_head["heads.reward.weight"][0])
            score = min(max(CALIBRATION.gain * raw + CALIBRATION.bias, -SCORE_CLIP), SCORE_CLIP)
            score -= 0.0 if episode.response[-1] == eos else MISSING_EOS
            theirs = [float(x) for x in reference.logprobs(frozen, episode)]
            rewards.append([-BETA * (ours - ref) for ours, ref in zip(old[-1], theirs, strict=True)])
            rewards[-1][-1] += score
            scores.append(score)
    pairs = [advantages_of(*pair) for pair in zip(rewards, old_values, strict=True)]
    flat = [advantage for advantages, _ in pairs for advantage in advantages]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))
    advantages = [[(x - mean) / deviation for x in row] for row, _ in pairs]
    returns = [row for _, row in pairs]

    assert len({len(row) for row in rewards}) > 1, "responses of one length prove less"
    for row in range(len(episodes)):
        size = len(rewards[row])
        assert experience.logprobs_BT[row, :size].tolist() == pytest.approx(old[row], abs=2e-5)
        assert experience.values_BT[row, :size].tolist() == pytest.approx(old_values[row], abs=2e-5)
        assert float(experience.scores_B[row]) == pytest.approx(scores[row], abs=2e-5)
        assert experience.rewards_BT[row, :size].tolist() == pytest.approx(rewards[row], abs=2e-5)
        assert experience.advantages_BT[row, :size].tolist() == pytest.approx(advantages[row], abs=1e-4)
        assert experience.returns_BT[row, :size].tolist() == pytest.approx(returns[row], abs=1e-4)

    # ---- the reference: four steps
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    norms: dict[str, list[float]] = {"policy": [], "value": []}
    losses = {"policy": 0.0, "value": 0.0}
    for step, rows in enumerate(order, start=1):
        tokens = sum(len(rewards[row]) for row in rows)
        policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            for t, logprob in enumerate(reference.logprobs(policy, episodes[row])):
                ratio = (logprob - old[row][t]).exp()
                gain = torch.minimum(ratio * advantages[row][t], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[row][t])
                policy_loss = policy_loss - gain / tokens
            for t, value in enumerate(reference.values(trunk, value_head, episodes[row])):
                near = min(max(float(value.detach()), old_values[row][t] - VALUE_CLIP), old_values[row][t] + VALUE_CLIP)
                plain = (value - returns[row][t]) ** 2
                clipped = (near - returns[row][t]) ** 2
                value_loss = value_loss + 0.5 * (plain if float(plain.detach()) >= clipped else clipped) / tokens
        losses["policy"] += float(policy_loss.detach())
        losses["value"] += float(value_loss.detach())
        (policy_loss + (1.0 if critic == "adapter" else VALUE_COEFFICIENT) * value_loss).backward()
        norms["policy"].append(adam(policy, moments, step, LEARNING_RATE))
        critic_parameters = {**value_adapter, **value_head} if critic == "adapter" else value_head
        norms["value"].append(adam(critic_parameters, moments, step, CRITIC_LEARNING_RATE))

    assert max(norms["policy"]) > MAX_NORM and max(norms["value"]) > MAX_NORM, "norm clipping had nothing to do"
    assert statistics.values_clipped > 0, "value clipping had nothing to do"
    for role in ("policy", "value"):
        assert statistics.gradient_norms[role] == pytest.approx(norms[role], rel=1e-3)
    assert statistics.policy_loss == pytest.approx(losses["policy"], abs=1e-5)
    assert statistics.value_loss == pytest.approx(losses["value"], rel=1e-5)
    # Float32 against float64: 3e-7 were measured, where four steps of 1e-3 move most parameters by 1e-3 and more.
    for name, parameter in {**found.roles.parameters("policy"), **found.roles.parameters("value")}.items():
        wanted = {**policy, **value_adapter, **value_head}[name]
        assert torch.allclose(parameter.double(), wanted, rtol=0, atol=3e-6), name
