"""`trivet runs` and `trivet show`: what runs there are, and how far one has come, for a terminal or a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.curves import short, sparkline
from flows.pipeline_picture import TITLES, key_lines
from flows.summary import as_text
from flows.verdict import progress_of, verdict_of
from pipeline.errors import RunDirectoryError
from pipeline.memory import megabytes
from pipeline.progress import duration
from pipeline.run_state import RunState, StageState, find_runs, read_run

_STYLES = {
    "finished": "green",
    "going": "cyan",
    "starting": "cyan",
    "interrupted": "yellow",
    "outdated": "yellow",
    "failed": "red",
    "damaged": "red",
    "waiting": "dim",
    "unfinished": "dim",
    "better": "green",
    "worse": "red",
    "unclear": "yellow",
    "open": "dim",
}
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_LINES = 15.0


def show_runs(folder: Path, console: Console) -> None:
    """List the runs in a folder: a table on a terminal, a line a run elsewhere.

    Raises:
        RunDirectoryError: there is no such folder, or no run in it.
    """
    found = find_runs(folder)
    if not found:
        raise RunDirectoryError(
            "there are no runs here", where=str(folder), remedy="trivet run CONFIG starts one; its run_dir says where."
        )
    states = [read_run(path, with_files=False) for path in found]
    if not console.is_terminal:
        for state in states:
            console.file.write(_line(state) + "\n")  # As it is: rich would make spaces of the tabs.
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "status", "stages", "verdict", "changed"):
        table.add_column(column, overflow="fold", no_wrap=column in ("status", "changed"))
    for state in states:
        verdict = verdict_of(state)
        table.add_row(
            str(state.root),
            Text(state.status, _STYLES[state.status]),
            Text("  ").join(_marks(state)),
            Text(verdict.line, _STYLES[verdict.outcome]),
            _age(state.changed),
        )
    console.print(table)


def _line(state: RunState) -> str:
    stages = ", ".join(_in_words(stage) for stage in state.stages.values())
    return "\t".join((str(state.root), state.status, stages, verdict_of(state).line))


def _in_words(stage: StageState) -> str:
    return f"{stage.name} {stage.status} {progress_of(stage)}".strip()


def _marks(state: RunState) -> Iterator[Text]:
    for stage in state.stages.values():
        text = stage.name if stage.status == "finished" else _in_words(stage)
        yield Text(text, _STYLES[stage.status])


def _age(changed: float) -> str:
    return f"{duration(max(0.0, time.time() - changed))} ago" if changed else ""


def show_run(folder: Path, console: Console) -> None:
    """Print one run.

    Raises:
        RunDirectoryError: there is no run.
    """
    state = read_run(folder)
    for part in _parts(state):
        console.print(part, markup=False, highlight=False)


def watch_run(folder: Path, console: Console) -> None:
    """Show one run until no process works on it any more: redrawn on a terminal, else a line for each change.

    Raises:
        RunDirectoryError: there is no run.
    """
    state = read_run(folder)
    if not console.is_terminal:
        _watch_in_lines(folder, state, console)
        return
    with Live(Group(*_parts(state)), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while state.is_going:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            state = read_run(folder)
            live.update(Group(*_parts(state)), refresh=True)


def _watch_in_lines(folder: Path, state: RunState, console: Console) -> None:
    last, printed_at = "", float("-inf")
    while True:
        line = "  ".join(filter(None, (_progress_line(state), *_newest(state))))
        if line != last and (time.monotonic() - printed_at >= _SECONDS_BETWEEN_LINES or not state.is_going):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            last, printed_at = line, time.monotonic()
        if not state.is_going:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        state = read_run(folder, with_files=False)
    console.print(verdict_of(read_run(folder)).line, markup=False, highlight=False, soft_wrap=True)


def _progress_line(state: RunState) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return (
        f"{now}  {', '.join(_in_words(stage) for stage in state.stages.values())}" if state.is_going else state.status
    )


def _newest(state: RunState) -> Iterator[str]:
    stage = next((one for one in state.stages.values() if one.status == "going"), None)
    if stage is not None:
        yield from key_lines(StageState(stage.name, stage.status, metrics=stage.metrics), state)


def _parts(state: RunState) -> Iterator[RenderableType]:
    verdict = verdict_of(state)
    yield Text.assemble((str(state.root), "bold"), "  ", (state.status, _STYLES[state.status]))
    yield Text(verdict.headline, _STYLES[verdict.outcome])
    yield Text(verdict.sentence)
    for caution in verdict.cautions:
        yield Text(caution, "yellow")
    for fault in state.faults[:8]:
        yield Text(f"cannot be read: {fault}", "red")
    yield _stages_table(state)
    for name, metric, unit in _CURVES:
        if curve := _curve(state, name, metric, unit):
            yield curve
    if (sample := _last_sample(state)) is not None:
        yield sample


_CURVES = (
    ("score", "objective/score", ""),
    ("KL", "kl/policy_reference_k1", " nats"),
    ("entropy", "policy/entropy", " nats"),
    ("length", "response/length_mean", " tokens"),
)


def _stages_table(state: RunState) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("stage", "status", "time", "memory", "figures"):
        justify: Any = "right" if column in ("time", "memory") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for stage in state.stages.values():
        used = ("", "")
        if stage.manifest is not None:
            used = (duration(stage.manifest.seconds), megabytes(stage.manifest.peak_memory_bytes))
        status = Text(f"{stage.status} {progress_of(stage)}".strip(), _STYLES[stage.status])
        figures = Text(", ".join(key_lines(stage, state)))
        if stage.reason and stage.status not in ("finished", "going", "waiting"):
            figures = Text(stage.reason.splitlines()[0], _STYLES[stage.status])
        table.add_row(TITLES[stage.name], status, *used, figures)
    return table


def _curve(state: RunState, label: str, metric: str, unit: str) -> Text | None:
    values = [row[metric] for row in state.stages["ppo"].metrics if metric in row]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    line = Text(f"{label:<8}", "bold")
    line.append(sparkline(values), "cyan")
    return line.append(f"  {short(known[0])} → {short(known[-1])}{unit}", "dim")


def _last_sample(state: RunState) -> Panel | None:
    """The newest answer: of the evaluation where there is one, else of PPO's last round."""
    if state.answers:
        row: Mapping[str, Any] = state.answers[-1]
        answers: Sequence[tuple[str, Any]] = (("SFT", row.get("sft")), ("PPO", row.get("ppo")))
        title = "the last answers of the evaluation"
    elif state.rounds:
        row = state.rounds[-1]
        score = row.get("score")
        label = f"score {short(score)}" if isinstance(score, (int, float)) else "PPO"
        answers = ((label, row.get("response")),)
        title = f"the last answer of round {row.get('step')}"
    else:
        return None
    body = Text(_plain(row.get("prompt")), "bold")
    for label, answer in answers:
        body.append(f"\n{label}: ", "cyan").append(_plain(answer) or "(nothing)", "not bold")
    return Panel(body, title=title, title_align="left")


def _plain(text: Any) -> str:
    """A text for a terminal: whatever it is, and without codes that a terminal would obey."""
    try:
        said = as_text(text)
    except (TypeError, KeyError):
        said = str(text)
    return "".join(letter for letter in said.strip() if letter.isprintable() or letter == "\n")
