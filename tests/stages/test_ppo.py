"""PPO's loop: what it may change, what it must not, when it stops, and that it learns and resumes.

Shape legend: B response, T response token, N token of any response.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import pvariance
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import loaded_tiny_base, tiny_base, tiny_config
from tiny_ppo import (
    CALIBRATION,
    add_made_up,
    favour_token,
    perturb,
    policy_roles,
    publish_reward,
    publish_sft,
    record_gradients,
    sharp_base,
    sharpen,
    tiny_round,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.artifacts import read_manifest
from pipeline.base_model import _quantization, fingerprint, load_base
from pipeline.checkpoint import CheckpointFolder
from pipeline.config import PPOSettings, RolloutSettings
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import (
    BaseModelError,
    ConfigError,
    DivergenceError,
    IncompatibleAdapterError,
    RewardFunctionError,
    StartupGateError,
)
from pipeline.metrics import read_metrics
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory
from pipeline.scoring import score_rewards
from stages import experience as experience_module
from stages import ppo
from stages.held_out_answers import HELD_OUT_ANSWERS
from stages.inputs import find_current
from stages.round_metrics import correlation, repetition, round_metrics
from stages.training_state import TrainingState
from stages.update import Updater, UpdateStatistics

BOTH_CRITICS = pytest.mark.parametrize("critic", ["adapter", "head"])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def as_plain_peft_reads_it(run: RunDirectory, loaded: LoadedConfig) -> None:
    """Each finished adapter on plain transformers gives the logits, or scores, that it gives here."""
    ids_BL = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 41, 42, 43, 44, 45]])
    settings = loaded.config.base
    options = {"dtype": torch.float32, "quantization_config": _quantization(settings, torch.float32)}
    for stage in ("sft", "reward", "ppo"):
        roles = Roles(load_base(settings))
        roles.add_from("policy", run.stage(stage))
        kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        extra = {"num_labels": 1, "pad_token_id": 0} if stage == "reward" else {}
        plain = PeftModel.from_pretrained(kind.from_pretrained(settings.model, **options, **extra), run.stage(stage))
        roles.inference_mode()
        with torch.no_grad(), roles.active("policy"):
            hidden_BLD = roles.hidden_states(ids_BL, torch.ones_like(ids_BL))
            if stage == "reward":
                wanted = roles.head_values("policy", hidden_BLD[:, -1])[:, None]
            else:
                wanted = roles.logits(hidden_BLD)
            found = plain.eval()(input_ids=ids_BL).logits
            with plain.disable_adapter():
                bare = plain(input_ids=ids_BL).logits
        # Left to itself, bitsandbytes computes on some CPUs with rounded copies of the 4-bit weights.
        assert torch.allclose(found, wanted, atol=5e-3), stage
        assert not torch.allclose(bare, wanted, atol=2e-2), stage


# ---- the round


@BOTH_CRITICS
@pytest.mark.parametrize("weights", ["adapter", "merged"])
def test_the_samplers_figures_are_the_trainers_where_they_are_reused(tmp_path, critic, weights):
    """Log-probabilities, and the values of a head on the policy: what a forward pass would find again."""

    def collected(**rollout: Any) -> tuple[Any, list[int]]:
        settings = RolloutSettings.model_validate({"weights": weights, **rollout})
        found = tiny_round(sharp_base(tmp_path), critic=critic, rollout=settings)
        perturb(found.roles, "policy", 0.1)
        perturb(found.roles, "value", 0.1)
        favour_token(found.roles, found.roles.base.chat.eos_token_id, 3.0)
        sizes: list[int] = []
        own = found.roles.hidden_states
        found.roles.hidden_states = lambda ids_BL, mask_BL: sizes.append(len(ids_BL)) or own(ids_BL, mask_BL)
        return found.collect(), sizes

    wanted, all_sizes = collected(reuse_logprobs=False)
    experience, sizes = collected()
    assert experience.episodes == wanted.episodes and set(wanted.finished_B.tolist()) == {True, False}
    assert wanted.checked_B.all() and experience.checked_B.tolist() == [True] + [False] * 7
    for name in ("logprobs_BT", "values_BT", "advantages_BT", "returns_BT", "kl_BT"):
        assert torch.allclose(getattr(experience, name), getattr(wanted, name), atol=2e-3), name
    assert torch.equal(experience.logprobs_BT[1:], experience.sampler_logprobs_BT[1:])
    assert sum(all_sizes) - sum(sizes) == 7, "a forward pass of seven responses less"


@BOTH_CRITICS
def test_where_the_sampler_says_otherwise_the_trainer_computes_everything(tmp_path, critic, monkeypatch):
    own = experience_module.generate

    def off(*args: Any, **named: Any) -> Any:
        found = own(*args, **named)
        return [replace(one, logprobs=tuple(value - 0.01 for value in one.logprobs)) for one in found]

    monkeypatch.setattr(experience_module, "generate", off)
    found = tiny_round(sharp_base(tmp_path), critic=critic)
    experience = found.collect()
    plain = tiny_round(sharp_base(tmp_path), critic=critic, rollout=RolloutSettings(reuse_logprobs=False)).collect()
    assert experience.checked_B.all()
    assert torch.allclose(experience.logprobs_BT, plain.logprobs_BT, atol=1e-5)
    assert torch.allclose(experience.values_BT, plain.values_BT, atol=1e-5)
    statistics = found.updater.update(experience, 0, critic_only=False)
    figures = round_metrics(experience, statistics, kl_coefficient=0.05, world=found.world)
    assert figures["sampler/logprob_gap_mean"] == pytest.approx(0.01, rel=0.01) and figures["sampler/checked"] == 1


def test_each_round_draws_anew(tmp_path, monkeypatch):
    loaded = tiny_config(tmp_path, "base.quantization=none", "ppo.iterations=3")
    publish_reward(loaded, publish_sft(loaded))
    seeds = []
    own = ppo.sample
    monkeypatch.setattr(ppo, "sample", lambda *args, **named: (seeds.append(named["seed"]), own(*args, **named))[1])
    ppo.run(loaded, RunDirectory.open(loaded))
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_first_round_has_no_kl_and_a_ratio_of_1(tmp_path, quantization):
    base = loaded_tiny_base(tmp_path, quantization=quantization)
    found = tiny_round(base, temperature=0.9, rollout=RolloutSettings(reuse_logprobs=False))
    experience = found.collect()
    assert not experience.kl_BT.any() and not experience.kl_k3_BT.any()
    statistics = found.updater.update(experience, 0, critic_only=False)
    assert statistics.first_ratio_error is not None
    assert statistics.first_ratio_error < (1e-5 if quantization != "int8" else 0.3)


def test_the_reward_is_the_score_at_the_end_minus_the_kl_everywhere(tmp_path):
    found = tiny_round(sharp_base(tmp_path))
    favour_token(found.roles, found.roles.base.chat.eos_token_id, 9.0)
    perturb(found.roles, "policy", 0.1)
    experience = found.collect(kl_coefficient=0.3)
    assert len(set(experience.lengths_B.tolist())) > 1
    for row, episode in enumerate(experience.episodes):
        last = len(episode.response) - 1
        k1_T = experience.logprobs_BT[row] - experience.reference_logprobs_BT[row]
        assert abs(float(k1_T[: last + 1].sum())) > 1e-3
        wanted = [-0.3 * float(k1_T[t]) for t in range(last + 1)]
        wanted[last] += float(experience.scores_B[row])
        assert experience.rewards_BT[row, : last + 1].tolist() == pytest.approx(wanted, abs=1e-6)
        assert not experience.rewards_BT[row, last + 1 :].any()


def test_scores_are_clipped_before_the_penalty_for_a_missing_eos(tmp_path):
    found = tiny_round(sharp_base(tmp_path))
    favour_token(found.roles, found.roles.base.chat.eos_token_id, 9.0)
    experience = found.collect(score_clip=0.25, missing_eos_penalty=2.0)
    assert set(experience.finished_B.tolist()) == {True, False}
    assert float(experience.raw_scores_B.abs().max()) > 0.25
    for raw, score, finished in zip(
        experience.raw_scores_B.tolist(),
        experience.scores_B.tolist(),
        experience.finished_B.tolist(),
        strict=True,
    ):
        assert score == pytest.approx(min(max(raw, -0.25), 0.25) - (0.0 if finished else 2.0))
    unlimited = found.collect(score_clip=None, missing_eos_penalty=0.0)
    assert torch.equal(unlimited.scores_B, experience.raw_scores_B)


def test_whitening_has_the_property_it_is_named_for(tmp_path):
    found = tiny_round(sharp_base(tmp_path))
    perturb(found.roles, "policy", 0.1)
    plain = found.collect(whiten_advantages=False)
    white = found.collect(whiten_advantages=True, whiten_rewards=True)
    advantages_N = white.advantages_BT[white.mask_BT].double()
    assert float(advantages_N.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages_N.var(correction=0)) == pytest.approx(1, abs=1e-4)
    rewards_N = white.rewards_BT[white.mask_BT].double()
    assert float(rewards_N.var(correction=0)) == pytest.approx(1, abs=1e-3)  # 1e-8 beside a small variance
    assert float(rewards_N.mean()) == pytest.approx(float(plain.rewards_BT[plain.mask_BT].mean()), abs=1e-5)
    assert float(plain.advantages_BT[plain.mask_BT].var()) != pytest.approx(1, abs=0.1)


@BOTH_CRITICS
def test_only_policy_and_critic_move_and_both_do(tmp_path, critic):
    """Every parameter of both roles moves; reference, reward and base keep every bit."""
    found = tiny_round(loaded_tiny_base(tmp_path, quantization="nf4"), critic=critic)
    before = {role: found.parameters(role) for role in ("policy", "value", "reference", "reward")}
    base_before = fingerprint(found.roles.base.model)
    for iteration in range(2):
        found.updater.update(found.collect(iteration), iteration, critic_only=False)
    for role in ("reference", "reward"):
        assert same(before[role], found.parameters(role)), role
    for role in ("policy", "value"):
        after = found.parameters(role)
        assert [name for name in after if torch.equal(after[name], before[role][name])] == [], role
    assert fingerprint(found.roles.base.model) == base_before


@BOTH_CRITICS
def test_in_the_critics_warm_up_the_policy_keeps_every_bit(tmp_path, critic):
    found = tiny_round(loaded_tiny_base(tmp_path), critic=critic)
    before = {role: found.parameters(role) for role in ("policy", "value")}
    for iteration in range(2):
        found.updater.update(found.collect(iteration), iteration, critic_only=True)
    assert same(before["policy"], found.parameters("policy"))
    after = found.parameters("value")
    assert all(not torch.equal(after[name], before["value"][name]) for name in after)


@BOTH_CRITICS
def test_the_critic_learns_to_predict_the_returns(tmp_path, critic):
    found = tiny_round(sharp_base(tmp_path), critic=critic, epochs=30, learning_rate=1e-2, value_clip_range=None)
    experience = found.collect()

    def error(values_BT: torch.Tensor) -> float:
        return float((values_BT - experience.returns_BT)[experience.mask_BT].square().mean())

    before = error(experience.values_BT)
    found.updater.update(experience, 0, critic_only=True)
    assert error(found.collect().values_BT) < 0.2 * before  # the same responses: the policy stood still


# ---- one step


def gradients_of_one_step(folder: Path, critic: str, **settings: Any) -> dict[str, torch.Tensor]:
    found = tiny_round(sharp_base(folder), critic=critic, minibatch_size=8, epochs=1, **settings)
    perturb(found.roles, "value", seed=5)
    seen = record_gradients(found, step=False)
    favour_token(found.roles, found.roles.base.chat.eos_token_id, 9.0)  # responses of different lengths
    found.updater.update(found.collect(microbatch_tokens=10_000), 0, critic_only=False)
    assert len(seen) == 1
    return seen[0]


@BOTH_CRITICS
def test_microbatches_do_not_change_loss_or_gradient(tmp_path, critic):
    whole = gradients_of_one_step(tmp_path, critic, microbatch_tokens=10_000)
    for microbatch_tokens in (16, 70):
        parts = gradients_of_one_step(tmp_path, critic, microbatch_tokens=microbatch_tokens)
        assert parts.keys() == whole.keys()
        for name, wanted in whole.items():
            # Float32 sums in another order; a mean of means would be off by tens of percent.
            assert torch.allclose(parts[name], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())), name


@BOTH_CRITICS
def test_checkpointing_recomputes_and_changes_no_gradient(tmp_path, critic):
    plain = gradients_of_one_step(tmp_path, critic, gradient_checkpointing=False)
    recomputed = gradients_of_one_step(tmp_path, critic, gradient_checkpointing=True)
    assert same(plain, recomputed)


def test_the_checkpointing_switch_is_heeded(tmp_path):
    calls = {}
    for switch in (False, True):
        found = tiny_round(loaded_tiny_base(tmp_path), minibatch_size=8, epochs=1, gradient_checkpointing=switch)
        experience = found.collect()
        counted: list[int] = []
        layer = found.roles.base.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        found.updater.update(experience, 0, critic_only=False)
        calls[switch] = len(counted)
    assert calls == {False: 2, True: 4}  # a forward pass for each of two roles, and its recomputation


def test_clipping_acts_on_every_step_and_role(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path), max_grad_norm=1e-3, epochs=3)
    seen = record_gradients(found)
    norms: dict[str, list[float]] = {"policy": [], "value": []}
    for iteration in range(2):
        statistics = found.updater.update(found.collect(iteration), iteration, critic_only=False)
        for role in norms:
            norms[role] += statistics.gradient_norms[role]  # type: ignore[index]
    assert len(seen) == len(norms["policy"]) == len(norms["value"]) == 12  # 2 iterations x 3 epochs x 2 minibatches
    for role in norms:
        assert min(norms[role]) > 2e-3, "clipping had nothing to do"
        for gradients in seen:
            mine = [gradient for name, gradient in gradients.items() if name in found.parameters(role)]
            assert float(torch.cat([gradient.flatten() for gradient in mine]).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_each_epoch_has_a_fresh_permutation_of_all_responses(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path), epochs=3)
    rows: list[list[int]] = []

    def step(_experience: Any, chosen: list[int], **_: Any) -> UpdateStatistics:
        rows.append(chosen)
        return UpdateStatistics(steps=1)

    monkeypatch.setattr(found.updater, "_step", step)
    experience = found.collect()
    for iteration in (0, 1):
        found.updater.update(experience, iteration, critic_only=False)
    assert {len(chosen) for chosen in rows} == {4} and len(rows) == 12
    epochs = [tuple(rows[start] + rows[start + 1]) for start in range(0, 12, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(set(epochs)) == 6
    again = list(rows)
    rows.clear()
    for iteration in (0, 1):
        found.updater.update(experience, iteration, critic_only=False)
    assert rows == again, "minibatches follow from seed, iteration and epoch alone"


def test_only_response_tokens_get_logits(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path), epochs=1)
    experience = found.collect()
    rows: list[int] = []
    own = found.roles.logits
    found.roles.logits = lambda hidden: rows.append(hidden.shape[0]) or own(hidden)  # type: ignore[func-returns-value,method-assign]
    found.updater.update(experience, 0, critic_only=False)
    assert sum(rows) == int(experience.mask_BT.sum())


def test_learning_rates_are_each_roles_own_and_fall(tmp_path):
    found = tiny_round(
        loaded_tiny_base(tmp_path), learning_rate=1e-3, critic_learning_rate=1e-2, iterations=4, lr_schedule="linear"
    )
    rates = []
    for iteration in range(4):
        ppo.set_learning_rates(found.optimizer, found.ppo, iteration)
        rates.append([group["lr"] for group in found.optimizer.param_groups])
    policy, value = zip(*rates, strict=True)
    assert policy == pytest.approx((1e-3, 0.75e-3, 0.5e-3, 0.25e-3))
    assert value == pytest.approx((1e-2, 0.75e-2, 0.5e-2, 0.25e-2))
    wanted = [set(found.roles.parameters(role).values()) for role in ("policy", "value")]
    assert [set(group["params"]) for group in found.optimizer.param_groups] == wanted
    assert {(group["eps"], group["betas"]) for group in found.optimizer.param_groups} == {(1e-5, (0.9, 0.95))}


def test_prompts_come_in_reshuffled_passes():
    settings = PPOSettings(prompts_per_iteration=4)
    pool: list[Any] = list(range(6))
    drawn = [prompt for iteration in range(6) for prompt in ppo.prompts_of(pool, settings, 0, iteration)]
    passes = [drawn[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(one) == pool for one in passes)
    assert len(set(map(tuple, passes))) == 4
    assert ppo.prompts_of(pool, settings, 1, 0) != ppo.prompts_of(pool, settings, 0, 0)


# ---- the critic's start


@BOTH_CRITICS
def test_the_critic_starts_with_the_reward_models_adapter_and_predicts_nothing(tmp_path, critic):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    add_made_up(roles, "reward", seed=2, head=True)
    ppo.add_critic(roles, PPOSettings.model_validate({"critic": critic}))

    def adapter(role: Role) -> dict[str, torch.Tensor]:
        named = roles.parameters(role)
        return {name.replace(f".{role}.", "."): tensor for name, tensor in named.items() if "lora_" in name}

    if critic == "adapter":
        assert same(adapter("value"), adapter("reward")) and adapter("value")
    else:
        assert not adapter("value")
    assert roles.heads["value"].bias is not None
    assert not roles.head_values("value", torch.randn(3, 64)).any()


def test_the_stage_applies_the_stored_calibration(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.iterations=1")
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    seen: list[Any] = []
    own = ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *args, **named: seen.append(own(*args, **named)) or seen[-1])
    ppo.run(loaded, run)
    roles = Roles(load_base(loaded.config.base))
    roles.add_from("reward", run.stage("reward"))
    raw_B = score_rewards(roles, [episode.ids for episode in seen[0].episodes], max_tokens=256)
    assert torch.allclose(seen[0].terms["model"], CALIBRATION.gain * raw_B + CALIBRATION.bias, atol=1e-6)


# ---- metrics


def test_metrics_count_real_tokens_and_nothing_else(tmp_path):
    """Each mean again, as a loop over the tokens that were said; padding would dilute it."""
    found = tiny_round(sharp_base(tmp_path), epochs=1, minibatch_size=8, microbatch_tokens=70)
    favour_token(found.roles, found.roles.base.chat.eos_token_id, 9.0)
    perturb(found.roles, "policy", 0.1)
    experience = found.collect()
    lengths = [len(episode.response) for episode in experience.episodes]
    assert len(set(lengths)) > 2
    real = [(row, t) for row, length in enumerate(lengths) for t in range(length)]
    ours, theirs = experience.logprobs_BT, experience.reference_logprobs_BT
    checked = [place for place in real if experience.checked_B[place[0]]]
    gaps = [abs(float(ours[place] - experience.sampler_logprobs_BT[place])) for place in checked]
    k1 = sum(float(ours[place] - theirs[place]) for place in real) / 8
    k3 = sum(math.expm1(float(theirs[place] - ours[place])) + float(ours[place] - theirs[place]) for place in real) / 8
    entropies = []
    with torch.no_grad(), found.roles.active("policy"):
        for row, t in real:
            episode = experience.episodes[row]
            ids = torch.tensor([episode.prompt + episode.response[:t]])
            hidden_BLD = found.roles.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
            p_V = found.roles.logits(hidden_BLD)[0, -1].double().softmax(dim=-1)
            entropies.append(float(-(p_V * p_V.log()).sum()))
    returns = [float(experience.returns_BT[place]) for place in real]
    errors = [float(experience.returns_BT[place] - experience.values_BT[place]) for place in real]

    statistics = found.updater.update(experience, 0, critic_only=False)
    metrics = round_metrics(experience, statistics, kl_coefficient=0.05, world=found.world)
    assert metrics["kl/policy_reference_k1"] == pytest.approx(k1, rel=1e-4)
    assert metrics["kl/policy_reference_k3"] == pytest.approx(k3, rel=1e-4)
    assert metrics["objective/reward"] == pytest.approx(float(experience.scores_B.mean()) - 0.05 * k1, rel=1e-4)
    assert metrics["policy/entropy"] == pytest.approx(sum(entropies) / len(real), rel=1e-4)
    assert metrics["value/explained_variance"] == pytest.approx(1 - pvariance(errors) / pvariance(returns), rel=1e-3)
    assert metrics["value/loss"] == pytest.approx(sum(error**2 for error in errors) / 2 / len(real), rel=1e-3)
    assert metrics["sampler/logprob_gap_mean"] == pytest.approx(sum(gaps) / len(gaps))
    assert metrics["sampler/logprob_gap_max"] == pytest.approx(max(gaps))
    assert metrics["sampler/checked"] == 1 / 8 and 0 < len(checked) < len(real)
    assert metrics["response/length_mean"] == sum(lengths) / 8
    assert metrics["response/eos_rate"] == float(experience.finished_B.float().mean())
    seconds = sum(metrics[f"seconds/{phase}"] for phase in ("rollout", "score", "update"))
    assert metrics["tokens/per_second"] == pytest.approx(len(real) / seconds)


@BOTH_CRITICS
def test_padding_is_what_the_passes_were_given(tmp_path, critic):
    """Told from the masks that reach the trunk; in the update like lengths go together as in scoring."""
    found = tiny_round(sharp_base(tmp_path), critic=critic)
    found.budgets.tokens.size = 120
    favour_token(found.roles, found.roles.base.chat.eos_token_id, 3.0)
    masks: list[torch.Tensor] = []
    own = found.roles.hidden_states
    found.roles.hidden_states = lambda ids_BL, mask_BL: masks.append(mask_BL) or own(ids_BL, mask_BL)

    def share() -> float:
        tokens = sum(mask_BL.numel() for mask_BL in masks)
        real = sum(int(mask_BL.sum()) for mask_BL in masks)
        masks.clear()
        return (tokens - real) / tokens

    experience = found.collect()
    score = share()
    statistics = found.updater.update(experience, 0, critic_only=False)
    metrics = round_metrics(experience, statistics, kl_coefficient=0.05, world=found.world)
    assert metrics["padding/score"] == pytest.approx(score) and score > 0
    update = share()
    assert metrics["padding/update"] == pytest.approx(update) and update > 0
    longest = max(len(episode.ids) for episode in experience.episodes)
    everything = sum(longest - len(episode.ids) for episode in experience.episodes) / (8 * longest)
    assert score < everything / 2, "responses of like length are padded together"


@BOTH_CRITICS
def test_nothing_is_said_of_a_policy_that_stands_still(tmp_path, critic):
    found = tiny_round(loaded_tiny_base(tmp_path), critic=critic)
    experience = found.collect()
    statistics = found.updater.update(experience, 0, critic_only=True)
    metrics = round_metrics(experience, statistics, kl_coefficient=0.05, world=found.world)
    assert [name for name in metrics if name.startswith(("policy/", "update/"))] == []
    assert metrics["value/loss"] > 0 and metrics["value/gradient_norm"] > 0


def test_repetition_and_correlation_by_example():
    assert (
        repetition([1, 2, 3, 1, 2, 3]) == 0.25
        and repetition([1, 2]) == 0.0
        and repetition([7] * 5) == pytest.approx(2 / 3)
    )
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 2.0], [5.0, 5.0]) == 0.0


# ---- what is not finite


@pytest.mark.parametrize("what", ["logits", "values", "advantages", "returns", "policy gradient", "value gradient"])
def test_what_is_not_finite_stops_before_the_step_and_is_named(tmp_path, what):
    found = tiny_round(loaded_tiny_base(tmp_path))
    found.updater.update(found.collect(), 0, critic_only=False)
    experience = found.collect(1)
    before = {role: found.parameters(role) for role in ("policy", "value")}
    moments = {key: value.clone() for state in found.optimizer.state.values() for key, value in state.items()}
    own = found.roles.logits
    if what == "logits":
        found.roles.logits = lambda hidden: own(hidden) * float("nan")  # type: ignore[method-assign]
    elif what == "values":
        own_values = found.roles.head_values
        found.roles.head_values = lambda role, hidden: own_values(role, hidden) * math.inf  # type: ignore[method-assign]
    elif what == "advantages":
        experience.advantages_BT[experience.mask_BT] = float("nan")
    elif what == "returns":
        experience.returns_BT[experience.mask_BT] = math.inf
    else:
        next(iter(found.roles.parameters(what.split()[0]).values())).register_hook(lambda gradient: gradient * math.inf)
    role = "value" if what.startswith("value") or what == "returns" else "policy"
    quantity = f"gradient of the {role}" if "gradient" in what else f"{role} loss"
    with pytest.raises(DivergenceError, match=f"the {quantity} is not finite") as caught:
        found.updater.update(experience, 6, critic_only=False)
    assert caught.value.where == "iteration 7, epoch 1, minibatch 1"
    for role in ("policy", "value"):
        assert same(before[role], found.parameters(role))  # type: ignore[index]
    after = {key: value for state in found.optimizer.state.values() for key, value in state.items()}
    assert all(torch.equal(moments[key], after[key]) for key in moments)


def test_nan_from_the_trunk_stops_the_round(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path))
    own = found.roles.logits
    found.roles.logits = lambda hidden: own(hidden) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="policy logprobs of this round are not finite"):
        found.collect()


def test_a_ratio_that_is_not_1_at_first_is_refused(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path))
    experience = found.collect()
    perturb(found.roles, "policy", 0.1)
    before = found.parameters("policy")
    with pytest.raises(StartupGateError, match="ratio differs from 1") as caught:
        found.updater.update(experience, 2, critic_only=False)
    assert caught.value.where == "iteration 3, epoch 1, minibatch 1"
    assert same(before, found.parameters("policy"))


def test_a_ratio_at_another_temperature_is_refused(tmp_path):
    found = tiny_round(sharp_base(tmp_path))
    experience = found.collect(temperature=0.8)
    with pytest.raises(StartupGateError, match="ratio differs from 1"):
        found.updater.update(experience, 0, critic_only=False)


@pytest.mark.parametrize("key", ["prompts_per_iteration", "minibatch_size"])
def test_processes_that_cannot_share_evenly_are_refused(key):
    settings = PPOSettings(prompts_per_iteration=6, minibatch_size=6).model_copy(update={key: 8})
    with pytest.raises(ConfigError, match=f"ppo.{key} is 8, which 3 processes") as caught:
        ppo.require_even_shares(settings, SimpleNamespace(size=3))  # type: ignore[arg-type]
    assert f"ppo.{key}=9" in str(caught.value)
    ppo.require_even_shares(settings, SimpleNamespace(size=2))  # type: ignore[arg-type]


# ---- the whole stage


METRICS = [
    "kl/policy_reference_k1",
    "kl/policy_reference_k3",
    "kl/coefficient",
    "objective/score_raw",
    "objective/score",
    "objective/reward",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/ratio_max",
    "value/loss",
    "value/explained_variance",
    "value/clip_fraction",
    "policy/gradient_norm",
    "value/gradient_norm",
    "response/length_mean",
    "response/length_p95",
    "response/eos_rate",
    "response/repetition",
    "response/score_length_correlation",
    "sampler/logprob_gap_mean",
    "sampler/logprob_gap_max",
    "tokens/per_second",
    "seconds/rollout",
    "seconds/score",
    "seconds/update",
    "memory/peak_mb",
]


def whole_config(folder: Path, *overrides: str) -> LoadedConfig:
    defaults = {"base.quantization": "none", "ppo.checkpoint_every": "1", "ppo.learning_rate": "0.001"}
    chosen = defaults | dict(override.split("=", 1) for override in overrides)
    return tiny_config(folder, *(f"{key}={value}" for key, value in chosen.items()))


def learned(run: RunDirectory) -> dict[str, bytes]:
    """Every file that PPO's result consists of."""
    return {name: (run.stage("ppo") / name).read_bytes() for name in read_manifest(run.stage("ppo")).files}


@BOTH_CRITICS
def test_a_whole_run_leaves_its_results_and_its_parents_as_they_should_be(tmp_path, critic, capsys):
    loaded = whole_config(tmp_path, f"ppo.critic={critic}", "base.quantization=nf4")
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    parents = {stage: read_manifest(run.stage(stage)).digest for stage in ("sft", "reward")}
    manifest = ppo.run(loaded, run)

    assert {stage: read_manifest(run.stage(stage)).digest for stage in parents} == parents == manifest.parents
    assert manifest == read_manifest(run.stage("ppo"))
    gates = manifest.extra["gates"]
    assert gates["kl"] == 0.0 and gates["reward_round_trip"] == 0.0
    wanted = {"adapter_config.json", "adapter_model.safetensors", "value/value_head.safetensors", HELD_OUT_ANSWERS}
    if critic == "adapter":
        wanted |= {"value/adapter_config.json", "value/adapter_model.safetensors"}
    assert set(manifest.files) == wanted
    assert not run.working("ppo").exists()

    rows = read_metrics(run.metrics("ppo"))
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert [name for name in (*METRICS, "score/model") if row.get(name) is None] == []
    first, second = (abs(row["kl/policy_reference_k1"]) for row in rows)
    assert first < 1e-5 < 1e-4 < second
    assert rows[0]["kl/policy_reference_k3"] < 1e-9 < rows[1]["kl/policy_reference_k3"]
    assert all(row["update/first_ratio_error"] < 1e-5 for row in rows)
    assert all(row["sampler/logprob_gap_max"] < 1e-4 for row in rows)
    said = capsys.readouterr().out
    assert "Samples come from a merged copy of" in said and "old log-probabilities are the sampler's" in said
    as_plain_peft_reads_it(run, loaded)
    samples = run.metrics("ppo").with_name("ppo_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [1, 1, 2, 2]


class InterruptedRunError(Exception):
    """The process is gone."""


def interrupt_before(monkeypatch, iteration: int) -> None:
    own, calls = ppo.collect, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > iteration:
            raise InterruptedRunError
        return own(*arguments, **options)

    monkeypatch.setattr(ppo, "collect", interrupted)


@pytest.mark.parametrize(
    ("optimizer", "state", "tolerance"),
    # bitsandbytes' own arithmetic; and moments that are off by a hundredth where they have 8 bits.
    [("adamw", torch.float32, 0.0), ("paged_adamw", torch.float32, 1e-5), ("paged_adamw_8bit", torch.uint8, 0.02)],
)
def test_every_optimizer_makes_the_steps_of_adamw(tmp_path, optimizer, state, tolerance):
    """Three of them: the first one only tells the gradient's sign."""

    def stepped(name: str) -> tuple[torch.Tensor, Any]:
        found = tiny_round(loaded_tiny_base(tmp_path), optimizer=name, adam_epsilon=1e-8)
        weight = nn.Parameter(torch.zeros(64, 64))
        made = ppo.make_optimizer(found.roles, found.ppo)
        made.add_param_group({"params": [weight], "lr": 0.1, "peak": 0.1})
        for seed in range(3):
            weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).abs() + 1
            made.step()
        return weight.detach(), made.state[weight]

    wanted, _ = stepped("adamw")
    found, kept = stepped(optimizer)
    error = float(((found - wanted) / wanted).abs().max())
    print(f"{optimizer}: steps off by {error:.2g} at the most")
    assert error <= tolerance
    assert next(value.dtype for key, value in kept.items() if key in ("exp_avg", "state1")) == state


@pytest.mark.parametrize(
    ("critic", "optimizer"),
    # Matrices of 64 x 64 are large enough for moments of 8 bits.
    [("adapter", "adamw"), ("head", "adamw"), ("adapter", "paged_adamw_8bit")],
)
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch, critic, optimizer):
    overrides = (f"ppo.critic={critic}", "ppo.iterations=3", "ppo.kl.controller=adaptive", "ppo.kl.horizon=20")
    overrides += (f"ppo.optimizer={optimizer}", f"lora.rank={64 if optimizer.endswith('8bit') else 4}")
    results, rows = {}, {}
    for name in ("undisturbed", "interrupted"):
        loaded = whole_config(tmp_path / name, *overrides)
        run = publish_sft(loaded)
        publish_reward(loaded, run)
        if name == "interrupted":
            with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
                interrupt_before(patch, 2)
                ppo.run(loaded, run)
            kept = CheckpointFolder(run.working("ppo") / "checkpoints", inputs_digest="", keep_last=2)
            states = {path.name: json.loads((path / "state.json").read_text()) for path in kept._folders()}
            assert list(states) == ["00000002", "00000001"]
            assert states["00000002"]["state"]["kl"]["coefficient"] != loaded.config.ppo.kl.coefficient
            tensors = load_file(run.working("ppo") / "checkpoints" / "00000002" / "roles.safetensors")
            assert {name.rpartition(".")[2] for name in tensors if "heads.value" in name} == {"weight", "bias"}
            assert any("lora_B.policy" in name for name in tensors)
            assert any("lora_B.value" in name for name in tensors) == (critic == "adapter")
            with run.metrics("ppo").open("a") as file:  # what it wrote beyond the checkpoint
                file.write('{"step": 3, "objective/score": 99}\n')
            with run.metrics("ppo").with_name("ppo_samples.jsonl").open("a") as file:
                file.write('{"step": 3, "prompt": "torn"}\n{"step"')
        torch.manual_seed(99 if name == "interrupted" else 0)
        ppo.run(loaded, run)
        results[name], rows[name] = learned(run), read_metrics(run.metrics("ppo"))
        lines = run.metrics("ppo").with_name("ppo_samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3]
    differing = [
        file
        for file in results["undisturbed"]
        if file.endswith(".safetensors") and results["undisturbed"][file] != results["interrupted"][file]
    ]
    assert results["undisturbed"].keys() == results["interrupted"].keys() and differing == []
    timeless = [
        [
            {key: value for key, value in row.items() if not key.startswith(("seconds", "tokens", "memory"))}
            for row in run
        ]
        for run in rows.values()
    ]
    assert timeless[0] == timeless[1]


def test_a_reward_that_is_not_a_number_names_the_iteration_and_spares_the_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "import os\n"
        "def judge(prompts, completions, **columns):\n"
        "    return [float(os.environ['JUDGEMENT'])] * len(prompts)\n"
    )
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: judge.py:judge}]", "ppo.iterations=3")
    monkeypatch.setenv("JUDGEMENT", "1")
    run = publish_sft(loaded)
    own, calls = ppo.collect, []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        monkeypatch.setenv("JUDGEMENT", "nan" if len(calls) == 3 else "1")
        return own(*arguments, **options)

    monkeypatch.setattr(ppo, "collect", spoilt)
    with pytest.raises(RewardFunctionError, match="returned nan for the response") as caught:
        ppo.run(loaded, run)
    assert caught.value.where is not None and caught.value.where.startswith("iteration 3, ")
    assert not run.stage("ppo").exists()
    from pipeline.artifacts import digest
    from stages.inputs import stage_inputs

    folder = run.working("ppo") / "checkpoints"
    kept = CheckpointFolder(folder, inputs_digest=digest(stage_inputs("ppo", loaded.config, run)), keep_last=2)
    found = kept.latest(warn=pytest.fail)
    assert found is not None and found.step == 2


def test_a_divergence_names_its_iteration(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: tiny_data.py:share_of_a}]")
    run = publish_sft(loaded)

    own = Updater.update

    def diverged(self: Updater, experience: Any, iteration: int, **options: Any) -> Any:
        experience.advantages_BT[:] = float("nan")
        return own(self, experience, iteration, **options)

    monkeypatch.setattr(Updater, "update", diverged)
    with pytest.raises(DivergenceError, match="policy loss is not finite") as caught:
        ppo.run(loaded, run)
    assert caught.value.where == "iteration 1, epoch 1, minibatch 1"


def test_rows_that_come_while_the_stage_runs_make_it_run_again(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: tiny_data.py:share_of_a}]")
    run = publish_sft(loaded)
    own = ppo.collect

    def collect(*args: Any, **named: Any) -> Any:
        with (tmp_path / "tiny_data.py").open("a") as file:
            file.write("\n# another row\n")
        return own(*args, **named)

    monkeypatch.setattr(ppo, "collect", collect)
    ppo.run(loaded, run)
    current, reason = find_current("ppo", loaded, run)
    assert current is None and reason.startswith("changed since the last run: ")


def test_an_adapter_of_another_base_is_refused_before_the_base_is_loaded(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: tiny_data.py:share_of_a}]")
    run = publish_sft(loaded)
    other = load_config(loaded.path, [*loaded.overrides, "base.dtype=bfloat16"])
    monkeypatch.setattr(ppo, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(IncompatibleAdapterError, match="its quantization is"):
        ppo.run(other, run)


def test_a_faulty_reward_function_stops_before_a_model_is_loaded(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: tiny_data.py:words}]")
    run = publish_sft(loaded)
    monkeypatch.setattr(ppo, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RewardFunctionError, match="no reward function 'words'"):
        ppo.run(loaded, run)


def test_a_base_that_changed_is_not_published(tmp_path, monkeypatch):
    loaded = whole_config(tmp_path, "ppo.rewards=[{function: tiny_data.py:share_of_a}]", "ppo.iterations=1")
    run = publish_sft(loaded)
    own = TrainingState.copied

    def meddling(self: TrainingState) -> Callable[[Path], None]:
        with torch.no_grad():
            self.roles.base.model.get_output_embeddings().weight[0, 0] += 1
        return own(self)

    monkeypatch.setattr(TrainingState, "copied", meddling)
    with pytest.raises(BaseModelError, match="base changed"):
        ppo.run(loaded, run)
    assert not run.stage("ppo").exists()


@pytest.mark.parametrize("override", ["ppo.top_p=0.9", "ppo.top_k=20"])
def test_a_filter_on_the_samples_is_refused_unless_asked_for(tmp_path, override):
    with pytest.raises(ConfigError, match="biases the KL estimate"):
        tiny_config(tmp_path, override)
    tiny_config(tmp_path, override, "ppo.allow_biased_sampling=true")


def test_ppo_learns_what_is_rewarded(tmp_path):
    """The share of letters in the answer: from what a random model says to clearly more."""
    (tmp_path / "letters.py").write_text(
        "def letters(prompts, completions, **columns):\n"
        "    return [sum(letter in 'abcdefghijklmnopqrstuvwxyz' for letter in text) / 8 for text in completions]\n"
    )
    sharpen(tiny_base(tmp_path / "llama-base"))
    loaded = whole_config(
        tmp_path,
        "ppo.rewards=[{function: letters.py:letters}]",
        "ppo.learning_rate=0.01",
        "ppo.iterations=10",
        "ppo.prompts_per_iteration=32",
        "ppo.minibatch_size=16",
        "ppo.microbatch_tokens=2048",
        "ppo.kl.coefficient=0.01",
        "ppo.missing_eos_penalty=0",
        "ppo.gradient_checkpointing=false",
        "ppo.checkpoint_every=100",
        "ppo.lr_schedule=constant",
    )
    ppo.run(loaded, publish_sft(loaded))
    rows = read_metrics(RunDirectory(loaded.config.run_dir).metrics("ppo"))
    first, last = rows[0]["objective/score"], rows[-1]["objective/score"]
    assert first is not None and last is not None
    assert last > first + 0.25, [row["objective/score"] for row in rows]
    assert rows[-1]["kl/policy_reference_k1"] > 0.1  # type: ignore[operator]


def test_the_manifest_tells_of_the_adapter_that_lies_beside_it(tmp_path):
    settings = ("ppo.rewards=[{function: tiny_data.py:share_of_a}]", "ppo.iterations=1", "ppo.held_out.every=null")
    run = publish_sft(whole_config(tmp_path, *settings))
    manifest = ppo.run(whole_config(tmp_path, *settings, "lora.rank=16", "lora.alpha=3"), run)
    found = json.loads((run.stage("ppo") / "adapter_config.json").read_text())
    assert (manifest.lora["rank"], manifest.lora["alpha"]) == (found["r"], found["lora_alpha"]) != (16, 3)
