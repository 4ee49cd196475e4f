"""Whether a run fits a card, how its base is best spread over several, and the cheapest change that makes it fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.cards import GIB, Card
from pipeline.config import PipelineConfig
from pipeline.memory_plan import Device, Sharding, StagePlan, compute_bytes, device_bytes, fits, plan_stages
from pipeline.model_shape import ModelShape
from pipeline.run_directory import StageName

MOST_GPUS = 64
"""More are not proposed."""


@dataclass(frozen=True)
class Change:
    """Settings that need less memory, as dotted keys, and what they cost."""

    settings: Mapping[str, Any]
    cost: str

    @property
    def text(self) -> str:
        """As overrides."""
        return " ".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.settings.items()
        )


@dataclass(frozen=True)
class Verdict:
    """Every stage on the card, and the changes that would make all of them fit (None: no such changes are known)."""

    strategy: Sharding
    reason: str
    plans: Mapping[StageName, StagePlan]
    changes: tuple[Change, ...] | None = ()


def device_of(config: PipelineConfig, card: Card, strategy: Sharding) -> Device:
    """What the arithmetic must know of a process on this card."""
    launch = config.launch
    return Device(
        dtype_bytes=compute_bytes(config.base.dtype, bfloat16=card.bfloat16, is_gpu=card.is_gpu),
        is_gpu=card.is_gpu,
        processes=launch.world_size,
        sharding=strategy,
        offload=launch.cpu_offload and strategy == "fsdp",
        reshard=launch.reshard_after_forward,
        eager=config.base.attention == "eager"
        or (config.base.attention == "auto" and not card.is_gpu and config.prefers_plain_attention),
        memory_bytes=card.memory_bytes,
    )


def choose_strategy(config: PipelineConfig, shape: ModelShape, card: Card) -> tuple[Sharding, str]:
    """How the processes share the base, and why.

    Returns:
        what `launch.strategy` says; for `auto`, `ddp` where every stage fits the card that way, else `fsdp`.
    """
    launch = config.launch
    if launch.world_size == 1:
        return "none", "one process"
    if launch.strategy != "auto":
        return launch.strategy, f"launch.strategy={launch.strategy}"
    if not card.is_gpu:
        return "ddp", "there is no GPU, and processes on CPUs share main memory"
    plans = plan_stages(config, shape, device_of(config, card, "ddp"))
    tight = next((stage for stage, plan in plans.items() if not fits(plan, card)), None)
    if tight is None:
        return "ddp", f"with the whole base on each GPU every stage fits {card.name}"
    if config.base.quantization == "int8":
        return "ddp", f"{tight} does not fit {card.name} with the whole base on it, but FSDP shards no int8 weights"
    reason = f"{tight} does not fit {card.name} with the whole base on it"
    shared = plan_stages(config, shape, device_of(config, card, "fsdp"))
    largest = max(shared.values(), key=device_bytes)
    if not fits(largest, card):
        needed = f"{largest.stage} takes {device_bytes(largest) / GIB:.1f} GiB while '{largest.peak_moment.name}'"
        reason = f"{reason}, and neither does a share: {needed}"
    return "fsdp", reason


def judge(config: PipelineConfig, shape: ModelShape, card: Card, *, launcher_file: bool = False) -> Verdict:
    """Plan every stage on a card; where one does not fit, find the cheapest changes that make all of them fit.

    Args:
        launcher_file: a file of the user's own has made the launch section, so that none of it can be changed here.
    """
    strategy, reason = choose_strategy(config, shape, card)
    plans = plan_stages(config, shape, device_of(config, card, strategy))
    if all(fits(plan, card) for plan in plans.values()):
        return Verdict(strategy, reason, plans)
    return Verdict(strategy, reason, plans, cheapest_changes(config, shape, card, launcher_file=launcher_file))


def cheapest_changes(
    config: PipelineConfig, shape: ModelShape, card: Card, *, launcher_file: bool = False
) -> tuple[Change, ...] | None:
    """As few of the proposals as are needed, none of which is dearer than the dearest that cannot be done without.

    Returns:
        None where even all of them do not suffice.
    """
    taken: list[Change] = []
    for change in _proposals(config, card, launcher_file=launcher_file):
        if changed(config, [*taken, change]) is None:
            continue  # it contradicts another setting
        taken.append(change)
        if _suffices(config, taken, shape, card):
            break
    else:
        return None
    # The dearest go first, and of one key the strongest, so that its mildest sufficient value is left.
    for change in reversed(taken[:-1]):
        fewer = [other for other in taken if other is not change]
        if _suffices(config, fewer, shape, card):
            taken = fewer
    return tuple(taken)


def _proposals(config: PipelineConfig, card: Card, *, launcher_file: bool) -> Iterator[Change]:
    """What could be changed, cheapest first: first what costs only time, last what costs money."""
    ppo, launch = config.ppo, config.launch
    if ppo.rollout.weights != "adapter":
        yield Change({"ppo.rollout.weights": "adapter"}, "sampling from the quantized base takes longer")
    for key, size in (
        ("ppo.rollout.batch_size", ppo.rollout.batch_size),
        ("evaluate.batch_size", config.evaluate.batch_size),
    ):
        for part in (2, 4, 8, 16):
            if size // part >= 1:
                yield Change({key: size // part}, "sampling takes longer")
    stages: tuple[Literal["sft", "reward"], ...] = ("sft", "reward")
    for stage in stages:
        section = getattr(config, stage)
        for rows in range(section.microbatch_size - 1, 0, -1):
            if section.batch_size // launch.world_size % rows == 0:
                yield Change({f"{stage}.microbatch_size": rows}, "the same steps in more forward passes")
    tokens, longest = ppo.microbatch_tokens, ppo.max_prompt_tokens + ppo.max_new_tokens
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        yield Change({"ppo.microbatch_tokens": tokens}, "the same steps in more forward passes")
    for name in (*stages, "ppo"):
        if not getattr(config, name).gradient_checkpointing:
            yield Change({f"{name}.gradient_checkpointing": True}, "about a third more time")
    if card.is_gpu and "8bit" not in ppo.optimizer:
        yield Change({"ppo.optimizer": "paged_adamw_8bit"}, "PPO's moments in 8 bits: PPO runs anew")
    if config.base.quantization == "nf4" and not config.base.double_quantization:
        yield Change({"base.double_quantization": True}, "another base: all stages run anew")
    if config.base.quantization != "nf4":
        yield Change({"base.quantization": "nf4"}, "a base of four bits: all stages run anew")
    if not card.is_gpu or launcher_file or config.base.quantization == "int8":
        return
    if launch.world_size > 1:
        sharded = {} if launch.strategy == "fsdp" else {"launch.strategy": "fsdp"}
        if launch.strategy == "ddp":
            yield Change(sharded, "more traffic between the GPUs")
        if not launch.reshard_after_forward:
            yield Change({"launch.reshard_after_forward": True}, "layers are gathered again in the backward pass")
        if not launch.cpu_offload:
            cost = "every layer comes from main memory: several times slower"
            yield Change(sharded | {"launch.cpu_offload": True}, cost)
    processes = launch.processes
    while processes * launch.machines * 2 <= MOST_GPUS:
        processes *= 2
        smaller = _even_batches(config, processes * launch.machines)
        if smaller is not None:
            settings = {"launch.processes": processes, "launch.strategy": "fsdp", **smaller}
            yield Change(settings, f"{processes} GPUs a machine")


def _even_batches(config: PipelineConfig, world: int) -> dict[str, int] | None:
    """Microbatches small enough for so many processes to share every step's batch; None where there are none."""
    found = {}
    for stage in ("sft", "reward"):
        section = getattr(config, stage)
        if section.batch_size % world:
            return None
        rows = math.gcd(section.microbatch_size, section.batch_size // world)
        if rows != section.microbatch_size:
            found[f"{stage}.microbatch_size"] = rows
    return found


def changed(config: PipelineConfig, changes: Sequence[Change]) -> PipelineConfig | None:
    """The config with the changes; None where the result contradicts itself."""
    tree = config.model_dump(exclude_unset=True)
    for change in changes:
        for key, value in change.settings.items():
            *sections, name = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
    if config.base.double_quantization and tree["base"].get("quantization") != "nf4":
        tree["base"].pop("double_quantization", None)
    found = PipelineConfig.model_validate(tree)
    return None if any(found.contradictions()) else found


def _suffices(config: PipelineConfig, changes: Sequence[Change], shape: ModelShape, card: Card) -> bool:
    other = changed(config, changes)
    if other is None:
        return False
    strategy, _ = choose_strategy(other, shape, card)
    return all(fits(plan, card) for plan in plan_stages(other, shape, device_of(other, card, strategy)).values())


def share_of_machine(card: Card, processes: int) -> Card:
    """Main memory as one of several processes on the machine may use it; a GPU is each process's own."""
    if card.is_gpu or processes == 1:
        return card
    return replace(card, name=f"1/{processes} of {card.name}", memory_bytes=card.memory_bytes // processes)
