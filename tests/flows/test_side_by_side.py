"""SFT and the reward model at the same time in one run: real processes on the tiny model, and real signals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from real_runs import environment, no_process_with, wait_for
from tiny_models import tiny_config

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.run_directory import STAGES, RunDirectory, StageName, read_json
from stages.interruption import EXIT_INTERRUPTED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

APART = ("reward.start_from=base", "reward.calibrate_on=base")
ENDLESS = 100_000
"""Steps that no test waits for."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all runs: only the first has to make Prefect's database."""
    return tmp_path_factory.mktemp("cache")


def start(cache: Path, output: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment(cache), cwd=cache, stdout=file, stderr=subprocess.STDOUT)


def interval(run: RunDirectory, stage: StageName) -> tuple[float, float]:
    """When a stage's processes were started, and when its result was there."""
    header = re.match(r"--- (\S+) ", run.log(stage).read_text())
    assert header
    return datetime.fromisoformat(header[1]).timestamp(), (run.stage(stage) / "trivet.json").stat().st_mtime


def long_config(folder: Path, *stages: str) -> LoadedConfig:
    """A tiny config in which these stages do not end by themselves."""
    rows = {"batch_size": 4, "microbatch_size": 2, "max_length": 128, "log_every": 1}
    sections = {stage: rows | {"max_steps": ENDLESS if stage in stages else 2} for stage in ("sft", "reward")}
    apart = {"start_from": "base", "calibrate_on": "base", "calibration_prompts": 8}
    return tiny_config(
        folder,
        sft=sections["sft"],
        reward=sections["reward"] | apart,
        launch={"side_by_side": True},
        gates={"max_sft_loss": 0.001},
    )


def test_both_train_at_once_and_give_what_they_give_one_after_the_other(tmp_path: Path, cache: Path) -> None:
    loaded = tiny_config(tmp_path)
    together, apart = RunDirectory(tmp_path / "together"), RunDirectory(tmp_path / "apart")
    process = start(
        cache,
        tmp_path / "output",
        *("run", loaded.path, f"run_dir={together.root}", "launch.side_by_side=true", *APART),
    )
    assert process.wait(500) == 0, (tmp_path / "output").read_text()
    summary = read_json(together.summary)
    assert list(summary["stages"]) == ["sft", "reward", "ppo", "evaluate"]
    (sft_start, sft_end), (reward_start, reward_end) = (interval(together, stage) for stage in ("sft", "reward"))
    shared = min(sft_end, reward_end) - max(sft_start, reward_start)
    print(
        f"SFT took {sft_end - sft_start:.0f} s, the reward model {reward_end - reward_start:.0f}; at once {shared:.0f}"
    )
    assert shared > 0.5 * min(sft_end - sft_start, reward_end - reward_start)
    assert read_manifest(together.stage("reward")).parents == {}
    assert set(read_manifest(together.stage("ppo")).parents) == {"sft", "reward"}

    for stage in ("reward", "sft"):  # in the other order
        process = start(cache, tmp_path / "output", stage, loaded.path, f"run_dir={apart.root}", *APART)
        assert process.wait(300) == 0, (tmp_path / "output").read_text()
    assert interval(apart, "sft")[0] >= int(interval(apart, "reward")[1])
    for stage in ("sft", "reward"):
        one, other = (read_manifest(run.stage(stage)) for run in (together, apart))
        assert one.inputs_digest == other.inputs_digest
        assert one.files == other.files, "byte for byte"
        assert (one.reward_gain, one.reward_bias) == (other.reward_gain, other.reward_bias)
    assert no_process_with(f"XDG_CACHE_HOME={cache}")


def test_a_gate_that_one_misses_stops_the_other_in_order(tmp_path: Path, cache: Path) -> None:
    loaded = long_config(tmp_path, "reward")
    run = RunDirectory(loaded.config.run_dir)
    process = start(cache, tmp_path / "output", "run", loaded.path)
    assert process.wait(300) == 2, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text()
    assert "sft, gates.max_sft_loss: the run stops here: held-out loss" in said
    assert run.stage("sft").exists() and not run.stage("reward").exists() and not run.log("ppo").exists()
    assert "reward: stopped as asked" in run.log("reward").read_text()
    assert no_process_with(f"XDG_CACHE_HOME={cache}", 10)


def test_a_signal_lets_both_write_a_checkpoint_from_which_they_go_on(tmp_path: Path, cache: Path) -> None:
    loaded = long_config(tmp_path, "sft", "reward")
    run = RunDirectory(loaded.config.run_dir)
    stages: tuple[StageName, ...] = ("sft", "reward")

    def steps(stage: StageName) -> int:
        lines = run.metrics(stage).read_text().splitlines() if run.metrics(stage).exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def both_are_past(wanted: dict[StageName, int]) -> bool:
        assert process.poll() is None, (tmp_path / "output").read_text()
        return all(steps(stage) > wanted[stage] for stage in stages)

    reached = dict.fromkeys(stages, 3)
    for resumed in (0, 1):
        process = start(cache, tmp_path / "output", "run", loaded.path)
        wait_for(partial(both_are_past, reached), "both learn", 200, (tmp_path / "output").read_text)
        asked = time.monotonic()
        process.terminate()
        assert process.wait(60) == EXIT_INTERRUPTED, (tmp_path / "output").read_text()
        assert time.monotonic() - asked < 30
        for stage in stages:
            log = run.log(stage).read_text()
            assert log.count(f"{stage}: stopped as asked") == resumed + 1
            assert log.count("Resuming after") == resumed
        assert no_process_with(f"XDG_CACHE_HOME={cache}", 10)
        reached = {stage: steps(stage) for stage in stages}


def test_otherwise_the_stages_of_a_run_wait_for_its_one_device(tmp_path: Path, cache: Path) -> None:
    """From two terminals: neither is refused, and the device has one of them at a time."""
    loaded = tiny_config(tmp_path)
    run = RunDirectory(loaded.config.run_dir)
    outputs = {stage: tmp_path / f"{stage}.output" for stage in ("sft", "reward")}
    device = f"launch.device=device-of-{tmp_path.parent.name}-{tmp_path.name}"
    processes = [start(cache, output, stage, loaded.path, device, *APART) for stage, output in outputs.items()]
    codes = [process.wait(280) for process in processes]
    said = [output.read_text() for output in outputs.values()]
    assert codes == [0, 0], said
    assert sum("Waiting for the device" in text for text in said) == 1
    first, second = sorted((interval(run, stage) for stage in STAGES[:2]), key=lambda one: one[0])
    assert second[0] >= int(first[1])
