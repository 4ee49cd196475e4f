"""What some processes began, others go on with: on 4, then 2, then 1, DDP or the base shared out; on 1, then 2."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from chained import BASE, CHAINS, MODULES, STOPS, go_on
from process_group import TESTS, run_together
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_ppo import publish_reward, publish_sft
from torch.testing import assert_close
from two_shards import require_same_adapters

from pipeline.artifacts import read_manifest
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory

EACH = pytest.mark.parametrize("chain", list(CHAINS))
PARENTS = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were never stopped, each by one process, and the chains."""
    folder = tmp_path_factory.mktemp("chained")
    # SGD without clipping: that, and Adam's first steps, would hide a wrong scale of the gradient.
    training: dict[str, Any] = {"batch_size": 4, "microbatch_size": 1, "max_steps": 4, "learning_rate": 0.05}
    training |= {"optimizer": "sgd", "max_length": 40, "log_every": 2, "max_grad_norm": 1e9}
    rounds = {"iterations": 3, "prompts_per_iteration": 8, "minibatch_size": 4, "checkpoint_every": 1}
    rounds |= {"max_new_tokens": 8, "microbatch_tokens": 60}
    sources = {"instructions": "demonstrations", "preferences": "comparisons", "prompts": "prompts"}
    # Eleven held-out rows, which neither four nor two processes share evenly.
    data = {kind: {"sources": [f"tiny_data.py:{name}"], "held_out": 0.3} for kind, name in sources.items()}
    reward = training | {"calibration_prompts": 9}
    loaded = tiny_config(folder, BASE, data=data, sft=training, reward=reward, ppo=rounds)
    publish_reward(loaded, publish_sft(loaded))
    for chain in ("straight", *CHAINS):
        for stage, parents in PARENTS.items():
            (folder / chain / stage).mkdir(parents=True)
            for parent in parents:
                shutil.copytree(RunDirectory.find(loaded).stage(parent), folder / chain / stage / parent)
    for stage in MODULES:
        go_on(folder, "straight", stage)
        go_on(folder, "up", stage)
    for processes in (4, 2):
        run_together(TESTS / "chained.py", folder, processes=processes)
    for stage in MODULES:
        go_on(folder, "down", stage)
        go_on(folder, "shared", stage)
    return folder


def result(folder: Path, chain: str, stage: Any) -> Path:
    return RunDirectory(folder / chain / stage).stage(stage)


def test_every_start_but_the_last_was_stopped(folder: Path) -> None:
    wanted = {
        f"stopped-{chain}-{stage}-{processes}-{rank}"
        for chain, processes in STOPS
        for stage in MODULES
        for rank in range(processes)
    }
    assert {path.name for path in folder.glob("stopped-*")} == wanted


@EACH
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_adapter_is_that_of_one_process_that_was_never_stopped(folder: Path, chain: str, stage: str) -> None:
    """The tolerance is that of two processes and one: float32 sums in another order."""
    ours, wanted = (
        load_file(result(folder, name, stage) / "adapter_model.safetensors") for name in (chain, "straight")
    )
    assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in wanted.items() if "lora_B" in name) > 1e-3


@EACH
def test_policy_and_critic_are_those_of_one_process_that_was_never_stopped(folder: Path, chain: str) -> None:
    require_same_adapters(result(folder, "straight", "ppo"), result(folder, chain, "ppo"))


@EACH
@pytest.mark.parametrize("stage", list(MODULES))
def test_the_figures_are_those_of_one_process_that_was_never_stopped(folder: Path, chain: str, stage: Any) -> None:
    """Each line of metrics, also one of steps that two starts made, but for times and what each process measures.

    The rate is left out of a line that two starts share.
    """
    own = ("seconds", "tokens", "memory", "time", "padding", "sampler")
    ours, wanted = (read_metrics(RunDirectory(folder / name / stage).metrics(stage)) for name in (chain, "straight"))
    assert [row["step"] for row in ours] == [row["step"] for row in wanted] == ([1, 2, 3] if stage == "ppo" else [2, 4])
    manifests = [read_manifest(result(folder, name, stage)).metrics for name in (chain, "straight")]
    for found, expected in [*zip(ours, wanted, strict=True), manifests]:
        assert set(found) | {"tokens_per_second"} == set(expected) | {"tokens_per_second"}
        for name, value in expected.items():
            if not name.startswith(own):
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
