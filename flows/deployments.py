"""What `trivet up` puts on the server, checked before it goes there; and which configs a run may name.

A server knows nothing of the folder that its workers run in. So the one that `trivet up` starts is told which configs
lie there, and refuses a run with another one when it is submitted, not after it has waited in the queue.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config_file import load_config
from pipeline.errors import ConfigError, TrivetError

POOL = "gpu-box"
"""The work pool that `trivet up` keeps a worker for."""

PARAMETERS = frozenset({"config", "overrides", "force"})
_NO_CONFIGS = frozenset({"runs", "registry", "node_modules", "venv"})
_MOST_CONFIGS = 500


def require_sound(project: Path) -> None:
    """Refuse a prefect.yaml with deployments whose runs could not begin.

    Raises:
        ConfigError: all faults that were found: no work pool, an unknown parameter, a config that is not there or that
            cannot be loaded.
    """
    path = project / "prefect.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        deployments = [dict(one) for one in found["deployments"]]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        said = f": {str(error).splitlines()[0]}" if isinstance(error, (OSError, yaml.YAMLError)) else ""
        raise ConfigError(
            f"it holds no list of deployments{said}",
            where=str(path),
            remedy="Start from the prefect.yaml that comes with trivet.",
        ) from None
    faults = [fault for deployment in deployments for fault in _faults(deployment, project)]
    if faults:
        raise ConfigError("; ".join(faults), where=str(path), remedy="Correct that, and start again.")


def _faults(deployment: Mapping[str, Any], project: Path) -> Iterator[str]:
    name = f"{deployment.get('entrypoint', '?').rpartition(':')[2]}/{deployment.get('name', '?')}"
    pool = (deployment.get("work_pool") or {}).get("name")
    if not pool:
        schedule = " and its schedule" if deployment.get("schedules") else ""
        yield f"{name}{schedule} has no work pool, so that nobody would run it (set work_pool: {{name: {POOL}}})"
    parameters = deployment.get("parameters") or {}
    for unknown in sorted(set(parameters) - PARAMETERS):
        yield f"{name} has a parameter '{unknown}', which no flow here knows ({', '.join(sorted(PARAMETERS))})"
    if pool != POOL or deployment.get("pull"):
        return  # Its workers see other folders.
    if "config" not in parameters:
        return  # Whoever submits a run names one.
    try:
        load_config(project / str(parameters["config"]), [str(one) for one in parameters.get("overrides") or ()])
    except TrivetError as error:
        yield f"{name}: {str(error).replace(chr(10), ' ')}"


def configs_in(project: Path) -> tuple[str, ...] | None:
    """The YAML files in a folder as a run may name them; None where there are more than anybody would list.

    Hidden folders, runs and registries are left out.
    """
    found: list[str] = []
    for folder, folders, files in os.walk(project):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _NO_CONFIGS and not _is_no_place(Path(folder, name))
        )
        here = Path(folder).relative_to(project)
        found += [str(here / name) for name in sorted(files) if name.endswith((".yaml", ".yml"))]
        if len(found) > _MOST_CONFIGS:
            return None
    return tuple(name for name in found if name != "prefect.yaml")


def configs_to_name(project: Path, elsewhere: Sequence[Path] = ()) -> tuple[str, ...] | None:
    """What a run may name: the configs of the folder that it begins in, and by their full paths those of all folders.

    Args:
        project: where runs begin.
        elsewhere: further folders with configs.

    Returns:
        Paths. None: more than anybody would list, so that a run may name any.
    """
    own = configs_in(project)
    found = [(folder, configs_in(folder)) for folder in elsewhere]
    if own is None or any(configs is None for _, configs in found):
        return None
    return own + tuple(str(folder / name) for folder, names in [(project, own), *found] for name in names or ())


def _is_no_place(folder: Path) -> bool:
    """Whether a folder is a run or a Python environment, of which there is much to read and nothing to find."""
    return any((folder / name).exists() for name in ("run.json", "registry.json", "pyvenv.cfg"))


def begins_in(pull_steps: Sequence[Mapping[str, Any]] | None, project: Path) -> bool:
    """Whether a deployment's runs begin in this folder, as far as its last step before a run tells."""
    last = list(pull_steps or [{}])[-1]
    return any(isinstance(step, Mapping) and step.get("directory") == str(project) for step in last.values())


def naming_configs(schema: Mapping[str, Any], configs: Sequence[str] | None) -> dict[str, Any]:
    """A deployment's parameter schema that lets a run name these configs.

    Args:
        schema: as Prefect made it, or as this function did earlier.
        configs: their paths. None: any.
    """
    changed = copy.deepcopy(dict(schema))
    config = changed.get("properties", {}).get("config")
    if config is None:
        return changed  # a flow of the user's own
    config.pop("enum", None)
    if configs is not None:
        config["enum"] = list(configs)
    return changed
