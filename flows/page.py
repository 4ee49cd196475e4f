"""What Prefect's page shows of a run: artifacts with progress, curves, figures, samples and lineage.

The page is a view. Where it cannot be written, because the server is away for instance, the run goes on.
"""

from __future__ import annotations

import contextvars
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from flows.curves import as_markdown, draw, read_curves
from flows.summary import as_text, figures_of, key_figures
from pipeline.artifacts import read_manifest
from pipeline.memory import megabytes
from pipeline.progress import ProgressUpdate, duration
from pipeline.run_directory import RunDirectory, StageName
from pipeline.run_state import SAMPLES
from stages.launch import StageResult

_SECONDS_BETWEEN_UPDATES = 5.0
_MOST_LINES = 500
_LONGEST_LINE = 2000

_CURVES = {
    "sft": ("loss", "mean_token_accuracy", "grad_norm", "learning_rate"),
    "reward": ("loss", "accuracy", "margin", "grad_norm"),
    "ppo": (
        "objective/score",
        "kl/policy_reference_k1",
        "response/length_mean",
        "policy/entropy",
        "value/explained_variance",
        "kl/coefficient",
    ),
    "evaluate": (),
}
_ESCAPED = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


class LiveProgress:
    """Shows on the page how far a stage has come, from a thread of its own: a slow server slows no training.

    Args:
        stage: which one.
        log: where it says that the page cannot be written.
    """

    def __init__(self, stage: StageName, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._stage, self._log = stage, log
        self._latest: ProgressUpdate | None = None
        self._artifact: UUID | None = None
        self._over = threading.Event()

    def show(self, update: ProgressUpdate) -> None:
        """Take note of the newest state; the thread sends it when it is due."""
        self._latest = update

    @contextmanager
    def running(self) -> Iterator[LiveProgress]:
        """Send updates while the block runs, and the last one at its end."""
        # The artifact belongs to the task whose context this is.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(self._send_until_over,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join(_SECONDS_BETWEEN_UPDATES)

    def _send_until_over(self) -> None:
        sent = None
        while not self._over.wait(_SECONDS_BETWEEN_UPDATES if sent else 0.5) or self._latest is not sent:
            if (latest := self._latest) is not None and latest is not sent:
                sent = latest
                with page_only(self._log):
                    self._send(latest)

    def _send(self, update: ProgressUpdate) -> None:
        percent = round(100.0 * update.done / max(1, update.total), 1)
        if self._artifact is None:
            created: Any = create_progress_artifact(percent, key=f"progress-{self._stage}", description=update.line)
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent, description=update.line)


@contextmanager
def page_only(log: logging.Logger | logging.LoggerAdapter[Any]) -> Iterator[None]:
    """Let a run go on although its page could not be written; the log says so."""
    try:
        yield
    except Exception as error:
        log.warning("The page of this run lacks something: %s", error)


def bounded(log: Callable[[str], None], whole_log: Path) -> Callable[[str], None]:
    """Pass on so many lines of a stage, and of a long one its beginning; the stage's own log has everything.

    Args:
        log: receives the lines.
        whole_log: the stage's log, which the last line names.
    """
    count = 0

    def on_line(line: str) -> None:
        nonlocal count
        count += 1
        if count <= _MOST_LINES:
            log(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ... ({len(line)} characters)")
        elif count == _MOST_LINES + 1:
            log(f"More than {_MOST_LINES} lines: all of them are in {whole_log}.")

    return on_line


def show_curves(stage: StageName, run: RunDirectory) -> None:
    """The curves of a stage that wrote metrics."""
    if not run.metrics(stage).exists():
        return
    if curves := read_curves(run.metrics(stage), _CURVES[stage]):
        create_markdown_artifact(as_markdown(draw(curves), f"Curves of {stage}"), key=f"curves-{stage}")


def show_figures(key: str, title: str, result: StageResult) -> None:
    """A stage's figures under a title, for a person who has to decide."""
    rows = "".join(f"\n| {_cell(name)} | {_cell(value)} |" for name, value in figures_of(result.metrics))
    create_markdown_artifact(f"## {title}\n\n| figure | value |\n|---|---|{rows}", key=key)


def show_run(summary: Mapping[str, Any]) -> None:
    """The table of the run, the answers before and after, and what each adapter was made from."""
    folder = Path(summary["run_dir"])
    create_markdown_artifact(summary_table(summary), key="summary")
    create_markdown_artifact(lineage(summary), key="lineage")
    if text := samples_side_by_side(folder / "evaluate" / SAMPLES):
        create_markdown_artifact(text, key="samples")


def summary_table(summary: Mapping[str, Any]) -> str:
    """The run's stages and their figures as markdown."""
    lines = [
        f"Run `{summary['run_dir']}` of `{summary['config']}`" + "".join(f" `{one}`" for one in summary["overrides"]),
        "",
        "| stage | time | peak memory | figures |",
        "|---|---:|---:|---|",
    ]
    states = []  # below the table, since the page is not wide enough for them in it
    for name, stage in summary["stages"].items():
        figures = "<br>".join(f"{_cell(key)} **{_cell(value)}**" for key, value in key_figures(name, stage["metrics"]))
        states.append(f"- {name} {'cached' if stage['cached'] else 'ran'}: {_cell(stage['reason'])}")
        memory = megabytes(stage["peak_memory_bytes"])
        lines.append(f"| {name} | {duration(stage['seconds'])} | {memory} | {figures} |")
    return "\n".join([*lines, "", *states])


def lineage(summary: Mapping[str, Any]) -> str:
    """Which adapter was made from which, by digest, as markdown."""
    lines = ["| stage | result | made from | base | data |", "|---|---|---|---|---|"]
    for name in summary["stages"]:
        manifest = read_manifest(Path(summary["run_dir"]) / name)
        parents = ", ".join(f"{parent} `{digest[:12]}`" for parent, digest in manifest.parents.items())
        data = ", ".join(
            f"{kind} `{digest[:12]}`" for kind, digest in manifest.inputs.get("data", {}).items() if len(digest) == 64
        )
        base = f"`{manifest.base.weights[:12]}` ({manifest.base.quantization})"
        lines.append(f"| {name} | `{manifest.digest[:12]}` | {parents or '-'} | {base} | {data} |")
    return "\n".join(lines)


def samples_side_by_side(path: Path) -> str:
    """The answers before and after as markdown; empty where the evaluation left none."""
    if not path.exists():
        return ""
    parts = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        parts.append(f"### {_cell(as_text(entry['prompt']).strip())}")
        parts.append("| policy | score | answer |\n|---|---:|---|")
        for label in ("sft", "ppo"):
            score = entry["scores"][label]
            shown = f"{score:.3g}" if isinstance(score, (int, float)) and math.isfinite(score) else "-"
            parts[-1] += f"\n| {label.upper()} | {shown} | {_cell(as_text(entry[label]).strip()) or '(nothing)'} |"
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    """A text as it is, in a cell of a markdown table."""
    return "<br>".join(text.translate(_ESCAPED).splitlines())
