"""The stages as Prefect tasks: plain functions first, tasks made of them below.

Each runs its stage in processes of its own, or finds that the finished result is still current. The truth
about that is the stage's manifest on disk; Prefect's cache is off, so that there are not two truths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from flows.display import current_display
from pipeline.config_file import load_config
from pipeline.progress import ProgressUpdate
from pipeline.run_directory import StageName
from stages.launch import StageResult, ensure_stage

_SECONDS_BETWEEN_LOG_LINES = 60.0


@dataclass(frozen=True)
class Order:
    """What a run was asked for, as on the command line."""

    config: str
    overrides: tuple[str, ...] = ()
    force: bool = False


def run_sft(order: Order) -> StageResult:
    """Stage 1: supervised fine-tuning on instructions."""
    return _run("sft", order)


def run_reward(order: Order, sft: StageResult) -> StageResult:
    """Stage 2: the reward model on preferences."""
    return _run("reward", order)


def run_ppo(order: Order, sft: StageResult, reward: StageResult | None) -> StageResult:
    """Stage 3: PPO from the SFT adapter against the reward."""
    return _run("ppo", order)


def run_evaluate(order: Order, sft: StageResult, reward: StageResult | None, ppo: StageResult) -> StageResult:
    """Stage 4: the PPO policy against SFT on held-out prompts."""
    return _run("evaluate", order)


# The arguments that look unused draw the edges of the graph on Prefect's page.
train_sft = task(name="sft", cache_policy=NO_CACHE)(run_sft)
train_reward = task(name="reward", cache_policy=NO_CACHE)(run_reward)
train_ppo = task(name="ppo", cache_policy=NO_CACHE)(run_ppo)
evaluate = task(name="evaluate", cache_policy=NO_CACHE)(run_evaluate)


def _run(stage: StageName, order: Order) -> StageResult:
    logger = get_run_logger()
    display = current_display()
    return ensure_stage(
        stage,
        load_config(order.config, order.overrides),
        force=order.force,
        on_line=logger.info,
        on_progress=display.progress if display else _log_now_and_then(logger.info),
    )


def _log_now_and_then(log: Callable[[str], None]) -> Callable[[ProgressUpdate], None]:
    """Progress as log lines, few enough for a log that is kept."""
    logged_at = time.monotonic()

    def on_progress(update: ProgressUpdate) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= _SECONDS_BETWEEN_LOG_LINES:
            logged_at = time.monotonic()
            log(update.line)

    return on_progress
