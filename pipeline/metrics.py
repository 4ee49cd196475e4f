"""The metrics of a stage: a JSON line a step, `{"step": 12, "reward": 0.31, ...}`.

Lines are appended whole, so a killed run leaves at most one torn line at the end, which readers drop.
A resumed run first cuts what lies after its checkpoint, so that no step stands twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from pipeline.disk import writing
from pipeline.errors import ArtifactError
from pipeline.run_directory import write_text

MetricsRow = dict[str, float | None]


class MetricsWriter:
    """Appends to a stage's metrics file. Only the main process of a stage may own one.

    Args:
        path: the file; its folder is made when needed. What it holds already is kept.

    Raises:
        RunDirectoryError: the disk does not take it, at any of the methods.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, values: Mapping[str, SupportsFloat] | None = None, /, **named: SupportsFloat) -> None:
        """Append one line. NaN and infinities, which JSON does not know, are written as null.

        Args:
            step: what the figures belong to: an optimizer step or a PPO iteration.
            values: figures by name; for names that are no Python identifiers, such as `kl/reference`.
            named: further figures by name.
        """
        figures = {**(values or {}), **named}
        if "step" in figures:
            raise ValueError("'step' is the line's own key; name the metric otherwise")
        row = {"step": step} | {name: _finite(value) for name, value in figures.items()}
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with writing(self.path):
            before = os.fstat(self._descriptor).st_size
            try:
                # A disk that is almost full takes a part of the line before it refuses the rest.
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BaseException:
                os.ftruncate(self._descriptor, before)
                raise

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def truncate_after(self, step: int) -> None:
        """Drop the lines after a step: what an interrupted run wrote beyond the checkpoint it resumes from."""
        kept = [row for row in read_metrics(self.path) if (row["step"] or 0) <= step]
        write_text(self.path, "".join(json.dumps(_step_as_integer(row), ensure_ascii=False) + "\n" for row in kept))
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND, 0o644)

    def close(self) -> None:
        """Bring what was written to the disk."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                with writing(self.path):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[MetricsRow]:
    """All whole lines of a metrics file, oldest first; none where there is no file.

    Raises:
        ArtifactError: a line before the last is not a JSON object of numbers with a step.
    """
    try:
        *lines, _ = Path(path).read_bytes().split(b"\n")  # What follows the last line end was never finished.
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise ArtifactError(
                f"not a line of metrics: {line[:80].decode(errors='replace')!r}",
                where=f"{path}, line {number}",
                remedy="Remove the line, or the file; the stage then writes it anew.",
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(value is None or type(value) in (int, float) for value in row.values())


def _finite(value: SupportsFloat) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _step_as_integer(row: MetricsRow) -> dict[str, Any]:
    return {**row, "step": int(row["step"] or 0)}


def _cut_torn_line(path: Path) -> None:
    """Remove a half line that a killed writer left, so that the next line starts at the margin."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
