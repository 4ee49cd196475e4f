"""What `test_sharded_stages.py` runs in two processes: whole stages, on bases of their own and on one shared out.

python sharded_stages.py FOLDER        with RANK, WORLD_SIZE and the address of rank 0 in the environment
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from two_shards import VARIABLES
from two_trainings import in_process

from pipeline import sharding
from pipeline.config_file import LoadedConfig, load_config
from pipeline.distributed import World
from pipeline.memory_budget import MemoryBudget
from pipeline.run_directory import STAGES, RunDirectory
from pipeline.sharding import Shards
from stages import evaluate, interruption, ppo, reward, sft
from stages.experience import Budgets
from stages.interruption import Interrupted
from stages.parts import Parts
from stages.trl_trainer import StageTrainer

MODULES = {"sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}
QUANTIZATIONS = ("none", "nf4")
WORKS = {
    "fsdp-none": ("none", True, ("sft", "reward", "evaluate")),
    "fsdp-nf4": ("nf4", True, ("sft", "reward", "ppo", "evaluate")),
    "ddp-nf4": ("nf4", False, ("sft", "reward", "ppo", "evaluate")),
    "offload-nf4": ("nf4", True, ("reward",)),
    "kept-nf4": ("nf4", True, ("reward",)),
}
"""What two processes do: over which base, whether they share it out, and which stages.

Two processes without quantization and sharing are the business of `test_trl_processes.py` and `test_processes.py`.
"""
STOPPED = ("sft", "reward")
"""Stages that two processes begin with a shared-out base, and one process ends."""
# Nothing but the adapter: a merged copy would gather the base by itself. Batches of 3 of 7 prompts leave a process
# without a batch at the end, and the last batch smaller than the others.
SETTINGS = (
    *("ppo.rollout.weights=adapter", "ppo.gradient_checkpointing=true"),
    *("evaluate.prompts=7", "evaluate.batch_size=3"),
)


def config(folder: Path, quantization: str, kind: str) -> LoadedConfig:
    """The config over a base; `kind` names the folder of the run."""
    return load_config(
        folder / "tiny.yaml", [*SETTINGS, f"base.quantization={quantization}", f"run_dir={folder / kind}"]
    )


def with_parents(folder: Path, quantization: str, kind: str, stage: str) -> RunDirectory:
    """A run in which everything before the stage is finished, by one process."""
    run = RunDirectory(folder / kind / stage)
    for parent in STAGES[: STAGES.index(stage)]:  # type: ignore[arg-type]
        shutil.copytree(folder / f"one-{quantization}" / parent, run.stage(parent))
    return run


@contextmanager
def shared_out(kind: str) -> Iterator[list[Shards]]:
    """A block in which the launcher asks for FSDP, if the kind does; gives what came of it."""
    made: list[Shards] = []
    own = Shards.__init__

    def noted(self: Shards, *args: Any, **named: Any) -> None:
        own(self, *args, **named)
        made.append(self)

    switches = {"FSDP_OFFLOAD_PARAMS": kind.startswith("offload"), "FSDP_RESHARD_AFTER_FORWARD": "kept" not in kind}
    variables = VARIABLES | {name: str(on).lower() for name, on in switches.items()}
    Shards.__init__ = noted  # type: ignore[method-assign]
    # With 4-bit weights, rollouts go token by token; without, the whole base is gathered for them.
    share, sharding.SHARE_OF_MEMORY = sharding.SHARE_OF_MEMORY, 0.0 if kind.endswith("nf4") else 0.5
    if not kind.startswith("ddp"):
        os.environ.update(variables)
    try:
        yield made
    finally:
        Shards.__init__, sharding.SHARE_OF_MEMORY = own, share  # type: ignore[method-assign]
        for variable in variables:
            os.environ.pop(variable, None)


def run_stage(folder: Path, kind: str, stage: str) -> None:
    """One stage; leaves what of the base this process held afterwards, and all of it, in bytes."""
    quantization = WORKS[kind][0]
    with shared_out(kind) as made:
        module: ModuleType = MODULES[stage]
        module.run(config(folder, quantization, f"{kind}/{stage}"), RunDirectory(folder / kind / stage))
    held = [[shards.bytes_here, shards.whole_bytes] for shards in made]
    (folder / f"held-{kind}-{stage}-{World().rank}.json").write_text(json.dumps(held))


def stop(folder: Path, stage: str) -> None:
    """Process 1 is asked to stop amid the second of three steps."""
    own = StageTrainer._parts
    in_process(1, 7, interruption.request)
    try:
        with shared_out("fsdp-nf4"):
            MODULES[stage].run(config(folder, "nf4", f"stopped/{stage}"), RunDirectory(folder / "stopped" / stage))
    except Interrupted:
        checkpoints = folder / "stopped" / stage / "working" / stage / "checkpoints"
        (folder / f"stopped-{stage}-{World().rank}").write_text(" ".join(path.name for path in checkpoints.iterdir()))
    interruption.withdraw()
    StageTrainer._parts = own  # type: ignore[method-assign]


def parts_in_step(folder: Path) -> None:
    """Squares of six numbers in three batches, of which process 0 has one already; each takes both processes."""
    world = World()
    calls: list[list[int]] = []

    def squares(batch: Any) -> list[int]:
        calls.append(list(batch))
        world.wait()
        return [number**2 for number in batch]

    budgets = Budgets(*(MemoryBudget(name, 8, print, alone=False) for name in ("tokens", "responses")))
    parts = Parts(folder / "parts", inputs_digest="", world=world, budgets=budgets, in_step=True)
    if world.is_main:
        parts.keep("squares-00000", lambda: [0, 1, 4])
    batches = [[0, 1, 2], [3, 4], [5]]
    found = [parts.compute("squares", batches, squares, lambda _: None) for _ in range(2)]
    (folder / f"parts-{world.rank}.json").write_text(json.dumps({"found": found, "calls": calls}))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    parts_in_step(folder)
    for kind, (_, _, stages) in WORKS.items():
        for stage in stages:
            run_stage(folder, kind, stage)
    for stage in STOPPED:
        stop(folder, stage)
    World().wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
