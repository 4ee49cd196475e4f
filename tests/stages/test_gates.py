"""The start-up gates: each opens for a sound start, and closes when its line is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import loaded_tiny_base, tiny_config
from tiny_ppo import CALIBRATION, perturb, prompts, publish_reward, publish_sft, sharp_base, tiny_round
from transformers import masking_utils

from pipeline.artifacts import read_manifest
from pipeline.base_model import load_base
from pipeline.errors import StartupGateError
from pipeline.generation import Response
from pipeline.roles import Roles
from stages import gates
from stages.gates import check_reward_round_trip, check_startup


def check(found, *, policy_is_reference: bool = True) -> dict[str, float]:
    return check_startup(
        found.roles, prompts(4), found.ppo, seed=0, policy_is_reference=policy_is_reference, budgets=found.budgets
    )


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_a_sound_start_passes_with_a_kl_of_exactly_0(tmp_path, quantization, critic):
    found = tiny_round(loaded_tiny_base(tmp_path, quantization=quantization), critic=critic, temperature=0.8)
    measured = check(found)
    assert measured["kl"] == 0.0
    assert measured["logits_gap"] <= 1e-6
    assert measured["sampler_gap"] < (1e-5 if quantization != "int8" else 0.1)


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_the_samplers_figures_serve_where_a_round_would_take_them(tmp_path, monkeypatch, critic):
    """In float32 a gap of 0.001 is too much for a round, though `max_logprob_gap` is 0.005; a head wants values too."""
    found = tiny_round(loaded_tiny_base(tmp_path), critic=critic)
    assert check(found)["sampler_serves"] == 1.0
    own = gates.generate

    def off(*arguments: Any, **options: Any) -> Any:
        return [
            replace(response, logprobs=tuple(value - 1e-3 for value in response.logprobs))
            for response in own(*arguments, **options)
        ]

    def without_values(*arguments: Any, **options: Any) -> Any:
        return [replace(response, values=()) for response in own(*arguments, **options)]

    monkeypatch.setattr(gates, "generate", off)
    assert check(found)["sampler_serves"] == 0.0
    monkeypatch.setattr(gates, "generate", without_values)
    assert check(found)["sampler_serves"] == (1.0 if critic == "adapter" else 0.0)


def test_the_logits_of_a_few_tokens_are_compared(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    own, tokens = found.roles.logits, []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        tokens.append(hidden.shape[:-1].numel())
        return own(hidden)

    monkeypatch.setattr(gates, "score_logprobs", lambda roles, role, episodes, **_: [torch.zeros(16)] * len(episodes))
    monkeypatch.setattr(gates, "generate", lambda *_, **__: [Response((7,) * 16, (0.0,) * 16, False)] * 4)
    found.roles.logits = logits  # type: ignore[method-assign]
    check(found)
    assert tokens == [16]  # of a prompt and 16 tokens more


def test_packed_sequences_that_see_each_other_are_refused(tmp_path, monkeypatch):
    """What an architecture does whose masks know nothing of positions."""
    found = tiny_round(sharp_base(tmp_path))
    found.roles.pack("always")
    assert 0 <= check(found)["packing_gap"] < 1e-5
    assert found.roles.packs
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(StartupGateError, match=r"packed sequences differ from padded ones[\s\S]*ppo.packing=never"):
        check(found)


def test_a_policy_that_is_not_the_reference_is_refused(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path))
    perturb(found.roles, "policy", 1e-4)
    with pytest.raises(StartupGateError, match=r"policy and reference differ by .* nats"):
        check(found)
    check(found, policy_is_reference=False)  # as after a resume


def test_the_bare_base_as_the_reference_is_refused(tmp_path, monkeypatch):
    """What PEFT's `disable_adapter` would give."""
    found = tiny_round(loaded_tiny_base(tmp_path))
    own = found.roles.active
    monkeypatch.setattr(found.roles, "active", lambda role: own(None if role == "reference" else role))
    with pytest.raises(StartupGateError, match="policy and reference differ"):
        check(found)


def test_a_parameter_that_pefts_switching_froze_is_found(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    monkeypatch.setattr(found.roles, "_apply_requires_grad", lambda: None)
    with pytest.raises(StartupGateError, match=r"with the role '.*' active, the parameter .*lora_A.*"):
        check(found)


@pytest.mark.parametrize(("undo", "state"), [(True, "learns, but should not"), (False, "should learn, but does not")])
def test_a_declaration_that_does_not_hold_is_found(tmp_path, monkeypatch, undo, state):
    found = tiny_round(loaded_tiny_base(tmp_path))
    name = "reference" if undo else "policy"
    own = found.roles._apply_requires_grad

    def meddling() -> None:
        own()
        next(iter(found.roles.parameters(name).values())).requires_grad_(undo)

    monkeypatch.setattr(found.roles, "_apply_requires_grad", meddling)
    with pytest.raises(StartupGateError, match=state):
        check(found)


def test_a_frozen_head_is_found(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    own = found.roles._apply_requires_grad
    monkeypatch.setattr(
        found.roles, "_apply_requires_grad", lambda: (own(), found.roles.heads["value"].requires_grad_(False))
    )
    with pytest.raises(StartupGateError, match=r"heads\.value\.\w+ should learn, but does not"):
        check(found)


def test_logits_that_are_not_the_models_own_are_found(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path, "gemma2"))
    check(found)
    own = found.roles.logits
    found.roles.logits = lambda hidden: own(hidden) + torch.linspace(0, 1, 259)  # type: ignore[method-assign]
    with pytest.raises(StartupGateError, match="logits from hidden states differ"):
        check(found)


def test_nan_logits_do_not_pass_a_gate(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path))
    own = found.roles.logits
    found.roles.logits = lambda hidden: own(hidden) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(StartupGateError):
        check(found)


@pytest.fixture
def scored(tmp_path):
    """The reward role as PPO loads it, the manifest, and its folder."""
    loaded = tiny_config(tmp_path, "base.quantization=none")
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    roles = Roles(load_base(loaded.config.base))
    manifest = roles.add_from("reward", run.stage("reward"))
    assert manifest == read_manifest(run.stage("reward"))
    assert (manifest.reward_gain, manifest.reward_bias) == (CALIBRATION.gain, CALIBRATION.bias)
    return roles, manifest, run.stage("reward")


def test_the_reward_scores_as_it_did_when_it_was_trained(scored):
    assert check_reward_round_trip(*scored) == 0.0


@pytest.mark.parametrize("part", ["head", "adapter", "role"])
def test_a_reward_that_scores_otherwise_is_refused(scored, part):
    roles, manifest, folder = scored
    with torch.no_grad():
        if part == "head":
            roles.heads["reward"].weight.mul_(1.1)
        elif part == "adapter":
            perturb(roles, "reward", 0.02)
        else:
            manifest = replace(manifest, extra={"probe": [{"ids": [5, 6, 7, 9], "score": 1.0}]})
    with pytest.raises(StartupGateError, match="the reward adapter scores a sequence") as caught:
        check_reward_round_trip(roles, manifest, folder)
    assert caught.value.where == str(folder)


def test_a_nan_score_is_refused(scored):
    roles, manifest, folder = scored
    with torch.no_grad():
        roles.heads["reward"].weight.fill_(float("nan"))
    with pytest.raises(StartupGateError):
        check_reward_round_trip(roles, manifest, folder)
