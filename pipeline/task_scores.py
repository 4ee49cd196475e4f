"""Scores of a run's speakers on tasks of lm-evaluation-harness, as they lie in RUN/lm_eval: a file a speaker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    `error` is its standard error, None where the harness gives none; `examples` how many stand in the prompt, in words,
    None where nothing is said of it; `setting` is what must be the same for two scores to stand side by side: task,
    version, metric, filter, number of rows, examples in the prompt, chat template or not.
    """

    task: str
    metric: str
    value: float
    error: float | None
    rows: int
    examples: str | None
    higher_is_better: bool | None
    setting: tuple[object, ...]


@dataclass(frozen=True)
class SpeakerScores:
    """What one speaker scored. `adapter` is the digest of the result that spoke, None for the base."""

    who: str
    adapter: str | None
    scores: Sequence[TaskScore]


def parse_scores(content: Mapping[str, Any]) -> SpeakerScores:
    """The content of a file.

    Raises:
        ValueError: it is not such a file; says what is wrong with it.
    """
    who, adapter, tasks = content.get("who"), content.get("adapter"), content.get("tasks")
    if not isinstance(who, str) or not isinstance(tasks, Mapping) or not isinstance(adapter, (str, type(None))):
        raise ValueError("no speaker, or no tasks")
    return SpeakerScores(who, adapter, [score for name, task in tasks.items() for score in _scores(str(name), task)])


def _scores(name: str, task: Any) -> Iterator[TaskScore]:
    if not isinstance(task, Mapping) or not isinstance(task.get("metrics"), list):
        raise ValueError(f"the task {name} has no metrics")
    rows = task.get("rows")
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise ValueError(f"the task {name} does not say how many rows it has")
    for metric in task["metrics"]:
        found = metric if isinstance(metric, Mapping) else {}
        value, error, better = (found.get(key) for key in ("value", "error", "higher_is_better"))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"a metric of the task {name} is no number")
        named, filtered = str(found.get("name")), str(found.get("filter", "none"))
        yield TaskScore(
            task=name,
            metric=named if filtered == "none" else f"{named}, {filtered}",
            value=float(value),
            error=float(error) if isinstance(error, (int, float)) and not isinstance(error, bool) else None,
            rows=rows,
            examples=None if task.get("examples") is None else str(task["examples"]),
            higher_is_better=better if isinstance(better, bool) else None,
            setting=(
                name,
                str(task.get("version")),
                named,
                filtered,
                rows,
                str(task.get("examples")),
                bool(task.get("chat")),
            ),
        )
