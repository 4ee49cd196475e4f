"""`report.html`: one self-contained page on a run, or on several beside each other.

It is made from what lies in the run's folder, in a moment and without torch or Prefect, while the run goes on too.
Every text that comes from data, models or settings is escaped by the template; what is marked as safe below was made
here, of numbers and of escaped texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import jinja2
from markupsafe import Markup

import pipeline
from flows.curves import Chart, picture, short
from flows.report_views import Comparison, RunView
from flows.summary import number_text
from pipeline.errors import RunDirectoryError
from pipeline.memory import megabytes
from pipeline.progress import duration
from pipeline.run_directory import RunDirectory, write_text
from pipeline.run_state import RunState, is_run, read_run

_PAGE = Path(__file__).with_name("report_page")
_SECONDS_BETWEEN_REPORTS = 20.0


def write_report(folders: Sequence[str | Path], target: Path | None = None) -> Path:
    """Write the page of a run, or that of several.

    Args:
        folders: the runs' folders.
        target: where to. None: `report.html` in the run's folder; for several, `comparison.html` in the folder that
            holds them all.

    Returns:
        the page's path.

    Raises:
        RunDirectoryError: a folder is no run, or the page cannot be written.
    """
    named = target is not None
    states = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    if target is None:
        common = Path(os.path.commonpath([state.root.resolve() for state in states]))
        target = RunDirectory(states[0].root).report if len(states) == 1 else common / "comparison.html"
    try:
        write_text(target, render(states))
    except RunDirectoryError as error:
        if not named and len(states) == 1:
            raise
        raise RunDirectoryError(
            error.problem, where=error.where, remedy="Correct that, or name another place with -o."
        ) from error
    return target


def render(states: Sequence[RunState]) -> str:
    """The page as the text of one HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": duration,
        "megabytes": megabytes,
        "short": _short,
        "percent": _percent,
        "chart": _drawn,
    }
    views = [RunView(state, name) for state, name in zip(states, _names(states), strict=True)]
    page = environment.get_template("page.html").render(
        runs=views,
        comparison=Comparison(views) if len(views) > 1 else None,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        version=pipeline.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return page.lstrip()


def _drawn(chart: Chart) -> Markup:
    return Markup(picture(chart))


def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _names(states: Sequence[RunState]) -> list[str]:
    """A name a run: its folder's, after as many of those above it as it takes to tell it from the others."""
    parts = [state.root.resolve().parts for state in states]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        depth = next(size for size in range(1, len(own) + 1) if own[-size:] not in [one[-size:] for one in others])
        return str(PurePath(*own[-depth:]))

    return [name(own) for own in parts]


@contextmanager
def kept_up(folder: str | Path, warn: Callable[[str], None]) -> Iterator[LiveReport]:
    """Keep the page of a run up to date while the block runs, and write it once more when it ends, however it does.

    Args:
        folder: the run's.
        warn: told where the page cannot be written. It is a view: the run goes on without.
    """
    live = LiveReport(folder, warn)
    live.write()
    try:
        yield live
    finally:
        live.write()


class LiveReport:
    """The page of a run that is going.

    Args:
        folder: the run's.
        warn: told, once, where the page cannot be written.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = Path(folder), warn
        self._written, self._complained = float("-inf"), False

    def look(self) -> None:
        """Write the page again if the last one is old. Cheap to call often."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_REPORTS:
            self.write()

    def write(self) -> None:
        """Write the page now; nothing happens where there is no run yet."""
        if not is_run(self._folder):
            return
        try:
            write_report([self._folder])
        except Exception as error:
            if not self._complained:
                self._warn(f"warning: the run's report cannot be written: {error}")
            self._complained = True
        self._written = time.monotonic()


def _short(value: Any) -> str:
    return short(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else number_text(value)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def run_folder(argument: str | Path) -> Path:
    """The folder of a run that a user named: by itself, or by the config that it belongs to.

    Raises:
        ConfigError: it is a config that cannot be read.
    """
    path = Path(argument)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        from pipeline.config_file import load_config

        return Path(load_config(path).config.run_dir)
    return path
