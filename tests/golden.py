"""The curve of a tiny run from its first stage to its last, which only a change that is meant to may move.

PYTHONPATH=.:tests python tests/golden.py     keep the curve as it is now; say in the commit why it has moved
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config

from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory, StageName
from stages import ppo, reward, sft

CURVE = Path(__file__).with_name("golden_curve.json")
OF_TRAINERS = ("loss", "grad_norm", "accuracy", "margin")
OF_PPO = (
    *("objective/score", "kl/policy_reference_k1", "kl/coefficient", "response/length_mean", "policy/entropy"),
    *("policy/clip_fraction", "policy/approx_kl", "policy/gradient_norm", "value/loss", "value/gradient_norm"),
)
"""What is kept of a line of metrics."""
ADAPTIVE = {"controller": "adaptive", "coefficient": 0.1, "target": 0.5, "horizon": 50}


def curve(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Line by line the figures of SFT, of the reward model, and of PPO with either critic, all in float32."""
    training = {"batch_size": 8, "microbatch_size": 4, "max_length": 64, "log_every": 1, "learning_rate": 0.01}
    trainer = training | {"max_steps": 5, "epochs": 1}
    rounds: dict[str, Any] = {"iterations": 3, "prompts_per_iteration": 8, "minibatch_size": 4, "epochs": 2}
    rounds |= {"max_new_tokens": 12, "learning_rate": 3e-3, "kl": ADAPTIVE}
    found = {}
    for critic in ("adapter", "head"):
        loaded = tiny_config(
            folder, sft=trainer, reward=trainer | {"calibration_prompts": 8}, ppo=rounds | {"critic": critic}
        )
        run = RunDirectory.open(loaded)
        if critic == "adapter":
            sft.run(loaded, run)
            reward.run(loaded, run)
            found |= {"sft": lines(run, "sft", OF_TRAINERS), "reward": lines(run, "reward", OF_TRAINERS)}
        ppo.run(loaded, run)
        found[f"ppo, critic: {critic}"] = lines(run, "ppo", OF_PPO)
    return found


def lines(run: RunDirectory, stage: StageName, names: tuple[str, ...]) -> list[dict[str, float]]:
    """A stage's metrics, as much of them as is kept."""
    kept = []
    for row in read_metrics(run.metrics(stage)):
        figures = {name: row.get(name) for name in names}
        kept.append({name: float(value) for name, value in figures.items() if value is not None})
    return kept


def main() -> None:
    """Write the curve."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {"torch": torch.__version__.partition("+")[0], "curve": curve(Path(folder))}
    CURVE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
