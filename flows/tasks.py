"""The stages as Prefect tasks: plain functions first, tasks made of them below.

Each runs its stage in processes of its own, or finds that the finished result is still current. The truth
about that is the stage's manifest on disk; Prefect's cache is off, so that there are not two truths. A result that
misses a gate of the config fails its task, so that the next stage does not start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, as_completed, wait
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.display import current_display
from flows.gates import require_passed
from flows.page import LiveProgress, bounded, page_only, show_curves
from flows.report import kept_up
from pipeline.config_file import load_config
from pipeline.errors import StageInterruptedError
from pipeline.progress import ProgressUpdate
from pipeline.run_directory import RunDirectory, StageName
from stages.interruption import StoppedInOrder
from stages.launch import StageDiedError, StageResult, ensure_stage
from stages.launcher_file import machine_rank_of
from stages.side_by_side import SideBySide

_SECONDS_BETWEEN_LOG_LINES = 60.0
_SECONDS_BEFORE_RETRIES = [10.0, 60.0]

Outcome = StageResult | State[StageResult]
"""A result; where an earlier one was current, inside the state that says so on Prefect's page."""

Started = StageResult | PrefectFuture[Outcome]
"""A stage that was submitted: finished, or still at work."""


@dataclass(frozen=True)
class Order:
    """What a run was asked for, as on the command line."""

    config: str
    overrides: tuple[str, ...] = ()
    force: bool = False
    beside: SideBySide | None = None
    """For stages that run at the same time. None: each one waits for the one before."""


def run_sft(order: Order) -> Outcome:
    """Stage 1: supervised fine-tuning on instructions."""
    return _run("sft", order)


def run_reward(order: Order, sft: StageResult | None = None) -> Outcome:
    """Stage 2: the reward model on preferences."""
    return _run("reward", order)


def run_ppo(order: Order, sft: StageResult | None = None, reward: StageResult | None = None) -> Outcome:
    """Stage 3: PPO from the SFT adapter against the reward."""
    return _run("ppo", order)


def run_evaluate(
    order: Order, sft: StageResult | None = None, reward: StageResult | None = None, ppo: StageResult | None = None
) -> Outcome:
    """Stage 4: the PPO policy against SFT on held-out prompts."""
    return _run("evaluate", order)


def worth_another_try(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a stage's process was killed while nobody watches: it resumes, and may get through."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageDiedError) and current_display() is None


class StageTask:
    """A stage as a task of the flow.

    Args:
        name: of the stage.
        function: runs it.
    """

    def __init__(self, name: StageName, function: Callable[..., Outcome]) -> None:
        self._task = task(
            name=name,
            cache_policy=NO_CACHE,
            retries=len(_SECONDS_BEFORE_RETRIES),
            retry_delay_seconds=_SECONDS_BEFORE_RETRIES,
            retry_condition_fn=worth_another_try,
        )(function)

    def __call__(self, order: Order, *parents: StageResult | None) -> StageResult:
        """Run the stage to its end."""
        result: StageResult = _settled(self._task(order, *parents))
        return result

    def submit(self, order: Order, *parents: Started | None) -> Started:
        """Run the stage beside what comes next where the order has stages side by side, else to its end."""
        return self._task.submit(order, *parents) if order.beside else _settled(self._task(order, *parents))


def finished(order: Order, *started: Started | None) -> tuple[Any, ...]:
    """Wait for stages that were submitted; what they hand on, None for one that the config does without.

    Raises:
        TrivetError: one of them failed; the others are asked to stop, and have stopped.
        StoppedInOrder: this process was asked to end, and all of them have stopped where they can go on.
    """
    futures = [one for one in started if isinstance(one, PrefectFuture)]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException as error:
        _stop(order, futures)
        if not isinstance(error, Exception) and all(_in_order(future) for future in futures):
            StoppedInOrder.happened = True
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise StoppedInOrder from None
        raise
    return tuple(_settled(one.result() if isinstance(one, PrefectFuture) else one) for one in started)


def _stop(order: Order, futures: list[PrefectFuture[Outcome]]) -> None:
    """Ask the stages to stop, and wait for their threads, whose stages a second signal ends at once."""
    assert order.beside is not None
    order.beside.stop()
    try:
        wait(futures)
    except BaseException:
        order.beside.stop()
        raise


def _in_order(future: PrefectFuture[Outcome]) -> bool:
    """Whether a stage is finished, or has stopped where the same command goes on."""
    end = future.result(raise_on_failure=False)
    return not isinstance(end, BaseException) or isinstance(end, StageInterruptedError)


def _settled(outcome: Any) -> Any:
    """A task's result, which is inside its state where an earlier one was current."""
    return outcome.result() if isinstance(outcome, State) else outcome


# The arguments that look unused draw the edges of the graph on Prefect's page.
train_sft = StageTask("sft", run_sft)
train_reward = StageTask("reward", run_reward)
train_ppo = StageTask("ppo", run_ppo)
evaluate = StageTask("evaluate", run_evaluate)


def _run(stage: StageName, order: Order) -> Outcome:
    log = get_run_logger()
    loaded = load_config(order.config, order.overrides)
    run = RunDirectory(loaded.config.run_dir)
    display = current_display()
    log_of_stage = run.log(stage, machine_rank_of(loaded.config.launch))
    with LiveProgress(stage, log).running() as live, kept_up(run.root, log.warning) as report:
        log_progress = _log_now_and_then(log.info)

        def on_progress(update: ProgressUpdate) -> None:
            live.show(update)
            report.look()
            (display.progress if display else log_progress)(update)

        result = ensure_stage(
            stage,
            loaded,
            force=order.force,
            on_line=log.info if display else bounded(log.info, log_of_stage),
            on_progress=on_progress,
            beside=order.beside,
        )
    with page_only(log):
        show_curves(stage, run)
    for verdict in require_passed(result, loaded.config):
        log.info("Gate passed: %s.", verdict.line)
    return Completed(name="Cached", message=result.reason, data=result) if result.cached else result


def _log_now_and_then(log: Callable[[str], None]) -> Callable[[ProgressUpdate], None]:
    """Progress as log lines, few enough for a log that is kept."""
    logged_at = time.monotonic()

    def on_progress(update: ProgressUpdate) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= _SECONDS_BETWEEN_LOG_LINES:
            logged_at = time.monotonic()
            log(update.line)

    return on_progress
