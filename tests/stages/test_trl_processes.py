"""SFT and reward training in two processes over gloo end where one process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch.testing import assert_close

from pipeline.artifacts import read_manifest
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory
from stages import reward, sft

ROOT = Path(__file__).parents[2]
BOTH_STAGES = """
import sys
import torch
from pipeline.config_file import load_config
from pipeline.run_directory import RunDirectory
from stages import reward, sft

torch.set_num_threads(1)
loaded = load_config(sys.argv[1])
run = RunDirectory.open(loaded)
for stage in (sft, reward):
    stage.run(loaded, run)
"""


def config(folder: Path):
    # SGD, since Adam's first steps would hide a wrong scale of the gradient.
    training = {"batch_size": 8, "microbatch_size": 2, "max_steps": 3, "learning_rate": 0.05, "optimizer": "sgd"}
    training |= {"max_length": 64, "log_every": 1}
    return tiny_config(folder, sft=training, reward=training | {"calibration_prompts": 8})


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RunDirectory]:
    """The run of one process, and that of two."""
    one, two = (config(tmp_path_factory.mktemp("processes") / name) for name in ("one", "two"))
    for stage in (sft, reward):
        stage.run(one, RunDirectory.open(one))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH_STAGES, str(two.path)],
            env=os.environ
            | address
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in running:
            process.kill()
    return RunDirectory(one.config.run_dir), RunDirectory(two.config.run_dir)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_train_the_adapter_that_one_trains(runs: tuple[RunDirectory, RunDirectory], stage) -> None:
    one, two = (load_file(run.stage(stage) / "adapter_model.safetensors") for run in runs)
    assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_write_one_result_with_the_same_figures(runs: tuple[RunDirectory, RunDirectory], stage) -> None:
    one, two = (read_manifest(run.stage(stage)).metrics for run in runs)
    assert two == pytest.approx(one, rel=1e-4) if stage == "sft" else set(two) == set(one)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert [row["step"] for row in read_metrics(runs[1].metrics(stage))] == [1, 2, 3]
