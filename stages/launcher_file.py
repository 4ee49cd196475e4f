"""What Accelerate is told: a launcher file made from the config's `launch` section, or an own one, read and checked.

A launcher file says how processes are started and how they share the model, and nothing that a result depends on. Of
DeepSpeed's files that much is followed, with PyTorch's own means: its engine would take over the optimizer's steps, and
its checkpoints are pickles. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.cards import Card, cards_here, find_card, has_accelerator
from pipeline.config import LaunchSettings, PipelineConfig
from pipeline.errors import ConfigError, TrivetError
from pipeline.memory_advice import choose_strategy, device_of
from pipeline.memory_plan import Sharding, samples_from_copy
from pipeline.model_shape import shape_of

Kind = Literal["none", "ddp", "fsdp"]

_NO_STAGE_CAN = {
    "MEGATRON_LM": "the stages know no other model than transformers'",
    "XLA": "the stages compute on GPUs, or on CPUs",
}
_WHOLE_ON_EACH = tuple(
    f"MULTI_{device}" for device in ("CPU", "GPU", "NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU", "NEURON")
)
_KINDS = ("NO", *_WHOLE_ON_EACH, "FSDP", "DEEPSPEED")
_PRECISIONS = ("no", "bf16", "fp16")
_MAKE_ONE = "Make one with `accelerate config --config_file FILE`, or take one of configs/accelerate/."


@dataclass(frozen=True)
class Launcher:
    """How processes start: on `machines` machines `processes` each, sharing the model as `kind` says.

    For FSDP, `offload` keeps shares in main memory, and `reshard` gives a layer up after its forward pass.
    `mixed_precision` is Accelerate's word for what the base computes in. `machine_rank`, `main_address` and `main_port`
    are as in the launch section. `zero` is the stage of DeepSpeed's ZeRO that a file asks for; None where it does not.
    `not_done` is what else such a file asks for in vain.
    """

    kind: Kind
    processes: int
    machines: int
    where: str
    offload: bool = False
    reshard: bool = True
    mixed_precision: Any = "no"
    machine_rank: int = 0
    main_address: str | None = None
    main_port: int | None = None
    zero: int | None = None
    not_done: tuple[str, ...] = ()

    def as_section(self, launch: LaunchSettings) -> LaunchSettings:
        """The launch section that starts the same; what a file does not say is as in `launch`."""
        several = self.world_size > 1
        found: dict[str, Any] = {
            "accelerate_config": None,
            "processes": self.processes,
            "machines": self.machines,
            "machine_rank": self.machine_rank,
            "main_address": self.main_address,
            "main_port": self.main_port or launch.main_port,
            "strategy": self.kind if several and self.kind != "none" else "auto",
            "mixed_precision": self.mixed_precision,
            "cpu_offload": several and self.offload,
            "reshard_after_forward": not several or self.reshard,
        }
        return launch.model_copy(update=found)

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
        ConfigError: it is not there, is none, or asks for what no stage can do.
    """
    where = f"launch.accelerate_config={path}"
    if not os.path.isfile(path):
        raise ConfigError("there is no such file", where=where, remedy=_MAKE_ONE)
    try:
        return _read(yaml.safe_load(Path(path).read_text(encoding="utf-8")), Path(path), where)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(
            f"it is no Accelerate config: {str(error).splitlines()[0]}", where=where, remedy=_MAKE_ONE
        ) from None


def machine_rank_of(launch: LaunchSettings) -> int:
    """The number of this machine, as the section or its own file says; errors as in `read_launcher_file`."""
    file = launch.accelerate_config
    return launch.machine_rank if file is None else read_launcher_file(file).machine_rank


def _read(settings: Mapping[str, Any], path: Path, where: str) -> Launcher:
    name = _kind_in(settings, where)
    machines = _count("num_machines", settings.get("num_machines") or 1, where)
    world = _count("num_processes", settings.get("num_processes", 1 if name == "NO" else None), where)
    address, port = settings.get("main_process_ip"), settings.get("main_process_port")
    if world % machines or (name == "NO" and world > 1):
        raise ConfigError(
            f"num_processes is {world}, with num_machines {machines} and distributed_type {name}",
            where=where,
            remedy="num_processes counts those of all machines, as many on each; distributed_type NO starts one.",
        )
    if machines > 1 and not address:
        raise ConfigError(
            "it does not say where machine 0 is", where=where, remedy="Give main_process_ip, and main_process_port."
        )
    zero = _read_zero(settings, machines, path, where) if name == "DEEPSPEED" else None
    fsdp = settings.get("fsdp_config") or {}
    kind: Kind = "fsdp" if name == "FSDP" or (zero is not None and zero.stage == 3) else "ddp"
    if name == "NO" or (zero is not None and world == 1):
        kind = "none"
    offload = _is_on(fsdp.get("fsdp_offload_params", False)) if zero is None else zero.offload
    precision = (zero.mixed_precision if zero is not None else None) or _word(settings.get("mixed_precision"))
    _require_known("mixed_precision", precision, _PRECISIONS, where)
    return Launcher(
        kind,
        world // machines,
        machines,
        where,
        offload=offload and kind == "fsdp",
        reshard=_is_on(fsdp.get("fsdp_reshard_after_forward", True)) or kind != "fsdp",
        mixed_precision=precision,
        machine_rank=_count("machine_rank", settings.get("machine_rank") or 0, where, least=0),
        main_address=None if address is None else str(address),
        main_port=None if port is None else _count("main_process_port", port, where, least=0),
        zero=None if zero is None else zero.stage,
        not_done=() if zero is None else zero.not_done(kind),
    )


def _kind_in(settings: Mapping[str, Any], where: str) -> str:
    """Accelerate's `distributed_type`; YAML reads an unquoted `NO` as False."""
    name = str(settings.get("distributed_type") or "NO").upper()
    if name in _NO_STAGE_CAN:
        raise ConfigError(
            f"it asks for {name}, which no stage can do: {_NO_STAGE_CAN[name]}",
            where=where,
            remedy="Set distributed_type to MULTI_GPU or FSDP there, or take a file of configs/accelerate/.",
        )
    _require_known("distributed_type", name, _KINDS, where)
    if str((settings.get("fsdp_config") or {}).get("fsdp_sharding_strategy")).upper() in ("NO_SHARD", "3"):
        raise ConfigError(
            "its fsdp_sharding_strategy, NO_SHARD, shares nothing out",
            where=where,
            remedy="Set distributed_type: MULTI_GPU there, and remove fsdp_config.",
        )
    for key, size in (settings.get("parallelism_config") or {}).items():
        if key.endswith("_size") and "_dp_" not in key and int(size or 1) > 1:
            raise ConfigError(
                f"its {key} is {size}, and no stage splits a layer or a text",
                where=where,
                remedy="Remove parallelism_config there: FSDP shares the base out.",
            )
    return name


def _require_known(key: str, value: str, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise ConfigError(
            f"{key} is '{value}', which no stage can do", where=where, remedy=f"Give one of: {', '.join(known)}."
        )


def _count(key: str, value: Any, where: str, *, least: int = 1, most: int | None = None) -> int:
    if not str(value).isdecimal() or int(value) < least or (most is not None and int(value) > most):
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{key} is {value!r}", where=where, remedy=f"Give a whole number {limits}.")
    return int(value)


@dataclass(frozen=True)
class _Zero:
    """What a file says of DeepSpeed's ZeRO.

    Its stage, the arithmetic that its JSON names (None: none), where the weights and the optimizer's states are to lie
    (None: on the GPU), and a file that lists the machines to start.
    """

    stage: int
    mixed_precision: str | None
    weights_on: str | None
    states_on: str | None
    hosts: str | None

    @property
    def offload(self) -> bool:
        return self.weights_on is not None

    def not_done(self, kind: Kind) -> tuple[str, ...]:
        """What the file asks for beside the sharing, and is left out."""
        found = []
        if self.offload and kind != "fsdp":
            found.append("weights in main memory")
        if self.states_on is not None:
            found.append(f"optimizer states {'in main memory' if self.states_on == 'cpu' else f'on {self.states_on}'}")
        if self.hosts is not None:
            found.append(f"starting the machines of {self.hosts}")
        return tuple(found)


def _read_zero(settings: Mapping[str, Any], machines: int, path: Path, where: str) -> _Zero:
    """DeepSpeed's part of a file, or of the JSON that it names. Hyperparameters in there count for nothing."""
    given = settings.get("deepspeed_config") or {}
    launcher = str(given.get("deepspeed_multinode_launcher") or "standard")
    if launcher != "standard" and machines > 1:
        raise ConfigError(
            f"it has {launcher} start the processes of all machines",
            where=where,
            remedy="Set deepspeed_multinode_launcher: standard there, and start the same command on each machine.",
        )
    precision = None
    if named := given.get("deepspeed_config_file"):
        places = [Path(named), path.parent / named]  # Accelerate looks in the working directory
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ConfigError(f"there is no '{named}', which it names", where=where, remedy="Correct the path there.")
        own = json.loads(found.read_text(encoding="utf-8"))
        optimization = own.get("zero_optimization") or {}
        stage = optimization.get("stage", 0)
        weights, states = (
            (optimization.get(f"offload_{part}") or {}).get("device") or "none" for part in ("param", "optimizer")
        )
        precision = next((word for word in _PRECISIONS if (own.get(word) or {}).get("enabled") is True), None)
    else:
        stage = given.get("zero_stage", 2)
        weights, states = (given.get(f"offload_{part}_device") or "none" for part in ("param", "optimizer"))
    if weights not in ("none", "cpu"):
        raise ConfigError(
            f"it wants the weights on '{weights}'",
            where=where,
            remedy="A share lies on its GPU or, with cpu, in memory.",
        )
    return _Zero(
        _count("DeepSpeed's stage", stage, where, least=0, most=3),
        precision,
        weights_on=None if weights == "none" else weights,
        states_on=None if states == "none" else states,
        hosts=given.get("deepspeed_hostfile"),
    )


def _word(precision: Any) -> str:
    """Accelerate's `mixed_precision`; YAML reads an unquoted `no` as False."""
    return str(precision).lower() if precision else "no"


def _is_on(value: Any) -> bool:
    """Whether a switch is on, written as YAML's own or, of FSDP1, as a word."""
    return str(value).lower() in ("1", "true", "full_shard")


def resolve(config: PipelineConfig) -> tuple[LaunchSettings, str | None]:
    """The section with `auto` decided, by the cards that are here or the one that `launch.card` names.

    What a DeepSpeed file asks for becomes a section too.

    Returns:
        the settings, and what was decided and why as a sentence; None where there was nothing to decide.

    Raises:
        ConfigError: the card is unknown, or the file is none.
    """
    launch = config.launch
    if launch.accelerate_config is not None:
        launcher = read_launcher_file(launch.accelerate_config)
        return (launch, None) if launcher.zero is None else (launcher.as_section(launch), _of_zero(launcher))
    if launch.strategy != "auto" or launch.world_size == 1:
        return launch, None
    strategy, reason = _choice(config)
    chosen = launch.model_copy(update={"strategy": strategy})
    return chosen, f"launch.strategy=auto is {strategy}: {reason}."


def _of_zero(launcher: Launcher) -> str:
    how = {
        "none": "with one process there is nothing to share out",
        "ddp": "it runs as DDP, and what ZeRO would share out, the adapters' gradients and moments, each GPU has whole",
        "fsdp": "it runs as FSDP2, with a share of the base on each GPU",
    }[launcher.kind]
    left_out = f"; not done: {', '.join(launcher.not_done)}" if launcher.not_done else ""
    return f"{launcher.where} asks for DeepSpeed's ZeRO-{launcher.zero}: {how}{left_out}."


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


def require_launchable(config: PipelineConfig) -> Launcher:
    """Refuse, before anything is loaded, a launch that cannot work.

    Raises:
        ConfigError: more processes than GPUs, batches that the file's processes cannot share, weights that FSDP cannot
            share out, an engine that needs them whole, or a way of sharing the model that no stage knows.
    """
    if config.launch.accelerate_config is not None:
        launcher = read_launcher_file(config.launch.accelerate_config)
    else:
        launch, _ = resolve(config)
        kind: Kind = "none" if launch.world_size == 1 else "fsdp" if launch.strategy == "fsdp" else "ddp"
        launcher = Launcher(
            kind,
            launch.processes,
            launch.machines,
            "launch",
            offload=launch.cpu_offload and kind == "fsdp",
            reshard=launch.reshard_after_forward or kind != "fsdp",
            mixed_precision=launch.mixed_precision,
            machine_rank=launch.machine_rank,
        )
    _require_gpus(launcher)
    require_agreement(config, launcher)
    if launcher.kind == "fsdp":
        _require_whole_for_paging(config, launcher)
    return launcher


def ask_as_accelerate(config: PipelineConfig) -> None:
    """Where torchrun has started this process: ask for what the launch section says as Accelerate's launcher would.

    Call it before the base is loaded.

    Raises:
        ConfigError: as for `require_launchable`.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # Accelerate's launcher, which never leaves it out
        return
    launcher = require_launchable(config)
    if launcher.kind == "fsdp":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(launcher.offload).lower()
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(launcher.reshard).lower()


def _require_gpus(launcher: Launcher) -> None:
    gpus = len(cards_here())
    if gpus and launcher.processes > gpus:
        raise ConfigError(
            f"{launcher.processes} processes are to start on this machine, which has {gpus} GPU(s)",
            where=launcher.where,
            remedy=f"Set launch.processes={gpus} (in a file of your own, num_processes); each process has its own GPU.",
        )


def require_agreement(config: PipelineConfig, launcher: Launcher) -> None:
    """Refuse settings that do not go with how processes start: what a file or `auto` comes to is known only here.

    Raises:
        ConfigError: batches that the processes cannot share, or weights that cannot be shared out.
    """
    as_section = launcher.as_section(LaunchSettings()).model_copy(update={"main_address": "machine-0"})
    other = config.model_copy(update={"launch": as_section})
    known = set(config.contradictions())
    faults = [fault for fault in other.contradictions() if fault not in known]
    if faults:
        raise ConfigError(
            f"with {launcher.world_size} processes under {launcher.kind.upper()}: {faults[0]}",
            where=launcher.where,
            remedy="Change the setting as said, or how the launcher starts the processes.",
        )


def _require_whole_for_paging(config: PipelineConfig, launcher: Launcher) -> None:
    """What `ppo.rollout.weights=auto` comes to depends on the GPUs that are here; unknown ones are let through."""
    rollout, cards = config.ppo.rollout, cards_here()
    if (rollout.engine, rollout.weights) != ("paged", "auto") or not cards:
        return
    card = min(cards, key=lambda one: one.memory_bytes)
    try:
        copied = samples_from_copy(config, shape_of(config.base), device_of(config, card, "fsdp"))
    except TrivetError:
        return
    if not copied:
        raise ConfigError(
            "ppo.rollout.engine is 'paged', which needs the base whole, FSDP shares it out, and a merged copy would"
            f" take more than a quarter of {card.name}",
            where=launcher.where,
            remedy="Set ppo.rollout.engine=auto, or ppo.rollout.weights=merged.",
        )
