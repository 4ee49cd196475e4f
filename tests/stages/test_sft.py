"""SFT: the loss that it minimizes, what it leaves alone, and what comes out."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import ARCHITECTURES, loaded_tiny_base, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, masking_utils

import stages.sft as sft
from pipeline.artifacts import Manifest
from pipeline.base_model import Base, fingerprint, load_base, require_unchanged
from pipeline.config import LoraSettings, PipelineConfig
from pipeline.config_file import LoadedConfig
from pipeline.errors import BaseModelError, ConfigError, DataError, DivergenceError, OutOfMemoryError
from pipeline.memory_budget import MemoryBudget
from pipeline.metrics import read_metrics
from pipeline.records import Demonstration, Message, Origin, TokenizedExample
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.trl_options import sft_arguments
from stages.trl_training import taking_options

QUESTIONS = ("sun", "the sea is", "sky and clouds", "ice", "oak, elm, ash and beech", "fox", "owls", "bees hum")


def demonstrations() -> list[Demonstration]:
    """Rows of different lengths, one with two turns."""
    rows = [
        Demonstration(
            (Message("user", text),), (Message("assistant", text.upper() * (1 + number % 3)),), Origin("x", 1)
        )
        for number, text in enumerate(QUESTIONS)
    ]
    turns = (Message("assistant", "yes"), Message("user", "why is that so?"), Message("assistant", "who knows"))
    return [*rows, Demonstration((Message("user", "is it?"),), turns, Origin("x", 1))]


def arguments(folder: Path, **settings: Any) -> Any:
    tree = {"run_dir": "run", "base": {"model": "b"}, "sft": {"batch_size": 4, "microbatch_size": 4} | settings}
    return sft_arguments(PipelineConfig.model_validate(tree), folder)


def policy(base: Base, *, scale: float = 0.1) -> Roles:
    """The policy's role on the base, with an adapter that already does something."""
    roles = Roles(base)
    torch.manual_seed(0)
    roles.add_fresh("policy", LoraSettings(rank=4, alpha=8))
    roles.set_trainable("policy")
    for name, parameter in roles.parameters("policy").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return roles


def run(loaded: LoadedConfig) -> Manifest:
    return sft.run(loaded, RunDirectory.open(loaded))


# -- the rows


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epochs_last_batch_has_gaps(tmp_path: Path, workers: int) -> None:
    """Through TRL's collator and Accelerate's loader; seven rows in batches of four, two a microbatch."""
    roles = policy(loaded_tiny_base(tmp_path))
    rows = sft.tokenize(roles.base.chat, demonstrations()[:7])
    options = arguments(tmp_path, microbatch_size=2, trl={"dataloader_num_workers": workers})
    loader = sft.build_trainer(roles, options, rows, []).get_train_dataloader()
    batches = list(loader)
    assert [batch["examples"] for batch in batches] == [2, 2, 2, 1]
    seen = [
        tuple(ids_L[mask_L.bool()].tolist())
        for batch in batches
        for ids_L, mask_L in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(seen) == sorted(tuple(row.ids) for row in rows)
    pickle.dumps(loader.collate_fn)  # for workers that are spawned


# -- the loss


def loss_by_hand(roles: Roles, rows: list[TokenizedExample]) -> tuple[float, int]:
    """The sum of -log p over what the assistant says, a row and a token at a time in float64; and their number."""
    model = copy.deepcopy(roles.model).double().eval()
    total, count = 0.0, 0
    for row in rows:
        logits_LV = model(input_ids=torch.tensor([row.ids])).logits[0]
        for position in range(1, len(row.ids)):
            if row.loss_mask[position]:
                total -= float(logits_LV[position - 1].log_softmax(-1)[row.ids[position]])
                count += 1
    return total, count


@pytest.mark.parametrize("packing", [False, True])
@torch.no_grad()
def test_the_loss_is_over_the_assistants_tokens_alone(tmp_path: Path, packing: bool) -> None:
    roles = policy(loaded_tiny_base(tmp_path))
    rows = sft.tokenize(roles.base.chat, demonstrations())
    total, count = loss_by_hand(roles, rows)
    trainer = sft.build_trainer(roles, arguments(tmp_path, packing=packing, max_length=256), rows, [])
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    assert len(batches) < len(rows) if packing else len(batches) == len(rows)
    trainer.model.eval()
    found = sum(float(trainer.compute_loss(roles.model, batch, num_items_in_batch=count)) for batch in batches)
    assert found == pytest.approx(total / count, rel=1e-5)
    # What users say, and the template's own words, are no targets.
    targets = sum(int((batch["labels"] != sft.IGNORED).sum()) for batch in batches)
    assert targets == count == sum(sum(row.loss_mask) for row in rows) < sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_targets_alone_give_the_loss_and_gradients_of_all_logits(tmp_path: Path, architecture: str) -> None:
    roles = policy(loaded_tiny_base(tmp_path, architecture))
    rows = sft.tokenize(roles.base.chat, demonstrations())
    trainer = sft.build_trainer(roles, arguments(tmp_path), rows, [])
    ours: Any = roles.base.model.forward
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    found = []
    for forward in (ours, ours.__wrapped__):
        roles.base.model.forward = forward
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        gradients = [parameter.grad for parameter in roles.parameters("policy").values()]
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        trainer._metrics["train"].clear()
        found.append([loss.detach(), gradients, metrics])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert set(found[0][2]) == {"entropy", "mean_token_accuracy"}
    # A batch in which nobody says anything is a loss of 0, not a fault.
    roles.base.model.forward = ours
    silent = batch | {"labels": torch.full_like(batch["labels"], sft.IGNORED)}
    loss = trainer.compute_loss(trainer.model, silent)
    loss.backward()
    assert float(loss.detach()) == 0


@torch.no_grad()
def tokens(size: int) -> MemoryBudget:
    return MemoryBudget("sft.microbatch_size * sft.max_length", size, print)


def test_with_too_little_memory_the_held_out_loss_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = policy(loaded_tiny_base(tmp_path))
    rows = sft.tokenize(roles.base.chat, demonstrations())
    accelerator = sft.build_trainer(roles, arguments(tmp_path), rows, []).accelerator
    expected = sft.held_out_loss(roles, "policy", rows, accelerator, tokens(10_000))
    own, longest = Roles.hidden_states, max(len(row.ids) for row in rows)

    def limited(most: int) -> None:
        def hidden_states(roles: Roles, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
            if ids_BL.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return own(roles, ids_BL, mask_BL)

        monkeypatch.setattr(Roles, "hidden_states", hidden_states)

    limited(2 * longest)
    budget = tokens(10_000)
    assert sft.held_out_loss(roles, "policy", rows, accelerator, budget) == pytest.approx(expected, rel=1e-6)
    assert budget.size < 400 and "Out of memory with sft.microbatch_size" in capsys.readouterr().out
    limited(longest - 1)
    with pytest.raises(OutOfMemoryError, match=f"sft.max_length={longest // 2}"):
        sft.held_out_loss(roles, "policy", rows, accelerator, tokens(10_000))


def test_the_held_out_loss_counts_every_token_the_same(tmp_path: Path) -> None:
    roles = policy(loaded_tiny_base(tmp_path))
    rows = sft.tokenize(roles.base.chat, demonstrations())
    total, count = loss_by_hand(roles, rows)
    accelerator = sft.build_trainer(roles, arguments(tmp_path), rows, []).accelerator
    for max_tokens in (1, 100, 10_000):
        found = sft.held_out_loss(roles, "policy", rows, accelerator, tokens(max_tokens))
        assert found == pytest.approx(total / count, rel=1e-5)
    # Before training the adapter changes nothing, so that the bare base stands for it.
    bare = sft.held_out_loss(roles, None, rows, accelerator, tokens(100))
    assert bare is not None and found is not None and abs(bare - found) > 1e-3
    assert sft.held_out_loss(roles, "policy", [], accelerator, tokens(100)) is None


def trained_adapter(base: Base, rows: list[TokenizedExample], settings: Any) -> dict[str, Tensor]:
    roles = policy(base, scale=0.0)
    before = {name: parameter.detach().clone() for name, parameter in roles.parameters("policy").items()}
    trainer = sft.build_trainer(roles, settings, rows, [])
    trainer.train()
    changes = {name: parameter.detach() - before[name] for name, parameter in roles.parameters("policy").items()}
    roles.model.unload()
    return changes


def test_a_step_does_not_depend_on_how_its_batch_is_divided(tmp_path: Path) -> None:
    base = loaded_tiny_base(tmp_path)
    rows = sft.tokenize(base.chat, demonstrations()[:8])
    # SGD, since Adam's first steps would hide a wrong scale of the gradient.
    settings = {"batch_size": 4, "max_steps": 3, "learning_rate": 1.0, "max_grad_norm": 1e9, "optimizer": "sgd"}
    whole = trained_adapter(base, rows, arguments(tmp_path, **settings | {"microbatch_size": 4}))
    # Recomputing activations in the backward pass must change as little.
    for division in ({"microbatch_size": 1}, {"microbatch_size": 2}, {"gradient_checkpointing": False}):
        parts = trained_adapter(base, rows, arguments(tmp_path, **settings | division))
        for name, change in whole.items():
            torch.testing.assert_close(parts[name], change, rtol=1e-3, atol=1e-6)
    assert max(float(change.abs().max()) for change in whole.values()) > 1e-3


# -- rows in one sequence


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_packed_rows_do_not_see_each_other(tmp_path: Path, architecture: str, attention: str | None) -> None:
    base = loaded_tiny_base(tmp_path, architecture)
    if attention is not None:  # None is the architecture's own choice, SDPA for most
        base.model.set_attn_implementation(attention)
    roles = policy(base)
    rows = sft.tokenize(base.chat, demonstrations())
    trainer = sft.build_trainer(roles, arguments(tmp_path, packing=True, max_length=256), rows, [])
    assert len(trainer.train_dataset) < len(rows)
    sft.require_separate_rows(roles, trainer)
    packed, count = 0.0, sum(sum(row.loss_mask) for row in rows)
    trainer.model.eval()
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        packed += float(trainer.compute_loss(roles.model, batch, num_items_in_batch=count))
    alone = sft.held_out_loss(roles, "policy", rows, trainer.accelerator, tokens(1))
    assert packed == pytest.approx(alone, rel=1e-5)


def test_rows_that_would_see_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in an architecture whose mask does not look at the positions.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ConfigError, match="would see each other"):
        run(tiny_config(tmp_path, "sft.packing=true"))
    run(tiny_config(tmp_path, "sft.packing=false"))


# -- numbers and storage


def test_the_adapter_stays_exact_and_in_float32(tmp_path: Path) -> None:
    base = loaded_tiny_base(tmp_path, quantization="nf4")
    roles = policy(base)
    before = {name: parameter.detach().clone() for name, parameter in roles.parameters("policy").items()}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values())
    trainer = sft.build_trainer(roles, arguments(tmp_path), sft.tokenize(base.chat, demonstrations()), [])
    for name, parameter in roles.parameters("policy").items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert roles.trainable_names() == roles.declared_names() == set(before)
    trainer.create_optimizer()
    optimized = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(parameter) for parameter in roles.parameters("policy").values()}


def test_a_base_that_changed_is_refused(tmp_path: Path) -> None:
    base = loaded_tiny_base(tmp_path, quantization="nf4")
    before = fingerprint(base.model)
    policy(base)
    require_unchanged(base, before)
    next(base.model.parameters()).data[0, 0] += 1
    with pytest.raises(BaseModelError, match="changed during the stage"):
        require_unchanged(base, before)


# -- the stage


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoadedConfig, Manifest]]:
    """A run on an NF4 base that learns to say the question's word again."""
    folder = tmp_path_factory.mktemp("sft")
    settings = {"max_steps": 40, "learning_rate": 2e-2, "batch_size": 8, "microbatch_size": 8, "max_length": 64}
    loaded = tiny_config(folder, sft=settings | {"gradient_checkpointing": False})
    yield loaded, run(loaded)


def test_the_held_out_loss_falls(learned: tuple[LoadedConfig, Manifest]) -> None:
    metrics = learned[1].metrics
    assert metrics["held_out_loss_before"] == pytest.approx(math.log(259), abs=0.1)  # of 259 tokens nothing is known
    # The tiny output head is frozen: its logits reach 1.3 at the most, and the loss about 4.3 at the least.
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"] - 0.4
    for when in ("before", "after"):
        expected = math.exp(metrics[f"held_out_loss_{when}"])
        assert metrics[f"held_out_perplexity_{when}"] == pytest.approx(expected)
    assert (metrics["rows"], metrics["held_out_rows"], metrics["steps"]) == (32, 8, 40)
    assert metrics["assistant_tokens"] == 5 * 32  # three letters, an exclamation mark, EOS


def test_the_manifest_tells_what_the_data_gave(learned: tuple[LoadedConfig, Manifest]) -> None:
    (report,) = learned[1].extra["data"]
    assert (report["read"], report["train"], report["held_out"]) == (40, 32, 8)


def test_metrics_are_written_once_a_step(learned: tuple[LoadedConfig, Manifest]) -> None:
    rows = read_metrics(RunDirectory(learned[0].config.run_dir).metrics("sft"))
    assert [row["step"] for row in rows] == [*range(5, 41, 5)]
    assert all(row["loss"] and row["grad_norm"] and row["tokens_per_second"] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_plain_peft_loads_the_adapter_and_says_the_same(
    learned: tuple[LoadedConfig, Manifest], tmp_path: Path, quantization: str
) -> None:
    loaded, _ = learned
    settings = loaded.config.base.model_copy(update={"quantization": quantization})
    folder = RunDirectory(loaded.config.run_dir).stage("sft")
    ours = load_base(settings, "cpu")
    roles = Roles(ours)
    roles.add_weights("reference", folder)
    ids_BL = torch.tensor([ours.chat.prompt_ids((Message("user", "owl"),))])
    theirs = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, quantization_config=getattr(ours.model.config, "quantization_config", None)
    )
    for module in theirs.modules():
        # Some CPUs have another kernel for 4-bit inference, which rounds to bfloat16; trivet never uses it.
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        bare = theirs(input_ids=ids_BL).logits
        theirs = PeftModel.from_pretrained(theirs, folder).eval()
        plain = theirs(input_ids=ids_BL).logits
        roles.inference_mode()
        with roles.active("reference"):
            own = roles.logits(roles.hidden_states(ids_BL, torch.ones_like(ids_BL).bool()))
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)
    assert float((plain - bare).abs().max()) > 0.1


def test_bad_data_is_told_before_the_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*_: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(sft, "load_base", load_weights)
    loaded = tiny_config(tmp_path, "sft.max_length=8")
    with pytest.raises(DataError):
        run(loaded)


def test_a_launchers_mixed_precision_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, though transformers would compute in what this variable says."""
    adapters = []
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        loaded = tiny_config(tmp_path, "sft.max_steps=2", f"run_dir={tmp_path / precision}")
        run(loaded)
        adapters.append((tmp_path / precision / "sft" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_nothing_is_printed_but_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = tiny_config(tmp_path, "sft.max_steps=2", "sft.packing=true")
    capfd.readouterr()
    run(loaded)
    captured = capfd.readouterr()
    assert captured.out == ""
    foreign = [line for line in captured.err.splitlines() if not line.startswith("sft")]
    assert [line for line in foreign if "Loading weights" not in line and "Failed to load CPU gemm" not in line] == []


def test_a_training_that_diverges_stops_the_stage(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, "sft.learning_rate=1e30", "sft.warmup_ratio=0")
    with pytest.raises(DivergenceError, match="not finite at step 2"):
        run(loaded)
    assert not RunDirectory(loaded.config.run_dir).stage("sft").exists()


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_held_out_loss_that_is_not_finite_stops_the_stage(tmp_path: Path, when: str) -> None:
    evaluation = {"trl": {"eval_strategy": "steps", "eval_steps": 2}} if when == "during" else {}
    settings = {"max_steps": 2, "batch_size": 4, "microbatch_size": 2, "max_length": 128, "warmup_ratio": 0.0}
    loaded = tiny_config(tmp_path, sft=settings | {"learning_rate": 1e20, "lr_schedule": "linear"} | evaluation)
    with pytest.MonkeyPatch.context() as patch:
        # The first step's weights would make the second step's loss infinite.
        patch.setattr(sft.PolicyTrainer, "_check_step", lambda *_: None)
        with pytest.raises(DivergenceError, match="held-out loss is not finite" + (" at step 2" * (when == "during"))):
            run(loaded)
    assert not RunDirectory(loaded.config.run_dir).stage("sft").exists()


# -- what an earlier run left


def adapter_bytes(loaded: LoadedConfig) -> bytes:
    return (RunDirectory(loaded.config.run_dir).stage("sft") / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    settings = ("sft.max_steps=4", "sft.checkpoint_every=2", "sft.learning_rate=0.01")
    straight = tiny_config(tmp_path / "a", *settings, "lora.alpha=4")
    run(straight)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(sft, "finish", None)
        run(tiny_config(tmp_path / "b", *settings))
    changed = tiny_config(tmp_path / "b", *settings, "lora.alpha=4")
    assert [path.name for path in (Path(changed.config.run_dir) / "working" / "sft" / "checkpoints").iterdir()]
    run(changed)
    assert adapter_bytes(changed) == adapter_bytes(straight)


def test_the_best_checkpoint_is_the_result_where_trl_is_asked_for_it(tmp_path: Path) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    settings = {"max_steps": 4, "checkpoint_every": 2, "batch_size": 4, "microbatch_size": 2, "max_length": 128}
    # "Best" is the highest loss here, so that it is not the last.
    loaded = tiny_config(
        tmp_path, sft=settings | {"learning_rate": 0.02, "trl": evaluation | {"metric_for_best_model": "eval_loss"}}
    )
    metrics = run(loaded).metrics
    rows = read_metrics(RunDirectory(loaded.config.run_dir).metrics("sft"))
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[0] is not None and losses[1] is not None and losses[0] - losses[1] > 0.01
    # Rows of one length and mean over batches of one size: the same as the mean over tokens.
    assert metrics["held_out_loss_after"] == pytest.approx(losses[0], rel=1e-4)


def test_an_evaluation_by_trl_after_an_epochs_last_batch_is_of_the_held_out_rows(tmp_path: Path) -> None:
    """29 rows in batches of four: the microbatch before the evaluation has no row of its own."""
    settings = {"max_steps": None, "epochs": 1, "batch_size": 4, "microbatch_size": 1, "max_length": 128}
    trl = {"trl": {"eval_strategy": "epoch"}}
    loaded = tiny_config(tmp_path, "data.instructions.held_out=0.3", sft=settings | trl)
    metrics = run(loaded).metrics
    assert metrics["rows"] == 29 and metrics["steps"] == 8
    rows = read_metrics(RunDirectory(loaded.config.run_dir).metrics("sft"))
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [
        pytest.approx(metrics["held_out_loss_after"], rel=1e-4)
    ]


def test_what_a_trainer_says_of_its_options_names_them(tmp_path: Path) -> None:
    with_options = tiny_config(tmp_path, sft={"trl": {"activation_offloading": True}})
    said = r"sft\.trl: the trainer does not take these options here: AttributeError: x"
    with pytest.raises(ConfigError, match=said), taking_options("sft", with_options):
        raise AttributeError("x")
    with pytest.raises(AttributeError), taking_options("sft", tiny_config(tmp_path)):
        raise AttributeError("a fault of our own")
