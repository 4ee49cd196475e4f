"""All benchmarks of this machine, one after the other: what `make bench` runs.

Writes `benchmarks/results/latest.json` and prints it: an iteration of PPO with a head as the critic at the top, with an
adapter under `adapter_critic`, what Prefect adds under `prefect`, planned and measured memory under `memory`. With
`--peers` other trainers on the same workload are under `peers`, each with trivet's samples a second and peak memory as
ratios to its own: at the same precision and threads, with a head as the critic. Where `--only` leaves something out,
the rest goes to `part.json` beside it.

    python benchmarks/bench.py [--only iteration,adapter,memory,prefect] [--peers]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PARTS = {
    "iteration": ("ppo_iteration.py", "--critic", "head"),
    "adapter": ("ppo_iteration.py", "--critic", "adapter"),
    "memory": ("memory_plan.py",),
    "prefect": ("prefect_overhead.py",),
}
PEERS = ("peers/side_by_side.py",)


def measure(script: str, *options: str) -> dict[str, Any]:
    """What one benchmark says, run in a process of its own; what it prints on the way goes to the error stream."""
    with tempfile.TemporaryDirectory(prefix="trivet-bench-") as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, str(FOLDER / script), *options, "--output", str(output)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def memory_ratio(memory: dict[str, Any]) -> float:
    """PPO's measured peak against SFT's, the mean over the shapes: at best 1, since there is one base."""
    peaks = {(run["shape"], run["stage"]): run["measured"] for run in memory["runs"]}
    shapes = {shape for shape, _ in peaks}
    return sum(peaks[shape, "ppo"] / peaks[shape, "sft"] for shape in shapes) / len(shapes)


def beside(peers: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The peers' figures with trivet's against them: above 1 it is faster, below 1 it takes less memory."""
    for peer in peers.values():
        peer["samples_per_second_ratio"] = round(ours["samples_per_second"] / peer["samples_per_second"], 2)
        peer["memory_ratio"] = round(ours["peak_memory_mb"] / peer["peak_memory_mb"], 3)
    return peers


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Runs the benchmarks of this machine.")
    parser.add_argument("--only", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--peers", action="store_true", help="other trainers too, in environments of their own")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if arguments.peers and "iteration" not in chosen:
        parser.error("--peers is measured against 'iteration', which --only leaves out")
    found = {part: measure(*PARTS[part]) for part in PARTS if part in chosen}
    result = found.pop("iteration", {})
    if "adapter" in found:
        result["adapter_critic"] = found.pop("adapter")
    if "memory" in found:
        result["ppo_to_sft_memory_ratio"] = round(memory_ratio(found["memory"]), 3)
    if arguments.peers:
        found["peers"] = beside(measure(*PEERS), result)
    text = json.dumps(result | found, indent=2)
    target = FOLDER / "results" / ("latest.json" if chosen == list(PARTS) else "part.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
