"""PPO that starts at the registry's current policy: the weights it starts from, and what does not depend on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_ppo import publish_reward, publish_sft

from pipeline.artifacts import read_manifest
from pipeline.config_file import load_config
from pipeline.registry import Registry
from stages import ppo
from stages.inputs import find_current

# One round in which only the critic learns: the policy ends as it started.
STANDING = ["ppo.iterations=2", "ppo.max_steps=1", "ppo.critic_warmup_iterations=1"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_policy_starts_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = tiny_config(tmp_path)
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    first = ppo.run(loaded, run)
    assert first.extra["started_from"] == read_manifest(run.stage("sft")).digest
    trained = weights(run.stage("ppo"))
    registry = Registry(tmp_path / "registry")

    # With nothing promoted, it starts at SFT.
    standing = load_config(loaded.path, [*STANDING, "ppo.start_from=promoted"])
    ppo.run(standing, run)
    assert same(weights(run.stage("ppo")), weights(run.stage("sft")))

    ppo.run(loaded, run)
    registry.promote(run, ("sft", "reward", "ppo"), figures={})
    again = ppo.run(standing, run)
    assert again.extra["started_from"] == first.digest
    assert same(weights(run.stage("ppo")), trained)
    assert not same(trained, weights(run.stage("sft")))

    # Promoting another policy does not make the result stale: or every night would train, and promote, again.
    registry.promote(run, ("sft", "reward", "ppo"), figures={})
    assert registry.current is not None
    assert find_current("ppo", standing, run)[0] is not None
