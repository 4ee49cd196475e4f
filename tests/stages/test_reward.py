"""The reward stage: what it learns, how it measures, and that a score means the same everywhere."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import loaded_tiny_base, tiny_base, tiny_config
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import stages.reward as reward
import stages.sft as sft
from pipeline.artifacts import Manifest
from pipeline.base_model import load_base
from pipeline.batching import pad
from pipeline.config import LoraSettings, PipelineConfig
from pipeline.config_file import LoadedConfig
from pipeline.errors import ArtifactError, DataError, DivergenceError, IncompatibleAdapterError
from pipeline.generation import SamplingSettings, draw, generate, uniforms
from pipeline.metrics import read_metrics
from pipeline.records import Comparison, Message, Origin
from pipeline.rewards import Calibration
from pipeline.roles import Roles, reward_model_for_training
from pipeline.run_directory import RunDirectory
from pipeline.scored_pairs import HELD_OUT
from pipeline.scoring import score_rewards
from pipeline.statistics import wilson_interval
from pipeline.trl_options import reward_arguments
from stages.pairs import Pair, correlation, tokenize

WITHOUT_Z = "abcdefghijklmnopqrstuvwxy "


def words(seed: int) -> str:
    """A text of 6 to 16 letters, none of them a z."""
    chance = random.Random(seed)
    return "".join(chance.choice(WITHOUT_Z) for _ in range(chance.randint(6, 16))).strip() + "."


def comparisons(count: int = 96) -> list[dict[str, Any]]:
    """Pairs of which the preferred one has two z's; which is longer is left to chance."""
    rows = []
    for number in range(count):
        chosen, rejected = words(2 * number), words(2 * number + 1)
        rows.append(
            {
                "prompt": [{"role": "user", "content": words(10_000 + number)}],
                "chosen": [{"role": "assistant", "content": chosen[:3] + "zz" + chosen[5:]}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "group": number % 2,
            }
        )
    return rows


def pairs_config(folder: Path, *overrides: str, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
    """The tiny config with the pairs above."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in (comparisons() if rows is None else rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    sources = {
        "instructions": {"sources": ["tiny_data.py:demonstrations"], "held_out": 0.25},
        "preferences": {"sources": ["pairs.jsonl"], "held_out": 0.25},
        "prompts": {"sources": ["tiny_data.py:prompts"], "held_out": 0.25},
    }
    return tiny_config(folder, *overrides, **{"data": sources} | settings)


def run_sft(loaded: LoadedConfig) -> Manifest:
    return sft.run(loaded, RunDirectory.open(loaded))


def run(loaded: LoadedConfig) -> Manifest:
    return reward.run(loaded, RunDirectory.open(loaded))


def folder_of(loaded: LoadedConfig) -> Path:
    return RunDirectory(loaded.config.run_dir).stage("reward")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoadedConfig, Manifest]]:
    """A run on an NF4 base whose reward model learns to look for z's."""
    settings = {"batch_size": 16, "microbatch_size": 16, "max_length": 64, "gradient_checkpointing": False}
    loaded = pairs_config(
        tmp_path_factory.mktemp("reward"),
        sft=settings | {"max_steps": 8, "learning_rate": 0.02},
        reward=settings | {"max_steps": 40, "learning_rate": 0.01, "calibration_prompts": 16, "log_every": 1},
    )
    run_sft(loaded)
    yield loaded, run(loaded)


# -- what comes out


def test_it_learns_more_than_that_the_longer_answer_wins(learned: tuple[LoadedConfig, Manifest]) -> None:
    metrics = learned[1].metrics
    accuracy, baseline = metrics["held_out_accuracy"], metrics["held_out_accuracy_longer_wins"]
    assert accuracy["value"] >= 0.9 and accuracy["low"] > baseline["high"]
    assert accuracy["n"] == baseline["n"] == metrics["held_out_pairs"] == 96 - metrics["pairs"]
    assert metrics["held_out_loss"] < math.log(2) / 2 and metrics["held_out_margin"] > 1


def test_the_figures_are_those_of_the_pairs(learned: tuple[LoadedConfig, Manifest]) -> None:
    loaded, manifest = learned
    lines = (folder_of(loaded) / HELD_OUT).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    metrics, n = manifest.metrics, len(rows)
    wins = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
    low, high = wilson_interval(wins, n)
    assert metrics["held_out_accuracy"] == {"value": wins / n, "low": low, "high": high, "n": n}
    longer = sum((row["characters_chosen"] > row["characters_rejected"]) for row in rows)
    equal = sum(row["characters_chosen"] == row["characters_rejected"] for row in rows)
    assert metrics["held_out_accuracy_longer_wins"]["value"] == pytest.approx((longer + equal / 2) / n)
    margins = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert metrics["held_out_margin"] == pytest.approx(sum(margins) / n, rel=1e-5)
    assert metrics["held_out_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / n, rel=1e-5)
    scores = torch.tensor([[row["score_chosen"], row["score_rejected"]] for row in rows]).flatten()
    lengths = torch.tensor([[row["characters_chosen"], row["characters_rejected"]] for row in rows]).flatten()
    expected = torch.corrcoef(torch.stack([scores, lengths.float()]))[0, 1]
    assert metrics["held_out_length_correlation"] == pytest.approx(float(expected), abs=1e-4)
    # Every line names its row, of which the lengths and columns are.
    originals = comparisons()
    for row in rows:
        original = originals[row["row"] - 1]
        assert row["source"].endswith("pairs.jsonl") and row["columns"] == {"group": original["group"]}
        assert row["characters_chosen"] == len(original["chosen"][0]["content"])
        assert row["characters_rejected"] == len(original["rejected"][0]["content"])
        assert {name: row[name] for name in ("prompt", "chosen", "rejected")} == {
            name: original[name] for name in ("prompt", "chosen", "rejected")
        }
        assert row["margin"] is None


def test_with_too_little_memory_the_held_out_pairs_score_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = pairs_config(tmp_path, "reward.max_steps=1", "reward.trl={eval_strategy: 'no'}")
    run_sft(loaded)
    expected = run(loaded).metrics
    own = reward.score_pairs

    def limited(roles: Roles, pairs: list[Pair], most: int) -> Tensor:
        if most > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(roles, pairs, most)

    monkeypatch.setattr(reward, "score_pairs", limited)
    found = run(loaded).metrics
    assert "Out of memory with reward.microbatch_size * reward.max_length" in capsys.readouterr().out
    for name in ("held_out_loss", "held_out_margin", "calibration_raw_mean"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_trl_evaluates_the_held_out_pairs(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "batch_size": 4, "microbatch_size": 2, "max_length": 64, "calibration_prompts": 8}
    loaded = pairs_config(tmp_path, reward=settings | {"trl": {"eval_strategy": "steps", "eval_steps": 3}})
    run_sft(loaded)
    metrics = run(loaded).metrics
    rows = read_metrics(RunDirectory(loaded.config.run_dir).metrics("reward"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [3]
    assert evaluated[0]["eval_loss"] == pytest.approx(metrics["held_out_loss"], rel=1e-2)


def loaded_roles(loaded: LoadedConfig) -> Roles:
    roles = Roles(load_base(loaded.config.base, "cpu"))
    roles.add_from("reference", RunDirectory(loaded.config.run_dir).stage("sft"))
    roles.add_from("reward", folder_of(loaded))
    return roles


def test_the_published_adapter_scores_as_the_trained_one_did(learned: tuple[LoadedConfig, Manifest]) -> None:
    loaded, _ = learned
    roles = loaded_roles(loaded)
    originals = comparisons()
    for line in (folder_of(loaded) / HELD_OUT).read_text().splitlines():
        row = json.loads(line)
        original = originals[row["row"] - 1]
        prompt = (Message("user", original["prompt"][0]["content"]),)
        chosen = roles.base.chat.example(prompt, (Message("assistant", original["chosen"][0]["content"]),)).ids
        # Alone here, among others there: sums in another order.
        assert float(score_rewards(roles, [chosen], max_tokens=1)) == pytest.approx(row["score_chosen"], abs=1e-4)


def test_calibrated_scores_of_the_sft_policy_have_mean_0_and_variance_1(
    learned: tuple[LoadedConfig, Manifest],
) -> None:
    loaded, manifest = learned
    assert manifest.reward_gain is not None and manifest.reward_bias is not None
    roles, config = loaded_roles(loaded), loaded.config
    prompts = reward.calibration_prompts(config, roles.base.chat, [])
    assert len(prompts) == manifest.metrics["calibration_prompts"] == 16
    assert len({tuple(prompt) for prompt in prompts}) == 16
    sampling = SamplingSettings(config.ppo.max_new_tokens, config.ppo.temperature)
    answers = generate(roles, "reference", prompts, sampling, seed=(config.seed, "calibration"))
    sequences = [(*prompt, *answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
    raw_B = score_rewards(roles, sequences, max_tokens=10_000)
    standard_B = Calibration(manifest.reward_gain, manifest.reward_bias).apply(raw_B.double())
    assert float(standard_B.mean()) == pytest.approx(0, abs=1e-3)
    assert float(standard_B.std(correction=0)) == pytest.approx(1, abs=1e-3)
    assert float(raw_B.mean()) == pytest.approx(manifest.metrics["calibration_raw_mean"], abs=1e-4)
    assert float(raw_B.std(correction=0)) == pytest.approx(manifest.metrics["calibration_raw_std"], abs=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_plain_peft_loads_the_adapter_and_scores_the_same(
    learned: tuple[LoadedConfig, Manifest], quantization: str
) -> None:
    loaded, _ = learned
    settings = loaded.config.base.model_copy(update={"quantization": quantization})
    ours = load_base(settings, "cpu")
    roles = Roles(ours)
    roles.add_weights("reward", folder_of(loaded))
    theirs = AutoModelForSequenceClassification.from_pretrained(
        settings.model,
        num_labels=1,
        dtype=torch.float32,
        quantization_config=getattr(ours.model.config, "quantization_config", None),
    )
    theirs = PeftModel.from_pretrained(theirs, folder_of(loaded)).eval()
    # Where pad = eos they would skip a final EOS in search of the last token.
    theirs.config.pad_token_id = None
    for module in theirs.modules():
        # Some CPUs have another kernel for 4-bit inference, which rounds to bfloat16; trivet never uses it.
        module.support_avx512bf16_for_cpu = False
    sequences = [
        ours.chat.example((Message("user", "hm"),), (Message("assistant", text),)).ids for text in ("fizz", "no", "zzz")
    ]
    own_B = torch.cat([score_rewards(roles, [sequence], max_tokens=1) for sequence in sequences])
    with torch.no_grad():
        plain_B = torch.cat([theirs(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences])
    torch.testing.assert_close(own_B, plain_B, rtol=1e-5, atol=1e-5)
    assert float(own_B.std()) > 0.5


def test_metrics_are_written_once_a_step(learned: tuple[LoadedConfig, Manifest]) -> None:
    rows = read_metrics(RunDirectory(learned[0].config.run_dir).metrics("reward"))
    assert [row["step"] for row in rows] == [*range(1, 41)]
    assert all(row["loss"] is not None and row["tokens_per_second"] for row in rows)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert learned[1].metrics["train_loss"] == pytest.approx(sum(losses) / len(losses))


# -- training


def arguments(folder: Path, **settings: Any) -> Any:
    tree = {"run_dir": "run", "base": {"model": "b"}, "reward": {"batch_size": 4, "microbatch_size": 4} | settings}
    return reward_arguments(PipelineConfig.model_validate(tree), folder)


def records(margins: list[float | None]) -> list[Comparison]:
    rows = comparisons(len(margins))
    return [
        Comparison(
            tuple(Message(**turn) for turn in row["prompt"]),
            tuple(Message(**turn) for turn in row["chosen"]),
            tuple(Message(**turn) for turn in row["rejected"]),
            Origin("x", number),
            margin,
        )
        for number, (row, margin) in enumerate(zip(rows, margins, strict=True), 1)
    ]


def test_rows_without_a_margin_ask_for_none(tmp_path: Path) -> None:
    chat = loaded_tiny_base(tmp_path).chat
    assert "margin" not in reward.as_dataset(tokenize(chat, records([None, None]))).column_names
    mixed = reward.as_dataset(tokenize(chat, records([None, 0.5, 2])))
    assert mixed["margin"][:] == [0.0, 0.5, 2.0]


@pytest.mark.parametrize("margins", [[None] * 4, [None, 0.5, 2.0, 1.0]])
def test_the_loss_is_the_one_in_the_docstring(tmp_path: Path, margins: list[float | None]) -> None:
    base = loaded_tiny_base(tmp_path)
    model, _ = reward_model_for_training(base, LoraSettings(rank=4), None)
    pairs = tokenize(base.chat, records(margins))
    trainer = reward.build_trainer(model, base.chat, arguments(tmp_path), pairs, [])
    with torch.no_grad():
        found = float(trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset))))
    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    scores_P2 = reward.score_while_training(model, sequences, base.device, 1).double().view(-1, 2)
    by_hand = [
        math.log1p(math.exp(-(float(chosen - rejected) - (margin or 0.0))))
        for (chosen, rejected), margin in zip(scores_P2, margins, strict=True)
    ]
    assert found == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@pytest.mark.parametrize("variant", ["chatml", "no_pad"])
def test_a_pair_in_a_batch_scores_as_it_does_alone(tmp_path: Path, variant: str) -> None:
    base = loaded_tiny_base(tmp_path, tokenizer_variant=variant)
    torch.manual_seed(0)
    model, _ = reward_model_for_training(base, LoraSettings(rank=4), None)
    pairs = tokenize(base.chat, records([None] * 4))
    trainer = reward.build_trainer(model, base.chat, arguments(tmp_path), pairs, [])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert int((batch["attention_mask"] == 0).sum()) > 0
    model.eval()
    with torch.no_grad():
        together_B = model(**batch).logits.squeeze(-1)
    # TRL puts all chosen answers before all rejected ones.
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    alone_B = reward.score_while_training(model, sequences, base.device, 1)
    torch.testing.assert_close(together_B, alone_B, rtol=1e-5, atol=1e-5)
    assert all(sequence[-1] == base.chat.eos_token_id for sequence in sequences)


def trained_head(base: Any, pairs: list[Pair], settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, _ = reward_model_for_training(base, LoraSettings(rank=4), None)
    reward.build_trainer(model, base.chat, settings, pairs, []).train()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.unload()
    return weights


def test_a_step_does_not_depend_on_how_its_batch_is_divided(tmp_path: Path) -> None:
    """Nor does the second step, for which three pairs are left: each counts a third, in whatever microbatch."""
    base = loaded_tiny_base(tmp_path)
    pairs = tokenize(base.chat, records([None] * 7))
    # SGD, since Adam's first steps would hide a wrong scale of the gradient.
    settings = {"batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "max_grad_norm": 1e9, "optimizer": "sgd"}
    whole = trained_head(base, pairs, arguments(tmp_path, **settings | {"microbatch_size": 4}))
    still = trained_head(base, pairs, arguments(tmp_path, **settings | {"microbatch_size": 4, "learning_rate": 1e-12}))
    assert max(float((whole[name] - still[name]).abs().max()) for name in whole) > 1e-2
    # Recomputing activations in the backward pass must change as little.
    for division in ({"microbatch_size": 1}, {"microbatch_size": 2}, {"gradient_checkpointing": False}):
        parts = trained_head(base, pairs, arguments(tmp_path, **settings | division))
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_and_head_learn_in_float32_on_a_quantized_base(tmp_path: Path, dtype: str) -> None:
    path = tiny_base(tmp_path / "base")
    settings = PipelineConfig.model_validate(
        {"run_dir": "r", "base": {"model": str(path), "dtype": dtype, "cache_dir": str(tmp_path / "cache")}}
    )
    base = load_base(settings.base, "cpu")
    model, _ = reward_model_for_training(base, LoraSettings(rank=4), None)
    pairs = tokenize(base.chat, records([None] * 4))
    trainer = reward.build_trainer(model, base.chat, arguments(tmp_path, max_steps=1), pairs, [])
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trainable} == {torch.float32}
    trainer.train()
    optimized = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in trainable}


def test_it_starts_as_the_sft_policy_or_afresh(learned: tuple[LoadedConfig, Manifest]) -> None:
    config = learned[0].config
    folder = RunDirectory(config.run_dir).stage("sft")
    theirs = load_file(folder / "adapter_model.safetensors")

    def adapter(start_from: Path | None) -> dict[str, Tensor]:
        model, _ = reward_model_for_training(load_base(config.base, "cpu"), config.lora, start_from)
        return {
            name.replace(".default", ""): weight.detach()
            for name, weight in model.named_parameters()
            if ".default." in name
        }

    copied, fresh = adapter(folder), adapter(None)
    assert len(theirs) == sum("lora_" in name for name in copied) == sum("lora_" in name for name in fresh)
    assert all(torch.equal(copied[name], tensor) for name, tensor in theirs.items())
    assert all(float(tensor.abs().max()) == 0 for name, tensor in fresh.items() if "lora_B" in name)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in theirs.items() if "lora_B" in name)


def test_a_base_that_was_converted_brings_no_warning(learned: tuple[LoadedConfig, Manifest], tmp_path: Path) -> None:
    config = learned[0].config
    folder = shutil.copytree(RunDirectory(config.run_dir).stage("sft"), tmp_path / "sft")
    adapter = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "package:x/y.gguf"}))
    base = load_base(config.base, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reward_model_for_training(base, config.lora, folder)


# -- the stage


def small_run(folder: Path, *overrides: str, **settings: Any) -> LoadedConfig:
    loaded = pairs_config(folder, "sft.max_steps=1", *overrides, **settings)
    if not RunDirectory(loaded.config.run_dir).stage("sft").exists():
        run_sft(loaded)
    return loaded


def test_a_score_that_changes_by_loading_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small_run(tmp_path, "reward.max_steps=1")
    load = Roles.add_weights

    def load_with_a_fault(self: Roles, role: Any, folder: Path) -> None:
        load(self, role, folder)
        if role == "reward":
            self.heads[role].weight.data *= 1 + 1e-6

    monkeypatch.setattr(Roles, "add_weights", load_with_a_fault)
    with pytest.raises(ArtifactError, match="after saving and loading"):
        run(loaded)
    assert not folder_of(loaded).exists()


def test_an_sft_adapter_of_another_base_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path)
    monkeypatch.setattr(reward, "train", None)
    other = pairs_config(tmp_path, "sft.max_steps=1", "base.double_quantization=false")
    with pytest.raises(IncompatibleAdapterError, match="quantization"):
        run(other)


def test_bad_data_is_told_before_the_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*_: object) -> None:
        raise AssertionError("the weights were loaded")

    loaded = small_run(tmp_path, "reward.max_length=8")
    monkeypatch.setattr(reward, "load_base", load_weights)
    with pytest.raises(DataError):
        run(loaded)


def test_a_training_that_diverges_stops_the_stage(tmp_path: Path) -> None:
    loaded = small_run(tmp_path, "reward.learning_rate=1e30", "reward.warmup_ratio=0")
    with pytest.raises(DivergenceError, match="not finite at step 2"):
        run(loaded)
    assert not folder_of(loaded).exists()


@pytest.mark.parametrize("scored", ["score_pairs", "score_rewards"])
def test_a_score_that_is_not_finite_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: str
) -> None:
    loaded = small_run(tmp_path, "reward.max_steps=1")
    own = getattr(reward, scored)
    calls: list[None] = []

    def spoilt(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        scores: Tensor = own(*args, **kwargs)
        # `score_rewards` first compares the scores before and after saving.
        return scores if scored == "score_rewards" and len(calls) == 1 else scores / 0.0

    monkeypatch.setattr(reward, scored, spoilt)
    with pytest.raises(DivergenceError, match="is not finite"):
        run(loaded)
    assert not folder_of(loaded).exists()


def test_without_prompts_those_of_the_pairs_calibrate(tmp_path: Path) -> None:
    chat = loaded_tiny_base(tmp_path).chat
    config = PipelineConfig.model_validate(
        {"run_dir": "r", "base": {"model": "b"}, "reward": {"calibration_prompts": 8}, "seed": 1}
    )
    rows = records([None] * 12)
    prompts = reward.calibration_prompts(config, chat, [*rows, *rows])
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 8
    assert {tuple(prompt) for prompt in prompts} <= {tuple(chat.prompt_ids(row.prompt)) for row in rows}
    assert prompts == reward.calibration_prompts(config, chat, [*rows, *rows])
    other = config.model_copy(update={"seed": 2})
    assert prompts != reward.calibration_prompts(other, chat, [*rows, *rows])


@pytest.mark.parametrize("weights", ["adapter", "merged"])
def test_without_sft_the_bare_base_calibrates(tmp_path: Path, weights: str) -> None:
    """The stage alone, in a run that has no SFT result, with a calibration that a bare model reproduces."""
    apart = ["reward.start_from=base", "reward.calibrate_on=base", f"ppo.rollout.weights={weights}"]
    loaded = pairs_config(tmp_path, *apart, "reward.learning_rate=0.02", "base.quantization=none")
    manifest = run(loaded)
    assert manifest.parents == {} and not RunDirectory(loaded.config.run_dir).stage("sft").exists()
    base, config = load_base(loaded.config.base, "cpu"), loaded.config
    prompts = reward.calibration_prompts(config, base.chat, [])
    answers = []
    for number, prompt in enumerate(prompts):  # no adapter has ever been on this model
        ids, chance_T = list(prompt), uniforms((0, "calibration"), [number], SamplingSettings(8))[0]
        for chance in chance_T:
            with torch.no_grad():
                probabilities_1V = base.model(torch.tensor([ids])).logits[:, -1].softmax(dim=-1)
            ids.append(int(draw(probabilities_1V, chance[None])))
            if ids[-1] == base.chat.eos_token_id:
                break
        answers.append(ids)
    roles = Roles(base)
    roles.add_from("reward", folder_of(loaded))
    raw_B = score_rewards(roles, answers, max_tokens=1000)
    assert manifest.reward_gain is not None and manifest.reward_bias is not None
    standard_B = Calibration(manifest.reward_gain, manifest.reward_bias).apply(raw_B.double())
    assert float(standard_B.mean()) == pytest.approx(0, abs=1e-3)
    assert float(standard_B.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_correlation_with_what_does_not_vary_is_none() -> None:
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])) == 0
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0, 4.0, 2.0])) == pytest.approx(-1)


def test_padding_ids_are_never_looked_at(tmp_path: Path) -> None:
    """The stage's own batches pad with id 0, TRL's with the tokenizer's pad token: the same scores come out."""
    base = loaded_tiny_base(tmp_path)
    torch.manual_seed(0)
    model, _ = reward_model_for_training(base, LoraSettings(rank=4), None)
    model.eval()
    ids_BL, mask_BL = pad([[5, 9, 3, 258], [7, 258]], base.device)
    with torch.no_grad():
        zeros, eos = (
            model(input_ids=ids_BL.masked_fill(~mask_BL, pad_id), attention_mask=mask_BL).logits for pad_id in (0, 258)
        )
    assert torch.equal(zeros, eos)
