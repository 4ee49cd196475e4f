"""A finished run's policy becomes the registry's current one, if all is current and every gate is passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.gates import require_passed
from pipeline.config_file import LoadedConfig
from pipeline.errors import RegistryError
from pipeline.registry import Event, Registry
from pipeline.run_directory import RunDirectory
from stages.inputs import find_current, stages_of
from stages.launch import stage_result


def promote(loaded: LoadedConfig, *, note: str = "") -> tuple[Event, bool]:
    """Promote the run of a config.

    Args:
        loaded: the run's config, with the overrides it ran with.
        note: why, or by whom; kept in the history.

    Returns:
        What is the current version now, and whether it is new.

    Raises:
        RegistryError: a stage has no current result.
        GateError: a figure misses its threshold.
    """
    run = RunDirectory(loaded.config.run_dir)
    stages = stages_of(loaded.config)
    figures: Mapping[str, Any] = {}
    for stage in stages:
        manifest, reason = find_current(stage, loaded, run)
        if manifest is None:
            raise RegistryError(
                f"the run is not finished: {stage}, {reason}",
                where=str(run.root),
                remedy="Run it first, with the same overrides: trivet run CONFIG [key=value ...].",
            )
        require_passed(stage_result(stage, run, manifest, cached=True, reason=reason), loaded.config)
        figures = manifest.metrics
    return Registry(loaded.config.registry.folder).promote(run, stages, figures=figures, note=note)


def describe(event: Event, *, new: bool = True) -> str:
    """A sentence about what is the current version now."""
    policy = f"version {event.version}, the policy {event.digest[:12]} of {event.run_dir}"
    return f"Current is now {policy}." if new else f"Nothing to do: current already is {policy}."
