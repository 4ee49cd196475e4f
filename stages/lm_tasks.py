"""The speakers of a finished run on tasks of EleutherAI's lm-evaluation-harness (`pip install 'trivet[lm-eval]'`).

The base is loaded once, as the run quantized it, and each speaker's adapter is switched on for its turn; the harness
gets the model that is there (`HFLM(pretrained=model)`). What comes out lies in RUN/lm_eval/WHO.json. Tasks and their
data are the harness's: most come from the hub, and `include_path` names a folder with YAML files of one's own.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, TrivetError
from pipeline.finished_run import STAGE_OF, FinishedRun, Speaker
from pipeline.run_directory import RunDirectory, read_json, write_json


@dataclass(frozen=True)
class Order:
    """Which tasks, by whom, and how.

    `limit`: so many rows of each task, None for all. `examples`: in each prompt, None for what the task says. `chat`:
    prompts go through the chat template. `batch_size`: rows at once.
    """

    tasks: tuple[str, ...]
    who: tuple[Speaker, ...]
    limit: int | None = None
    examples: int | None = None
    chat: bool = False
    batch_size: int = 8
    include_path: Path | None = None


def require_harness() -> None:
    """Refuse where the harness is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed",
            where="lm-eval",
            remedy="Run pip install 'trivet[lm-eval]'.",
        )


def score_tasks(found: FinishedRun, order: Order, on_done: Callable[[Speaker, Path], None]) -> None:
    """Let each speaker do all tasks, and write down its scores.

    Args:
        found: the run.
        order: tasks and speakers.
        on_done: told each speaker's file as soon as it is written.

    Raises:
        ConfigError: the harness is not installed, or knows no such task; before a model is loaded.
        TrivetError: the harness fails at a task, as without its data.
    """
    require_harness()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from stages.answering import ROLE_OF, Speakers

    manager = TaskManager(include_path=None if order.include_path is None else str(order.include_path))
    _require_known(order.tasks, manager.all_tasks)
    speakers = Speakers(found, order.who)
    for who in order.who:
        with speakers.roles.active(ROLE_OF[who]):
            # The harness gives the tokenizer a pad token.
            model = HFLM(
                pretrained=speakers.roles.model,
                tokenizer=copy.deepcopy(speakers.chat.tokenizer),
                batch_size=order.batch_size,
            )
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=list(order.tasks),
                    num_fewshot=order.examples,
                    limit=order.limit,
                    apply_chat_template=order.chat,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise TrivetError(
                    f"lm-evaluation-harness failed: {type(error).__name__}: {error}",
                    where=", ".join(order.tasks),
                    remedy="Data of most tasks comes from the hub; --include-path names a folder of tasks of your own.",
                ) from error
        on_done(who, _write(found, who, order, results))


def _require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, n=3)
            raise ConfigError(
                f"lm-evaluation-harness knows no task '{task}'",
                where="--tasks",
                remedy=f"Did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them.",
            )


def _write(found: FinishedRun, who: Speaker, order: Order, results: Mapping[str, Any]) -> Path:
    """Scores of this speaker, beside those of other tasks that the same adapter has done."""
    path = tasks_file(found.run, who)
    stage = STAGE_OF.get(who)
    adapter = None if stage is None else found.adapters[stage].digest
    try:
        before = read_json(path)
        kept = dict(before["tasks"]) if before.get("adapter") == adapter else {}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    tasks = {
        name: {
            "version": results["versions"].get(name),
            "rows": _rows(name, results),
            "examples": results["n-shot"].get(name),
            "chat": order.chat,
            "metrics": list(_metrics(found_here, results["higher_is_better"].get(name, {}))),
        }
        for name, found_here in results["results"].items()
    }
    version = importlib.metadata.version("lm_eval")
    write_json(path, {"who": who, "adapter": adapter, "lm_eval": version, "tasks": kept | tasks})
    return path


def tasks_file(run: RunDirectory, who: Speaker) -> Path:
    """Where a speaker's scores lie."""
    return run.task_scores / f"{who}.json"


def _rows(name: str, results: Mapping[str, Any]) -> int:
    """Rows that were answered; of a group, those of all its tasks."""
    inside = results.get("group_subtasks", {}).get(name) or [name]
    counts = results["n-samples"]
    return sum(int(counts[one]["effective"]) for one in inside if one in counts)


def _metrics(figures: Mapping[str, Any], better: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in figures.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        error = figures.get(f"{name}_stderr,{filtered}")
        known = isinstance(error, (int, float)) and math.isfinite(error)
        yield {
            "name": name,
            "filter": filtered,
            "value": float(value),
            "error": float(error) if known else None,  # type: ignore[arg-type]
            "higher_is_better": better.get(name),
        }
