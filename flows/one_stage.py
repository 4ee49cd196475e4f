"""Each stage as a flow of its own, for deployments that run or schedule one of them.

trivet ppo CONFIG [key=value ...] [--force]
prefect deployment run ppo/quickstart
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Flow, flow

from flows.parameters import ConfigFile, Overrides
from flows.tasks import Order, evaluate, train_ppo, train_reward, train_sft
from pipeline.run_directory import StageName
from stages.launch import StageResult


def _as_flow(name: StageName, stage: Callable[[Order], StageResult]) -> Flow[..., dict[str, Any]]:
    def run(config: ConfigFile, overrides: Overrides = None, force: bool = False) -> dict[str, Any]:
        """Run one stage; those before it must have results. Returns its figures.

        Args:
            config: path of the run's config; relative paths count from the project's folder.
            overrides: `key=value` settings on top of it.
            force: run the stage again although its result is current.
        """
        return dict(stage(Order(config, tuple(overrides or ()), force)).metrics)

    return flow(name=name)(run)


sft = _as_flow("sft", train_sft)
reward = _as_flow("reward", train_reward)
ppo = _as_flow("ppo", train_ppo)
judgement = _as_flow("evaluate", evaluate)
