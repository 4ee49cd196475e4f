"""`trivet lm-eval`: base, SFT and policy of a run on tasks of lm-evaluation-harness, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flows.display import Display
from flows.report import LiveReport
from flows.report_views import TaskRow, task_rows
from pipeline.errors import ConfigError
from pipeline.finished_run import SPEAKERS, FinishedRun, Speaker
from pipeline.run_state import read_run
from stages.command import quiet
from stages.device_lock import device_lock
from stages.launch import device_of
from stages.lm_tasks import Order, require_harness, score_tasks


def order_of(
    found: FinishedRun,
    *,
    tasks: str,
    who: Sequence[str],
    limit: int | None,
    examples: int | None,
    chat: bool,
    batch_size: int,
    include_path: Path | None,
) -> Order:
    """The options of the command as an order; without speakers, all that the run has.

    Raises:
        ConfigError: no task is named, nobody is called so, or there is no such folder.
        ArtifactError: a speaker's stage is not finished.
    """
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise ConfigError("no task is named", where="--tasks", remedy="Name some, such as hellaswag,arc_easy.")
    chosen: list[Speaker] = [one for one in SPEAKERS if one in who] or list(found.speakers)
    for one in who:
        if one not in SPEAKERS:
            raise ConfigError(f"nobody is called '{one}'", where="--who", remedy=f"Choose from: {', '.join(SPEAKERS)}.")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError("there is no such folder", where=f"--include-path {include_path}", remedy="Name another one.")
    for speaker in chosen:
        found.require(speaker)
    return Order(names, tuple(chosen), limit, examples, chat, batch_size, include_path)


def lm_eval(found: FinishedRun, order: Order, display: Display) -> None:
    """Let the harness ask, print the scores beside each other, and put them into the run's report.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        TrivetError: it fails at one.
    """
    require_harness()
    for caution in found.cautions:
        display.line(f"warning: {caution}", "yellow")
    quiet()
    root = found.state.root
    with device_lock(device_of(found.config.launch), f"lm-eval of {root.resolve()}", display.line):
        score_tasks(found, order, lambda who, path: display.line(f"{who}: {path}"))
    state = read_run(root)
    rows = [row for row in task_rows(state) if row.task in order.tasks]
    display.console.print(table_of(rows))
    LiveReport(root, display.line).write()


def table_of(rows: Sequence[TaskRow]) -> Table:
    """A row a metric, a column a speaker: the score, and its standard error."""
    table = Table(title="lm-evaluation-harness", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("rows", "examples", *SPEAKERS):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.task, row.metric, str(row.rows), row.examples, *(row.values[one] for one in SPEAKERS))
    return table
