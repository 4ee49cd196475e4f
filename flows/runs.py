"""`trivet runs` and `trivet show`: what runs there are, and how far one has come, for a terminal or a pipe."""

from __future__ import annotations

import textwrap
import time
from collections import deque
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
_WINDOW = 16  # steps that the pace is taken from


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
    state, pace = read_run(folder), Pace()
    if not console.is_terminal:
        _watch_in_lines(folder, state, pace, console)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            pace.look(state, time.monotonic())
            live.update(Group(*_parts(state, pace)), refresh=True)
            if not state.is_going:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            state = read_run(folder)


class Pace:
    """How long stages will take yet, by how fast the share of their steps that is done has grown of late."""

    def __init__(self) -> None:
        self._grown: dict[str, deque[tuple[float, float]]] = {}
        self._now = 0.0

    def look(self, state: RunState, now: float) -> None:
        """Take note of what is done now, in seconds of any clock."""
        self._now = now
        for stage in state.stages.values():
            if stage.status != "going" or stage.done is None:
                self._grown.pop(stage.name, None)
                continue
            seen = self._grown.setdefault(stage.name, deque(maxlen=_WINDOW + 1))
            if not seen:
                # It was reached some time before the first look; nobody knows when.
                seen.append((float("-inf"), stage.done))
            elif stage.done != seen[-1][1]:
                seen.append((now, stage.done))

    def seconds_left(self, stage: StageState) -> float | None:
        """None where nothing is known yet. Before two steps were seen, PPO's rounds tell how long they took."""
        if stage.status != "going" or not stage.done or stage.done >= 1:
            return None
        seen = [one for one in self._grown.get(stage.name, ()) if one[0] > float("-inf")]
        since = self._now - seen[-1][0] if seen else 0.0
        if len(seen) > 1 and seen[-1][1] > seen[0][1]:
            whole = (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1])
        else:
            rounds = [seconds for row in stage.metrics[-_WINDOW:] if (seconds := row.get("seconds/total")) is not None]
            if not rounds:
                return None
            whole = sum(rounds) / len(rounds) * (stage.metrics[-1]["step"] or 0) / stage.done
        return max(0.0, whole * (1 - stage.done) - since)

    def words(self, stage: StageState) -> str:
        """`1 min 27 s left`, where that is known; else nothing."""
        left = self.seconds_left(stage)
        return "" if left is None else f"{duration(left)} left"


def _watch_in_lines(folder: Path, state: RunState, pace: Pace, console: Console) -> None:
    last: tuple[str, ...] = ()
    printed_at = float("-inf")
    while True:
        pace.look(state, time.monotonic())
        news = (", ".join(_in_words(stage) for stage in state.stages.values()), *_newest(state))
        if news != last and (time.monotonic() - printed_at >= _SECONDS_BETWEEN_LINES or not state.is_going):
            line = "  ".join(filter(None, (_progress_line(state, pace), *news[1:])))
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            last, printed_at = news, time.monotonic()
        if not state.is_going:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        state = read_run(folder, with_files=False)
    console.print(verdict_of(read_run(folder)).line, markup=False, highlight=False, soft_wrap=True)


def _progress_line(state: RunState, pace: Pace) -> str:
    if not state.is_going:
        return state.status
    stages = (", ".join(filter(None, (_in_words(stage), pace.words(stage)))) for stage in state.stages.values())
    return f"{datetime.now(UTC).isoformat(timespec='seconds')}  {', '.join(stages)}"


def _newest(state: RunState) -> Iterator[str]:
    """The latest figures of the stage that is going; of PPO with the curves that matter, and what it said last."""
    stage = next((one for one in state.stages.values() if one.status == "going"), None)
    if stage is None:
        return
    lines = key_lines(StageState(stage.name, stage.status, metrics=stage.metrics), state)
    if stage.name != "ppo":
        yield from lines
        return
    yield from lines[:1]
    for label, metric, unit in _CURVES:
        values = [row[metric] for row in stage.metrics if metric in row]
        known = [value for value in values if value is not None]
        if known:
            drawn = f" {sparkline(values, _SHORT_CURVE)}" if metric in _DRAWN else ""
            yield f"{label} {short(known[-1])}{unit}{drawn}"
    if state.rounds:
        said = " ".join(_plain(state.rounds[-1].get("response")).split())
        yield f"last answer: {textwrap.shorten(said, _SHORT_ANSWER, placeholder=' ...') or '(nothing)'}"


def _parts(state: RunState, pace: Pace | None = None) -> Iterator[RenderableType]:
    verdict = verdict_of(state)
    yield Text.assemble((str(state.root), "bold"), "  ", (state.status, _STYLES[state.status]))
    yield Text(verdict.headline, _STYLES[verdict.outcome])
    yield Text(verdict.sentence)
    for caution in verdict.cautions:
        yield Text(caution, "yellow")
    for fault in state.faults[:8]:
        yield Text(f"cannot be read: {fault}", "red")
    yield _stages_table(state, pace)
    for name, metric, unit in _CURVES:
        if curve := _curve(state, name, metric, unit):
            yield curve
    if (sample := _last_sample(state)) is not None:
        yield sample


_CURVES = (
    ("score", "objective/score", ""),
    ("reward", "objective/reward", ""),
    ("KL", "kl/policy_reference_k1", " nats"),
    ("entropy", "policy/entropy", " nats"),
    ("length", "response/length_mean", " tokens"),
    ("clipped", "policy/clip_fraction", ""),
)
_DRAWN = ("objective/reward", "kl/policy_reference_k1")
_SHORT_CURVE, _SHORT_ANSWER = 12, 80
"""In a line: bars of a curve, and letters of an answer."""


def _stages_table(state: RunState, pace: Pace | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("stage", "status", "time", "memory", "figures"):
        justify: Any = "right" if column in ("time", "memory") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for stage in state.stages.values():
        used = ("", "")
        if pace is not None and stage.status == "going":
            used = (pace.words(stage), "")
        elif stage.manifest is not None:
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
