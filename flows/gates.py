"""The gates between stages: what a stage must have reached before the next one spends time.

Thresholds come from the config's `gates` section. An estimate has to pass with its pessimistic end: a rate with the
lower bound of its 95% interval, a KL with the upper one where there is an interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import PipelineConfig
from pipeline.errors import GateError
from pipeline.run_directory import StageName
from stages.launch import StageResult


@dataclass(frozen=True)
class Verdict:
    """One gate: the setting that holds the threshold, what was measured against it, and which side is the good one."""

    setting: str
    figure: str
    value: float
    threshold: float
    wanted: Literal["at most", "at least"]

    @property
    def passed(self) -> bool:
        """Whether the figure is on the good side; a figure that is not a number never is."""
        return self.value <= self.threshold if self.wanted == "at most" else self.value >= self.threshold

    @property
    def line(self) -> str:
        """`held-out loss 2.31, wanted at most 2`."""
        return f"{self.figure} {self.value:.4g}, wanted {self.wanted} {self.threshold:g}"


def verdicts(result: StageResult, config: PipelineConfig) -> Iterator[Verdict]:
    """The gates that a result stands at."""
    return verdicts_on(result.stage, result.metrics, config)


def verdicts_on(stage: StageName, metrics: Mapping[str, Any], config: PipelineConfig) -> Iterator[Verdict]:
    """The gates that a stage's figures stand at; none where the config sets no threshold for it."""
    gates = config.gates
    if stage == "sft" and gates.max_sft_loss is not None:
        loss = metrics.get("held_out_loss_after")
        yield Verdict("gates.max_sft_loss", "held-out loss", _number(loss), gates.max_sft_loss, "at most")
    if stage == "reward" and gates.min_reward_accuracy is not None:
        low = metrics["held_out_accuracy"]["low"]
        figure = "lower bound of the accuracy on held-out pairs"
        yield Verdict("gates.min_reward_accuracy", figure, _number(low), gates.min_reward_accuracy, "at least")
    if stage == "ppo" and gates.max_kl is not None:
        kl = metrics["kl/policy_reference_k1"]
        yield Verdict(
            "gates.max_kl", "KL of the last round to SFT, in nats an answer,", _number(kl), gates.max_kl, "at most"
        )
    if stage == "evaluate":
        yield from _of_the_evaluation(metrics, config)


def _of_the_evaluation(metrics: Mapping[str, Any], config: PipelineConfig) -> Iterator[Verdict]:
    gates = config.gates
    if gates.max_kl is not None:
        figure = "upper bound of the KL to SFT on held-out prompts, in nats an answer,"
        yield Verdict("gates.max_kl", figure, _number(metrics["kl"]["high"]), gates.max_kl, "at most")
    if gates.min_win_rate is not None:
        judge = config.gate_judge
        figure = f"lower bound of the win rate against SFT by {judge}"
        low = metrics["win_rate"].get(judge, {}).get("low")
        yield Verdict("gates.min_win_rate", figure, _number(low), gates.min_win_rate, "at least")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def require_passed(result: StageResult, config: PipelineConfig) -> list[Verdict]:
    """The gates that the stage has passed.

    Raises:
        GateError: a figure misses its threshold; all of those that do are named.
    """
    found = list(verdicts(result, config))
    missed = [verdict for verdict in found if not verdict.passed]
    if missed:
        raise GateError(
            "the run stops here: " + "; ".join(verdict.line for verdict in missed),
            where=f"{result.stage}, {', '.join(verdict.setting for verdict in missed)}",
            remedy=f"Look into {result.path} and its curves, then change the data or the settings, or the threshold;"
            " the same command goes on from here.",
        )
    return found
