"""What the policy answered while it learned, and what the gold measure says of it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tiny_models import tiny_config
from tiny_ppo import publish_reward, publish_sft

from pipeline.artifacts import read_manifest
from pipeline.background import Background
from pipeline.metrics import read_metrics
from pipeline.records import Origin, Prompt
from pipeline.rewards import RewardFunction
from pipeline.run_directory import RunDirectory
from stages import evaluate, ppo
from stages.held_out_answers import (
    HELD_OUT_ANSWERS,
    as_row,
    drop_answers_after,
    judged_while_learning,
    keep_answers,
    publish_answers,
)

PROMPTS = [Prompt(f"word {number}", Origin("prompts.jsonl", number + 1), {}) for number in range(4)]


JUDGE = """
def sums(prompts, completions, **columns):
    return [sum(map(ord, text)) % 7 for text in completions]
"""


def gold(folder: Path) -> RewardFunction:
    """A measure that PPO knows nothing of: the sum of the characters' numbers, modulo 7."""
    (folder / "judge.py").write_text(JUDGE)
    return RewardFunction(f"{folder / 'judge.py'}:sums", what="gold function")


def now(name: str, make: Any) -> list[float]:
    found: list[float] = make()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """PPO towards another reward than the gold measure, measured twice, and the evaluation."""
    folder = tmp_path_factory.mktemp("gold")
    gold(folder)
    loaded = tiny_config(
        folder,
        "base.quantization=none",
        "ppo.rewards=[{function: tiny_data.py:share_of_a}]",
        "ppo.iterations=4",
        "ppo.held_out.every=2",
        "ppo.learning_rate=0.01",
        "evaluate.gold=judge.py:sums",
    )
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    ppo.run(loaded, run)
    evaluate.run(loaded, run)
    return run


def test_ppo_publishes_what_the_policy_answered_each_time_it_was_measured(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in (run.stage("ppo") / HELD_OUT_ANSWERS).read_text().splitlines()]
    measured = {row["step"]: row for row in read_metrics(run.metrics("ppo")) if "held_out/score" in row}
    assert {row["iteration"] for row in rows} == set(measured) == {2, 4}
    for step, figures in measured.items():
        some = [row for row in rows if row["iteration"] == step]
        assert fmean(row["score"] for row in some) == pytest.approx(figures["held_out/score"])
        assert fmean(row["kl"] for row in some) == pytest.approx(figures["held_out/kl"])
        assert len({row["number"] for row in some}) == len(some) > 1
    assert HELD_OUT_ANSWERS in read_manifest(run.stage("ppo")).files


def test_the_evaluation_has_them_judged_by_the_gold_measure(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in (run.stage("ppo") / HELD_OUT_ANSWERS).read_text().splitlines()]
    found = read_manifest(run.stage("evaluate")).metrics["gold_while_learning"]
    assert [point["iteration"] for point in found] == [2, 4]
    for point in found:
        some = [row for row in rows if row["iteration"] == point["iteration"]]
        sums = [sum(map(ord, row["answer"])) % 7 for row in some]
        assert point["gold"]["value"] == pytest.approx(fmean(sums)) and point["gold"]["n"] == len(some)
        assert point["kl"]["value"] == pytest.approx(fmean(row["kl"] for row in some))
    assert found[0]["gold"]["value"] > 0


def test_answers_of_iterations_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    with Background() as background:
        for iteration in (2, 4, 10):
            rows = [as_row(0, PROMPTS[0], f"after {iteration}", 1.0, 0.5)]
            keep_answers(background, tmp_path / "kept", iteration, rows)
    drop_answers_after(tmp_path / "kept", 4)
    tmp_path.joinpath("result").mkdir()
    publish_answers(tmp_path / "kept", tmp_path / "result")
    found = [json.loads(line) for line in (tmp_path / "result" / HELD_OUT_ANSWERS).read_text().splitlines()]
    assert [(row["iteration"], row["answer"]) for row in found] == [(2, "after 2"), (4, "after 4")]
    drop_answers_after(tmp_path / "kept", 0)
    tmp_path.joinpath("none").mkdir()
    publish_answers(tmp_path / "kept", tmp_path / "none")
    assert not list(tmp_path.joinpath("none").iterdir())
    assert judged_while_learning(tmp_path / "none", PROMPTS, gold(tmp_path), now) == []


def test_an_answer_to_a_prompt_that_has_changed_is_left_out(tmp_path: Path) -> None:
    other = Prompt("another text", Origin("prompts.jsonl", 2), {})
    rows = [
        as_row(0, PROMPTS[0], "aaaa", 1.0, 4.0),
        as_row(1, other, "bbbb", 1.0, 4.0),
        as_row(9, PROMPTS[3], "bbbb", 1.0, 4.0),
    ]
    with Background() as background:
        keep_answers(background, tmp_path / "kept", 3, rows)
    publish_answers(tmp_path / "kept", tmp_path)
    (point,) = judged_while_learning(tmp_path, PROMPTS, gold(tmp_path), now)
    assert (point["iteration"], point["gold"]["value"], point["gold"]["n"]) == (3, 4 * ord("a") % 7, 1)
