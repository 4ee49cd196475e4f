"""The whole job: supervised fine-tuning, a reward model, PPO against it, and the judgement (Ouyang et al. 2022).

trivet run CONFIG [key=value ...] [--force]
prefect deployment run rlhf/quickstart
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.approval import promote_policy
from flows.page import page_only, show_run
from flows.parameters import ConfigFile, Overrides
from flows.report import LiveReport
from flows.summary import write_summary
from flows.tasks import Order, evaluate, finished, train_ppo, train_reward, train_sft
from pipeline.config_file import load_config
from stages.preflight import require_good_input
from stages.side_by_side import SideBySide


def align(config: ConfigFile, overrides: Overrides = None, force: bool = False) -> dict[str, Any]:
    """Align the config's base model; returns what is also written to the run's summary.json.

    Args:
        config: path of the run's config; relative paths count from the project's folder.
        overrides: `key=value` settings on top of it.
        force: run every stage again, also those whose results are current.
    """
    started = datetime.now(UTC)
    loaded = load_config(config, overrides or ())
    settings = loaded.config
    order = Order(config, loaded.overrides, force, SideBySide() if settings.launch.side_by_side else None)
    require_good_input(loaded, warn=get_run_logger().warning)

    sft = train_sft.submit(order)
    start = sft if settings.reward_needs_sft else None
    reward = train_reward.submit(order, start) if settings.trains_reward_model else None
    sft, reward = finished(order, sft, reward)
    ppo = train_ppo(order, sft, reward)
    judgement = evaluate(order, sft, reward, ppo)

    summary = write_summary(loaded, [sft, reward, ppo, judgement], started)
    LiveReport(settings.run_dir, get_run_logger().warning).write()  # The summary is in it now.
    with page_only(get_run_logger()):
        show_run(summary)
    promote_policy(order, judgement)
    return summary


rlhf = flow(name="rlhf")(align)
