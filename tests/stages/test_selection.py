"""Which policy PPO publishes, and what ends it early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import loaded_tiny_base, tiny_config
from tiny_ppo import prompts, publish_sft, tiny_round

from pipeline.artifacts import read_manifest
from pipeline.config import GuardSettings
from pipeline.errors import ConfigError, DivergenceError
from pipeline.metrics import read_metrics
from pipeline.records import as_plain
from pipeline.run_directory import RunDirectory
from pipeline.scoring import score_logprobs
from stages import ppo
from stages.experience import judge, sample, sampling_settings
from stages.selection import is_better, measure_held_out, violations

FIGURES = {"kl/policy_reference_k1": 3.0, "policy/ratio_max": 1.5, "policy/entropy": 2.0}


@pytest.mark.parametrize(
    ("guard", "metrics", "expected"),
    [
        ({}, FIGURES, []),
        ({"max_kl": 2.5}, FIGURES, ["kl/policy_reference_k1 is 3, above 2.5"]),
        ({"max_ratio": 1.5, "max_entropy": 2.0, "min_entropy": 2.0}, FIGURES, []),
        (
            {"min_entropy": 2.1, "max_ratio": 1.4},
            FIGURES,
            ["policy/ratio_max is 1.5, above 1.4", "policy/entropy is 2, below 2.1"],
        ),
        ({"max_kl": 2.5}, {"kl/policy_reference_k1": math.nan}, ["kl/policy_reference_k1 is nan, above 2.5"]),
        ({"max_ratio": 1.1}, {"kl/policy_reference_k1": 0.0}, []),  # the critic's warm-up measures no ratio
    ],
)
def test_bounds(guard: dict[str, float], metrics: Mapping[str, float], expected: list[str]) -> None:
    assert list(violations(metrics, GuardSettings(**guard))) == expected  # type: ignore[arg-type]


def test_the_best_policy_has_the_highest_score_within_the_bound() -> None:
    guard = GuardSettings(max_kl=10.0)
    good = {"held_out/score": 1.0, "held_out/kl": 9.0}
    assert is_better(good, None, guard)
    assert is_better(good | {"held_out/score": 1.1}, good, guard)
    assert not is_better(good, good, guard)
    assert not is_better({"held_out/score": 5.0, "held_out/kl": 10.5}, None, guard)
    assert not is_better({"held_out/score": 5.0, "held_out/kl": math.nan}, None, guard)


def test_the_held_out_figures_are_means_over_the_answers(tmp_path) -> None:
    found = tiny_round(loaded_tiny_base(tmp_path), held_out={"prompts": 5}, max_new_tokens=6)
    with torch.no_grad():
        for parameter in found.roles.parameters("policy").values():
            parameter += 0.02
    named = {"world": found.world, "budgets": found.budgets}
    kept: list[dict[str, Any]] = []
    measured = measure_held_out(found.roles, found.rewards, prompts(8), found.ppo, seed=3, **named, keep=kept.extend)
    answers = sample(found.roles, prompts(8)[-5:], seed=(3, "held out"), sampling=sampling_settings(found.ppo), **named)
    judged = judge(found.roles, found.rewards, prompts(8)[-5:], answers, found.ppo, found.world)
    ours, theirs = (
        torch.cat(score_logprobs(found.roles, role, answers.episodes, temperature=1.0, max_tokens=64))
        for role in ("policy", "reference")
    )
    assert [(row["number"], row["prompt"]) for row in kept] == [
        (number, as_plain(prompts(8)[number].prompt)) for number in range(3, 8)
    ]
    assert [row["answer"] for row in kept] == judged.completions
    assert [row["score"] for row in kept] == judged.scores_B.tolist()
    assert sum(row["kl"] for row in kept) == pytest.approx(float((ours - theirs).sum()), rel=1e-3)
    assert measured["held_out/score"] == pytest.approx(float(judged.scores_B.mean()), rel=1e-4)
    assert measured["held_out/kl"] == pytest.approx(float((ours - theirs).sum()) / 5, rel=1e-3)
    assert measured["held_out/length"] == sum(len(row.response) for row in answers.episodes) / 5
    assert measured == measure_held_out(found.roles, found.rewards, prompts(8), found.ppo, seed=3, **named)


# ---- whole runs

SETTINGS = (
    "base.quantization=none",
    "ppo.rewards=[{function: tiny_data.py:share_of_a}]",
    "ppo.iterations=6",
    "ppo.learning_rate=0.01",
)


SCORES = [0.1, 0.7, 0.3, 0.6, 0.2, 0.4]


def run_ppo(folder, monkeypatch, scores: list[float], *overrides: str, every: int = 1, kl: float = 1.0) -> RunDirectory:
    """A whole PPO stage whose held-out figures are given, while all else is real."""
    loaded = tiny_config(folder, *SETTINGS, f"ppo.held_out.every={every}", *overrides)
    run = publish_sft(loaded)
    own, given = ppo.measure_held_out, iter(scores)

    def measured(*args: Any, **named: Any) -> dict[str, float]:
        return own(*args, **named) | {"held_out/score": next(given), "held_out/kl": kl}

    monkeypatch.setattr(ppo, "measure_held_out", measured)
    ppo.run(loaded, run)
    return run


def adapter(run: RunDirectory, *folder: str) -> dict[str, torch.Tensor]:
    return load_file(run.stage("ppo").joinpath(*folder, "adapter_model.safetensors"))


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_best_policy_is_published_and_the_last_one_kept(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        best = run_ppo(tmp_path / "best", patch, SCORES)
    with monkeypatch.context() as patch:
        last = run_ppo(tmp_path / "last", patch, SCORES, "ppo.publish=last")
    with monkeypatch.context() as patch:
        two = run_ppo(tmp_path / "two", patch, SCORES[:2], "ppo.max_steps=2")
    manifest = read_manifest(best.stage("ppo"))
    assert manifest.extra["published"] == 2 and manifest.extra["iterations"] == 6
    assert manifest.metrics["held_out/score"] == 0.7
    assert same(adapter(best), adapter(two)) and same(adapter(best, "last"), adapter(last))
    assert not same(adapter(best), adapter(last))
    assert not (last.stage("ppo") / "last").exists() and not (two.stage("ppo") / "last").exists()
    assert [row["held_out/score"] for row in read_metrics(best.metrics("ppo"))] == SCORES


def test_a_policy_beyond_the_bound_is_not_the_best(tmp_path, monkeypatch) -> None:
    run = run_ppo(tmp_path, monkeypatch, SCORES, kl=101.0)
    manifest = read_manifest(run.stage("ppo"))
    assert manifest.extra["published"] == 6 and manifest.extra["stopped"] is None  # there is none within: the last


def test_a_run_that_leaves_a_bound_stops_with_the_best_policy_so_far(tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        free = run_ppo(tmp_path / "free", patch, SCORES)
    kl = [row["kl/policy_reference_k1"] for row in read_metrics(free.metrics("ppo"))]
    number = next(number for number in range(3, 6) if kl[number - 1] > max(kl[: number - 1]))
    bound = (kl[number - 1] + max(kl[: number - 1])) / 2
    with monkeypatch.context() as patch:
        stopped = run_ppo(
            tmp_path / "stopped",
            patch,
            [0.5, 0.2, 0.3, 0.4, 0.1],
            f"ppo.guard.max_kl={bound}",
            "ppo.guard.action=stop",
            "ppo.publish=last",
            kl=0.0,
        )
    manifest = read_manifest(stopped.stage("ppo"))
    assert manifest.extra["iterations"] == number < 6 and manifest.extra["published"] == 1
    assert manifest.extra["stopped"].startswith(f"iteration {number}: kl/policy_reference_k1 is")
    assert f"warning: iteration {number}: kl/policy_reference_k1" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(stopped.metrics("ppo"))] == list(range(1, number + 1))


def test_without_a_policy_within_the_bound_there_is_nothing_to_publish(tmp_path, monkeypatch) -> None:
    with pytest.raises(DivergenceError, match="before one within it had been measured"):
        run_ppo(
            tmp_path,
            monkeypatch,
            [0.1] * 4,
            "ppo.guard.min_entropy=50",
            "ppo.guard.action=stop",
            every=3,
        )
    assert not (tmp_path / "run" / "ppo").exists()


@pytest.mark.parametrize("override", ["ppo.guard.action=stop", "ppo.publish=best"])
def test_without_measurements_there_is_no_best(tmp_path, override) -> None:
    with pytest.raises(ConfigError, match="nothing is measured"):
        tiny_config(tmp_path, "ppo.held_out.every=null", override)
    tiny_config(tmp_path, "ppo.held_out.every=null")
