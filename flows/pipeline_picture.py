"""The pipeline of a run as an SVG picture: its stages on the one base they share, with time, memory and figures.

Drawn twice, side by side for a wide page and one below the other for a narrow one; the style sheet shows one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any, Literal

from flows.curves import short
from flows.verdict import as_estimate, progress_of, verdict_of
from pipeline.memory import megabytes
from pipeline.progress import duration
from pipeline.run_directory import StageName
from pipeline.run_state import RunState, StageState

TITLES: Mapping[StageName, str] = {
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
}
_MARKS = {
    "finished": "✓",
    "outdated": "↻",
    "going": "●",
    "starting": "●",
    "interrupted": "‖",
    "failed": "✕",
    "damaged": "!",
    "waiting": "○",
}
_CARD, _GAP, _TALL, _SHORT = 244, 40, 158, 144
_LONGEST_FIGURE = 36


def pictures(state: RunState) -> str:
    """Both pictures."""
    stages = list(state.stages.values())
    return _wide(state, stages) + _narrow(state, stages)


def key_lines(stage: StageState, state: RunState) -> list[str]:
    """The few figures of a stage that say how it went."""
    return [line[:_LONGEST_FIGURE] for line in _key_lines(stage, state)]


def _key_lines(stage: StageState, state: RunState) -> Iterator[str]:
    figures = stage.figures
    if not figures:
        if stage.metrics and stage.name != "evaluate":
            yield from _so_far(stage)
        return
    if stage.name == "sft":
        yield from _change(figures, "held_out_loss_before", "held_out_loss_after", "held-out loss", "")
        yield from _change(figures, "held_out_perplexity_before", "held_out_perplexity_after", "perplexity", "")
        yield from _counts(figures, ("rows", "rows"), ("steps", "steps"))
    elif stage.name == "reward":
        yield from _interval("accuracy", figures.get("held_out_accuracy"))
        longer = as_estimate(figures.get("held_out_accuracy_longer_wins"))
        if longer is not None:
            yield f"longer answer wins {longer.value:.2f}"
        yield from _counts(figures, ("pairs", "pairs"), ("steps", "steps"))
    elif stage.name == "ppo":
        scores = [row["objective/score"] for row in stage.metrics if row.get("objective/score") is not None]
        if len(scores) > 1:
            yield f"score {scores[0]:.2f} → {scores[-1]:.2f}"
        if isinstance(kl := figures.get("kl/policy_reference_k1"), (int, float)):
            yield f"KL {kl:.1f} nats an answer"
        if stage.metrics:
            yield f"{len(stage.metrics)} rounds"
    else:
        judgement = verdict_of(state).judgement
        if judgement is not None:
            yield from _interval("wins", figures["win_rate"][judgement.judge])
            if (fair := judgement.length_controlled) is not None:
                yield f"equal length {fair.value:.2f} [{fair.low:.2f}, {fair.high:.2f}]"
        kl = as_estimate(figures.get("kl"))
        if kl is not None:
            yield f"KL {kl.value:.1f} [{kl.low:.1f}, {kl.high:.1f}] nats"
        yield from _counts(figures, ("n", "prompts"))


def _so_far(stage: StageState) -> Iterator[str]:
    last = stage.metrics[-1]
    unit = "round" if stage.name == "ppo" else "step"
    yield f"{unit} {last['step']:.0f}"
    name, label = ("objective/score", "score") if stage.name == "ppo" else ("loss", "loss")
    value = next((row[name] for row in reversed(stage.metrics) if row.get(name) is not None), None)
    if value is not None:
        yield f"{label} {short(value)}"


def _change(figures: Mapping[str, Any], before: str, after: str, label: str, unit: str) -> Iterator[str]:
    values = [figures.get(before), figures.get(after)]
    if all(isinstance(value, (int, float)) for value in values):
        yield f"{label} {short(values[0])} → {short(values[1])}{unit}"  # type: ignore[arg-type]
    elif isinstance(values[1], (int, float)):
        yield f"{label} {short(values[1])}{unit}"


def _counts(figures: Mapping[str, Any], *wanted: tuple[str, str]) -> Iterator[str]:
    """`277 rows, 70 steps`, as far as they are known."""
    found = [f"{figures[name]:,} {unit}" for name, unit in wanted if isinstance(figures.get(name), int)]
    if found:
        yield ", ".join(found)


def _interval(label: str, figure: Any) -> Iterator[str]:
    found = as_estimate(figure)
    if found is not None:
        yield f"{label} {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def base_of(state: RunState) -> tuple[str, str]:
    """The base's name and how it is quantized."""
    manifest = next((stage.manifest for stage in state.stages.values() if stage.manifest is not None), None)
    if manifest is not None:
        return _short_base(manifest.base.model), manifest.base.quantization
    model, quantization = state.owner.get("base_model"), state.owner.get("base_quantization")
    return _short_base(str(model)) if model else "unknown", str(quantization or "")


def _short_base(model: str) -> str:
    name = model.removeprefix("package:")
    return PurePath(name).name if name.endswith(".gguf") or name.startswith(("/", ".", "~")) else name


def _wide(state: RunState, stages: Sequence[StageState]) -> str:
    top, width = 34, len(stages) * (_CARD + _GAP) - _GAP
    spots = {stage.name: (index * (_CARD + _GAP), top) for index, stage in enumerate(stages)}
    base = top + _TALL + 22
    parts = [_card(stage, state, *spots[stage.name], _CARD, _TALL) for stage in stages]
    for first, second in _edges(state, stages):
        (x1, y1), (x2, y2) = spots[first], spots[second]
        if x2 - x1 == _CARD + _GAP:
            parts.append(_arrow(f"M{x1 + _CARD} {y1 + 44}H{x2 - 8}", x2, y1 + 44, "right"))
        else:
            curve = f"M{x1 + _CARD - 60} {y1}C{x1 + _CARD - 30} 2 {x2 + 50} 2 {x2 + 50} {y2 - 8}"
            parts.append(_arrow(curve, x2 + 50, y2, "down"))
    parts += [f'<path class="stem" d="M{x + _CARD / 2} {y + _TALL}V{base}"/>' for x, y in spots.values()]
    parts.append(_base(state, 0, base, width, lines=1))
    return _svg("pipeline wide", width, base + 42, parts, state)


def _narrow(state: RunState, stages: Sequence[StageState]) -> str:
    left, width, step = 34, 360, _SHORT + 26
    spots = {stage.name: (left, index * step + 2) for index, stage in enumerate(stages)}
    base = len(stages) * step - 4
    parts = [_card(stage, state, *spots[stage.name], width - left - 2, _SHORT) for stage in stages]
    for first, second in _edges(state, stages):
        (x1, y1), (x2, y2) = spots[first], spots[second]
        if y2 - y1 == step:
            parts.append(_arrow(f"M{x1 + 60} {y1 + _SHORT}V{y2 - 8}", x1 + 60, y2, "down"))
        else:
            curve = f"M{x1} {y1 + 70}C{x1 - 36} {y1 + 90} {x1 - 36} {y2 + 40} {x2 - 8} {y2 + 40}"
            parts.append(_arrow(curve, x2, y2 + 40, "right"))
    parts.append(_base(state, left, base, width - left - 2, lines=2))
    return _svg("pipeline narrow", width, base + 62, parts, state)


def _edges(state: RunState, stages: Sequence[StageState]) -> Iterator[tuple[StageName, StageName]]:
    """What each stage starts from. What the evaluation compares with PPO is left out: it would be every stage."""
    names = [stage.name for stage in stages]
    config = state.checked_config
    wanted: list[tuple[StageName, StageName]] = [("sft", "ppo"), ("reward", "ppo"), ("ppo", "evaluate")]
    if config is None or config.reward_needs_sft:
        wanted.insert(0, ("sft", "reward"))
    yield from (edge for edge in wanted if edge[0] in names and edge[1] in names)


def _card(stage: StageState, state: RunState, x: float, y: float, width: float, height: float) -> str:
    status = f"{_MARKS[stage.status]} {stage.status}"
    used = ""
    if stage.manifest is not None:
        used = f"{duration(stage.manifest.seconds)}, {megabytes(stage.manifest.peak_memory_bytes)}"
    texts = [
        f'<text class="title" x="{x + 16}" y="{y + 28}">{escape(TITLES[stage.name])}</text>',
        f'<text class="status" x="{x + width - 14}" y="{y + 28}" text-anchor="end">{escape(status)}</text>',
        f'<text class="used" x="{x + 16}" y="{y + 54}">{escape(used)}</text>',
        # Beside a long title there is no room for it.
        f'<text class="status" x="{x + width - 14}" y="{y + 54}" text-anchor="end">{progress_of(stage)}</text>',
    ]
    for number, line in enumerate(key_lines(stage, state)[:3]):
        texts.append(f'<text x="{x + 16}" y="{y + 82 + 21 * number}">{escape(line)}</text>')
    bar = ""
    if stage.status in ("going", "interrupted", "failed") and stage.done is not None:
        bar = (
            f'<rect class="track" x="{x + 16}" y="{y + height - 16}" width="{width - 32}" height="5" rx="2.5"/>'
            f'<rect class="bar" x="{x + 16}" y="{y + height - 16}" width="{(width - 32) * stage.done:.1f}" height="5"'
            ' rx="2.5"/>'
        )
    return (
        f'<g class="stage {stage.name} is-{stage.status}"><title>{escape(TITLES[stage.name])}: {stage.status}'
        f"{'. ' + escape(stage.reason) if stage.reason else ''}</title>"
        f'<rect class="card" x="{x + 1}" y="{y}" width="{width - 2}" height="{height}" rx="10"/>'
        f'<rect class="edge" x="{x + 1}" y="{y + 12}" width="4" height="{height - 24}" rx="2"/>'
        f"{''.join(texts)}{bar}</g>"
    )


def _arrow(path: str, x: float, y: float, direction: Literal["right", "down"]) -> str:
    """A line and its head, whose tip is at (x, y)."""
    head = f"M{x} {y}l-9 -5v10z" if direction == "right" else f"M{x} {y}l-5 -9h10z"
    return f'<path class="arrow" d="{path}"/><path class="head" d="{head}"/>'


def _base(state: RunState, x: float, y: float, width: float, *, lines: int) -> str:
    """What all stages stand on, in one line or two."""
    name, quantization = base_of(state)
    said = (
        ["one base: " + name, quantization]
        if lines == 2
        else [", ".join(filter(None, (f"one base: {name}", quantization)))]
    )
    texts = [
        f'<text x="{x + width / 2}" y="{y + 25 + 20 * number}" text-anchor="middle">{escape(line)}</text>'
        for number, line in enumerate(said)
    ]
    return (
        f'<g class="base"><rect x="{x + 1}" y="{y}" width="{width - 2}" height="{20 + 20 * lines}" rx="8"/>'
        f"{''.join(texts)}</g>"
    )


def _svg(kind: str, width: float, height: float, parts: Sequence[str], state: RunState) -> str:
    label = escape(", ".join(f"{TITLES[stage.name]} {stage.status}" for stage in state.stages.values()))
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
