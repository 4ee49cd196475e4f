"""The evaluation: equal policies tie, a better one wins, and what it says can be read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base, tiny_config
from tiny_ppo import perturb, publish, publish_reward, publish_sft, sharpen

from pipeline.artifacts import read_manifest
from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig
from pipeline.errors import RewardFunctionError, StartupGateError
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.scoring import Episode, score_logprobs
from stages import evaluate
from stages.evaluate import compare


def config(folder: Path, *overrides: str) -> LoadedConfig:
    if not (folder / "llama-base").exists():
        sharpen(tiny_base(folder / "llama-base"))
    return tiny_config(folder, "base.quantization=none", *overrides)


def publish_ppo(loaded: LoadedConfig, run: RunDirectory, *, steps: int = 0, scale: float = 0.0) -> None:
    """The SFT policy as PPO's result: as it is, moved at random, or taught to say `a`."""
    roles = Roles(load_base(loaded.config.base))
    roles.add_weights("policy", run.stage("sft"))
    perturb(roles, "policy", scale)
    roles.set_trainable("policy")
    optimizer = torch.optim.Adam(roles.parameters("policy").values(), lr=0.02)
    letter = roles.base.chat.tokenizer("a").input_ids[0]
    prompt = torch.tensor([roles.base.chat.prompt_ids("sun") + [letter] * 6])
    for _ in range(steps):
        optimizer.zero_grad()
        with roles.active("policy"):
            roles.model(input_ids=prompt).logits.log_softmax(dim=-1)[..., letter].mean().neg().backward()
        optimizer.step()
    publish("ppo", "policy", roles, loaded, run)


def evaluated(loaded: LoadedConfig, **ppo: float) -> tuple[RunDirectory, dict]:
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    publish_ppo(loaded, run, **ppo)
    return run, dict(evaluate.run(loaded, run).metrics)


def test_equal_policies_tie_everywhere(tmp_path):
    _, metrics = evaluated(config(tmp_path))
    assert set(metrics["win_rate"]) == {"reward_model", "gold"}
    for found in metrics["win_rate"].values():
        assert (found["value"], found["wins"], found["losses"], found["ties"]) == (0.5, 0, 0, metrics["n"])
        assert found["low"] < 0.5 < found["high"]
    assert metrics["kl"]["value"] == metrics["kl"]["low"] == metrics["kl"]["high"] == 0.0
    assert metrics["response"]["sft"] == metrics["response"]["ppo"]
    for found in metrics["mean_score"].values():
        assert found["sft"] == found["ppo"]
    assert metrics["reward_accuracy"] == 0.5


def test_a_policy_that_learned_the_gold_measure_wins(tmp_path):
    run, metrics = evaluated(config(tmp_path), steps=40)
    gold = metrics["win_rate"]["gold"]
    assert gold["value"] > 0.8 and gold["low"] > 0.5 and gold["losses"] == 0
    assert gold["wins"] + gold["ties"] == metrics["n"] == gold["n"]
    scores = metrics["mean_score"]["gold"]
    assert scores["ppo"]["low"] > scores["sft"]["high"]
    assert metrics["kl"]["value"] > 1.0
    rows = [json.loads(line) for line in (run.stage("evaluate") / "answers.jsonl").read_text().splitlines()]
    assert sum("aa" in row["ppo"] for row in rows) > sum("aa" in row["sft"] for row in rows)


def test_the_kl_is_that_of_the_policys_own_answers(tmp_path):
    """Estimated again here, from full logits, on the answers that were written."""
    loaded = config(tmp_path)
    run, metrics = evaluated(loaded, scale=0.1)
    roles = Roles(load_base(loaded.config.base))
    roles.add_from("reference", run.stage("sft"))
    roles.add_from("policy", run.stage("ppo"))
    seen = {}
    for role in ("policy", "reference"):
        episode = Episode((1, 2, 3), (4, 5, 6, 7))
        seen[role] = score_logprobs(roles, role, [episode], temperature=1.0, max_tokens=64)[0]
        found = evaluate.policy_kl(roles, [episode], temperature=1.0, max_tokens=64)
    assert found.tolist() == pytest.approx([float((seen["policy"] - seen["reference"]).sum())], abs=1e-5)
    assert abs(float(found[0])) > 1e-3 and metrics["kl"]["value"] > 0


def samples_of(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in ("prompt", "sft", "ppo", "scores")} for row in rows]


def test_answers_samples_and_intervals_are_written(tmp_path):
    run, metrics = evaluated(config(tmp_path, "evaluate.samples=3"), scale=0.05)
    manifest = read_manifest(run.stage("evaluate"))
    assert manifest.metrics == metrics and set(manifest.files) == {"answers.jsonl", "samples.json"}
    assert set(manifest.parents) == {"sft", "reward", "ppo"}
    rows = [json.loads(line) for line in (run.stage("evaluate") / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == metrics["n"] == 8
    samples = json.loads((run.stage("evaluate") / "samples.json").read_text())
    assert samples == [row | {"judge": "gold", "scores": row["scores"]["gold"]} for row in samples_of(rows[:3])]
    for row in rows:
        assert set(row) == {"prompt", "source", "sft", "ppo", "scores"}
        assert set(row["scores"]) == {"reward_model", "gold"}
    for judge, found in metrics["mean_score"].items():
        for name, estimate in found.items():
            scores = [row["scores"][judge][name] for row in rows]
            assert estimate["value"] == pytest.approx(sum(scores) / len(scores))
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] == len(rows)
        wins = sum(row["scores"][judge]["ppo"] > row["scores"][judge]["sft"] for row in rows)
        assert metrics["win_rate"][judge]["wins"] == wins


def test_held_out_prompts_are_asked_and_no_others(tmp_path):
    from pipeline.chat import ChatFormat
    from pipeline.datasets import load_prompts

    loaded = config(tmp_path, "evaluate.prompts=5")
    run, metrics = evaluated(loaded)
    assert metrics["n"] == 5
    split = load_prompts(loaded.config.data, ChatFormat(load_base(loaded.config.base).chat.tokenizer))
    asked = [json.loads(line)["source"] for line in (run.stage("evaluate") / "answers.jsonl").read_text().splitlines()]
    assert asked == [str(prompt.origin) for prompt in split.held_out[:5]]
    assert not set(asked) & {str(prompt.origin) for prompt in split.train}


def test_without_a_reward_model_the_functions_judge(tmp_path):
    loaded = config(tmp_path, "ppo.rewards=[{function: tiny_data.py:share_of_a}]", "data.preferences.sources=[]")
    run = publish_sft(loaded)
    publish_ppo(loaded, run)
    metrics = evaluate.run(loaded, run).metrics
    assert set(metrics["win_rate"]) == {"share_of_a", "gold"} and "reward_accuracy" not in metrics


def test_a_faulty_gold_function_stops_before_a_model_is_loaded(tmp_path, monkeypatch):
    loaded = config(tmp_path, "evaluate.gold=tiny_data.py:words")
    run = publish_sft(loaded)
    monkeypatch.setattr(evaluate, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RewardFunctionError, match="no gold function 'words'"):
        evaluate.run(loaded, run)


def test_a_base_that_changed_is_not_published(tmp_path, monkeypatch):
    loaded = config(tmp_path)
    prints = iter(["before", "after"])
    monkeypatch.setattr(evaluate, "fingerprint", lambda _: next(prints))
    with pytest.raises(StartupGateError, match="base changed"):
        evaluated(loaded)


def test_wins_ties_and_losses_are_counted_prompt_by_prompt():
    found = compare([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 9.0, 3.0])
    assert (found["wins"], found["ties"], found["losses"], found["value"], found["n"]) == (2, 1, 1, 0.625, 4)
