"""TRL's own options, as `sft.trl` and `reward.trl` pass them through: checked by name and type before any model loads.

Options that trivet sets itself are refused with the key to use instead, so that no knob stands in two places.
torch and TRL are imported only where there is something to check.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.config import PipelineConfig, TrainerSettings
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from trl import RewardConfig, SFTConfig

TrainerStage = Literal["sft", "reward"]

_BY_CHAT_FORMAT = "rows are tokenized by trivet's chat format, the same in all stages; see base.chat_template"
_BY_LAUNCH = "set launch.accelerate_config to an Accelerate file that asks for it"
_FINISHED_FOLDER = "publish the finished stage's folder instead"
_OWN_PROGRESS = "trivet shows its own progress"

_INSTEAD: Mapping[str, str] = {
    "accelerator_config": _BY_LAUNCH,
    "activation_checkpointing": "set {stage}.gradient_checkpointing",
    "activation_checkpointing_kwargs": "set gradient_checkpointing_kwargs",
    "assistant_only_loss": _BY_CHAT_FORMAT,
    "auto_find_batch_size": "set {stage}.microbatch_size",
    "average_tokens_across_devices": "a token counts the same in whatever process",
    "bf16": "set base.dtype",
    "bf16_full_eval": "set base.dtype",
    "chat_template_path": "set base.chat_template",
    "completion_only_loss": _BY_CHAT_FORMAT,
    "dataset_kwargs": _BY_CHAT_FORMAT,
    "dataset_num_proc": _BY_CHAT_FORMAT,
    "dataset_text_field": _BY_CHAT_FORMAT,
    "deepspeed": _BY_LAUNCH,
    "disable_tqdm": _OWN_PROGRESS,
    "enable_jit_checkpoint": "trivet writes a checkpoint when it is asked to stop",
    "eos_token": _BY_CHAT_FORMAT,
    "fp16": "set base.dtype",
    "fp16_full_eval": "set base.dtype",
    "fsdp": _BY_LAUNCH,
    "fsdp_config": _BY_LAUNCH,
    "full_determinism": "set deterministic",
    "gradient_accumulation_steps": "set {stage}.batch_size and {stage}.microbatch_size",
    "gradient_checkpointing": "set {stage}.gradient_checkpointing",
    "hub_always_push": _FINISHED_FOLDER,
    "hub_model_id": _FINISHED_FOLDER,
    "hub_private_repo": _FINISHED_FOLDER,
    "hub_revision": _FINISHED_FOLDER,
    "hub_strategy": _FINISHED_FOLDER,
    "hub_token": _FINISHED_FOLDER,
    "ignore_data_skip": "a resumed run goes on with the rows that come next",
    "learning_rate": "set {stage}.learning_rate",
    "local_rank": _BY_LAUNCH,
    "log_level": _OWN_PROGRESS,
    "log_level_replica": _OWN_PROGRESS,
    "logging_nan_inf_filter": "trivet stops at a loss or gradient that is not finite",
    "logging_steps": "set {stage}.log_every",
    "logging_strategy": "set {stage}.log_every",
    "max_grad_norm": "set {stage}.max_grad_norm",
    "max_length": "set {stage}.max_length",
    "max_steps": "set {stage}.max_steps",
    "model_init_kwargs": "see the base section",
    "num_train_epochs": "set {stage}.epochs",
    "optim": "set {stage}.optimizer",
    "output_dir": "set run_dir",
    "packing": "set sft.packing",
    "pad_token": "padding is known by lengths, whatever the pad token",
    "parallelism_config": _BY_LAUNCH,
    "per_device_train_batch_size": "set {stage}.microbatch_size",
    "push_to_hub": _FINISHED_FOLDER,
    "remove_unused_columns": _BY_CHAT_FORMAT,
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "save_only_model": "set {stage}.checkpoint_every; a checkpoint to resume from is whole",
    "save_steps": "set {stage}.checkpoint_every",
    "save_strategy": "set {stage}.checkpoint_every",
    "save_total_limit": "set {stage}.keep_last",
    "seed": "set seed",
    "truncation_mode": "rows longer than {stage}.max_length are dropped and reported",
    "trust_remote_code": "set base.trust_remote_code",
    "use_cache": "it is on for sampling and off for training",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to nothing",
    "warmup_steps": "set {stage}.warmup_ratio",
    "weight_decay": "set {stage}.weight_decay",
}
"""TRL's name of what trivet decides -> what to do instead."""

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""trivet's `lr_schedule` -> transformers' name. Its plain `constant` would ignore the warm-up."""


def check_trl_options(config: PipelineConfig) -> None:
    """Check both stages' pass-through and optimizer.

    Raises:
        ConfigError: with every option that is unknown, is trivet's own, or has a value of the wrong kind.
    """
    faults = [*_faults("sft", config), *_faults("reward", config)]
    if faults:
        listed = faults[0] if len(faults) == 1 else "\n".join(f"  {n}. {fault}" for n, fault in enumerate(faults, 1))
        raise ConfigError(listed if len(faults) == 1 else f"{len(faults)} faults in TRL's options:\n{listed}")


def sft_arguments(config: PipelineConfig, output_dir: Path) -> SFTConfig:
    """TRL's arguments for SFT: trivet's settings with the pass-through on top.

    Raises:
        ConfigError: see `check_trl_options`; or TRL itself refuses the combination.
    """
    from trl import SFTConfig

    given = _checked("sft", config)
    options = _from_settings("sft", config, output_dir)
    options["packing"] = config.sft.packing
    if given.get("padding_free") and not config.sft.packing:
        options["max_length"] = None  # TRL cannot enforce it then; the data already obeys it
    return _build(SFTConfig, "sft", {**options, **given})


def reward_arguments(config: PipelineConfig, output_dir: Path) -> RewardConfig:
    """TRL's arguments for reward training; arguments and errors as for `sft_arguments`."""
    from trl import RewardConfig

    given = _checked("reward", config)
    options = _from_settings("reward", config, output_dir)
    # TRL would switch all dropout off, the adapter's too, which `lora.dropout` may ask for.
    options["disable_dropout"] = config.lora.dropout == 0
    return _build(RewardConfig, "reward", {**options, **given})


def _from_settings(stage: TrainerStage, config: PipelineConfig, output_dir: Path) -> dict[str, Any]:
    import torch

    from pipeline.distributed import World

    settings: TrainerSettings = getattr(config, stage)
    on_cuda = torch.cuda.is_available()
    checkpointing: dict[str, Any] = {"use_reentrant": False} | settings.trl.get("gradient_checkpointing_kwargs", {})
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if settings.max_steps is None else settings.max_steps,
        "per_device_train_batch_size": settings.microbatch_size,
        "per_device_eval_batch_size": settings.microbatch_size,
        "gradient_accumulation_steps": _accumulation_steps(stage, settings, World().size),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": _SCHEDULES[settings.lr_schedule],
        # Below 1 it is a share of the steps, from 1 on a number of them.
        "warmup_steps": min(settings.warmup_ratio, 1 - 1e-9),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": _optimizer(settings, on_cuda=on_cuda),
        "max_length": settings.max_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": checkpointing if settings.gradient_checkpointing else None,
        # No autocast: the base has its own dtype to compute in, adapters and heads stay in float32.
        "bf16": False,
        "fp16": False,
        "use_cpu": not on_cuda,
        "dataloader_pin_memory": on_cuda,
        "seed": config.seed % 2**32,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": settings.keep_last,
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "report_to": "none",
    }


def _accumulation_steps(stage: TrainerStage, settings: TrainerSettings, processes: int) -> int:
    """Forward passes an optimizer step, for the number of processes that there really are."""
    step = settings.microbatch_size * processes
    if settings.batch_size % step:
        raise ConfigError(
            f"{stage}.batch_size is {settings.batch_size}, which {processes} processes with"
            f" {stage}.microbatch_size={settings.microbatch_size} cannot share evenly",
            remedy=f"Set {stage}.batch_size={-(-settings.batch_size // step) * step}.",
        )
    return settings.batch_size // step


def _optimizer(settings: TrainerSettings, *, on_cuda: bool) -> str:
    if settings.optimizer != "auto":
        return settings.optimizer
    return "paged_adamw_8bit" if on_cuda else "adamw_torch"


def _build(kind: Any, stage: TrainerStage, options: dict[str, Any]) -> Any:
    try:
        arguments = kind(**options)
        # A process uses one GPU, however many it sees; TRL would refuse to start.
        arguments._n_gpu = min(1, arguments.n_gpu)
        # Read from the launcher, which would round what the adapters compute: see `require_agreed_dtype`.
        arguments.mixed_precision = "no"
        return arguments
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"TRL refuses the options: {error}",
            where=f"{stage}.trl",
            remedy="Change or remove the option that it names.",
        ) from error


def _checked(stage: TrainerStage, config: PipelineConfig) -> dict[str, Any]:
    """The pass-through's values, converted to the types that TRL declares."""
    check_trl_options(config)
    given: Mapping[str, Any] = getattr(config, stage).trl
    hints = get_type_hints(_config_class(stage)) if given else {}
    converted = {name: _adapter(hints[name]).validate_python(value) for name, value in given.items()}
    if "gradient_checkpointing_kwargs" in converted:
        converted["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | given["gradient_checkpointing_kwargs"]
    return converted


def _faults(stage: TrainerStage, config: PipelineConfig) -> Iterator[str]:
    settings: TrainerSettings = getattr(config, stage)
    if settings.optimizer != "auto":
        yield from _optimizer_faults(stage, settings.optimizer)
    if not settings.trl:
        return
    known = {field.name: field for field in dataclasses.fields(_config_class(stage)) if field.init}
    hints = get_type_hints(_config_class(stage))
    for name, value in settings.trl.items():
        key = f"{stage}.trl.{name}"
        if name in _INSTEAD:
            yield f"{key} is decided by trivet; {_INSTEAD[name].format(stage=stage)}"
        elif name not in known:
            allowed = sorted(set(known) - set(_INSTEAD))
            nearest = difflib.get_close_matches(name, allowed, n=1)
            advice = f"did you mean '{nearest[0]}'?" if nearest else "TRL's documentation lists them"
            yield f"{key} is no option of TRL's {_config_class(stage).__name__}; {advice}"
        else:
            yield from _value_faults(key, value, hints[name], known[name].metadata.get("choices"))
            yield from _conflicts(stage, settings, name, value)


def _value_faults(key: str, value: Any, hint: Any, choices: Any) -> Iterator[str]:
    try:
        _adapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(detail["msg"][0].lower() + detail["msg"][1:] for detail in error.errors())
        yield f"{key}: {', or '.join(reasons)} (got {value!r})"
        return
    if choices and value is not None and value not in choices:
        yield f"{key} is {value!r}; it is one of {', '.join(map(str, choices))}"


def _conflicts(stage: TrainerStage, settings: TrainerSettings, name: str, value: Any) -> Iterator[str]:
    """Options that are allowed, but not with this value or beside trivet's own key."""
    key = f"{stage}.trl.{name}"
    if name == "lr_scheduler_type":
        if value in _SCHEDULES:
            yield f"{key} is '{value}', which trivet has itself; set {stage}.lr_schedule={value}"
        elif "lr_schedule" in settings.model_fields_set:
            yield f"{key} and {stage}.lr_schedule are both set; keep one of them"
    elif name == "train_sampling_strategy" and value != "random" and stage == "reward":
        yield f"{key} is '{value}', for which a row has one length, not two; pairs come at random"
    elif name == "packing_strategy" and value == "wrapped":
        yield f"{key} is 'wrapped', which cuts rows in two and lets rows see each other; use 'bfd'"
    elif name == "gradient_checkpointing_kwargs":
        if not isinstance(value, dict):
            yield f"{key} is {value!r}; it is a mapping"
        elif not settings.gradient_checkpointing:
            yield f"{key} is set, but {stage}.gradient_checkpointing is false; set that to true, or remove the option"


def _optimizer_faults(stage: TrainerStage, name: str) -> Iterator[str]:
    from transformers.training_args import OptimizerNames

    names = sorted(member.value for member in OptimizerNames)
    if name not in names:
        nearest = difflib.get_close_matches(name, ["auto", *names], n=1)
        advice = f"did you mean '{nearest[0]}'?" if nearest else f"known optimizers: auto, {', '.join(names)}"
        yield f"{stage}.optimizer is '{name}', which transformers does not know; {advice}"


def _config_class(stage: TrainerStage) -> Any:
    import trl

    return trl.SFTConfig if stage == "sft" else trl.RewardConfig


def _adapter(hint: Any) -> TypeAdapter[Any]:
    """Checks a value against a field's annotation; a field of named choices takes no other string."""
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
            members = tuple(member for member in members if member is not str)
        hint = Union[members]  # noqa: UP007 - the members are known only here
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return TypeAdapter(hint)
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
