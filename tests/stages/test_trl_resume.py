"""SFT and reward training lose nothing: killed or stopped anywhere, they end in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import wait_for
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_ppo import publish_sft
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.config_file import LoadedConfig
from pipeline.errors import DivergenceError, OutOfMemoryError
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory, read_json
from stages import interruption, reward, sft
from stages.interruption import Interrupted
from stages.trl_trainer import StageTrainer
from stages.trl_training import TrainingReport, checkpoint_folder

ROOT = Path(__file__).parents[2]
RUN = {"sft": sft.run, "reward": reward.run}
TIMES = {"tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}

TRAINING = {
    "max_steps": 11,
    "batch_size": 4,
    "microbatch_size": 2,
    "max_length": 64,
    "learning_rate": 0.01,
    "checkpoint_every": 4,
    "log_every": 3,
}


def config(
    folder: Path, stage: str, run_name: str = "run", dropout: float = 0.1, rank: int = 4, **training: Any
) -> LoadedConfig:
    """A stage with dropout, whose lines of metrics, checkpoints and epochs (of 8 steps) do not all fall together."""
    settings = {stage: TRAINING | ({"calibration_prompts": 8} if stage == "reward" else {}) | training}
    overrides = ("deterministic=true", f"lora.dropout={dropout}", f"lora.rank={rank}", f"run_dir={folder / run_name}")
    loaded = tiny_config(folder, *overrides, **settings)
    if stage == "reward" and not RunDirectory(loaded.config.run_dir).stage("sft").exists():
        publish_sft(loaded)
    return loaded


def run(stage: str, loaded: LoadedConfig) -> None:
    RUN[stage](loaded, RunDirectory.open(loaded))


def result(stage: Any, loaded: LoadedConfig) -> dict[str, Any]:
    """All that a stage leaves behind, but for times and memory."""
    directory = RunDirectory(loaded.config.run_dir)
    manifest = read_json(directory.stage(stage) / "trivet.json")
    figures = [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_metrics(directory.metrics(stage))
    ]
    files = {path.name: path.read_bytes() for path in directory.stage(stage).iterdir() if path.name != "trivet.json"}
    kept = {key: manifest[key] for key in ("files", "metrics", "reward_gain", "reward_bias")}
    return {"files": files, "figures": figures, "manifest": kept}


class KilledHereError(Exception):
    """Stands for a kill: nothing of the stage runs any more."""


@contextmanager
def killed(event: str, step: int) -> Iterator[None]:
    """Within it, training dies at an event of this step."""

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KilledHereError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledHereError):
        patch.setattr(TrainingReport, event, die, raising=False)
        yield


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "packed": ("sft", {"packing": True}),
    "best": (
        "sft",
        {
            "checkpoint_every": 2,
            "keep_last": 1,
            # The highest loss is the best here, so that it is the first.
            "trl": {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
                "greater_is_better": True,
            },
        },
    ),
    # Of matrices of 4096 numbers on, the optimizer keeps bytes.
    "8 bits": ("sft", {"optimizer": "adamw_8bit", "rank": 64}),
    # The second epoch's order is drawn anew.
    "by length": ("sft", {"trl": {"train_sampling_strategy": "group_by_length"}}),
    "reward": ("reward", {}),
}


def test_tokens_of_another_process_are_in_no_rate(tmp_path: Path) -> None:
    loaded = config(tmp_path, "sft")
    with killed("on_step_begin", 4):
        run("sft", loaded)
    run("sft", loaded)
    rows = read_metrics(RunDirectory(loaded.config.run_dir).metrics("sft"))
    assert [(row["step"], "tokens_per_second" in row) for row in rows if "loss" in row] == [
        (3, True),
        (6, False),  # steps 5 and 6 alone had a time here
        (9, True),
        (11, True),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path, variant: str) -> None:
    stage, training = VARIANTS[variant]
    straight, broken = (config(tmp_path, stage, name, **training) for name in ("a", "b"))
    run(stage, straight)
    # Before the first checkpoint, right after one, between two, in the second epoch, and when all steps are done.
    for event, step in (("on_step_end", 2), ("on_step_begin", 4), ("on_step_end", 6), ("on_step_begin", 8)):
        with killed(event, step):
            run(stage, broken)
    with killed("on_train_end", 11):
        run(stage, broken)
    newest = checkpoint_folder(stage, RunDirectory(broken.config.run_dir)) / "00000011"  # type: ignore[arg-type]
    kinds = {tensor.dtype for tensor in load_file(newest / "optimizer.safetensors").values()}
    run(stage, broken)
    expected = result(stage, straight)
    if variant == "8 bits":
        assert torch.uint8 in kinds
    assert [row["step"] for row in expected["figures"] if "loss" in row] == [3, 6, 9, 11]
    assert result(stage, broken) == expected


@pytest.mark.parametrize("stage", RUN)
def test_a_checkpoint_holds_no_pickle(tmp_path: Path, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", lambda *_, **__: pytest.fail("torch.save"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    loaded = config(tmp_path, stage)
    with killed("on_step_begin", 5):
        run(stage, loaded)
    folder = checkpoint_folder(stage, RunDirectory(loaded.config.run_dir))
    (checkpoint,) = folder.iterdir()
    assert checkpoint.name == "00000004"
    assert {path.suffix for path in checkpoint.rglob("*")} == {".json", ".safetensors"}
    for path in checkpoint.glob("*.json"):
        json.loads(path.read_text())
    run(stage, loaded)
    assert not folder.exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = (config(tmp_path, "sft", name) for name in ("a", "b"))
    run("sft", straight)
    with killed("on_step_begin", 9):
        run("sft", broken)
    folder = checkpoint_folder("sft", RunDirectory(broken.config.run_dir))
    weights = folder / "00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    run("sft", broken)
    said = capsys.readouterr().out
    assert "00000008 is damaged (model.safetensors)" in said
    assert "Resuming after step 4 of 11." in said
    assert result("sft", broken) == result("sft", straight)


# -- real processes

BOTH_STAGES = """
import sys
from pipeline.config_file import load_config
from pipeline.run_directory import RunDirectory
from stages import reward, sft

loaded = load_config(sys.argv[1], sys.argv[2:])
run = RunDirectory.open(loaded)
for stage in (sft, reward):
    if not run.stage(stage.__name__.rpartition(".")[2]).exists():
        stage.run(loaded, run)
"""


def test_a_process_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    training = TRAINING | {"max_steps": 25, "checkpoint_every": 3, "log_every": 1}
    common, run_dir = ("deterministic=true", "lora.dropout=0.1"), f"run_dir={tmp_path / 'b'}"
    settings = {"sft": training, "reward": training | {"calibration_prompts": 8}}
    straight, broken = (tiny_config(tmp_path, *common, *more, **settings) for more in ((), (run_dir,)))
    directory = RunDirectory(broken.config.run_dir)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", BOTH_STAGES, str(broken.path), *common, run_dir]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    for stage, step in (("sft", 8), ("reward", 11)):
        process = start()
        metrics = directory.metrics(stage)  # type: ignore[arg-type]
        wait_for(
            lambda metrics=metrics, step=step, process=process: (  # type: ignore[misc]
                process.poll() is not None or len(read_metrics(metrics)) >= step
            ),
            f"step {step} of {stage}",
            300,
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert not directory.stage(stage).exists()  # type: ignore[arg-type]
    assert start().wait(300) == 0
    for stage in RUN:
        run(stage, straight)
        assert result(stage, broken) == result(stage, straight)


# -- signals


@pytest.fixture
def _no_request() -> Iterator[None]:
    yield
    interruption.withdraw()


@pytest.mark.usefixtures("_no_request")
@pytest.mark.parametrize("stage", RUN)
@pytest.mark.parametrize("where", ["end of step", "between microbatches"])
def test_a_stage_that_is_asked_to_stop_writes_a_checkpoint(tmp_path: Path, stage: Any, where: str) -> None:
    straight, broken = (config(tmp_path, stage, name) for name in ("a", "b"))
    run(stage, straight)
    method = "_check_step" if where == "end of step" else "_parts"
    own, calls = getattr(StageTrainer, method), []

    def ask(self: Any, *args: Any) -> Any:
        calls.append(None)
        if len(calls) == (7 if where == "end of step" else 15):  # the first microbatch of step 8
            interruption.request()
        return own(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageTrainer, method, ask)
        run(stage, broken)
    folder = checkpoint_folder(stage, RunDirectory(broken.config.run_dir))
    assert sorted(path.name for path in folder.iterdir()) == ["00000004", "00000007"]
    interruption.withdraw()
    run(stage, broken)
    assert result(stage, broken) == result(stage, straight)


# -- divergence


@pytest.mark.parametrize("stage", RUN)
@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(tmp_path: Path, stage: Any, quantity: str) -> None:
    """In the first of a step's two microbatches; the checkpoint before it serves when the cause is gone."""
    straight, broken = (config(tmp_path, stage, name) for name in ("a", "b"))
    run(stage, straight)
    kind = sft.PolicyTrainer if stage == "sft" else reward.PairTrainer
    compute_loss, calls = kind.compute_loss, []

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        calls.append(None)
        if len(calls) != 9:  # the first microbatch of step 5
            return loss
        if quantity == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss
        return loss + float("inf")  # of which the gradient is that of the loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "compute_loss", spoilt)
        with pytest.raises(DivergenceError, match=f"the {quantity} is not finite at step 5") as raised:
            run(stage, broken)
    assert raised.value.where == stage
    run(stage, broken)
    assert result(stage, broken) == result(stage, straight)


# -- out of memory


@contextmanager
def little_memory(tokens: int, where: str, since: int = 1) -> Iterator[None]:
    """From a call of the first layer on, more than so many tokens at once do not fit."""
    forward, calls = LlamaDecoderLayer.forward, []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def limited(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, hidden, *args, **kwargs)
        if self.self_attn.layer_idx == 0 and self.training:
            calls.append(None)
            if len(calls) >= since and hidden.shape[0] * hidden.shape[1] > tokens:
                fail() if where == "forward" else found.register_hook(fail)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", limited)
        yield


def memory_config(folder: Path, stage: str, run_name: str = "run", **training: Any) -> LoadedConfig:
    """SGD without a bound for the gradient, since Adam's first steps and clipping would hide a wrong scale."""
    training = {
        "batch_size": 8,
        "microbatch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optimizer": "sgd",
        "max_grad_norm": 1e9,
        "log_every": 1,
        "checkpoint_every": 1,
        "gradient_checkpointing": False,
    } | training
    return config(folder, stage, run_name, dropout=0.0, **training)


LIMITS = {"sft": ("sft", {}, 100), "packed": ("sft", {"packing": True}, 150), "reward": ("reward", {}, 200)}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("variant", LIMITS)
def test_a_microbatch_that_does_not_fit_is_halved(
    tmp_path: Path, variant: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, training, tokens = LIMITS[variant]
    straight, scarce = (memory_config(tmp_path, stage, name, **training) for name in ("a", "b"))
    run(stage, straight)
    capsys.readouterr()
    # The second microbatch of the second step, as the first one's learning rate is 0: there are gradients already.
    with little_memory(tokens, where, since=4):
        with killed("on_step_begin", 2):
            run(stage, scarce)
        assert f"Out of memory with {stage}.microbatch_size=4; going on with 2." in capsys.readouterr().out
        run(stage, scarce)
    assert "Out of memory" not in capsys.readouterr().out  # the checkpoint knows
    one, other = (
        load_file(RunDirectory(loaded.config.run_dir).stage(stage) / "adapter_model.safetensors")  # type: ignore[arg-type]
        for loaded in (straight, scarce)
    )
    # Float32 sums in another order; a gradient that was kept or lost would be off by tens of percent.
    assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3
    losses, expected = ([row["loss"] for row in result(stage, loaded)["figures"]] for loaded in (scarce, straight))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", RUN)
def test_where_one_row_does_not_fit_the_setting_to_lower_is_named(tmp_path: Path, stage: Any) -> None:
    loaded = memory_config(tmp_path, stage)
    with little_memory(10, "backward"), pytest.raises(OutOfMemoryError) as raised:
        run(stage, loaded)
    assert raised.value.where == f"{stage}.microbatch_size"
    assert f"set {stage}.max_length=" in str(raised.value)
    assert f"{stage}.gradient_checkpointing=true" in str(raised.value)


def test_an_error_of_another_kind_is_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    loaded = memory_config(tmp_path, "sft")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="of another kind"):
        patch.setattr(
            LlamaDecoderLayer, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("of another kind"))
        )
        run("sft", loaded)
