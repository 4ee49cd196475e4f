"""What speed costs in quality: PPO on one SFT and one reward model, with each critic and fast path, several seeds each.

A start that was interrupted goes on where it stopped. Prints a table of the gold measure against PPO's seconds, and
writes `FOLDER/quality.json`.

    python benchmarks/quality.py [CONFIG [KEY=VALUE ...]] [--folder runs/quality] [--seeds 1,2,3] [--variants head]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.config_file import load_config
from pipeline.run_directory import RunDirectory, StageName, read_json
from stages.inputs import stages_of

VARIANTS: Mapping[str, Sequence[str]] = {
    "head": ("ppo.critic=head",),
    "head-sampling-with-adapter": ("ppo.critic=head", "ppo.rollout.weights=adapter"),
    "adapter": ("ppo.critic=adapter",),
}
"""Each critic as it is by default, which samples from merged weights; and the head without them.

Sampling with the adapter on the quantized base gives log-probabilities that are used as the old ones. Those of merged
16-bit weights are computed again.
"""


def run_stage(stage: StageName, config: Path, *overrides: str) -> None:
    """A stage as a user starts it; nothing happens where its result is current."""
    command = [sys.executable, "-m", "flows.cli", stage, str(config), *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)


def measure(
    config: Path, start: RunDirectory, parents: Sequence[StageName], folder: Path, seed: int, overrides: Sequence[str]
) -> dict[str, float]:
    """PPO and evaluation of one seed, from the parents' results in `start`."""
    run = RunDirectory(folder)
    for parent in parents:
        if not run.stage(parent).exists():
            shutil.copytree(start.stage(parent), run.stage(parent))
    own = (f"run_dir={folder}", f"seed={seed}", *overrides)
    run_stage("ppo", config, *own)
    run_stage("evaluate", config, *own)
    found, ppo = (read_json(run.stage(stage) / "trivet.json") for stage in ("evaluate", "ppo"))
    metrics: Any = found["metrics"]
    return {
        "seconds": ppo["seconds"],
        "peak_memory_mb": ppo["peak_memory_bytes"] / 1e6,
        "gold_win_rate": metrics["win_rate"]["gold"]["value"],
        "gold_score": metrics["mean_score"]["gold"]["ppo"]["value"],
        "kl": metrics["kl"]["value"],
    }


def line(name: str, found: Sequence[Mapping[str, float]]) -> str:
    """Mean and standard deviation over the seeds, as a row of a table."""

    def figure(key: str, digits: int) -> str:
        values = [one[key] for one in found]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}"

    figures = (figure("seconds", 0), figure("gold_win_rate", 3), figure("gold_score", 3), figure("kl", 1))
    return "| " + " | ".join((name, str(len(found)), *figures, figure("peak_memory_mb", 0))) + " |"


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Gold score against wall time for critics and fast paths.")
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", help="settings on top of the config, key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    arguments = parser.parse_args()
    folder, seeds = arguments.folder.resolve(), [int(seed) for seed in arguments.seeds.split(",")]
    chosen = arguments.variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")

    start = RunDirectory(folder / "start")
    overrides = arguments.overrides
    parents = [
        stage for stage in stages_of(load_config(arguments.config, overrides).config) if stage in ("sft", "reward")
    ]
    for stage in parents:
        run_stage(stage, arguments.config, *overrides, f"run_dir={start.root}")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for seed in seeds:
        for name in chosen:
            place = folder / f"{name}-{seed}"
            figures = measure(arguments.config, start, parents, place, seed, [*overrides, *VARIANTS[name]])
            found[name].append({"seed": seed} | figures)
            (folder / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    print("| critic and path | seeds | PPO's seconds | gold win rate over SFT | gold score | KL | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in found.items():
        print(line(name, rows))


if __name__ == "__main__":
    main()
