"""What a person at a terminal sees of a run: the stages' lines, and their bars below them.

Nothing here imports Prefect; it names the class below by its path to print a run's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from pipeline.progress import ProgressUpdate, TerminalView, view_for

_current: Display | None = None


class Display:
    """Prints lines and draws bars on one console, so that neither breaks the other.

    Args:
        console: where to. Its stream decides between bars and plain progress lines.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._view = view_for(console.file, console)

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line as it is."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def progress(self, update: ProgressUpdate) -> None:
        """Move a job's bar."""
        self._view.show(update)

    def close(self) -> None:
        """Take bars off the screen that a failed stage left running."""
        if isinstance(self._view, TerminalView):
            self._view.close()


@contextmanager
def showing(display: Display) -> Iterator[Display]:
    """Make this display the one of the process: a run's log and progress go there."""
    global _current
    before, _current = _current, display
    try:
        yield display
    finally:
        display.close()
        _current = before


def current_display() -> Display | None:
    """The display of this process. None where nobody watches, as in a worker."""
    return _current


class RunLogHandler(logging.Handler):
    """Stands in for Prefect's console handler in `trivet run`: our lines and other people's warnings.

    Args:
        stream: what Prefect would print to; used while there is no display.
        styles: Prefect's colours, not used.
        level: the least severe level to print.
    """

    def __init__(self, stream: TextIO, styles: dict[str, str] | None = None, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, unless it is the engine telling what the flow's caller is told anyway."""
        from_run = record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
        if record.levelno < logging.WARNING and not from_run:
            return
        if from_run and _is_engines_own(record):
            return
        try:
            text = record.getMessage()
            if (display := current_display()) is None:
                self._stream.write(text + "\n")
            else:
                display.line(text, _STYLES.get(record.levelname))
        except Exception:
            self.handleError(record)


_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}


def _is_engines_own(record: logging.LogRecord) -> bool:
    """Whether Prefect's engine wrote it: states of runs, and tracebacks of errors that reach our caller."""
    return record.module in ("flow_engine", "task_engine", "engine") and "prefect" in record.pathname
