"""A tiny pipeline whose stages can be ended anywhere and started again, and what of its results must not differ."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_models import tiny_config

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory, StageName
from stages.inputs import parents_of

ROOT = Path(__file__).parents[2]
TIMES_AND_MEMORY = ("seconds", "tokens_per_second", "tokens/per_second", "memory")
"""Beginnings of the names of figures that no two runs share."""


@dataclass(frozen=True)
class Stop:
    """Where a process ends: see `runner`."""

    at: str
    call: int = 1
    when: str = "before"
    signal: int = signal.SIGKILL
    about: str = ""

    def __str__(self) -> str:
        about = f"({self.about})" if self.about else ""
        name = "" if self.signal == signal.SIGKILL else f"{signal.Signals(self.signal).name}-"
        return f"{name}{self.when}-{self.at.rpartition(':')[2]}{about}-{self.call}"


class Runner:
    """Starts stages in processes that can be ended; see the module `runner`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(
        self,
        stage: StageName,
        loaded: LoadedConfig,
        stop: Stop | None = None,
        after: tuple[float, int] | None = None,
        most_tokens: int | None = None,
    ) -> int:
        """Run a stage to its end, to the stop, or until it gets a signal after some seconds.

        Args:
            most_tokens: above so many tokens in a forward pass of PPO, memory runs out.

        Returns:
            the exit code, or minus the signal that ended it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {
            "stage": stage,
            "config": str(loaded.path),
            "overrides": list(loaded.overrides),
            "log": str(log(loaded)),
            "stop": None if stop is None else asdict(stop),
            "after": after,
            "most_tokens": most_tokens,
        }
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(json.loads(self._process.stdout.readline())["status"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def small_pipeline(folder: Path, *overrides: str) -> LoadedConfig:
    """A config in which every kind of state matters: dropout, a moving KL coefficient, several rounds and epochs."""
    settings = {
        "deterministic": "true",
        "base.quantization": "none",
        "lora.dropout": "0.1",
        "sft.max_steps": "5",
        "sft.checkpoint_every": "2",
        "reward.max_steps": "5",
        "reward.checkpoint_every": "2",
        "ppo.iterations": "4",
        "ppo.epochs": "2",
        "ppo.checkpoint_every": "2",
        "ppo.critic_warmup_iterations": "1",
        "ppo.learning_rate": "0.001",
        "ppo.held_out.every": "2",
        "ppo.held_out.prompts": "4",
        "ppo.kl.controller": "adaptive",
        "ppo.kl.horizon": "50",
        "evaluate.batch_size": "4",
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return tiny_config(folder, *(f"{key}={value}" for key, value in settings.items()))


def elsewhere(folder: Path, undisturbed: LoadedConfig, *overrides: str) -> LoadedConfig:
    """The same config and data with a run directory of its own, below a folder."""
    settings = dict(setting.split("=", 1) for setting in (*undisturbed.overrides, *overrides))
    settings["run_dir"] = str(folder / "run")
    return load_config(undisturbed.path, [f"{key}={value}" for key, value in settings.items()])


def with_parents(stage: StageName, folder: Path, undisturbed: LoadedConfig, *overrides: str) -> LoadedConfig:
    """`elsewhere`, with the finished stages that this one starts from."""
    loaded = elsewhere(folder, undisturbed, *overrides)
    run, finished = RunDirectory(loaded.config.run_dir), RunDirectory(undisturbed.config.run_dir)
    for parent in parents_of(stage, loaded.config):
        shutil.copytree(finished.stage(parent), run.stage(parent))
    return loaded


def log(loaded: LoadedConfig) -> Path:
    """Where the run's stages print."""
    path = Path(loaded.config.run_dir).with_name("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def result_of(stage: StageName, loaded: LoadedConfig) -> dict[str, Any]:
    """All that a stage leaves: its files' digests, its figures and its metrics, but for times and memory."""
    run = RunDirectory(loaded.config.run_dir)
    manifest = read_manifest(run.stage(stage))
    samples = run.metrics("ppo").with_name("ppo_samples.jsonl")
    return {
        "files": dict(manifest.files),
        "identity": manifest.digest,
        "figures": timeless(manifest.metrics),
        "extra": {name: value for name, value in manifest.extra.items() if name != "data"},
        "metrics": [timeless(row) for row in read_metrics(run.metrics(stage))],
        "samples": samples.read_text() if stage == "ppo" else None,
    }


def timeless(figures: Any) -> dict[str, Any]:
    """Figures without those that no two runs share."""
    return {name: value for name, value in figures.items() if not name.startswith(TIMES_AND_MEMORY)}


def leftovers(loaded: LoadedConfig) -> list[str]:
    """Drafts and working files in the run's folder."""
    root = Path(loaded.config.run_dir)
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.name.startswith(".") or (path.relative_to(root).parts[0] == "working" and path.is_file())
    )
