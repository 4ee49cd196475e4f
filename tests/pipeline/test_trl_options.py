"""TRL's options: every name and value is checked before a model loads, and none stands in two places."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig, SFTConfig

from pipeline.config import PipelineConfig
from pipeline.distributed import World
from pipeline.errors import ConfigError
from pipeline.trl_options import _INSTEAD, _from_settings, check_trl_options, reward_arguments, sft_arguments

NAMES = {field.name for kind in (SFTConfig, RewardConfig) for field in dataclasses.fields(kind) if field.init}


def config(**sections: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"run_dir": "run", "base": {"model": "base"}} | sections)


def refused(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_trl_options(config(**sections))
    return str(caught.value)


def test_settings_reach_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "size", 2)
    settings = {
        "epochs": 2.5,
        "max_steps": 7,
        "batch_size": 24,
        "microbatch_size": 4,
        "learning_rate": 3e-4,
        "lr_schedule": "linear",
        "warmup_ratio": 0.25,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "max_length": 99,
        "log_every": 3,
        "checkpoint_every": 11,
        "keep_last": 4,
        "gradient_checkpointing": True,
    }
    both = config(sft=settings | {"packing": True}, reward=settings, seed=5)
    for arguments in (sft_arguments(both, tmp_path), reward_arguments(both, tmp_path)):
        assert arguments.output_dir == str(tmp_path)
        assert (arguments.num_train_epochs, arguments.max_steps) == (2.5, 7)
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 3)
        assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (3e-4, 0.01, 0.5)
        assert (arguments.lr_scheduler_type.value, arguments.get_warmup_steps(100)) == ("linear", 25)
        assert (arguments.max_length, arguments.seed) == (99, 5)
        assert (arguments.logging_steps, arguments.save_steps, arguments.save_total_limit) == (3, 11, 4)
        assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}
        assert not arguments.bf16 and not arguments.fp16
        assert arguments.report_to in ([], "none", ["none"])
    assert sft_arguments(both, tmp_path).packing


def test_the_processes_that_there_are_must_share_a_batch_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "size", 8)  # started by hand, whatever launch.processes says
    with pytest.raises(ConfigError, match=r"Set reward\.batch_size=32"):
        reward_arguments(config(reward={"batch_size": 16, "microbatch_size": 4}), tmp_path)


def test_a_launcher_does_not_round_what_the_adapters_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take this for autocast, which no other stage has."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for arguments in (sft_arguments(config(), tmp_path), reward_arguments(config(), tmp_path)):
        assert arguments.mixed_precision == "no"


def test_a_constant_rate_warms_up_too(tmp_path: Path) -> None:
    arguments = sft_arguments(config(sft={"lr_schedule": "constant", "warmup_ratio": 1.0}), tmp_path)
    assert arguments.lr_scheduler_type.value == "constant_with_warmup"
    assert arguments.get_warmup_steps(200) == 200


@pytest.mark.parametrize(("cuda", "optimizer"), [(False, "adamw_torch"), (True, "paged_adamw_8bit")])
def test_the_automatic_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, optimizer: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = _from_settings("sft", config(), tmp_path)
    assert (options["optim"], options["use_cpu"]) == (optimizer, not cuda)


def test_the_adapters_dropout_is_kept_in_reward_training(tmp_path: Path) -> None:
    assert reward_arguments(config(), tmp_path).disable_dropout
    assert not reward_arguments(config(lora={"dropout": 0.1}), tmp_path).disable_dropout


def test_options_pass_through_in_the_types_that_trl_declares(tmp_path: Path) -> None:
    arguments = sft_arguments(
        config(sft={"trl": {"adam_epsilon": "1e-6", "loss_type": "dft", "lr_scheduler_type": "polynomial"}}), tmp_path
    )
    assert (arguments.adam_epsilon, arguments.loss_type) == (1e-6, "dft")
    assert arguments.lr_scheduler_type.value == "polynomial"
    centred = reward_arguments(config(reward={"trl": {"center_rewards_coefficient": "1e-2"}}), tmp_path)
    assert centred.center_rewards_coefficient == 0.01


def test_padding_free_rows_have_no_length_to_enforce(tmp_path: Path) -> None:
    assert sft_arguments(config(sft={"trl": {"padding_free": True}}), tmp_path).max_length is None


def test_checkpointing_stays_non_reentrant_beside_other_options(tmp_path: Path) -> None:
    more = {"trl": {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}}
    assert sft_arguments(config(sft=more), tmp_path).gradient_checkpointing_kwargs == {
        "use_reentrant": False,
        "preserve_rng_state": False,
    }


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("learning_rate", 1e-4, "{stage}.learning_rate"),
        ("per_device_train_batch_size", 2, "{stage}.microbatch_size"),
        ("gradient_accumulation_steps", 2, "{stage}.batch_size"),
        ("max_length", 10, "{stage}.max_length"),
        ("bf16", True, "base.dtype"),
        ("seed", 1, "seed"),
        ("deepspeed", "x.json", "launch.accelerate_config"),
    ],
)
def test_what_trivet_sets_is_refused_with_its_key(stage: str, option: str, value: object, advice: str) -> None:
    message = refused(**{stage: {"trl": {option: value}}})
    assert f"{stage}.trl.{option}" in message
    assert advice.format(stage=stage) in message


def test_an_unknown_option_gets_the_nearest_name() -> None:
    assert "did you mean 'neftune_noise_alpha'?" in refused(sft={"trl": {"neftune_noise": 5}})
    assert "reward.trl.loss_type" in refused(reward={"trl": {"loss_type": "dft"}})
    # The nearest name must be one that may be set.
    assert "learning_rate'?" not in refused(sft={"trl": {"learning_rat": 5}})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("neftune_noise_alpha", "loud"),
        ("dataloader_num_workers", 1.5),
        ("dataloader_drop_last", "perhaps"),
        ("eval_strategy", "sometimes"),
        ("lr_scheduler_type", "cosinus"),
        ("train_sampling_strategy", "alphabetical"),
        ("loss_type", "mse"),
        ("gradient_checkpointing_kwargs", "no"),
        ("packing_strategy", "wrapped"),
        ("lr_scheduler_type", "cosine"),
    ],
)
def test_wrong_values_are_refused(option: str, value: object) -> None:
    message = refused(sft={"trl": {option: value}})
    assert f"sft.trl.{option}" in message and repr(value) in message


def test_pairs_have_no_length_to_be_ordered_by() -> None:
    refused_here = refused(reward={"trl": {"train_sampling_strategy": "group_by_length"}})
    assert "reward.trl.train_sampling_strategy is 'group_by_length', for which a row has one length" in refused_here
    check_trl_options(config(sft={"trl": {"train_sampling_strategy": "group_by_length"}}))
    check_trl_options(config(reward={"trl": {"train_sampling_strategy": "random"}}))


def test_no_knob_stands_in_two_places() -> None:
    assert "both set" in refused(sft={"lr_schedule": "linear", "trl": {"lr_scheduler_type": "polynomial"}})
    checkpointing = {"gradient_checkpointing": False, "trl": {"gradient_checkpointing_kwargs": {"debug": True}}}
    assert "sft.gradient_checkpointing is false" in refused(sft=checkpointing)


def test_unknown_optimizers_are_refused() -> None:
    assert "did you mean 'adamw_torch'?" in refused(reward={"optimizer": "adamw_torhc"})
    check_trl_options(config(sft={"optimizer": "sgd"}))


def test_all_faults_are_told_at_once() -> None:
    message = refused(
        sft={"trl": {"learning_rate": 1, "neftun": 2, "eval_delay": "x"}}, reward={"trl": {"output_dir": "x"}}
    )
    assert message.startswith("4 faults")
    for option in ("sft.trl.learning_rate", "sft.trl.neftun", "sft.trl.eval_delay", "reward.trl.output_dir"):
        assert option in message


def test_what_trl_itself_refuses_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.trl: TRL refuses"):
        sft_arguments(config(sft={"trl": {"load_best_model_at_end": True}}), tmp_path)


def test_the_names_are_those_of_the_installed_trl(tmp_path: Path) -> None:
    assert set(_INSTEAD) <= NAMES
    # What trivet sets is refused in the pass-through, but for these, which a user may replace.
    replaceable = {
        "lr_scheduler_type",
        "gradient_checkpointing_kwargs",
        "per_device_eval_batch_size",
        "dataloader_pin_memory",
        "report_to",
    }
    assert set(_from_settings("sft", config(), tmp_path)) - set(_INSTEAD) == replaceable


def test_a_config_without_options_costs_no_import_of_torch() -> None:
    program = (
        "import sys; from pipeline.config import PipelineConfig; from pipeline.trl_options import check_trl_options\n"
        "check_trl_options(PipelineConfig.model_validate({'run_dir': 'r', 'base': {'model': 'b'}}))\n"
        "sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
