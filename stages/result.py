"""How a stage ends: its files and its manifest appear together, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from pipeline.artifacts import BaseIdentity, Manifest, digest, folder_files, write_manifest
from pipeline.config_file import LoadedConfig
from pipeline.memory import peak_memory_bytes, reset_peak
from pipeline.rewards import Calibration
from pipeline.run_directory import RunDirectory, StageName, read_json


@dataclass
class StageClock:
    """Time and peak memory of a stage, from the moment it is made."""

    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        reset_peak()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return time.monotonic() - self.started


def finish(
    stage: StageName,
    role: str,
    loaded: LoadedConfig,
    run: RunDirectory,
    *,
    inputs: Mapping[str, Any],
    base: BaseIdentity,
    clock: StageClock,
    metrics: Mapping[str, Any],
    save: Callable[[Path], None],
    calibration: Calibration | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """Publish a stage's result.

    Args:
        inputs: what `stage_inputs` said when the stage began; what has changed since then is not in the result.
        save: writes the result's files into the folder that it is given.
        calibration: gain and bias of a reward adapter.
        extra: anything else worth keeping in the manifest.

    Returns:
        the manifest, as it stands beside the files.
    """
    with run.publish(stage) as draft:
        save(draft)
        manifest = Manifest(
            stage=stage,
            role=role,
            base=base,
            inputs=inputs,
            inputs_digest=digest(inputs),
            parents=inputs["parents"],
            lora=loaded.config.lora.model_dump(mode="json") | _shape_of_adapter(draft),
            metrics=dict(metrics),
            seconds=round(clock.seconds, 3),
            peak_memory_bytes=peak_memory_bytes(),
            files=folder_files(draft),
            code_version=pipeline.__version__,
            reward_gain=calibration.gain if calibration else None,
            reward_bias=calibration.bias if calibration else None,
            extra=dict(extra or {}),
        )
        write_manifest(draft, manifest)
    return manifest


def _shape_of_adapter(folder: Path) -> dict[str, Any]:
    """What PEFT has written of the adapter there, if there is one: it may be of other settings than the config has."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return {}
    found = read_json(path)
    ours = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"}
    return {name: found[theirs] for name, theirs in ours.items()}
