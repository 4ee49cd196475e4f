"""Further judges and yardsticks of the evaluation: another reward model, endpoints, the base, best of n, perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import Asked, judge_server, longer_wins
from tiny_models import tiny_base, tiny_config
from tiny_ppo import CALIBRATION, add_made_up, perturb, publish, publish_reward, publish_sft, sharpen

from flows.verdict import verdict_of
from pipeline.artifacts import read_manifest
from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import ArtifactError, ConfigError, IncompatibleAdapterError
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_run
from pipeline.scoring import score_rewards
from stages import evaluate, preflight, sft
from stages.inputs import stage_inputs
from stages.yardsticks import best_of, best_of_n_kl

KEY = "sk-very-secret-0123456789"


def ready(folder: Path, *overrides: str, scale: float = 0.05, **settings: Any) -> tuple[LoadedConfig, RunDirectory]:
    """A run that is ready to be evaluated; its policy is SFT's, moved at random."""
    if not (folder / "llama-base").exists():
        sharpen(tiny_base(folder / "llama-base"))
    loaded = tiny_config(folder, "base.quantization=none", *overrides, **settings)
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    roles = Roles(load_base(loaded.config.base))
    roles.add_weights("policy", run.stage("sft"))
    perturb(roles, "policy", scale)
    publish("ppo", "policy", roles, loaded, run)
    return loaded, run


def with_judges(loaded: LoadedConfig, *judges: dict[str, Any], **more: Any) -> LoadedConfig:
    """The same config with these judges."""
    extra = [f"evaluate.{key}={json.dumps(value)}" for key, value in more.items()]
    return load_config(loaded.path, [*loaded.overrides, f"evaluate.judges={json.dumps(judges)}", *extra])


def another_reward_model(loaded: LoadedConfig, folder: Path, seed: int = 7) -> Path:
    """A finished reward stage in another run on the same base, of another rank."""
    other = load_config(loaded.path, [*loaded.overrides, f"run_dir={folder}", "lora.rank=8"])
    run = publish_sft(other)
    roles = Roles(load_base(other.config.base))
    add_made_up(roles, "reward", seed=seed, head=True, lora=other.config.lora)
    publish("reward", "reward", roles, other, run, calibration=CALIBRATION)
    return folder


def answers_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.stage("evaluate") / "answers.jsonl").read_text().splitlines()]


# -- another reward model


def test_another_run_s_reward_model_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, run = ready(tmp_path)
    folders = [another_reward_model(loaded, tmp_path / name, seed) for name, seed in (("other", 7), ("third", 8))]
    loaded = with_judges(loaded, {"reward_run": str(folders[0])}, {"reward_run": f"{folders[1]}/reward", "name": "z"})
    published: list[Any] = []
    publish_it = evaluate.publish
    monkeypatch.setattr(evaluate, "publish", lambda *args: (published.append(args[5]), publish_it(*args)))
    metrics = evaluate.run(loaded, run).metrics
    assert list(metrics["win_rate"]) == ["reward_model", "other", "z", "gold"]
    assert metrics["judges"]["other"]["digest"] == read_manifest(folders[0] / "reward").digest
    (found,) = published
    rows = answers_of(run)
    for name, folder in (("other", folders[0]), ("z", folders[1])):  # scored again here, each alone
        roles = Roles(load_base(loaded.config.base))
        roles.add_from("reward", folder / "reward")
        for contestant, answers in found.answers.items():
            raw_B = score_rewards(roles, [episode.ids for episode in answers.episodes], max_tokens=1)
            given = [row["scores"][name][contestant] for row in rows]
            assert given == pytest.approx(CALIBRATION.apply(raw_B).tolist(), abs=1e-4)
    assert rows[0]["scores"]["other"] != rows[0]["scores"]["z"]
    assert verdict_of(read_run(run.root)).judgement.judge == "gold"


def test_without_gold_the_held_out_judge_decides(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, "evaluate.gold=null")
    other = another_reward_model(loaded, tmp_path / "other")
    loaded = with_judges(loaded, {"reward_run": str(other)})
    assert loaded.config.judges == ("other", "reward_model") and loaded.config.gate_judge == "other"
    evaluate.run(loaded, run)
    verdict = verdict_of(read_run(run.root))
    assert verdict.judgement.judge == "other" and verdict.judgement.is_independent
    assert not any("trained to please" in caution for caution in verdict.cautions)
    assert [one.is_independent for one in verdict.others] == [False]


def test_judges_that_cannot_judge_stop_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, run = ready(tmp_path)
    foreign, _ = ready(tmp_path / "foreign", "base.dtype=bfloat16")
    monkeypatch.setattr(evaluate, "load_base", lambda *_: pytest.fail("a model was loaded"))
    for folder, error, words in (
        (tmp_path / "absent", ArtifactError, "no finished stage"),
        (run.stage("sft"), ArtifactError, "no reward model, but a policy adapter"),
        (tmp_path / "foreign" / "run", IncompatibleAdapterError, "another base"),
    ):
        wrong = with_judges(loaded, {"reward_run": str(folder)})
        for check in (
            lambda wrong=wrong: evaluate.run(wrong, run),
            lambda wrong=wrong: preflight.check(wrong, ["evaluate"]),
        ):
            with pytest.raises(error, match=words):
                check()
    wrong = with_judges(loaded, {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "api_key_variable": "NO_SUCH_KEY"})
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        evaluate.run(wrong, run)
    assert foreign.config.base.dtype == "bfloat16"


def test_another_judge_is_another_evaluation_but_not_another_pace(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path)
    first, second = (another_reward_model(loaded, tmp_path / name, seed) for name, seed in (("a", 7), ("b", 8)))

    def inputs(*judges: dict[str, Any]) -> Any:
        return stage_inputs("evaluate", with_judges(loaded, *judges).config, run)

    assert inputs({"reward_run": str(first), "name": "j"}) != inputs({"reward_run": str(second), "name": "j"})
    slow = {"endpoint": "http://h/v1", "model": "m"}
    assert inputs(slow) == inputs(slow | {"concurrency": 1, "retries": 0, "timeout": 3, "api_key_variable": "K"})
    assert inputs(slow) != inputs(slow | {"model": "n"})


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        ({}, "names no judge"),
        ({"reward_run": "r", "endpoint": "http://h/v1", "model": "m"}, "names two"),
        ({"endpoint": "http://h/v1"}, "set evaluate.judges[0].model"),
        ({"reward_run": "r", "model": "m"}, "is for an endpoint"),
        ({"reward_run": "runs/gold"}, "called 'gold'"),
        ({"reward_run": "r", "name": "reward_model"}, "called 'reward_model'"),
    ],
)
def test_contradictory_judges_are_refused(tmp_path: Path, judge: dict[str, Any], fault: str) -> None:
    loaded = tiny_config(tmp_path)
    with pytest.raises(ConfigError) as caught:
        with_judges(loaded, judge)
    assert fault in str(caught.value)


# -- an endpoint


def test_an_endpoint_judges_and_what_it_did_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, run = ready(tmp_path, scale=0.2)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    words: list[str] = []

    def moody(asked: Asked) -> Any:
        """Has never an opinion on the first word that it is asked about."""
        word = asked.between("request")
        words.append(word)
        return (500, KEY, {}) if word == words[0] else longer_wins(asked)

    with judge_server(moody) as server:
        endpoint = {"endpoint": server.address, "model": "big/judge-1", "api_key_variable": "JUDGE_KEY"}
        loaded = with_judges(loaded, endpoint | {"retries": 0, "concurrency": 1})
        metrics = evaluate.run(loaded, run).metrics
        asked = len(server.asked)
    rows = answers_of(run)
    differ = [row for row in rows if row["sft"] != row["ppo"]]
    assert asked == 2 * len(differ) - 1
    about = metrics["judges"]["judge-1"]["against_sft"]
    assert (about["asked"], about["answered"]) == (8, 7) and list(about["errors"].values()) == [1]
    rate = metrics["win_rate"]["judge-1"]
    known = [row for row in rows if "judge-1" in row["scores"]]
    assert len(known) == 7 == rate["n"]
    assert rate["wins"] == sum(len(row["ppo"]) > len(row["sft"]) for row in known)
    assert rate["losses"] == sum(len(row["ppo"]) < len(row["sft"]) for row in known)
    for row in known:
        assert row["scores"]["judge-1"] in ({"sft": 0, "ppo": 1}, {"sft": 1, "ppo": 0}, {"sft": 0.5, "ppo": 0.5})
    said = capsys.readouterr().out
    assert "the judge 'judge-1' answered 7 of 8 questions" in said and KEY not in said
    assert any("answered only 7 of 8" in caution for caution in verdict_of(read_run(run.root)).cautions)
    left = [path for path in run.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not left, "the key is in no file"


def test_an_endpoint_that_never_answers_leaves_the_evaluation_whole(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, scale=0.2)
    with judge_server(lambda _: (404, "no such model", {})) as server:
        loaded = with_judges(loaded, {"endpoint": server.address, "model": "m", "name": "nobody"})
        metrics = evaluate.run(loaded, run).metrics
    assert set(metrics["win_rate"]) == {"reward_model", "gold"}
    about = metrics["judges"]["nobody"]["against_sft"]
    assert about["answered"] <= about["asked"] - 1 and "HTTP 404" in next(iter(about["errors"]))


def test_what_an_endpoint_said_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, run = ready(tmp_path, scale=0.2)
    with judge_server(longer_wins) as server:
        loaded = with_judges(loaded, {"endpoint": server.address, "model": "m", "prompts": 5})
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(evaluate, "finish", None)
            evaluate.run(loaded, run)
        asked = len(server.asked)
        metrics = evaluate.run(loaded, run).metrics
        assert 0 < len(server.asked) == asked
    assert metrics["judges"]["m"]["against_sft"]["asked"] == 5 == metrics["win_rate"]["m"]["n"]


# -- yardsticks


def test_the_base_answers_too_where_it_is_an_opponent(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, "evaluate.opponents=[sft, base]", scale=0.2)
    metrics = evaluate.run(loaded, run).metrics
    assert set(metrics["against_base"]["win_rate"]) == set(metrics["win_rate"]) == {"reward_model", "gold"}
    assert set(metrics["response"]) == {"sft", "ppo", "base"}
    rows = answers_of(run)
    for judge, found in metrics["against_base"]["win_rate"].items():
        gaps = [row["scores"][judge]["ppo"] - row["scores"][judge]["base"] for row in rows]
        assert (found["wins"], found["losses"]) == (sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
    assert any(row["base"] != row["sft"] for row in rows)


def test_the_best_of_n_is_the_best_by_the_reward(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, "evaluate.best_of=6", scale=0.2)
    metrics = evaluate.run(loaded, run).metrics
    found = metrics["best_of_n"]
    assert found["n"] == 6 and found["kl"] == pytest.approx(math.log(6) - 5 / 6)
    scores = metrics["mean_score"]["reward_model"]
    assert scores["best_of_n"]["value"] > scores["sft"]["value"] + 0.1
    rows = answers_of(run)
    wins = sum(row["scores"]["gold"]["ppo"] > row["scores"]["gold"]["best_of_n"] for row in rows)
    assert found["win_rate"]["gold"]["wins"] == wins
    assert len({row["best_of_n"] for row in rows}) > 1


def test_best_of_takes_the_first_of_the_best_of_each_prompt() -> None:
    assert best_of([1.0, 3.0, 2.0, 5.0, 5.0, 4.0], 3) == [1, 3]
    assert best_of_n_kl(1) == 0.0
    # Against a simulation: the KL of the largest of n uniform draws from one, mean of log(n x^(n-1)).
    draws = torch.rand(200_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).amax(dim=1)
    assert best_of_n_kl(4) == pytest.approx(float((4 * draws**3).log().mean()), abs=0.01)


def test_perplexity_is_that_of_the_sft_stage(tmp_path: Path) -> None:
    """On the same rows as SFT's own held-out loss; a policy that was moved has forgotten."""
    loaded = tiny_config(tmp_path, "base.quantization=none")
    run = RunDirectory.open(loaded)
    wanted = sft.run(loaded, run).metrics["held_out_perplexity_after"]
    publish_reward(loaded, run)
    roles = Roles(load_base(loaded.config.base))
    roles.add_weights("policy", run.stage("sft"))
    perturb(roles, "policy", 0.3)
    publish("ppo", "policy", roles, loaded, run)
    found = evaluate.run(loaded, run).metrics["perplexity"]
    assert found["sft"] == pytest.approx(wanted, rel=1e-4) and found["rows"] == 8
    assert found["ppo"] > found["sft"] and found["loss_ppo_minus_sft"]["value"] > 0


def test_perplexity_can_be_left_out(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, "evaluate.perplexity_rows=0")
    assert "perplexity" not in evaluate.run(loaded, run).metrics
    assert "instructions" not in stage_inputs("evaluate", loaded.config, run)["data"]


def test_length_is_controlled_for_by_every_judge(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path, scale=0.2)
    metrics = evaluate.run(loaded, run).metrics
    assert set(metrics["length_controlled_win_rate"]) == set(metrics["win_rate"])
    for found in metrics["length_controlled_win_rate"].values():
        assert 0 < found["low"] < found["value"] < found["high"] < 1 and found["n"] == 8


def test_a_role_that_was_removed_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    loaded, run = ready(tmp_path)
    roles = Roles(load_base(loaded.config.base))
    roles.add_from("reward", run.stage("reward"))
    before = score_rewards(roles, [[5, 6, 7]], max_tokens=1)
    folder = another_reward_model(loaded, tmp_path / "other") / "reward"
    roles.add_from("judge", folder)
    theirs = score_rewards(roles, [[5, 6, 7]], max_tokens=1, role="judge")
    roles.remove("judge")
    assert "judge" not in roles.heads and not roles.trainable_names()
    assert torch.equal(score_rewards(roles, [[5, 6, 7]], max_tokens=1), before) and not torch.equal(theirs, before)
    roles.add_from("judge", folder)
    assert torch.equal(score_rewards(roles, [[5, 6, 7]], max_tokens=1, role="judge"), theirs)
