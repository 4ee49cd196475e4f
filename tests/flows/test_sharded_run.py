"""`trivet run` with the base shared out between two processes, as a user starts it; and what the death of one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from real_runs import environment, no_process_with, processes_with, wait_for
from tiny_models import tiny_config

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.metrics import read_metrics
from pipeline.run_directory import STAGES, RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SHARED_OUT = ("launch.processes=2", "launch.strategy=fsdp")
SECONDS_UNTIL_ALL_ARE_GONE = 90.0
"""Twice what the launcher and the supervisor give a process that does not answer before they kill it."""


def small(folder: Path, **settings: Any) -> LoadedConfig:
    training = {"batch_size": 4, "microbatch_size": 2, "max_length": 128, "log_every": 1, "max_steps": 2}
    settings.setdefault("sft", training)
    return tiny_config(folder, reward=training | {"calibration_prompts": 8}, **settings)


def start(cache: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    cache.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *map(str, arguments), *SHARED_OUT],
        env=environment(cache) | {"OMP_NUM_THREADS": "1"},
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_whole_run_on_a_shared_out_base(tmp_path: Path) -> None:
    loaded = small(tmp_path)
    run = RunDirectory(loaded.config.run_dir)
    said, _ = (process := start(tmp_path / "cache", "run", loaded.path)).communicate(timeout=600)
    assert process.returncode == 0, said
    summary = json.loads(run.summary.read_text())
    assert list(summary["stages"]) == list(STAGES)
    for stage in STAGES:
        read_manifest(run.stage(stage))  # verifies every file
        log = run.log(stage).read_text()
        assert "(2 process(es))" in log
        assert 45 < float(log.partition("each process holds ")[2].partition("% of its layers'")[0]) < 55
    assert set(summary["evaluation"]["win_rate"]) == {"reward_model", "gold"}
    assert no_process_with(f"XDG_CACHE_HOME={tmp_path / 'cache'}")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_dead_process_ends_the_stage_with_its_cause(tmp_path: Path, stage: Any) -> None:
    """One of two is killed between two of very many steps, amid what both do together."""
    loaded = small(
        tmp_path,
        sft={"batch_size": 4, "microbatch_size": 2, "max_length": 128, "log_every": 1, "max_steps": 100000},
        ppo={
            "iterations": 100000,
            "prompts_per_iteration": 4,
            "minibatch_size": 4,
            "max_new_tokens": 8,
            "rewards": [{"function": "tiny_data.py:share_of_a", "weight": 1.0}],
        },
    )
    run = RunDirectory.open(loaded)
    if stage == "ppo":
        from tiny_ppo import publish_sft

        publish_sft(loaded)
    cache = tmp_path / "cache"
    process = start(cache, stage, loaded.path)
    try:
        wait_for(
            lambda: (run.metrics(stage).exists() and len(read_metrics(run.metrics(stage))) >= 2) or process.poll(),
            "the second step",
            200,
            lambda: run.log(stage).read_text() if run.log(stage).exists() else "",
        )
        (victim,) = [
            number
            for number, line in processes_with(f"XDG_CACHE_HOME={cache}").items()
            if f"stages.{stage}" in line and "accelerate" not in line and rank_of(number) == "1"
        ]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        said, _ = process.communicate(timeout=SECONDS_UNTIL_ALL_ARE_GONE)
        print(f"{stage}: ended {time.monotonic() - killed:.1f} s after one process was killed")
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"a process of the {stage} stage was killed" in said, said
    assert no_process_with(f"XDG_CACHE_HOME={cache}", 10)
    assert not run.stage(stage).exists()


def rank_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(variable.partition("=")[::2] for variable in variables).get("RANK", "")
