"""What `test_chained.py` runs in four processes, then in two: stages that go on where other processes stopped.

python chained.py FOLDER        with RANK, WORLD_SIZE and the address of rank 0 in the environment
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sharded_stages import shared_out

from pipeline.config_file import load_config
from pipeline.distributed import World
from pipeline.run_directory import RunDirectory
from stages import interruption, ppo, reward, sft
from stages.interruption import Interrupted
from stages.trl_trainer import StageTrainer
from stages.update import Updater

MODULES: dict[str, ModuleType] = {"sft": sft, "reward": reward, "ppo": ppo}
CHAINS = {"down": (4, 2, 1), "shared": (4, 2, 1), "up": (1, 2)}
"""How many processes each start of a run has; all but the last are asked to stop. In "shared" they share the base."""
BASE = "base.quantization=nf4"
STOPS: dict[tuple[str, int], dict[str, int]] = {
    **{(chain, 4): {"sft": 1, "reward": 1, "ppo": 6} for chain in ("down", "shared")},
    **{(chain, 2): {"sft": 4, "reward": 4, "ppo": 6} for chain in ("down", "shared")},
    ("up", 1): {"sft": 5, "reward": 5, "ppo": 6},
}
"""At which microbatch of SFT and of the reward model, or optimizer step of PPO, of this start one process is asked.

SFT and reward training stop in the first of four steps and in the third, so amid what a line of metrics sums up; PPO
in the second of three rounds and in the third.
"""


@contextmanager
def asked_at(kind: type, method: str, number: int) -> Iterator[None]:
    """A block in which the last process is asked to stop at its so manyth call of a method."""
    own, calls = getattr(kind, method), []

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == number and World().rank == World().size - 1:
            interruption.request()
        return own(*args, **named)

    setattr(kind, method, counted)
    try:
        yield
    finally:
        setattr(kind, method, own)


def go_on(folder: Path, chain: str, stage: str) -> None:
    """Start a stage of a chain's run once more; leaves a file where this start was stopped."""
    loaded = load_config(folder / "tiny.yaml", [BASE, f"run_dir={folder / chain / stage}"])
    world = World()
    number = STOPS.get((chain, world.size), {}).get(stage, 0)
    where = (Updater, "_step") if stage == "ppo" else (StageTrainer, "_parts")
    share_out = chain == "shared" and world.size > 1
    try:
        with asked_at(*where, number), shared_out("fsdp-nf4") if share_out else nullcontext([]) as shards:
            MODULES[stage].run(loaded, RunDirectory.find(loaded))
    except Interrupted:
        assert bool(shards) == share_out
        (folder / f"stopped-{chain}-{stage}-{world.size}-{world.rank}").touch()
    interruption.withdraw()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for chain, starts in CHAINS.items():
        for stage in MODULES:
            if World().size in starts:
                go_on(folder, chain, stage)
    World().wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] in ("2", "4")
    main(Path(sys.argv[1]))
