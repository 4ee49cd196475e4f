"""A stage that is killed anywhere and started again ends with the bytes that an undisturbed one ends with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from resume.harness import Runner, Stop, leftovers, result_of, small_pipeline, with_parents

from pipeline.config_file import LoadedConfig
from pipeline.run_directory import STAGES

PPO = [
    # Each phase of an iteration: before, within and after.
    Stop("stages.ppo:check_startup"),
    Stop("stages.ppo:collect", 1),
    Stop("stages.ppo:collect", 3),
    Stop("pipeline.generation:_generate_batch", 2),
    Stop("pipeline.generation:_LogprobRecorder._record", 9),
    Stop("stages.experience:score_logprobs", 3),
    Stop("stages.experience:score_values", 2, "after"),
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
    Stop("stages.training_state:save_optimizer", 1),
    Stop("stages.training_state:save_optimizer", 3, "after"),
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

ASKED = [
    Stop("stages.ppo:load_base", signal=signal.SIGTERM),
    Stop("stages.ppo:collect", 1, signal=signal.SIGINT),
    Stop("stages.ppo:collect", 4, signal=signal.SIGTERM),
    Stop("pipeline.generation:_LogprobRecorder._record", 20, signal=signal.SIGTERM),
    Stop("stages.update:Updater._step", 2, signal=signal.SIGTERM),
    Stop("stages.update:Updater._policy_backward", 9, "after", signal=signal.SIGINT),
    Stop("stages.update:Updater._critic_backward", 10, signal=signal.SIGTERM),
    Stop("stages.ppo:measure_held_out", 1, signal=signal.SIGTERM),
    Stop("stages.ppo:Checkpoints.save", 1, signal=signal.SIGTERM),
    Stop("stages.ppo:finish", signal=signal.SIGTERM),
]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    started = Runner()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    loaded = small_pipeline(tmp_path_factory.mktemp("undisturbed"))
    for stage in STAGES:
        assert runner.run(stage, loaded) == 0, loaded.path.with_name("log").read_text()[-4000:]
    return loaded


@pytest.mark.parametrize("stop", PPO, ids=str)
def test_ppo_killed(runner: Runner, undisturbed: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    loaded = with_parents("ppo", tmp_path / "run", undisturbed)
    assert runner.run("ppo", loaded, stop) == -signal.SIGKILL, "the place was never reached"
    assert runner.run("ppo", loaded) == 0, loaded.path.with_name("log").read_text()[-4000:]
    assert result_of("ppo", loaded) == result_of("ppo", undisturbed)
    assert leftovers(loaded) == []


@pytest.mark.parametrize("stop", ASKED, ids=str)
def test_ppo_asked_to_stop(runner: Runner, undisturbed: LoadedConfig, tmp_path: Path, stop: Stop) -> None:
    loaded = with_parents("ppo", tmp_path / "run", undisturbed)
    assert runner.run("ppo", loaded, stop) == 75, loaded.path.with_name("log").read_text()[-4000:]
    assert runner.run("ppo", loaded) == 0, loaded.path.with_name("log").read_text()[-4000:]
    assert result_of("ppo", loaded) == result_of("ppo", undisturbed)
    assert leftovers(loaded) == []
