"""A stage that is killed anywhere and started again ends with the bytes that an undisturbed one ends with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from resume.harness import Runner, Stop, leftovers, log, result_of, small_pipeline, with_parents

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.run_directory import STAGES, RunDirectory, StageName

PPO = [
    # Each phase of an iteration: before, within and after.
    Stop("stages.ppo:check_startup"),
    Stop("stages.ppo:collect", 1),
    Stop("stages.ppo:collect", 3),
    Stop("pipeline.generation:_generate_batch", 2),
    Stop("pipeline.generation:_Sampler.__call__", 9),
    Stop("stages.experience:score_logprobs", 3),
    Stop("stages.experience:score_logprobs", 3, "after"),
    Stop("stages.ppo:Rounds.sampled", 2, "after"),
    Stop("pipeline.roles:Roles.hidden_states", 7),
    Stop("stages.ppo:Rounds.save", 2),
    Stop("stages.ppo:Rounds.save", 2, "after"),
    Stop("stages.ppo:Rounds.save", 3, "after"),
    Stop("stages.update:Updater._step", 1),
    Stop("stages.update:Updater._step", 6),
    Stop("stages.update:Updater._step", 6, "after"),
    Stop("stages.update:Updater._policy_backward", 5, "after"),
    Stop("stages.update:Updater._critic_backward", 3),
    Stop("stages.ppo:round_metrics", 3),
    Stop("stages.ppo:measure_held_out", 1),
    Stop("stages.ppo:measure_held_out", 2, "after"),
    Stop("pipeline.metrics:MetricsWriter.write", 2),
    Stop("pipeline.metrics:MetricsWriter.write", 3, "after"),
    Stop("stages.ppo:sample_lines", 3, "after"),
    # While a checkpoint is written, and when it is whole.
    Stop("stages.ppo:Checkpoints.save", 1),
    Stop("stages.training_state:save_tensors", 2),
    Stop("stages.training_state:save_tensors", 6, "after"),
    Stop("os:rename", 1, "before", about="checkpoints"),
    Stop("os:rename", 1, "after", about="checkpoints"),
    Stop("shutil:rmtree", 1, "before", about="checkpoints"),
    Stop("stages.ppo:Checkpoints.save", 2, "after"),
    Stop("stages.ppo:Checkpoints.save_best", 1, "after"),
    # While the result is published.
    Stop("stages.ppo:finish"),
    Stop("stages.ppo:save_learned", 1, "after"),
    Stop("stages.result:write_manifest"),
    Stop("stages.result:write_manifest", when="after"),
    Stop("os:rename", 1, "before", about="/run/ppo'"),
    Stop("os:rename", 1, "after", about="/run/ppo'"),
]

# The stages that TRL trains, and the evaluation.
OTHERS: dict[StageName, list[Stop]] = {
    "sft": [
        Stop("stages.sft:held_out_loss"),
        Stop("stages.trl_trainer:StageTrainer.training_step", 7),
        Stop("stages.trl_trainer:StageTrainer._save_checkpoint", 2),
        Stop("stages.trl_trainer:StageTrainer._save_checkpoint", 2, "after"),
        Stop("stages.trl_trainer:StageTrainer.log", 3),
        Stop("stages.sft:finish"),
        Stop("os:rename", 1, "after", about="/run/sft'"),
        Stop("stages.trl_trainer:StageTrainer.training_step", 5, signal=signal.SIGTERM),
    ],
    "reward": [
        Stop("stages.trl_trainer:StageTrainer.training_step", 6, "after"),
        Stop("stages.trl_trainer:save_tensors", 1, "after"),
        Stop("stages.reward:as_roles"),
        Stop("stages.reward:calibrate", 1, "after"),
        Stop("stages.result:write_manifest"),
        Stop("stages.trl_trainer:StageTrainer.training_step", 3, signal=signal.SIGINT),
        Stop("stages.reward:calibrate", signal=signal.SIGTERM),
    ],
    "evaluate": [
        Stop("pipeline.generation:_generate_batch", 2),
        Stop("pipeline.generation:_generate_batch", 3, "after"),
        Stop("stages.evaluate:policy_kl", 1, "after"),
        Stop("stages.evaluate:finish"),
        Stop("pipeline.generation:_generate_batch", 1, signal=signal.SIGTERM),
    ],
}

ASKED = [
    Stop("stages.ppo:load_base", signal=signal.SIGTERM),
    Stop("stages.ppo:collect", 1, signal=signal.SIGINT),
    Stop("stages.ppo:collect", 4, signal=signal.SIGTERM),
    Stop("pipeline.generation:_Sampler.__call__", 20, signal=signal.SIGTERM),
    Stop("stages.update:Updater._step", 2, signal=signal.SIGTERM),
    Stop("stages.update:Updater._policy_backward", 9, "after", signal=signal.SIGINT),
    Stop("stages.update:Updater._critic_backward", 10, signal=signal.SIGTERM),
    Stop("stages.ppo:measure_held_out", 1, signal=signal.SIGTERM),
    Stop("stages.ppo:Checkpoints.save", 1, signal=signal.SIGTERM),
    Stop("stages.ppo:finish", signal=signal.SIGTERM),
]


def ends_in_the_same_bytes(
    runner: Runner,
    undisturbed: LoadedConfig,
    stage: StageName,
    folder: Path,
    *stops: Stop,
    most_tokens: int | None = None,
) -> None:
    """End a stage at each of the stops, one start after the other, and let the last start through."""
    loaded = with_parents(stage, folder, undisturbed)
    for stop in stops:
        expected = -signal.SIGKILL if stop.signal == signal.SIGKILL else 75
        assert runner.run(stage, loaded, stop, most_tokens=most_tokens) == expected, f"{stop}: {said(loaded)}"
    assert runner.run(stage, loaded, most_tokens=most_tokens) == 0, said(loaded)
    assert result_of(stage, loaded) == result_of(stage, undisturbed)
    assert leftovers(loaded) == []


def said(loaded: LoadedConfig) -> str:
    """The end of what the stages printed."""
    return log(loaded).read_text()[-4000:]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    started = Runner()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    loaded = small_pipeline(tmp_path_factory.mktemp("undisturbed"))
    for stage in STAGES:
        assert runner.run(stage, loaded) == 0, said(loaded)
    return loaded


# A run whose guard stops it, with a critic on the policy's trunk, and more measurements than checkpoints.
STOPPING = (
    "ppo.guard.action=stop",
    "ppo.guard.max_ratio=1.0001",
    "ppo.critic=head",
    "ppo.held_out.every=1",
    "ppo.checkpoint_every=3",
    "ppo.critic_warmup_iterations=2",
)


@pytest.fixture(scope="module")
def stopping(runner: Runner, undisturbed: LoadedConfig, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    loaded = with_parents("ppo", tmp_path_factory.mktemp("stopping"), undisturbed, *STOPPING)
    assert runner.run("ppo", loaded) == 0, said(loaded)
    manifest = read_manifest(RunDirectory(loaded.config.run_dir).stage("ppo"))
    assert manifest.extra["stopped"].startswith("iteration 3: policy/ratio_max")
    assert manifest.extra["iterations"] == 3 < loaded.config.ppo.iterations
    return loaded


@pytest.mark.parametrize(
    "stop",
    [
        Stop("stages.ppo:finish"),
        Stop("stages.ppo:Checkpoints.save", 1),
        Stop("stages.ppo:measure_held_out", 3),
        Stop("stages.round_metrics:write_text"),
        Stop("stages.update:Updater._step", 9, signal=signal.SIGTERM),
        Stop("stages.ppo:round_metrics", 3, signal=signal.SIGTERM),
    ],
    ids=str,
)
def test_a_run_that_stops_early(runner: Runner, stopping: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    if stop.at.endswith("write_text"):  # samples are dropped where a start finds some
        first = Stop("stages.ppo:measure_held_out", 2)
        ends_in_the_same_bytes(runner, stopping, "ppo", tmp_path / "run", first, stop)
    else:
        ends_in_the_same_bytes(runner, stopping, "ppo", tmp_path / "run", stop)


@pytest.mark.parametrize("stop", PPO, ids=str)
def test_ppo_killed(runner: Runner, undisturbed: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    ends_in_the_same_bytes(runner, undisturbed, "ppo", tmp_path / "run", stop)


@pytest.mark.parametrize("stop", ASKED, ids=str)
def test_ppo_asked_to_stop(runner: Runner, undisturbed: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    ends_in_the_same_bytes(runner, undisturbed, "ppo", tmp_path / "run", stop)


def test_ppo_ended_again_and_again(runner: Runner, undisturbed: LoadedConfig, tmp_path: Path) -> None:
    ends_in_the_same_bytes(
        runner,
        undisturbed,
        "ppo",
        tmp_path / "run",
        Stop("stages.update:Updater._step", 3, signal=signal.SIGTERM),
        Stop("stages.update:Updater._step", 2),
        Stop("stages.update:Updater._step", 2, signal=signal.SIGTERM),
        Stop("stages.ppo:Checkpoints.save", 1),
        Stop("stages.ppo:Rounds.save", 1, "after"),
        Stop("stages.ppo:finish"),
    )


@pytest.mark.parametrize(
    ("stage", "stop"), [pytest.param(stage, stop, id=f"{stage}-{stop}") for stage in OTHERS for stop in OTHERS[stage]]
)
def test_another_stage_ended(
    runner: Runner, undisturbed: LoadedConfig, tmp_path: Path, stage: StageName, stop: Stop
) -> None:
    ends_in_the_same_bytes(runner, undisturbed, stage, tmp_path / "run", stop)


# ---- as a real run computes: a quantized base, 16 bits, and samples from a merged copy

QUANTIZED: list[tuple[StageName, Stop]] = [
    ("sft", Stop("stages.trl_trainer:StageTrainer.training_step", 7)),
    ("reward", Stop("stages.trl_trainer:StageTrainer.training_step", 6, "after")),
    ("reward", Stop("stages.reward:calibrate", 1, "after")),
    ("ppo", Stop("pipeline.generation:_generate_batch", 2)),
    ("ppo", Stop("stages.ppo:Rounds.sampled", 2, "after")),
    ("ppo", Stop("stages.update:Updater._step", 6)),
    ("ppo", Stop("stages.update:Updater._step", 6, signal=signal.SIGTERM)),
    ("ppo", Stop("stages.ppo:Checkpoints.save", 1, "after")),
    ("evaluate", Stop("pipeline.generation:_generate_batch", 2, "after")),
]


@pytest.fixture(scope="module")
def quantized(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    settings = ("base.quantization=nf4", "base.dtype=bfloat16", "ppo.rollout.weights=merged")
    loaded = small_pipeline(tmp_path_factory.mktemp("quantized"), *settings)
    for stage in STAGES:
        assert runner.run(stage, loaded) == 0, said(loaded)
    return loaded


@pytest.mark.parametrize(("stage", "stop"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in QUANTIZED])
def test_a_quantized_run_ended(
    runner: Runner, quantized: LoadedConfig, tmp_path: Path, stage: StageName, stop: Stop
) -> None:
    ends_in_the_same_bytes(runner, quantized, stage, tmp_path / "run", stop)


# ---- a run that memory does not suffice for

LITTLE_MEMORY = 48
"""Tokens of a forward pass: four sequences of the tiny run have more."""


@pytest.fixture(scope="module")
def cramped(runner: Runner, undisturbed: LoadedConfig, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    loaded = with_parents("ppo", tmp_path_factory.mktemp("cramped"), undisturbed)
    assert runner.run("ppo", loaded, most_tokens=LITTLE_MEMORY) == 0, said(loaded)
    assert "Out of memory with ppo.microbatch_tokens" in said(loaded)
    return loaded


@pytest.mark.parametrize(
    "stop",
    [
        Stop("stages.ppo:Rounds.sampled", 1, "after"),
        Stop("stages.ppo:Rounds.save", 2, "after"),
        Stop("stages.update:Updater._step", 6),
        Stop("stages.update:Updater._step", 3, signal=signal.SIGTERM),
        Stop("stages.ppo:Checkpoints.save", 1, "after"),
    ],
    ids=str,
)
def test_a_run_that_ran_out_of_memory_ended(runner: Runner, cramped: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    ends_in_the_same_bytes(runner, cramped, "ppo", tmp_path / "run", stop, most_tokens=LITTLE_MEMORY)
