"""What Accelerate is told: a launcher file made from the config's `launch` section, or an own one, read and checked.

A launcher file says how processes are started and how they share the model, and nothing that a result depends on. What
the stages cannot do yet is refused here, in `ABLE`, and nowhere else. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.cards import Card, cards_here, find_card, has_accelerator
from pipeline.config import LaunchSettings, PipelineConfig
from pipeline.errors import ConfigError, TrivetError
from pipeline.memory_advice import choose_strategy
from pipeline.memory_plan import Sharding
from pipeline.model_shape import shape_of
from pipeline.run_directory import STAGES, StageName

Kind = Literal["none", "ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3", "megatron_lm"]

ABLE: Mapping[Kind, frozenset[str]] = {
    "none": frozenset(STAGES),
    "ddp": frozenset(STAGES),
    "fsdp": frozenset(STAGES),
    "deepspeed_zero2": frozenset(),
    "deepspeed_zero3": frozenset(),
    "megatron_lm": frozenset(),
}
"""Which stages work with which way of sharing the model. A kind is let through by naming the stages here."""

_WHY_NOT: Mapping[Kind, str] = {
    "deepspeed_zero2": "the stages step their optimizer themselves",
    "deepspeed_zero3": "the stages hold the base whole on each GPU, and DeepSpeed would split its packed weights",
    "megatron_lm": "the stages know no other model than transformers'",
}
_SHARDING: Mapping[Sharding, Kind] = {"none": "none", "ddp": "ddp", "fsdp": "fsdp"}
_MAKE_ONE = "Make one with `accelerate config --config_file FILE`, or take one of configs/accelerate/."


@dataclass(frozen=True)
class Launcher:
    """How processes start: on `machines` machines `processes` each, sharing the model as `kind` says.

    For FSDP, `offload` keeps shares in main memory, and `reshard` gives a layer up after its forward pass.
    `mixed_precision` is Accelerate's word for what the base computes in.
    """

    kind: Kind
    processes: int
    machines: int
    where: str
    offload: bool = False
    reshard: bool = True
    mixed_precision: Any = "no"

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines


def launcher_settings(launch: LaunchSettings, *, use_cpu: bool) -> dict[str, Any]:
    """An Accelerate config of the section, as data for YAML. `launch.strategy=auto` counts as ddp here.

    Args:
        use_cpu: True where there is no GPU.
    """
    several = launch.world_size > 1
    sharded = several and launch.strategy == "fsdp"
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # On CPUs too: what Accelerate calls MULTI_CPU starts one process unless there is an MPI.
        "distributed_type": "FSDP" if sharded else "MULTI_GPU" if several else "NO",
        "num_machines": launch.machines,
        "num_processes": launch.world_size,
        "machine_rank": launch.machine_rank,
        # 0 lets Accelerate find a free port, so that two runs on one machine do not meet.
        "main_process_port": (0 if launch.machines == 1 else launch.main_port) if several else None,
        "mixed_precision": launch.mixed_precision,
        "dynamo_config": {"dynamo_backend": "NO"},
        "use_cpu": use_cpu,
    }
    if launch.machines > 1:
        settings |= {"main_process_ip": launch.main_address, "rdzv_backend": "static", "same_network": True}
    if sharded:
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": launch.reshard_after_forward,
            "fsdp_offload_params": launch.cpu_offload,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            # Stages recompute by themselves, under the right role: see `Roles.training_mode`.
            "fsdp_activation_checkpointing": False,
        }
    return settings


def read_launcher_file(path: str | Path) -> Launcher:
    """What an own Accelerate config asks for.

    Raises:
        ConfigError: it is not there, or is none.
    """
    where = f"launch.accelerate_config={path}"
    if not os.path.isfile(path):
        raise ConfigError("there is no such file", where=where, remedy=_MAKE_ONE)
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        kind = _kind(settings)
        machines = max(1, int(settings.get("num_machines") or 1))
        processes = max(1, int(settings.get("num_processes") or 1)) // machines
        fsdp = settings.get("fsdp_config") or {}
        offload = _is_on(fsdp.get("fsdp_offload_params", False))
        reshard = _is_on(fsdp.get("fsdp_reshard_after_forward", True))
        precision = _word(settings.get("mixed_precision"))
    except (OSError, ValueError, TypeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(
            f"it is no Accelerate config: {str(error).splitlines()[0]}", where=where, remedy=_MAKE_ONE
        ) from None
    offload, reshard = offload and kind == "fsdp", reshard or kind != "fsdp"
    return Launcher(kind, max(1, processes), machines, where, offload, reshard, precision)


def _word(precision: Any) -> str:
    """Accelerate's `mixed_precision`; YAML reads an unquoted `no` as False."""
    return str(precision).lower() if precision else "no"


def _is_on(value: Any) -> bool:
    """Whether a switch is on, written as YAML's own or, of FSDP1, as a word."""
    return str(value).lower() in ("1", "true", "full_shard")


def _kind(settings: Mapping[str, Any]) -> Kind:
    name = str(settings.get("distributed_type", "NO")).upper()
    if name == "DEEPSPEED":
        stage = int((settings.get("deepspeed_config") or {}).get("zero_stage", 2))
        return "deepspeed_zero3" if stage == 3 else "deepspeed_zero2"
    if name == "FSDP":
        return "fsdp"
    if name == "MEGATRON_LM":
        return "megatron_lm"
    return "none" if name == "NO" else "ddp"


def resolve(config: PipelineConfig) -> tuple[LaunchSettings, str | None]:
    """The section with `auto` decided, by the cards that are here or the one that `launch.card` names.

    Returns:
        the settings, and the reason for the choice as a sentence; None where there was nothing to choose.

    Raises:
        ConfigError: the card is unknown.
    """
    launch = config.launch
    if launch.strategy != "auto" or launch.world_size == 1 or launch.accelerate_config is not None:
        return launch, None
    strategy, reason = _choice(config)
    chosen = launch.model_copy(update={"strategy": strategy})
    return chosen, f"launch.strategy=auto is {strategy}: {reason}."


def _choice(config: PipelineConfig) -> tuple[Sharding, str]:
    if not has_accelerator():
        return "ddp", "there is no GPU, and processes on CPUs share main memory"
    card = card_of(config)
    if card is None:
        return "ddp", "how much memory the GPUs have is not known; set launch.card"
    try:
        shape = shape_of(config.base)
    except TrivetError as error:
        return "ddp", f"the memory of this base is not known ({error.problem})"
    return choose_strategy(config, shape, card)


def card_of(config: PipelineConfig) -> Card | None:
    """The card that `launch.card` names, or the smallest of those that are here; None where neither is known.

    Raises:
        ConfigError: `launch.card` names none.
    """
    if config.launch.card is not None:
        return find_card(config.launch.card, where="launch.card")
    return min(cards_here(), key=lambda card: card.memory_bytes, default=None)


def require_launchable(config: PipelineConfig, stages: Sequence[str]) -> Launcher:
    """Refuse, before anything is loaded, a launch that cannot work.

    Raises:
        ConfigError: more processes than GPUs, batches that the file's processes cannot share, weights that FSDP cannot
            share out, or a way of sharing the model that a stage does not know.
    """
    if config.launch.accelerate_config is not None:
        launcher = read_launcher_file(config.launch.accelerate_config)
    else:
        launch, _ = resolve(config)
        kind = _SHARDING["none" if launch.world_size == 1 else "fsdp" if launch.strategy == "fsdp" else "ddp"]
        precision = launch.mixed_precision
        launcher = Launcher(kind, launch.processes, launch.machines, "launch", mixed_precision=precision)
    _require_gpus(launcher)
    _require_agreement(config, launcher)
    unable = [stage for stage in stages if stage not in ABLE[launcher.kind]]
    if unable:
        raise ConfigError(
            f"it asks for {launcher.kind.upper()}, which {' and '.join(unable)} cannot do: {_WHY_NOT[launcher.kind]}",
            where=launcher.where,
            remedy="Set launch.strategy=ddp (in a file of your own, distributed_type: MULTI_GPU), and"
            " base.quantization=nf4 if the base is too large; trivet plan CONFIG shows what fits.",
        )
    return launcher


def _require_gpus(launcher: Launcher) -> None:
    gpus = len(cards_here())
    if gpus and launcher.processes > gpus:
        raise ConfigError(
            f"{launcher.processes} processes are to start on this machine, which has {gpus} GPU(s)",
            where=launcher.where,
            remedy=f"Set launch.processes={gpus} (in a file of your own, num_processes); each process has its own GPU.",
        )


def _require_agreement(config: PipelineConfig, launcher: Launcher) -> None:
    """The section's own settings are checked with the config; what a file or `auto` comes to is known only here."""
    strategy = launcher.kind if launcher.kind in ("ddp", "fsdp") and launcher.world_size > 1 else "auto"
    as_section = LaunchSettings.model_construct(
        processes=launcher.processes,
        machines=launcher.machines,
        main_address="machine-0",
        strategy=strategy,
        mixed_precision=launcher.mixed_precision,
    )
    other = config.model_copy(update={"launch": as_section})
    known = set(config.contradictions())
    faults = [fault for fault in other.contradictions() if fault not in known]
    if faults:
        raise ConfigError(
            f"with {launcher.world_size} processes under {launcher.kind.upper()}: {faults[0]}",
            where=launcher.where,
            remedy="Change the setting as said, or how the launcher starts the processes.",
        )


def stages_able(kind: Kind) -> tuple[StageName, ...]:
    """The stages that work with a way of sharing the model."""
    return tuple(stage for stage in STAGES if stage in ABLE[kind])
