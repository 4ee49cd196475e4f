"""PPO where memory runs out: the work is done again in smaller parts, and the result is what those parts give."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import loaded_tiny_base, tiny_config
from tiny_ppo import Round, tiny_round
from transformers import GenerationMixin

from pipeline.distributed import World
from pipeline.errors import OutOfMemoryError
from pipeline.kl import FixedKL
from stages.experience import Budgets
from stages.training_state import Checkpoints, Position, TrainingState


def limit_tokens(patch: pytest.MonkeyPatch, found: Round, tokens: int) -> list[int]:
    """Let the trunk run out of memory above so many tokens of a forward pass; returns the sizes it was given."""
    own, seen = found.roles.hidden_states, []

    def limited(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        seen.append(ids_BL.numel())
        if ids_BL.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(ids_BL, mask_BL)

    patch.setattr(found.roles, "hidden_states", limited)
    return seen


def updated(found: Round, hinder: Callable[[Round], Any] = lambda _: None) -> dict[str, torch.Tensor]:
    """Policy and critic after the update of a round that is the same whatever the budget."""
    experience = found.collect()
    hinder(found)
    found.updater.update(experience, 0, critic_only=False)
    return {**found.parameters("policy"), **found.parameters("value")}


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_an_update_with_too_little_memory_is_that_of_smaller_microbatches(tmp_path, monkeypatch, critic, capsys):
    found = tiny_round(loaded_tiny_base(tmp_path / "hindered"), critic=critic, microbatch_tokens=256)
    after = updated(found, lambda given: limit_tokens(monkeypatch, given, 100))
    assert found.budgets.tokens.size < 100
    assert "Out of memory with ppo.microbatch_tokens=256; going on with" in capsys.readouterr().out

    smaller = tiny_round(loaded_tiny_base(tmp_path / "smaller"), critic=critic, microbatch_tokens=256)
    experience = smaller.collect()
    smaller.budgets.tokens.size = found.budgets.tokens.size
    smaller.updater.update(experience, 0, critic_only=False)
    expected = {**smaller.parameters("policy"), **smaller.parameters("value")}
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def test_what_a_failed_backward_has_left_does_not_count(tmp_path, monkeypatch):
    expected = updated(tiny_round(loaded_tiny_base(tmp_path / "undisturbed"), microbatch_tokens=64))
    found = tiny_round(loaded_tiny_base(tmp_path / "hindered"), microbatch_tokens=64)
    experience = found.collect()
    own, calls = torch.Tensor.backward, []

    def failing(self: torch.Tensor, *args: Any, **named: Any) -> None:
        own(self, *args, **named)
        calls.append(1)
        if len(calls) == 2:  # the gradients of two microbatches are there
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    found.updater.update(experience, 0, critic_only=False)
    assert found.budgets.tokens.size == 32
    after = {**found.parameters("policy"), **found.parameters("value")}
    for name, tensor in expected.items():  # other microbatches, so float32 sums in another order
        assert torch.allclose(after[name], tensor, rtol=1e-3, atol=2e-5), name


def test_scoring_with_too_little_memory_gives_the_same_round(tmp_path, monkeypatch):
    expected = tiny_round(loaded_tiny_base(tmp_path / "undisturbed"), microbatch_tokens=256).collect()
    found = tiny_round(loaded_tiny_base(tmp_path / "hindered"), microbatch_tokens=256)
    seen = limit_tokens(monkeypatch, found, 100)
    experience = found.collect()
    assert max(seen) > 100 and found.budgets.tokens.size <= 100
    assert [row.response for row in experience.episodes] == [row.response for row in expected.episodes]
    for name in ("logprobs_BT", "reference_logprobs_BT", "values_BT", "scores_B", "advantages_BT"):
        assert torch.allclose(getattr(experience, name), getattr(expected, name), rtol=1e-4, atol=1e-5), name


def test_sampling_with_too_little_memory_takes_fewer_responses_at_once(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    found.budgets.responses.size = 8
    expected = found.collect()
    own, seen = GenerationMixin.generate, []

    def limited(model: Any, **named: Any) -> Any:
        seen.append(len(named["input_ids"]))
        if len(named["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(model, **named)

    monkeypatch.setattr(GenerationMixin, "generate", limited)
    assert found.collect().episodes == expected.episodes, "they are the same responses"
    assert seen == [8, 4, 2, 2, 2, 2]


def test_one_sequence_that_does_not_fit_says_what_to_lower_and_by_how_much(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    experience = found.collect()
    before = found.parameters("policy")
    limit_tokens(monkeypatch, found, 0)
    with pytest.raises(OutOfMemoryError, match=r"memory runs out even with ppo\.microbatch_tokens") as caught:
        found.updater.update(experience, 0, critic_only=False)
    said = re.search(r"One sequence of (\d+) tokens .* ppo\.max_new_tokens to (\d+)", caught.value.remedy or "")
    assert said is not None
    longest, lower = map(int, said.groups())
    assert longest in {len(episode.ids) for episode in experience.episodes} and lower == longest // 2
    after = found.parameters("policy")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_no_room_for_the_optimizers_state_says_how_much_it_takes(tmp_path, monkeypatch):
    found = tiny_round(loaded_tiny_base(tmp_path))
    experience, before = found.collect(), found.parameters("policy")
    learning = sum(tensor.numel() for role in ("policy", "value") for tensor in found.parameters(role).values())

    def failing(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", failing)
    with pytest.raises(OutOfMemoryError, match=f"for each of {learning:,} that learn") as caught:
        found.updater.update(experience, 0, critic_only=False)
    assert "lora.rank" in str(caught.value)
    assert all(torch.equal(found.parameters("policy")[name], tensor) for name, tensor in before.items())


def test_a_lowered_budget_is_part_of_the_checkpoint(tmp_path):
    config = tiny_config(tmp_path / "config", "ppo.rollout.batch_size=16").config

    def fresh(name: str) -> TrainingState:
        found = tiny_round(loaded_tiny_base(tmp_path / name))
        return TrainingState(found.roles, found.optimizer, FixedKL(0.1), Budgets.of(config.ppo), found.world, "sft")

    def checkpoints() -> Checkpoints:
        return Checkpoints(tmp_path / "working", config, "digest", World(), warn=pytest.fail)

    lowered = fresh("lowered")
    lowered.budgets.tokens.size, lowered.budgets.responses.size = 100, 8
    checkpoints().save(1, lowered)
    resumed = fresh("resumed")
    assert checkpoints().restore(resumed, lambda *_: False) == Position(1)
    assert (resumed.budgets.tokens.size, resumed.budgets.responses.size) == (100, 8)
