"""The figures of a run: `summary.json`, and the table and samples that a person reads."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.errors import ArtifactError
from pipeline.memory import megabytes
from pipeline.progress import duration
from pipeline.run_directory import STAGES, RunDirectory, write_json
from pipeline.run_state import SAMPLES
from stages.inputs import stages_of
from stages.launch import StageResult, available_cores, stage_result

_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "prefect")


_KEY_FIGURES = {
    "sft": ("held_out_loss", "held_out_perplexity"),
    "reward": ("held_out_accuracy",),
    "ppo": ("objective/score", "kl/policy_reference_k1", "response/length_mean", "response/eos_rate"),
    "evaluate": (
        "n",
        "kl",
        "win_rate",
        "length_controlled_win_rate",
        "against_base",
        "best_of_n",
        "perplexity",
        "mean_score",
        "response",
    ),
}
"""Beginnings of the names that the table shows."""


def write_summary(loaded: LoadedConfig, results: Sequence[StageResult | None], started: datetime) -> dict[str, Any]:
    """Write `summary.json` and return its content.

    Args:
        loaded: the run's config.
        results: what the stages handed on; None for a stage that the config does without.
        started: when the run began.
    """
    done = {result.stage: result for result in results if result is not None}
    summary: dict[str, Any] = {
        "config": str(loaded.path.resolve()),
        "overrides": list(loaded.overrides),
        "run_dir": str(Path(loaded.config.run_dir).resolve()),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "stages": {
            name: {
                "seconds": done[name].seconds,
                "peak_memory_bytes": done[name].peak_memory_bytes,
                "metrics": dict(done[name].metrics),
                "adapter_digest": done[name].adapter_digest,
                "cached": done[name].cached,
                "reason": done[name].reason,
            }
            for name in STAGES
            if name in done
        },
        "evaluation": dict(done["evaluate"].metrics) if "evaluate" in done else {},
    }
    write_json(RunDirectory(loaded.config.run_dir).summary, summary)
    return summary


def finished_stages(loaded: LoadedConfig) -> list[StageResult]:
    """What the stages that are finished in the run's folder hand on; those that are not are left out."""
    run, found = RunDirectory(loaded.config.run_dir), []
    for stage in stages_of(loaded.config):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(run.stage(stage))
            found.append(stage_result(stage, run, manifest, cached=True, reason="finished before"))
    return found


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"trivet": pipeline.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def machine() -> dict[str, str]:
    """Where it ran, as far as the operating system tells without being asked for long."""
    found = {"system": platform.platform(), "cores": str(available_cores())}
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        found["processor"] = cpu.partition(":")[2].strip()
    gpus = [name for path in Path("/proc/driver/nvidia/gpus").glob("*/information") if (name := _gpu_name(path))]
    if gpus:
        found["gpus"] = ", ".join(gpus)
    return found


def _gpu_name(path: Path) -> str:
    with contextlib.suppress(OSError, StopIteration):
        return (
            next(line for line in path.read_text().splitlines() if line.startswith("Model")).partition(":")[2].strip()
        )
    return ""


def show_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the table of stages, and the answers before and after."""
    table = Table(title=f"Run {summary['run_dir']}", title_justify="left", show_lines=True)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("figures", overflow="fold")
    for name, stage in summary["stages"].items():
        figures = Group(*(Text(f"{key}  {value}") for key, value in key_figures(name, stage["metrics"])))
        seconds = duration(stage["seconds"]) + ("\n(earlier)" if stage["cached"] else "")
        table.add_row(name, seconds, megabytes(stage["peak_memory_bytes"]), figures)
    for panel in samples(Path(summary["run_dir"]) / "evaluate" / SAMPLES):
        console.print(panel)
    console.print(table)


def key_figures(stage: str, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures to read first; summary.json has them all."""
    for key, value in figures_of(metrics):
        if key.startswith(_KEY_FIGURES[stage]):
            yield key, value


def figures_of(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Metrics as names and short texts; an estimate `{value, low, high, n}` becomes one text."""
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            count = f", n={number_text(value['n'])}" if "n" in value else ""
            yield (
                name,
                f"{number_text(value['value'])} [{number_text(value['low'])}, {number_text(value['high'])}{count}]",
            )
        elif isinstance(value, Mapping):
            yield from figures_of(value, f"{name}.")
        elif not isinstance(value, (list, tuple)):
            yield name, number_text(value)


def number_text(value: Any) -> str:
    """A figure for people, with four digits at the most; `-` where there is none."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    return "-" if value is None else str(value)


def samples(path: Path) -> Iterator[RenderableType]:
    """The side-by-side answers that the evaluation left."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for entry in entries:
        body = Text()
        body.append(f"{as_text(entry['prompt']).strip()}\n", style="bold")
        for label in ("sft", "ppo"):
            score = f" ({entry['judge']} {number_text(entry['scores'][label])})"
            body.append(f"\n{label.upper()}{score}: ", style="cyan" if label == "sft" else "green")
            body.append(as_text(entry[label]).strip() or "(nothing)")
        yield Panel(body)


def as_text(text: Any) -> str:
    """A plain text as it is; of a conversation, its turns."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)
