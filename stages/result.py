"""How a stage ends: its files and its manifest appear together, or not at all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from pipeline.artifacts import BaseIdentity, Manifest, digest, folder_files, write_manifest
from pipeline.config_file import LoadedConfig
from pipeline.memory import peak_memory_bytes, reset_peak
from pipeline.progress import is_main_process
from pipeline.rewards import Calibration
from pipeline.run_directory import RunDirectory, StageName, read_json, write_json

_CLOCK = "clock.json"


@dataclass
class StageClock:
    """Time of a stage, that of its interrupted starts included, and peak memory from the moment it is made."""

    started: float = field(default_factory=time.monotonic)
    before: float = 0.0

    def __post_init__(self) -> None:
        reset_peak()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far, of all starts in which this result was made."""
        return self.before + time.monotonic() - self.started

    def go_on(self, run: RunDirectory, stage: StageName, inputs_digest: str) -> None:
        """Count the starts that were interrupted before this one, each up to the last file that it wrote.

        To be called when nothing can be refused any more. A start from other inputs does not count. The main process
        alone keeps the account.
        """
        if not is_main_process():
            return
        path = run.working(stage) / _CLOCK
        files = [file for file in (*run.working(stage).rglob("*"), run.metrics(stage)) if file.is_file()]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            earlier = read_json(path)
            if earlier["inputs_digest"] == inputs_digest:
                last_sign = max(file.stat().st_mtime for file in files)
                self.before = float(earlier["before"]) + max(0.0, last_sign - float(earlier["started"]))
        began = time.time() - (time.monotonic() - self.started)
        write_json(path, {"inputs_digest": inputs_digest, "before": self.before, "started": began})


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
