"""How time and memory of a PPO iteration grow with the batch, the length of the responses and the number of roles.

Each point is an iteration of `ppo_iteration.py`, in a process of its own, after one to warm up. Prints JSON, and draws
`docs/growth.svg` where asked.

    python benchmarks/growth.py [--batches 8,16,32,64,128] [--lengths 16,32,64,128,256] [--output FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flows.curves import Points, draw

SCRIPT = Path(__file__).with_name("ppo_iteration.py")
BATCH, LENGTH = 16, 48
ROLES = {2: ("head", "function"), 3: ("head", "adapter"), 4: ("adapter", "adapter")}
"""Adapters on the base -> critic and reward: policy and reference, then a reward adapter, then a value adapter."""


def point(prompts: int, new_tokens: int, critic: str = "head", reward: str = "adapter") -> dict[str, Any]:
    """Seconds by phase and peak memory of one iteration."""
    with tempfile.TemporaryDirectory(prefix="trivet-bench-") as folder:
        output = Path(folder) / "result.json"
        options = {"prompts": prompts, "new-tokens": new_tokens, "critic": critic, "reward": reward}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, str(SCRIPT), "--no-floor", "--iterations", "1", *arguments, "--output", str(output)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(output.read_text())
    return {
        "prompts": prompts,
        "new_tokens": new_tokens,
        "seconds": found["seconds"],
        "seconds_per_phase": found["seconds_per_phase"],
        "peak_memory_mb": found["peak_memory_mb"],
    }


def curves(found: dict[str, Any]) -> dict[str, Points]:
    """Seconds and memory against batch, length and roles."""
    return {
        f"{title}, by {what}": [(float(row[axis]), float(row[figure])) for row in found[key]]
        for key, axis, what in (
            ("batch", "prompts", "responses a round"),
            ("length", "new_tokens", "new tokens a response"),
            ("roles", "adapters", "adapters on the base"),
        )
        for title, figure in (("seconds", "seconds"), ("peak MB", "peak_memory_mb"))
    }


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time and memory against batch, length and roles.")
    parser.add_argument("--batches", default="8,16,32,64,128")
    parser.add_argument("--lengths", default="16,32,64,128,256")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--picture", type=Path, help="draw it there, as SVG")
    arguments = parser.parse_args()
    found = {
        "batch": [point(int(batch), LENGTH) for batch in arguments.batches.split(",")],
        "length": [point(BATCH, int(length)) for length in arguments.lengths.split(",")],
        "roles": [{"adapters": count} | point(BATCH, LENGTH, *settings) for count, settings in ROLES.items()],
    }
    text = json.dumps(found, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    if arguments.picture:
        arguments.picture.write_text(draw(curves(found), include=(0.0,)))
    print(text)


if __name__ == "__main__":
    main()
