"""The evaluation: equal policies tie, a better one wins, and what it says can be read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base, tiny_config
from tiny_ppo import perturb, publish, publish_reward, publish_sft, sharpen
from transformers import GenerationMixin

from pipeline.artifacts import read_manifest
from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig
from pipeline.errors import BaseModelError, DivergenceError, RewardFunctionError
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.scoring import Episode, score_logprobs
from stages import evaluate, interruption, judges, parts
from stages.evaluate import count
from stages.experience import Budgets
from stages.interruption import Interrupted


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
        found = evaluate.policy_kl(roles, [episode], 1.0, Budgets.of(loaded.config.ppo), [0])
    assert found == pytest.approx([float((seen["policy"] - seen["reference"]).sum())], abs=1e-5)
    assert abs(found[0]) > 1e-3 and metrics["kl"]["value"] > 0


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
    monkeypatch.setattr(evaluate, "fingerprint", lambda _: "before")
    with pytest.raises(BaseModelError, match="base changed"):
        evaluated(loaded)


def test_wins_ties_and_losses_are_counted_prompt_by_prompt():
    found = count([1.0, 0.5, 0.0, 1.0])
    assert (found["wins"], found["ties"], found["losses"], found["value"], found["n"]) == (2, 1, 1, 0.625, 4)


# -- nothing is lost


IN_THREES = ("evaluate.batch_size=3", "evaluate.perplexity_rows=0", "deterministic=true")


@pytest.fixture
def finished(tmp_path: Path) -> tuple[LoadedConfig, RunDirectory]:
    """A run that is ready to be evaluated, in batches of three prompts."""
    loaded = config(tmp_path, *IN_THREES)
    run = publish_sft(loaded)
    publish_reward(loaded, run)
    publish_ppo(loaded, run, scale=0.05)
    return loaded, run


def contents(run: RunDirectory) -> tuple[dict[str, bytes], dict]:
    manifest = read_manifest(run.stage("evaluate"))
    return {name: (run.stage("evaluate") / name).read_bytes() for name in manifest.files}, dict(manifest.metrics)


@contextmanager
def counted() -> Iterator[list[str]]:
    """Which of the stage's costly functions are called, from now on."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((parts, "generate"), (judges, "score_rewards"), (evaluate, "score_logprobs")):
            own = getattr(module, name)
            patch.setattr(
                module, name, lambda *args, own=own, name=name, **named: (seen.append(name), own(*args, **named))[1]
            )
        yield seen


@pytest.mark.parametrize("done", range(1, 16, 3))
def test_an_evaluation_that_is_killed_does_nothing_twice(finished, done):
    """Eight prompts are 3 batches, and these 6 of answers, 6 of scores and 3 of divergences."""
    loaded, run = finished
    with counted() as all_calls:
        evaluate.run(loaded, run)
    expected = contents(run)
    assert len(all_calls) == 6 + 6 + 2 * 3

    class KilledHereError(Exception):
        pass

    write, written = parts.write_json, []

    def die(path: Path, content: dict) -> None:
        if len(written) == done:
            raise KilledHereError
        written.append(path)
        write(path, content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledHereError), counted() as first_calls:
        patch.setattr(parts, "write_json", die)
        evaluate.run(loaded, run)
    torn = written.pop()
    torn.write_text(torn.read_text()[:-20])
    with counted() as later_calls:
        evaluate.run(loaded, run)
    assert contents(run) == expected
    # What was written is not made again: only the part at which it died, and the torn one.
    per_part = {"reward": 1, "answers": 1, "kl": 2}
    again = sum(per_part[name.partition("-")[0]] for name in (torn.stem, part_after(written, torn)))
    assert len(first_calls) + len(later_calls) - again == len(all_calls)
    assert not run.working("evaluate").exists()


def part_after(written: list[Path], torn: Path) -> str:
    """The part that follows the torn one."""
    order = [f"answers-{role}-{n:05d}" for role in ("reference", "policy") for n in range(3)]
    order += [f"reward-{name}-{n:05d}" for name in ("sft", "ppo") for n in range(3)] + [f"kl-{n:05d}" for n in range(3)]
    assert [path.stem for path in written] == order[: order.index(torn.stem)]
    return order[order.index(torn.stem) + 1]


def test_parts_of_other_inputs_are_made_again(finished):
    loaded, run = finished
    evaluate.run(loaded, run)
    expected = contents(run)
    other = config(loaded.path.parent, *IN_THREES, "evaluate.temperature=0.5")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(evaluate, "finish", None)
        evaluate.run(other, run)
    assert len(list((run.working("evaluate") / "parts").iterdir())) == 6 + 6 + 3 + 2
    with counted() as calls:
        evaluate.run(loaded, run)
    assert contents(run) == expected and len(calls) == 6 + 6 + 2 * 3


def test_an_evaluation_that_is_asked_to_stop_keeps_what_is_done(finished):
    loaded, run = finished
    evaluate.run(loaded, run)
    expected = contents(run)
    own, asked = parts.generate, []

    def ask(*args, **named):
        asked.append(args)
        if len(asked) == 2:  # stops in the midst of the second batch
            interruption.request()
        return own(*args, **named)

    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(parts, "generate", ask)
            evaluate.run(loaded, run)
    finally:
        interruption.withdraw()
    kept = run.working("evaluate") / "parts"
    assert [path.name for path in kept.iterdir()] == ["answers-reference-00000.json"]
    with counted() as calls:
        evaluate.run(loaded, run)
    assert contents(run) == expected and calls.count("generate") == 5


@pytest.mark.parametrize("scored", ["score_rewards", "score_logprobs"])
def test_a_score_that_is_not_finite_stops_the_evaluation(finished, monkeypatch, scored):
    loaded, run = finished
    module = judges if scored == "score_rewards" else evaluate
    own = getattr(module, scored)

    def spoilt(*args, **named):
        found = own(*args, **named)
        return found / 0.0 if scored == "score_rewards" else [row / 0.0 for row in found]

    monkeypatch.setattr(module, scored, spoilt)
    with pytest.raises(DivergenceError, match="is not finite"):
        evaluate.run(loaded, run)


@contextmanager
def little_memory(responses: int, tokens: int) -> Iterator[None]:
    """A device that takes no more than this at once."""
    own_generate, own_states = GenerationMixin.generate, Roles.hidden_states

    def generate(model, **named):
        if len(named["input_ids"]) > responses:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own_generate(model, **named)

    def hidden_states(roles, ids_BL, mask_BL):
        if ids_BL.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own_states(roles, ids_BL, mask_BL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate)
        patch.setattr(Roles, "hidden_states", hidden_states)
        yield


def test_where_memory_runs_out_the_evaluation_takes_less_at_once_and_finds_the_same(tmp_path, capsys):
    settings = ("evaluate.batch_size=8", "ppo.microbatch_tokens=512")
    _, wanted = evaluated(config(tmp_path / "undisturbed", *settings), scale=0.1)
    with little_memory(responses=3, tokens=60):
        _, found = evaluated(config(tmp_path / "short", *settings), scale=0.1)
    said = capsys.readouterr().out
    assert "Out of memory with evaluate.batch_size=8; going on with 4." in said
    assert "Out of memory with ppo.microbatch_tokens=512; going on with" in said
    assert found["win_rate"] == wanted["win_rate"] and found["response"] == wanted["response"]
    assert found["kl"]["value"] == pytest.approx(wanted["kl"]["value"], rel=1e-3, abs=1e-5)


def test_what_an_evaluation_learned_of_memory_it_knows_after_an_interruption(finished, monkeypatch, capsys):
    """Killed after its first part, it does not try again with what did not fit."""
    loaded, run = finished
    write = parts.write_json

    def die_after_the_first(path: Path, content: dict) -> None:
        write(path, content)
        raise KeyboardInterrupt

    with little_memory(responses=1, tokens=10_000):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(parts, "write_json", die_after_the_first)
            evaluate.run(loaded, run)
        assert "Out of memory with evaluate.batch_size=3; going on with 1." in capsys.readouterr().out
        evaluate.run(loaded, run)
    assert "Out of memory" not in capsys.readouterr().out
