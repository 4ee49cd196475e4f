"""What the two stages that TRL trains share: quiet libraries, checkpoints to resume from, progress and metrics."""

from __future__ import annotations

import copy
import math
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import datasets
import huggingface_hub.constants
import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pipeline.artifacts import digest
from pipeline.base_model import Base, fingerprint
from pipeline.chat import ChatFormat
from pipeline.config_file import LoadedConfig
from pipeline.errors import BaseModelError, DivergenceError
from pipeline.metrics import MetricsWriter
from pipeline.progress import Progress, is_main_process, progress
from pipeline.run_directory import RunDirectory, StageName, read_json, write_json
from stages.inputs import stage_inputs

_NOT_A_METRIC = {"num_tokens", "eval_num_tokens", "total_flos"}
"""What TRL logs and counts from 0 again after a resume."""
_LAST_FILE = "trainer_state.json"
"""What transformers writes into a checkpoint when the rest is there."""


def quiet_libraries() -> None:
    """Progress, warnings and usage statistics are ours to print, or not to send."""
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


def checkpoint_folder(stage: StageName, run: RunDirectory) -> Path:
    """Where the stage keeps what an interrupted run resumes from."""
    return run.working(stage) / "checkpoints"


def find_checkpoint(stage: StageName, loaded: LoadedConfig, run: RunDirectory) -> Path | None:
    """The newest whole checkpoint of an interrupted run of the same stage with the same inputs.

    Checkpoints that belong to other settings or data are removed. Every process calls it.
    """
    folder, note = checkpoint_folder(stage, run), run.working(stage) / "inputs.json"
    inputs = {"inputs_digest": digest(stage_inputs(stage, loaded.config, run))}
    with PartialState().main_process_first():
        if is_main_process():
            try:
                current = read_json(note) == inputs
            except (OSError, ValueError):
                current = False
            if not current:
                shutil.rmtree(run.working(stage), ignore_errors=True)
                write_json(note, inputs)
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file is there and readable; a killed process leaves it out or torn."""
    try:
        return int(read_json(checkpoint / _LAST_FILE)["global_step"]) == _step(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def padding_tokenizer(chat: ChatFormat) -> Any:
    """A copy of the tokenizer that has a pad token, as TRL wants one; which one does not matter."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.eos_token_id)
    return tokenizer


def require_unchanged_base(base: Base, before: str) -> None:
    """Refuse to go on where training touched the base.

    Raises:
        BaseModelError: its fingerprint is another than before.
    """
    after = fingerprint(base.model)
    if after != before:
        raise BaseModelError(
            f"the base changed during training (fingerprint {before[:12]} before, {after[:12]} after)",
            where=f"base.model={base.identity.model}",
            remedy="The adapter is not kept. This is a fault in trivet or in a library below it; please report it.",
        )


class WithoutModelCard:
    """Put before a trainer of TRL's: its checkpoints are working files, which nobody publishes."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""


class TrainingReport(TrainerCallback):  # type: ignore[misc]
    """Shows progress, writes the metrics file, and stops a training that diverges.

    A context manager: progress and file are closed however the training ends.

    Args:
        stage: whose training it is.
        run: where its metrics go.
    """

    def __init__(self, stage: StageName, run: RunDirectory) -> None:
        self._stage, self._run = stage, run
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._writer: MetricsWriter | None = None
        self._tokens, self._logged_at = 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged_at = time.monotonic()
        self._progress = self._stack.enter_context(progress(state.max_steps, self._stage, done=state.global_step))
        if state.is_world_process_zero:
            self._writer = self._stack.enter_context(MetricsWriter(self._run.metrics(self._stage)))
            self._writer.truncate_after(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise DivergenceError(
                f"the gradient is not finite at step {state.global_step + 1}",
                where=self._stage,
                remedy=f"Lower {self._stage}.learning_rate or {self._stage}.max_grad_norm, or look at the rows of the"
                " step. The last checkpoint is intact.",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._progress is not None
        self._progress.advance()
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self._progress is not None and "loss" in logs:
            self._progress.advance(0, note=f"loss {logs['loss']:.4g}")
        if self._writer is not None and "train_runtime" not in logs:
            figures = {name: value for name, value in logs.items() if name not in _NOT_A_METRIC}
            if "num_tokens" in logs:
                now = time.monotonic()
                figures["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / max(now - self._logged_at, 1e-9)
                self._tokens, self._logged_at = logs["num_tokens"], now
            self._writer.write(state.global_step, figures)


def train(trainer: Any, report: TrainingReport, checkpoint: Path | None) -> float:
    """Train, from the checkpoint on if there is one.

    Args:
        trainer: TRL's trainer, ready to go.
        report: where progress and metrics go.
        checkpoint: the folder to resume from.

    Returns:
        the mean training loss over all steps, those before an interruption included.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(report)
    reached = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / _LAST_FILE))
    if checkpoint is not None and reached is not None and reached.global_step >= reached.max_steps:
        # Interrupted after the last step, which transformers would follow with one more.
        trainer.state = reached
        trainer._load_from_checkpoint(str(checkpoint))
        if trainer.args.load_best_model_at_end:
            trainer._load_best_model()
    else:
        with report:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    total, last = 0.0, 0
    for entry in trainer.state.log_history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(1, last)
