"""Where a PPO run goes on, and what of an earlier start it may use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import loaded_tiny_base, tiny_config
from tiny_ppo import Round, prompts, publish_reward, publish_sft, tiny_round

from pipeline.kl import FixedKL
from pipeline.metrics import read_metrics
from pipeline.roles import Roles
from stages import interruption, ppo
from stages.experience import sample, sampling_settings
from stages.interruption import Interrupted
from stages.rounds import Rounds
from stages.training_state import Checkpoints, Position, TrainingState
from stages.update import Updater, UpdateStatistics


def state_of(found: Round) -> TrainingState:
    return TrainingState(found.roles, found.optimizer, FixedKL(0.05), found.budgets, found.world, "sft")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return tiny_config(tmp_path / "config").config


def rounds_in(folder: Path, config: Any, found: Round, warn: Any = pytest.fail) -> Rounds:
    return Rounds(folder, config, "inputs", found.world, warn=warn)


def test_a_kept_round_comes_back_as_it_was(tmp_path, config):
    found = tiny_round(loaded_tiny_base(tmp_path))
    experience = found.collect()
    kept = rounds_in(tmp_path / "working", config, found)
    kept.save(3, "policy", experience, found.budgets)
    again = kept.load(3, "policy", experience.prompts, found.roles, found.budgets)
    assert again is not None and kept.exists(3, "policy")
    for name, value in vars(experience).items():
        other = getattr(again, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other) and value.dtype == other.dtype, name
        elif name == "terms":
            assert list(value) == list(other) and all(torch.equal(value[key], other[key]) for key in value)
        else:
            assert list(value) == list(other), name


@pytest.mark.parametrize("with_values", [False, True])
def test_a_rollout_that_nobody_has_judged_comes_back_as_it_was(tmp_path, config, with_values):
    found = tiny_round(loaded_tiny_base(tmp_path), critic="head" if with_values else "adapter")
    kept, asked = rounds_in(tmp_path / "working", config, found), prompts(8)
    draw = partial(
        sample,
        found.roles,
        asked,
        seed=(0,),
        world=found.world,
        budgets=found.budgets,
        sampling=sampling_settings(found.ppo),
        with_values=with_values,
    )
    first = kept.sampled(3, "policy", asked, found.roles, found.budgets, draw)
    assert any(response.values for response in first.responses) == with_values
    again = kept.sampled(3, "policy", asked, found.roles, found.budgets, lambda: pytest.fail("it is there"))
    assert again == first
    made = []
    kept.sampled(3, "another", asked, found.roles, found.budgets, lambda: made.append("new") or draw())
    kept.sampled(4, "another", asked, found.roles, found.budgets, lambda: made.append("next") or draw())
    assert made == ["new", "next"]


@pytest.mark.parametrize("passes", [2, 10], ids=["rewards", "log-probabilities"])
def test_a_stop_amid_the_scoring_comes_between_two_passes_and_loses_no_rollout(tmp_path, monkeypatch, passes):
    loaded = tiny_config(tmp_path, "base.quantization=none", "ppo.microbatch_tokens=32", "ppo.held_out.every=null")
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    ppo.run(loaded, run)
    undisturbed = (run.stage("ppo") / "adapter_model.safetensors").read_bytes()
    calls: list[str] = []
    own_sample, own_states = ppo.sample, Roles.hidden_states

    def counted_sample(*args: Any, **named: Any) -> Any:
        calls.append("sample")
        return own_sample(*args, **named)

    def asking(*args: Any) -> Any:
        if calls:  # the rollout is there
            calls.append("pass")
            if calls.count("pass") == passes:
                interruption.request()
        return own_states(*args)

    monkeypatch.setattr(ppo, "sample", counted_sample)
    monkeypatch.setattr(Roles, "hidden_states", asking)
    with pytest.raises(Interrupted):
        ppo.run(loaded, run)
    interruption.withdraw()
    assert calls == ["sample", *["pass"] * passes]
    ppo.run(loaded, run)
    assert calls.count("sample") == loaded.config.ppo.iterations
    assert (run.stage("ppo") / "adapter_model.safetensors").read_bytes() == undisturbed


def test_a_round_of_another_policy_iteration_or_world_is_not_used(tmp_path, config, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    experience = found.collect()
    kept = rounds_in(tmp_path / "working", config, found)
    kept.save(3, "policy", experience, found.budgets)
    assert kept.load(3, "another", experience.prompts, found.roles, found.budgets) is None
    assert kept.load(4, "policy", experience.prompts, found.roles, found.budgets) is None
    assert not kept.exists(3, "another")
    monkeypatch.setattr(type(found.world), "size", 2)
    monkeypatch.setattr(type(found.world), "maximum", lambda self, number: number)
    assert kept.load(3, "policy", experience.prompts, found.roles, found.budgets) is None


def test_the_digest_is_that_of_what_learns(tmp_path):
    found = tiny_round(loaded_tiny_base(tmp_path))
    state = state_of(found)
    before = state.digest()
    assert before == state.digest()
    for role in ("policy", "value"):
        with torch.no_grad():
            next(iter(found.roles.parameters(role).values())).view(-1)[0] += 1e-6
        assert state.digest() != before
        before = state.digest()


def test_a_state_within_an_iteration_is_used_only_with_its_responses(tmp_path, config):
    found = tiny_round(loaded_tiny_base(tmp_path))
    state, said = state_of(found), []
    checkpoints = Checkpoints(tmp_path / "working", config, "inputs", found.world, warn=said.append)
    checkpoints.save(2, state)
    statistics = UpdateStatistics(steps=1, tokens=9.0, gradient_norms={"policy": [0.25]})
    checkpoints.save_unfinished(Position(2, statistics, "policy"), state)

    def restored(exists: bool) -> Position:
        asked: list[Any] = []
        position = Checkpoints(tmp_path / "working", config, "inputs", found.world, warn=said.append).restore(
            state, lambda *which: asked.append(which) or exists
        )
        assert asked == [(2, "policy")]
        return position

    assert restored(True) == Position(2, statistics, "policy")
    assert restored(False) == Position(2)
    assert said == ["warning: the responses of iteration 3 are lost; it is done again"]
    checkpoints.save(3, state)
    assert Checkpoints(tmp_path / "working", config, "inputs", found.world, warn=pytest.fail).restore(
        state, lambda *_: pytest.fail("older than the newest")
    ) == Position(3)


def test_what_was_done_before_the_stop_is_not_done_again(tmp_path, monkeypatch):
    """Neither the rollout nor the steps of the iteration, nor the iterations before it."""
    loaded = tiny_config(
        tmp_path,
        "base.quantization=none",
        "ppo.rewards=[{function: tiny_data.py:share_of_a}]",
        "ppo.checkpoint_every=5",
        "ppo.held_out.every=null",
    )
    run = publish_sft(loaded)
    steps: list[str] = []
    own_step, own_collect = Updater._step, ppo.collect

    def step(self: Updater, *args: Any, where: str, **named: Any) -> Any:
        steps.append(where)
        if where == "iteration 2, epoch 1, minibatch 2" and "iteration 1, epoch 1, minibatch 1" in steps:
            interruption.request()
        return own_step(self, *args, where=where, **named)

    def collect(*args: Any, **named: Any) -> Any:
        steps.append("rollout")
        return own_collect(*args, **named)

    monkeypatch.setattr(Updater, "_step", step)
    monkeypatch.setattr(ppo, "collect", collect)
    with pytest.raises(Interrupted):
        ppo.run(loaded, run)
    interruption.withdraw()
    first, steps[:] = list(steps), []
    ppo.run(loaded, run)
    every = [f"epoch {epoch}, minibatch {number}" for epoch in (1, 2) for number in (1, 2)]
    whole = ["rollout", *(f"iteration 1, {step}" for step in every), "rollout"]
    # The step in which the request came is broken off after its microbatch, and is the first of the next start.
    assert first == [*whole, *(f"iteration 2, {step}" for step in every[:2])]
    assert steps == [f"iteration 2, {step}" for step in every[1:]]
    assert [row["step"] for row in read_metrics(run.metrics("ppo"))] == [1, 2]
