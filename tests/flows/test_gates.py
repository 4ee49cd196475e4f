"""The gates between stages: which figure stands at which, and on which side of it a run stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finished_stages import METRICS, light_config

from flows.gates import require_passed, verdicts
from pipeline.config_file import load_config
from pipeline.errors import GateError
from stages.launch import StageResult

RATE = {"value": 0.75, "low": 0.6, "high": 0.86, "n": 40}
FIGURES: dict[str, dict[str, Any]] = METRICS | {
    "ppo": {"kl/policy_reference_k1": 7.0},
    "evaluate": {"kl": {"value": 5.0, "low": 4.0, "high": 6.0}, "win_rate": {"gold": RATE, "reward_model": RATE}},
}


def result(stage: str, **figures: Any) -> StageResult:
    metrics = FIGURES[stage] | figures
    return StageResult(stage, f"runs/x/{stage}", "d", 1.0, 1, metrics, cached=False, reason="")  # type: ignore[arg-type]


def settings(folder: Path, *overrides: str) -> Any:
    return load_config(light_config(folder), overrides).config


@pytest.mark.parametrize(
    ("stage", "passing", "missing", "figure"),
    [
        ("sft", "max_sft_loss=2.5", "max_sft_loss=2.49", "held-out loss 2.5, wanted at most 2.49"),
        ("reward", "min_reward_accuracy=0.6", "min_reward_accuracy=0.61", "held-out pairs 0.6, wanted at least 0.61"),
        ("ppo", "max_kl=7", "max_kl=6.9", "nats an answer, 7, wanted at most 6.9"),
        ("evaluate", "max_kl=6", "max_kl=5.9", "upper bound of the KL to SFT on held-out prompts"),
        ("evaluate", "min_win_rate=0.6", "min_win_rate=0.61", "win rate against SFT by reward_model 0.6"),
    ],
)
def test_the_pessimistic_end_decides(tmp_path: Path, stage: str, passing: str, missing: str, figure: str) -> None:
    (verdict,) = require_passed(result(stage), settings(tmp_path, f"gates.{passing}"))
    assert verdict.passed
    with pytest.raises(GateError) as caught:
        require_passed(result(stage), settings(tmp_path, f"gates.{missing}"))
    assert figure in str(caught.value)
    assert f"gates.{missing.partition('=')[0]}" in str(caught.value)
    assert f"runs/x/{stage}" in (caught.value.remedy or "")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate"])
def test_without_thresholds_there_is_no_gate(tmp_path: Path, stage: str) -> None:
    assert list(verdicts(result(stage), settings(tmp_path))) == []


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_figure_that_is_none_does_not_pass(tmp_path: Path, loss: float | None) -> None:
    with pytest.raises(GateError):
        require_passed(result("sft", held_out_loss_after=loss), settings(tmp_path, "gates.max_sft_loss=9"))


def test_all_missed_gates_are_named(tmp_path: Path) -> None:
    with pytest.raises(GateError) as caught:
        require_passed(result("evaluate"), settings(tmp_path, "gates.max_kl=1", "gates.min_win_rate=0.9"))
    assert caught.value.where == "evaluate, gates.max_kl, gates.min_win_rate"


def test_the_named_judge_counts(tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def gold(prompts, completions): return [0.0] * len(prompts)\n")
    low = RATE | {"low": 0.1}
    figures = result("evaluate", win_rate={"gold": RATE, "reward_model": low})
    gold = ("gates.min_win_rate=0.5", "evaluate.gold=gold.py:gold")
    assert require_passed(figures, settings(tmp_path, *gold))
    with pytest.raises(GateError, match="by reward_model"):
        require_passed(figures, settings(tmp_path, *gold, "gates.judge=reward_model"))
