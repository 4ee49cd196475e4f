"""The whole job: supervised fine-tuning, a reward model, PPO against it, and the judgement (Ouyang et al. 2022).

trivet run CONFIG [key=value ...] [--force]
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import flow

from flows.summary import write_summary
from flows.tasks import Order, evaluate, train_ppo, train_reward, train_sft
from pipeline.config_file import load_config
from stages.preflight import require_good_input


def align(config: str, overrides: list[str] | None = None, force: bool = False) -> dict[str, Any]:
    """Align the config's base model; returns what is also written to the run's summary.json.

    Args:
        config: path of the run's config.
        overrides: `key=value` settings on top of it.
        force: run every stage again, also those whose results are current.
    """
    started = datetime.now(UTC)
    order = Order(config, tuple(overrides or ()), force)
    loaded = load_config(config, order.overrides)
    require_good_input(loaded)

    sft = train_sft(order)
    reward = train_reward(order, sft) if loaded.config.trains_reward_model else None
    ppo = train_ppo(order, sft, reward)
    judgement = evaluate(order, sft, reward, ppo)

    return write_summary(loaded, [sft, reward, ppo, judgement], started)


rlhf = flow(name="rlhf")(align)
