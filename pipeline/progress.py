"""How far a long job has come: a bar on a terminal, plain lines in a pipe, machine lines for a parent process.

The time left comes from the last few steps, not from the whole run, and is not claimed before the first
step is done. A stage that runs as a child of `trivet` or of a flow (TRIVET_PROGRESS=json) writes machine
lines; the parent turns them back into `ProgressUpdate`s and draws the bar itself.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich import progress as bars
    from rich.console import Console

FORMAT_VARIABLE = "TRIVET_PROGRESS"
"""Environment variable; `json` asks for machine lines."""
_MARK = "\x1etrivet-progress "
_WINDOW = 16  # steps that the rate is taken from
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_MACHINE_LINES = 0.2


@dataclass(frozen=True)
class ProgressUpdate:
    """The state of a job at one moment.

    `seconds_each` is the recent time per unit, None before the first one is done. `elapsed` counts from
    the start of this process's work. `finished` is True on the last update, also after an error.
    """

    description: str
    unit: str
    done: int
    total: int
    elapsed: float
    seconds_each: float | None = None
    note: str = ""
    finished: bool = False

    @property
    def seconds_left(self) -> float | None:
        """The time the rest takes at the recent rate. None while nothing is known."""
        return None if self.seconds_each is None else self.seconds_each * max(0, self.total - self.done)

    @property
    def line(self) -> str:
        """One plain line: `ppo 12/40 iterations, 3.1 s each, 1 min 27 s left, reward 0.31`."""
        parts = [f"{self.description} {self.done}/{self.total} {self.unit}"]
        if self.seconds_each is not None:
            digits = ".2g" if self.seconds_each < 1 else ".1f"
            parts.append(f"{self.seconds_each:{digits}} s each")
        if self.done >= self.total:
            parts.append(f"took {duration(self.elapsed)}")
        elif self.finished:
            parts.append(f"stopped after {duration(self.elapsed)}")
        elif self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    @property
    def machine_line(self) -> str:
        """The update as one line that `parse_machine_line` understands."""
        return f"{_MARK}{json.dumps(asdict(self), ensure_ascii=False)}\n"


def parse_machine_line(line: str) -> tuple[ProgressUpdate | None, str]:
    """Take a machine line out of a child's output.

    Returns:
        The update, None if the line holds none; and the rest of the line, since a child may have printed
        something without a line end before.
    """
    before, mark, payload = line.partition(_MARK)
    if not mark:
        return None, line
    try:
        return ProgressUpdate(**json.loads(payload)), before
    except (ValueError, TypeError):
        return None, before


def duration(seconds: float) -> str:
    """Seconds for people: `0.4 s`, `12 s`, `1 min 27 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressView(Protocol):
    """Something that shows the updates of one job or of several, told apart by their descriptions."""

    def show(self, update: ProgressUpdate) -> None:
        """Show the newest state. May be called often; the last call of a job has `finished`."""


class Progress:
    """What a job counts its steps with; made by `progress`."""

    def __init__(self, update: ProgressUpdate, view: ProgressView) -> None:
        self._update, self._view = update, view
        self._start = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._start, update.done)], maxlen=_WINDOW + 1)
        view.show(update)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done. The note, such as the newest figures, stands behind the bar."""
        now = time.monotonic()
        done = self._update.done + n
        self._recent.append((now, done))
        first_time, first_done = self._recent[0]
        seconds_each = (now - first_time) / (done - first_done) if done > first_done else None
        note = note or self._update.note
        self._update = replace(self._update, done=done, elapsed=now - self._start, seconds_each=seconds_each, note=note)
        self._view.show(self._update)

    def finish(self) -> None:
        """Show the last state."""
        self._view.show(replace(self._update, elapsed=time.monotonic() - self._start, finished=True))


@contextmanager
def progress(total: int, description: str, unit: str = "steps", *, done: int = 0) -> Iterator[Progress]:
    """Count the steps of a job and show them on standard error; only the main process prints.

    Args:
        total: how many units there are.
        description: what is being done, in a word or two. Jobs inside one another need different ones.
        unit: what is counted, in the plural.
        done: units that an earlier, interrupted run has done already; they do not count for the rate.
    """
    handle = Progress(ProgressUpdate(description, unit, done, total, 0.0), _view_for_this_process())
    try:
        yield handle
    finally:
        handle.finish()


def is_main_process() -> bool:
    """Whether this is the one process of a launch that prints."""
    return all(int(os.environ.get(variable) or 0) == 0 for variable in ("RANK", "LOCAL_RANK"))


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_main_process():
        print(line, flush=True)


@functools.cache
def _view_for_this_process() -> ProgressView:
    if not is_main_process():
        return SilentView()
    if os.environ.get(FORMAT_VARIABLE) == "json":
        return MachineView(sys.stderr)
    return view_for(sys.stderr)


def view_for(stream: IO[str], console: Console | None = None) -> ProgressView:
    """A bar where the stream is a terminal, plain lines elsewhere.

    Args:
        stream: where to show progress.
        console: a rich console on that stream, if lines are printed beside the bar through one.
    """
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalView(stream, console)
    return PlainView(stream)


class SilentView:
    """Shows nothing."""

    def show(self, update: ProgressUpdate) -> None:
        """Nothing."""


class PlainView:
    """A line at a job's start, at its end, and every few seconds between."""

    def __init__(self, stream: IO[str], seconds_between: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream, self._seconds_between = stream, seconds_between
        self._printed_at: dict[str, float] = {}

    def show(self, update: ProgressUpdate) -> None:
        """Print the line if it is due, or the job's last."""
        now = time.monotonic()
        due = now - self._printed_at.get(update.description, -math.inf) >= self._seconds_between
        # The last step is followed at once by the job's end, which knows as much and the time taken.
        if update.finished or (due and update.done < update.total):
            self._printed_at[update.description] = now
            self._stream.write(update.line + "\n")
            self._stream.flush()
        if update.finished:
            del self._printed_at[update.description]


class MachineView:
    """Machine lines for a parent process, a few a second at the most, the first and the last of a job always."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._written_at: dict[str, float] = {}

    def show(self, update: ProgressUpdate) -> None:
        """Write the update if it is due."""
        now = time.monotonic()
        written_at = self._written_at.get(update.description, -math.inf)
        if update.finished or now - written_at >= _SECONDS_BETWEEN_MACHINE_LINES:
            self._written_at[update.description] = now
            # One write, so that another process's line does not come between.
            self._stream.write(update.machine_line)
            self._stream.flush()
        if update.finished:
            del self._written_at[update.description]


class TerminalView:
    """Rich bars, one a job. Their clocks run on between two updates."""

    def __init__(self, stream: IO[str], console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(file=stream)
        self._bars: bars.Progress | None = None
        self._running: dict[str, bars.TaskID] = {}
        self._lock = threading.Lock()

    def show(self, update: ProgressUpdate) -> None:
        """Move the job's bar. Bars stay on the screen when the last of them is finished."""
        fields: dict[str, Any] = {"update": update, "shown_at": time.monotonic()}
        with self._lock:
            if self._bars is None:
                self._bars = self._make_bars()
                self._bars.start()
            task = self._running.get(update.description)
            if task is None:
                task = self._bars.add_task(
                    update.description, total=max(update.total, 1), completed=update.done, **fields
                )
                self._running[update.description] = task
            else:
                self._bars.update(task, completed=update.done, **fields)
            if update.finished:
                del self._running[update.description]
                if not self._running:
                    self.close()

    def close(self) -> None:
        """Leave the screen to others; a job that was cut off keeps its bar as it was last."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._running.clear()

    def _make_bars(self) -> bars.Progress:
        from rich import progress as bars
        from rich.table import Column
        from rich.text import Text

        class _State(bars.ProgressColumn):
            """How many, how long, how long yet, and the note."""

            def render(self, task: bars.Task) -> Text:
                update: ProgressUpdate = task.fields["update"]
                since = 0.0 if update.finished else time.monotonic() - task.fields["shown_at"]
                text = Text(f"{update.done}/{update.total} {update.unit}  {duration(update.elapsed + since)}")
                left = update.seconds_left
                if left is not None and left > 0 and not update.finished:
                    text.append(f", {duration(max(0.0, left - since))} left")
                if update.note:
                    text.append(f"  {update.note}", style="dim")
                return text

        return bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=20),
            _State(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            refresh_per_second=4,
        )
