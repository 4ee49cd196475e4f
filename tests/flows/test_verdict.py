"""Better or not: the verdict follows the interval, and says what to keep in mind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from finished_stages import light_config, publish
from reported_run import answers, judged, lines, whole_run

from flows.verdict import verdict_of
from pipeline.config_file import load_config
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_run
from pipeline.statistics import mean_interval


def evaluated(
    folder: Path, figures: Mapping[str, Any], rows: list[dict[str, Any]] | None = None, **settings: Any
) -> Any:
    """The verdict on an evaluation with these figures."""
    loaded = load_config(light_config(folder, **settings))
    run = RunDirectory.open(loaded)
    for stage in ("sft", "reward", "ppo"):
        publish(stage, loaded, run)  # type: ignore[arg-type]
    publish("evaluate", loaded, run, metrics=figures, files={"answers.jsonl": lines(rows)} if rows else None)
    return verdict_of(read_run(run.root))


def rate(low: float, value: float, high: float, n: int = 100) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n, "wins": 5, "ties": 1, "losses": 4}


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((0.51, 0.6, 0.7), "better"),
        ((0.5, 0.6, 0.7), "unclear"),
        ((0.3, 0.4, 0.49), "worse"),
        ((0.3, 0.4, 0.6), "unclear"),
    ],
)
def test_the_verdict_is_the_interval_s(tmp_path: Path, interval: tuple[float, float, float], outcome: str) -> None:
    verdict = evaluated(tmp_path, {"n": 100, "win_rate": {"gold": rate(*interval)}})
    assert verdict.outcome == outcome
    assert f"{outcome}: {interval[1]:.2f} [{interval[0]:.2f}, {interval[2]:.2f}] of 100 prompts" in verdict.line
    assert f"{100 * interval[0]:.0f}% to {100 * interval[2]:.0f}%" in verdict.sentence


def test_gold_decides_and_the_others_are_told(tmp_path: Path) -> None:
    figures = {
        "win_rate": {"polite": rate(0.6, 0.7, 0.8), "reward_model": rate(0.8, 0.9, 1.0), "gold": rate(0.2, 0.3, 0.4)}
    }
    verdict = evaluated(tmp_path, figures)
    assert verdict.judgement.judge == "gold" and verdict.outcome == "worse"
    assert [one.judge for one in verdict.others] == ["reward_model", "polite"]
    (caution,) = [caution for caution in verdict.cautions if "the reward may be exploited" in caution]
    assert "PPO wins by the reward model and polite" in caution
    assert "not by the gold measure (0.30 [0.20, 0.40] of 100 prompts)" in caution


@pytest.mark.parametrize(
    ("rates", "deciding", "said"),
    [
        (  # the config lets the reward model decide
            {"reward_model": rate(0.8, 0.9, 1.0), "gold": rate(0.2, 0.3, 0.4)},
            "reward_model",
            ["The reward model is what PPO was trained to please.", "not by the gold measure (0.30 [0.20, 0.40]"],
        ),
        (
            {"reward_model": rate(0.8, 0.9, 1.0), "gold": rate(0.6, 0.7, 0.8)},
            "reward_model",
            ["The reward model is what PPO was trained to please."],
        ),
        (
            {"reward_model": rate(0.8, 0.9, 1.0)},
            None,
            ["trained to please; an independent measure (evaluate.gold, evaluate.judges) would tell more."],
        ),
        (
            {"gold": rate(0.6, 0.7, 0.8), "other": rate(0.3, 0.4, 0.49), "reward_model": rate(0.8, 0.9, 1.0)},
            None,
            ["PPO wins by the reward model, which it was trained to please, and not by other (0.40 [0.30, 0.49]"],
        ),
        (
            {"gold": rate(0.6, 0.7, 0.8), "other": rate(0.4, 0.5, 0.6), "reward_model": rate(0.3, 0.4, 0.6)},
            None,
            ["other does not say better: 0.50 [0.40, 0.60] of 100 prompts."],
        ),
        ({"gold": rate(0.6, 0.7, 0.8), "other": rate(0.6, 0.7, 0.8), "reward_model": rate(0.8, 0.9, 1.0)}, None, []),
        ({"gold": rate(0.2, 0.3, 0.4), "reward_model": rate(0.2, 0.3, 0.4)}, None, []),
    ],
)
def test_a_judge_of_another_mind_is_named_with_its_figure(
    tmp_path: Path, rates: dict[str, Any], deciding: str | None, said: list[str]
) -> None:
    (tmp_path / "gold.py").write_text("def gold(prompts, completions): return [0.0] * len(prompts)\n")
    settings = {"gates": {"judge": deciding, "min_win_rate": 0.5}} if deciding else {}
    figures = {"win_rate": rates, "judges": {"other": {"reward_run": "runs/other"}}}
    cautions = evaluated(tmp_path, figures, evaluate={"gold": "gold.py:gold"}, **settings).cautions
    assert len(cautions) == len(said), cautions
    for wanted, caution in zip(said, cautions, strict=True):
        assert wanted in caution


def test_a_judge_that_training_saw_is_no_proof(tmp_path: Path) -> None:
    verdict = evaluated(tmp_path, {"win_rate": {"reward_model": rate(0.8, 0.9, 1.0)}})
    assert any("trained to please" in caution for caution in verdict.cautions)
    assert not whole_cautions(tmp_path / "gold")


def whole_cautions(folder: Path) -> list[str]:
    return list(verdict_of(read_run(whole_run(folder).config.run_dir)).cautions)


def test_few_prompts_and_longer_answers_are_told(tmp_path: Path) -> None:
    lengths = {
        name: {"length": {"value": value, "low": 1, "high": 99, "n": 9}} for name, value in (("sft", 20), ("ppo", 60))
    }
    verdict = evaluated(tmp_path, {"win_rate": {"gold": rate(0.6, 0.8, 0.9, n=9)}, "response": lengths})
    assert "Only 9 prompts" in verdict.cautions[0]
    assert "from 20 to 60 tokens" in verdict.cautions[1]


def test_the_difference_is_taken_prompt_by_prompt(tmp_path: Path) -> None:
    rows = answers(50)
    found = evaluated(tmp_path, judged(rows), rows).judgement.difference
    gaps = [row["scores"]["gold"]["ppo"] - row["scores"]["gold"]["sft"] for row in rows]
    assert found == mean_interval(gaps)
    rows[3]["scores"]["gold"]["ppo"] = None
    rows[4]["scores"] = "none"
    rows[5]["scores"]["gold"] = {"ppo": 1e308, "sft": -1e308}
    assert evaluated(tmp_path / "gaps", judged(answers(50)), rows).judgement.difference.n == 47


def test_the_config_can_name_the_judge(tmp_path: Path) -> None:
    figures = {"win_rate": {"gold": rate(0.2, 0.3, 0.4), "reward_model": rate(0.8, 0.9, 1.0)}}
    gates = {"judge": "reward_model", "min_win_rate": 0.5}
    (tmp_path / "gold.py").write_text("def gold(prompts, completions): return [0.0] * len(prompts)\n")
    evaluate = {"gold": "gold.py:gold"}
    assert evaluated(tmp_path, figures, gates=gates, evaluate=evaluate).judgement.judge == "reward_model"


@pytest.mark.parametrize("figures", [{}, {"win_rate": None}, {"win_rate": {"gold": {"value": "x"}}}])
def test_without_figures_nothing_is_claimed(tmp_path: Path, figures: dict[str, Any]) -> None:
    verdict = evaluated(tmp_path, figures)
    assert (verdict.outcome, verdict.headline) == ("open", "Not judged yet")


def test_an_unfinished_run_says_what_it_is_at(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    assert verdict_of(read_run(run.root)).headline == "Not judged yet"
    with run.locked("sft", warn=print):
        assert verdict_of(read_run(run.root)).headline == "sft is at work"
    run.working("sft").mkdir(parents=True)
    assert verdict_of(read_run(run.root)).headline == "sft was interrupted"


def test_a_judge_that_the_config_names_comes_before_those_that_training_saw(tmp_path: Path) -> None:
    figures = {
        "win_rate": {"reward_model": rate(0.8, 0.9, 1.0), "other": rate(0.3, 0.4, 0.49), "polite": rate(0.6, 0.7, 0.8)},
        "judges": {"other": {"reward_run": "runs/other"}},
    }
    verdict = evaluated(tmp_path, figures)
    assert (verdict.judgement.judge, verdict.outcome) == ("other", "worse")
    assert [one.judge for one in verdict.others] == ["reward_model", "polite"]
    assert any("not by other (0.40" in caution and "may be exploited" in caution for caution in verdict.cautions)
    figures["win_rate"]["gold"] = rate(0.51, 0.6, 0.7)
    assert evaluated(tmp_path / "gold", figures).judgement.judge == "gold"


@pytest.mark.parametrize(("low", "told"), [(0.45, True), (0.51, False)])
def test_a_gain_that_may_be_length_is_told(tmp_path: Path, low: float, told: bool) -> None:
    fair = {"gold": {"value": 0.55, "low": low, "high": 0.65, "n": 100}}
    figures = {"win_rate": {"gold": rate(0.6, 0.7, 0.8)}, "length_controlled_win_rate": fair}
    verdict = evaluated(tmp_path, figures)
    assert verdict.judgement.length_controlled.low == low
    assert f"between answers of equal length for 55% ({100 * low:.0f}% to 65%)" in verdict.sentence
    assert any("equal length" in caution and "0.55" in caution for caution in verdict.cautions) == told


def test_questions_that_a_judge_did_not_answer_are_told(tmp_path: Path) -> None:
    about = {"asked": 100, "answered": 90, "errors": {"HTTP 500: overloaded": 10}}
    figures = {"win_rate": {"gold": rate(0.6, 0.7, 0.8)}, "judges": {"big": {"endpoint": "e", "against_sft": about}}}
    cautions = evaluated(tmp_path, figures).cautions
    assert any("big answered only 90 of 100 questions: HTTP 500: overloaded." in caution for caution in cautions)
    about["errors"] = {}
    assert not any("answered only" in caution for caution in evaluated(tmp_path / "all", figures).cautions)
