"""Stages that are finished as far as their manifests say, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import BaseIdentity, Manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.run_directory import STAGES, RunDirectory, StageName
from stages.inputs import stage_inputs
from stages.result import StageClock, finish

ROLES = {"sft": "policy", "reward": "reward", "ppo": "policy", "evaluate": "evaluation"}
SAMPLES = [
    {
        "prompt": [{"role": "user", "content": "How do I open the [red] door?"}],
        "sft": "Dunno.",
        "ppo": "Please turn the handle.",
        "judge": "gold",
        "scores": {"sft": -1.5, "ppo": 2.0},
    }
]
METRICS: dict[str, dict[str, Any]] = {
    "sft": {"held_out_loss_before": 3.0, "held_out_loss_after": 2.5, "steps": 4},
    "reward": {"held_out_accuracy": {"value": 0.75, "low": 0.6, "high": 0.86, "n": 40}},
    "ppo": {"objective/score": 0.5, "policy/loss": 0.1},
    "evaluate": {"n": 8, "win_rate": {"gold": {"value": 0.7, "low": 0.52, "high": 0.83, "n": 32, "wins": 20}}},
}


def light_config(folder: Path, **settings: Any) -> Path:
    """A config file whose base is a folder that only looks like a model."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    rows = {
        "instructions": {"prompt": "p", "completion": "c"},
        "preferences": {"prompt": "p", "chosen": "c", "rejected": "r"},
        "prompts": {"prompt": "p"},
    }
    for kind, row in rows.items():
        (folder / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "base": {"model": str(base), "cache_dir": str(folder / "cache")},
        "data": {kind: {"sources": f"{kind}.jsonl"} for kind in rows},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree | settings))
    return path


def publish(
    stage: StageName,
    loaded: LoadedConfig,
    run: RunDirectory,
    *,
    metrics: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """Finish a stage with made-up files and figures, or with these."""

    def save(folder: Path) -> None:
        (folder / "adapter.txt").write_text(stage)
        if stage == "evaluate":
            (folder / "samples.json").write_text(json.dumps(SAMPLES))
        for name, content in (files or {}).items():
            (folder / name).write_text(content)

    identity = BaseIdentity(model="m", revision=None, weights="w", quantization="nf4", tokenizer="t", chat_template="c")
    return finish(
        stage,
        ROLES[stage],
        loaded,
        run,
        inputs=stage_inputs(stage, loaded.config, run),
        base=identity,
        clock=StageClock(),
        metrics=METRICS[stage] if metrics is None else metrics,
        save=save,
        extra=extra,
    )


def publish_all(path: Path) -> LoadedConfig:
    """Finish every stage that the config has."""
    loaded = load_config(path)
    run = RunDirectory.open(loaded)
    for stage in STAGES:
        if stage != "reward" or loaded.config.trains_reward_model:
            publish(stage, loaded, run)
    return loaded
