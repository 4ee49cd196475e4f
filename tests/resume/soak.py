"""Kills stages of a tiny pipeline at random moments, again and again, and compares what comes out in the end.

    python tests/resume/soak.py [--minutes 10] [--seed 0]

Each round runs the whole pipeline: every start of a stage is ended after a random time by SIGKILL (or asked to stop
by SIGTERM), and started again until one start is let through. Exit code 1 at the first difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from resume.harness import Runner, elsewhere, leftovers, log, result_of, small_pipeline  # noqa: E402

from pipeline.config_file import LoadedConfig  # noqa: E402
from pipeline.run_directory import STAGES  # noqa: E402

STARTS = 4
"""At most so many starts of a stage are ended before one is let through."""


def main() -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Kills stages at random moments and compares results.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    runner = Runner()
    kills = rounds = 0
    with tempfile.TemporaryDirectory(prefix="trivet-soak-") as temporary:
        undisturbed = small_pipeline(Path(temporary) / "undisturbed")
        seconds = {}
        for stage in STAGES:
            started = time.monotonic()
            assert runner.run(stage, undisturbed) == 0, log(undisturbed).read_text()[-4000:]
            seconds[stage] = time.monotonic() - started
        while time.monotonic() < end:
            folder = Path(temporary) / f"round-{rounds}"
            loaded = elsewhere(folder, undisturbed)
            for stage in STAGES:
                for _ in range(draw.randrange(STARTS + 1)):
                    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                    status = runner.run(stage, loaded, after=(draw.uniform(0.0, 1.2 * seconds[stage]), number))
                    if status not in (0, 75, -number):
                        return different(loaded, f"round {rounds}, {stage}: ended with {status}")
                    kills += status != 0
                status = runner.run(stage, loaded)
                if status != 0 or result_of(stage, loaded) != result_of(stage, undisturbed) or leftovers(loaded):
                    return different(loaded, f"round {rounds}, {stage}: differs (exit code {status})")
            shutil.rmtree(folder)
            rounds += 1
            print(f"{rounds} pipelines, ended {kills} times in all, no difference", flush=True)
    runner.close()
    return 0


def different(loaded: LoadedConfig, what: str) -> int:
    """Say what went wrong, and keep the run and its log in the working directory."""
    folder = Path(loaded.config.run_dir).parent
    kept = Path.cwd() / folder.name
    shutil.copytree(folder, kept)
    print(f"{log(loaded).read_text()[-4000:]}\n{what}; kept in {kept}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
