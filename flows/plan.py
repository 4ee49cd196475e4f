"""What `trivet plan` shows: each stage's memory by part, whether it fits the card, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.cards import GIB, Card, cards_here, find_card, main_memory, size_in
from pipeline.config import PipelineConfig
from pipeline.errors import ConfigError
from pipeline.memory_advice import Verdict, judge, share_of_machine
from pipeline.memory_plan import StagePlan, device_bytes, fits
from pipeline.model_shape import ModelShape, shape_of
from stages.launcher_file import read_launcher_file, require_agreement


def with_launcher_file(config: PipelineConfig) -> PipelineConfig:
    """The config with the processes and the sharing that its own Accelerate file asks for.

    Raises:
        ConfigError: the file is none, or asks for what no stage can do with this config.
    """
    path = config.launch.accelerate_config
    if path is None:
        return config
    launcher = read_launcher_file(path)
    require_agreement(config, launcher)
    return config.model_copy(update={"launch": launcher.as_section(config.launch)})


def card_for(config: PipelineConfig, card: str | None, memory: str | None) -> Card:
    """The card to plan for: the option's, the config's, the smallest GPU that is here, or main memory.

    Raises:
        ConfigError: no such card, or both options.
    """
    if card is not None and memory is not None:
        raise ConfigError("--card and --memory are both given", remedy="Keep one of them.")
    if memory is not None:
        if size_in(memory) is None:
            remedy = "Give a number with its unit: 24GB, 24GiB or 24000MB."
            raise ConfigError(f"'{memory}' is no size", where="--memory", remedy=remedy)
        return find_card(memory, where="--memory")
    if card is not None:
        return find_card(card, where="--card")
    if config.launch.card is not None:
        return find_card(config.launch.card, where="launch.card")
    here = cards_here()
    if here:
        return min(here, key=lambda one: one.memory_bytes)
    return share_of_machine(main_memory(), config.launch.processes)


def examine_memory(config: PipelineConfig, card: str | None, memory: str | None) -> tuple[ModelShape, Card, Verdict]:
    """The base's shape, the card, and what becomes of the stages on it.

    Raises:
        ConfigError, BaseModelError: the card or the base is not known.
    """
    launcher_file = config.launch.accelerate_config is not None
    config = with_launcher_file(config)
    chosen = card_for(config, card, memory)
    shape = shape_of(config.base)
    return shape, chosen, judge(config, shape, chosen, launcher_file=launcher_file)


def as_json(shape: ModelShape, card: Card, verdict: Verdict) -> dict[str, Any]:
    """The plan as data; sizes in bytes."""
    changes = verdict.changes
    return {
        "base": {"name": shape.name, "parameters": shape.parameters},
        "card": {"name": card.name, "memory_bytes": card.memory_bytes, "gpu": card.is_gpu},
        "strategy": verdict.strategy,
        "reason": verdict.reason,
        "fits": all(fits(plan, card) for plan in verdict.plans.values()),
        "stages": {
            stage: {
                "parts": plan.parts,
                "at": plan.peak_moment.name,
                "moments": {moment.name: plan.at(moment) for moment in (plan.loading_moment, plan.working_moment)},
                "activations": dict(plan.activations),
                "tensor_bytes": plan.tensor_bytes,
                "device_bytes": device_bytes(plan, is_gpu=card.is_gpu),
                "host_bytes": plan.host_bytes,
                "fits": fits(plan, card),
            }
            for stage, plan in verdict.plans.items()
        },
        "changes": None if changes is None else [{"settings": one.settings, "cost": one.cost} for one in changes],
    }


def plan_lines(shape: ModelShape, card: Card, verdict: Verdict) -> Iterator[str]:
    """The plan for people: a table of parts by stage, the verdict, and the way out.

    The parts are those of the largest moment after loading: while it loads, a stage has nothing but its base. Below the
    sums stand the activations with gradient checkpointing and without, whichever is set.
    """
    place = "GPU" if card.is_gpu else "process"
    yield f"{shape.name}: {shape.parameters / 1e9:.2f}e9 parameters; {verdict.strategy}, because {verdict.reason}."
    yield ""
    plans = verdict.plans
    working = [plan.at(plan.working_moment) for plan in plans.values()]
    names = list(dict.fromkeys(name for parts in working for name in parts))
    width = max(len(name) for name in [*names, "allocator's reserve, CUDA"])
    yield f"{f'GiB a {place}':<{width}}" + "".join(f"{stage:>10}" for stage in plans)
    for name in names:
        yield _row(name, width, [parts.get(name, 0) for parts in working])
    yield _row("at work, together", width, [sum(parts.values()) for parts in working])
    yield _row("while loading", width, [plan.size_at(plan.loading_moment) for plan in plans.values()])
    yield _row("peak of the tensors", width, [plan.tensor_bytes for plan in plans.values()])
    reserve = [device_bytes(plan, is_gpu=card.is_gpu) - plan.tensor_bytes for plan in plans.values()]
    yield _row("allocator's reserve, CUDA" if card.is_gpu else "allocator, libraries", width, reserve)
    yield _row("needed", width, [device_bytes(plan, is_gpu=card.is_gpu) for plan in plans.values()])
    if any(plan.host_bytes for plan in plans.values()):
        yield _row("main memory (offloaded)", width, [plan.host_bytes for plan in plans.values()])
    for name, words in (("recomputed", "activations, recomputed"), ("kept", "activations, all kept")):
        yield _row(words, width, [plan.activations.get(name, 0) for plan in plans.values()])
    yield ""
    for stage, plan in plans.items():
        at_work = plan.working_moment.name
        moments = f"at most while '{plan.peak_moment.name}'"
        moments += "" if plan.peak_moment.name == at_work else f", at work while '{at_work}'"
        yield f"{stage}: {moments}; {_verdict(plan, card)}"
    if verdict.changes is None:
        yield ""
        yield "No change that trivet knows makes this fit: choose a smaller base, shorter texts, or a larger card."
    elif verdict.changes:
        yield ""
        yield "The cheapest change that makes it fit:"
        for change in verdict.changes:
            yield f"  {change.text}   ({change.cost})"


def side_by_side_lines(config: PipelineConfig, card: Card, verdict: Verdict) -> Iterator[str]:
    """What SFT and the reward model take together, where the config has them run at the same time."""
    both = [verdict.plans[stage] for stage in ("sft", "reward") if stage in verdict.plans]
    if not config.launch.side_by_side or len(both) < 2:
        return
    needed, place = sum(device_bytes(plan, is_gpu=card.is_gpu) for plan in both), "GPU" if card.is_gpu else "machine"
    short = needed - card.memory_bytes
    verdict_on_both = f"{short / GIB:.1f} GiB more than there is" if short > 0 else f"which fits {card.name}"
    elsewhere = "; with two GPUs for each process, each stage has its own" if card.is_gpu else ""
    yield ""
    yield f"sft and reward side by side: {needed / GIB:.2f} GiB on one {place}, {verdict_on_both}{elsewhere}."


def _row(name: str, width: int, sizes: list[int]) -> str:
    return f"{name:<{width}}" + "".join(f"{size / GIB:>10.2f}" if size else f"{'':>10}" for size in sizes)


def _verdict(plan: StagePlan, card: Card) -> str:
    needed = device_bytes(plan, is_gpu=card.is_gpu)
    if fits(plan, card):
        left = (card.memory_bytes - needed) / GIB
        return f"fits {card.name}, with {left:.1f} of {card.memory_bytes / GIB:.1f} GiB left."
    return f"does NOT fit {card.name}: {(needed - card.memory_bytes) / GIB:.1f} GiB too much."
