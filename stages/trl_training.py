"""What the two stages that TRL trains share: quiet libraries, checkpoints to resume from, progress and metrics."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import datasets
import huggingface_hub.constants
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pipeline.chat import ChatFormat
from pipeline.checkpoint import CheckpointFolder
from pipeline.config_file import LoadedConfig
from pipeline.distributed import World
from pipeline.errors import ConfigError, DivergenceError, TrivetError
from pipeline.memory import is_out_of_memory
from pipeline.metrics import MetricsWriter
from pipeline.progress import Progress, progress, say
from pipeline.run_directory import RunDirectory, StageName
from pipeline.trackers import TrackedMetrics
from pipeline.trl_options import TrainerStage
from stages.interruption import Interrupted, asked_of_any, deferred
from stages.trl_trainer import TRAINER_STATE

_NOT_A_METRIC = {"num_tokens", "eval_num_tokens", "total_flos"}
"""What TRL logs and counts from 0 again after a resume."""


def quiet_libraries() -> None:
    """Progress, warnings and usage statistics are ours to print, or not to send."""
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


def checkpoint_folder(stage: StageName, run: RunDirectory) -> Path:
    """Where the stage keeps what an interrupted run resumes from."""
    return run.working(stage) / "checkpoints"


def open_checkpoints(stage: StageName, loaded: LoadedConfig, run: RunDirectory, inputs_digest: str) -> CheckpointFolder:
    """The stage's checkpoints; those of other settings or data do not count."""
    settings = loaded.config.sft if stage == "sft" else loaded.config.reward
    return CheckpointFolder(checkpoint_folder(stage, run), inputs_digest=inputs_digest, keep_last=settings.keep_last)


@contextmanager
def taking_options(stage: TrainerStage, loaded: LoadedConfig) -> Iterator[None]:
    """A block that makes a trainer: what it says of TRL's own options becomes an error that names them.

    Raises:
        ConfigError: the trainer refuses what the pass-through asks for.
    """
    given = getattr(loaded.config, stage).trl
    try:
        yield
    except TrivetError:
        raise
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if not given or is_out_of_memory(error):
            raise
        raise ConfigError(
            f"the trainer does not take these options here: {type(error).__name__}: {error}",
            where=f"{stage}.trl",
            remedy=f"Change or remove one of {', '.join(sorted(given))}.",
        ) from error


def padding_tokenizer(chat: ChatFormat) -> Any:
    """A copy of the tokenizer that has a pad token, as TRL wants one; which one does not matter."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.eos_token_id)
    return tokenizer


class TrainingReport(TrainerCallback):  # type: ignore[misc]
    """Shows progress, writes the metrics file, and stops a training that is asked to stop or cannot be measured.

    A context manager: progress and file are closed however the training ends.

    Args:
        stage: whose training it is.
        loaded: the run's config.
        run: where its metrics go.
    """

    def __init__(self, stage: StageName, loaded: LoadedConfig, run: RunDirectory) -> None:
        self._stage, self._loaded, self._run = stage, loaded, run
        self._world, self._stopping = World(), False
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._writer: MetricsWriter | None = None
        self._tokens: float | None = None
        self._logged_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # What was done before a checkpoint took its time in another process: no rate until the next line.
        self._tokens = 0.0 if state.global_step == 0 else None
        self._logged_at = time.monotonic()
        self._progress = self._stack.enter_context(progress(state.max_steps, self._stage, done=state.global_step))
        if state.is_world_process_zero:
            self._writer = self._stack.enter_context(TrackedMetrics(self._stage, self._loaded, self._run))
            self._writer.truncate_after(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._progress is not None
        self._progress.advance()
        if state.global_step >= state.max_steps:
            control.should_log = True
        if asked_of_any(self._world):
            control.should_save = self._stopping = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stopping:
            raise Interrupted

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self._progress is not None and "loss" in logs:
            self._progress.advance(0, note=f"loss {logs['loss']:.4g}")
        if self._writer is not None and "train_runtime" not in logs:
            figures = {name: value for name, value in logs.items() if name not in _NOT_A_METRIC}
            if "num_tokens" in logs:
                now = time.monotonic()
                if self._tokens is not None:
                    seconds = max(now - self._logged_at, 1e-9)
                    figures["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / seconds
                self._tokens, self._logged_at = logs["num_tokens"], now
            self._writer.write(state.global_step, figures)
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise DivergenceError(
                f"the held-out loss is not finite at step {state.global_step}",
                where=self._stage,
                remedy=f"Lower {self._stage}.learning_rate; the stage then starts anew.",
            )


def train(trainer: Any, report: TrainingReport, checkpoints: CheckpointFolder) -> float:
    """Train, from the newest checkpoint on if there is one.

    Args:
        trainer: a `StageTrainer`, ready to go.
        report: where progress and metrics go.
        checkpoints: where to resume from, and where to keep what a later run resumes from.

    Returns:
        the mean training loss over all steps, those before an interruption included.

    Raises:
        DivergenceError, OutOfMemoryError: the last checkpoint is intact.
        Interrupted: the stage was asked to stop; it goes on from a checkpoint.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(report)
    trainer.checkpoints = checkpoints
    checkpoint = checkpoints.latest(warn=lambda text: say(f"warning: {text}"))
    folder = None if checkpoint is None else str(checkpoint.folder)
    reached = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE))
    if reached is not None:
        say(f"Resuming after step {reached.global_step} of {reached.max_steps}.")
    if reached is not None and reached.global_step >= reached.max_steps:
        # Interrupted after the last step, which transformers would follow with one more.
        trainer.state = reached
        trainer._load_from_checkpoint(folder)
    else:
        with deferred(), report:
            trainer.train(resume_from_checkpoint=folder)
    if trainer.args.load_best_model_at_end:
        trainer.load_best()
    total, last = 0.0, 0
    for entry in trainer.state.log_history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(1, last)
