"""Prints the figures of finished runs as the table of docs/results.md.

python benchmarks/results_table.py runs/sentiment runs/polite ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.run_directory import RunDirectory, read_json

COLUMNS = (
    "run",
    "SFT loss before -> after",
    "reward accuracy",
    "longer wins",
    "PPO over SFT",
    "score SFT -> PPO",
    "KL",
    "length SFT -> PPO",
    "EOS SFT -> PPO",
    "minutes",
)


def interval(estimate: Mapping[str, float]) -> str:
    """An estimate with its 95% interval and its n."""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}], n={estimate['n']:.0f}"


def rows(run: RunDirectory) -> Iterator[tuple[str, ...]]:
    """One row a judge."""
    summary = read_json(run.summary)
    stages, evaluation = summary["stages"], summary["evaluation"]
    sft, reward = stages["sft"]["metrics"], stages.get("reward", {}).get("metrics")
    response: Any = evaluation["response"]
    minutes = sum(stage["seconds"] for stage in stages.values()) / 60
    for judge, win in evaluation["win_rate"].items():
        means = evaluation["mean_score"][judge]
        yield (
            run.root.name,
            f"{sft['held_out_loss_before']:.3f} -> {sft['held_out_loss_after']:.3f}",
            interval(reward["held_out_accuracy"]) if reward else "no reward model",
            interval(reward["held_out_accuracy_longer_wins"]) if reward else "",
            f"{judge}: {interval(win)}",
            f"{means['sft']['value']:.3f} -> {means['ppo']['value']:.3f}",
            f"{evaluation['kl']['value']:.2f} [{evaluation['kl']['low']:.2f}, {evaluation['kl']['high']:.2f}]",
            " -> ".join(f"{response[name]['length']['value']:.1f}" for name in ("sft", "ppo")),
            " -> ".join(f"{response[name]['eos_rate']:.2f}" for name in ("sft", "ppo")),
            f"{minutes:.1f}",
        )


def main() -> None:
    """Command line: see the module's docstring."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for argument in sys.argv[1:]:
        for row in rows(RunDirectory(Path(argument))):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
