"""SFT and reward training in two processes over gloo end where one process ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from process_group import TESTS, run_together
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch import Tensor
from torch.testing import assert_close
from two_trainings import FEW

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.metrics import MetricsRow, read_metrics
from pipeline.run_directory import RunDirectory
from stages import reward, sft


def config(folder: Path, *overrides: str) -> LoadedConfig:
    # SGD without clipping: that, and Adam's first steps, would hide a wrong scale of the gradient.
    # The fourth step has the five rows that are left of 29, so that a process has fewer than the other.
    training = {"batch_size": 8, "microbatch_size": 2, "max_steps": 5, "learning_rate": 0.05, "optimizer": "sgd"}
    training |= {"max_length": 64, "log_every": 1, "max_grad_norm": 1e9}
    # Eleven held-out rows and nine prompts for the calibration: neither is a multiple of the processes.
    sources = {"instructions": "demonstrations", "preferences": "comparisons", "prompts": "prompts"}
    data = {kind: {"sources": [f"tiny_data.py:{name}"], "held_out": 0.3} for kind, name in sources.items()}
    return tiny_config(folder, *overrides, data=data, sft=training, reward=training | {"calibration_prompts": 9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two leave behind; started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("processes")
    one = config(folder, f"run_dir={folder / 'one'}")
    for stage in (sft, reward):
        stage.run(one, RunDirectory.open(one))
        stage.run(few := config(folder, f"run_dir={folder / 'few-one'}", *FEW), RunDirectory.open(few))
    run_together(TESTS / "two_trainings.py", folder)
    return folder


@pytest.fixture
def runs(folder: Path) -> tuple[RunDirectory, RunDirectory]:
    """The run of one process, and that of two."""
    return RunDirectory(folder / "one"), RunDirectory(folder / "two")


def adapter(run: RunDirectory, stage: Any = "sft") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(run.stage(stage) / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_train_the_adapter_that_one_trains(runs: tuple[RunDirectory, RunDirectory], stage) -> None:
    one, two = (adapter(run, stage) for run in runs)
    assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_process_that_never_has_a_row_takes_no_part(folder: Path, stage: Any) -> None:
    one, two = (RunDirectory(folder / f"few-{name}") for name in ("one", "two"))
    assert read_manifest(one.stage(stage)).metrics["rows" if stage == "sft" else "pairs"] == 1
    assert_close(adapter(two, stage), adapter(one, stage), rtol=1e-4, atol=1e-6)
    assert figures(two, stage) == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in figures(one, stage)]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_write_one_result_with_the_same_figures(runs: tuple[RunDirectory, RunDirectory], stage) -> None:
    one, two = (read_manifest(run.stage(stage)).metrics for run in runs)
    assert one["held_out_rows" if stage == "sft" else "held_out_pairs"] == 11
    assert two == pytest.approx(one, rel=1e-4) if stage == "sft" else set(two) == set(one)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    lines, wanted = (figures(run, stage) for run in (runs[1], runs[0]))
    assert [row["step"] for row in wanted] == [1, 2, 3, 4, 5]
    assert lines == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in wanted]


def test_processes_stop_together_and_go_on_to_the_same_bytes(folder: Path) -> None:
    assert [(folder / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["00000002"] * 2
    straight, stopped = (RunDirectory(folder / name) for name in ("straight", "stopped"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (stopped.stage("sft") / name).read_bytes() == (straight.stage("sft") / name).read_bytes()
    assert read_manifest(stopped.stage("sft")).metrics == read_manifest(straight.stage("sft")).metrics
    assert figures(stopped) == figures(straight)


def figures(run: RunDirectory, stage: Any = "sft") -> list[MetricsRow]:
    rows = read_metrics(run.metrics(stage))
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_a_process_that_runs_out_of_memory_tries_again_while_the_others_wait(folder: Path) -> None:
    assert (folder / "ran-out").exists()
    scarce, two = adapter(RunDirectory(folder / "scarce")), adapter(RunDirectory(folder / "two"))
    assert_close(scarce, two, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_in_one_process_stops_both(folder: Path) -> None:
    said = [(folder / f"diverged-{rank}").read_text() for rank in (0, 1)]
    assert said == ["the loss is not finite at step 2"] * 2
