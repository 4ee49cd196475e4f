"""What `test_trl_processes.py` runs in two processes: SFT and reward training, undisturbed, and disturbed in one.

python two_trainings.py FOLDER        with RANK, WORLD_SIZE and the address of rank 0 in the environment
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.config_file import load_config
from pipeline.distributed import World
from pipeline.errors import DivergenceError
from pipeline.run_directory import RunDirectory
from stages import interruption, reward, sft
from stages.interruption import Interrupted
from stages.trl_trainer import StageTrainer

FEW = ("data.instructions.fraction=0.06", "data.preferences.fraction=0.06", "sft.max_steps=2", "reward.max_steps=2")
"""One row of 29: whole epochs have none for the second process."""
DROPOUT = ("lora.dropout=0.1", "deterministic=true")


def run(folder: Path, name: str, stage: Any, *overrides: str) -> None:
    loaded = load_config(folder / "tiny.yaml", [f"run_dir={folder / name}", *overrides])
    stage.run(loaded, RunDirectory.open(loaded))


def in_process(rank: int, number: int, disturb: Callable[[], None]) -> None:
    """Disturb one of the processes at its so manyth microbatch from now on."""
    own, calls = StageTrainer._parts, []

    def counted(self: Any, *args: Any) -> Any:
        calls.append(None)
        if self.world.rank == rank and len(calls) == number:
            disturb()
        return own(self, *args)

    StageTrainer._parts = counted  # type: ignore[method-assign]


def stopped(folder: Path) -> None:
    """Process 1 is asked to stop in the second step."""
    in_process(1, 4, interruption.request)
    try:
        run(folder, "stopped", sft, *DROPOUT)
    except Interrupted:
        checkpoints = folder / "stopped" / "working" / "sft" / "checkpoints"
        (folder / f"stopped-{World().rank}").write_text(" ".join(path.name for path in checkpoints.iterdir()))
    interruption.withdraw()
    run(folder, "stopped", sft, *DROPOUT)


def out_of_memory(folder: Path) -> None:
    """In process 1 one backward pass does not fit, the second of the second step: gradients of the first are there."""
    own = LlamaDecoderLayer.forward

    def fail_once() -> None:
        def fail(_: Any) -> None:
            LlamaDecoderLayer.forward = own
            (folder / "ran-out").touch()
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = own(self, *args, **kwargs)
            if self.self_attn.layer_idx == 0 and hidden.requires_grad:
                hidden.register_hook(fail)
            return hidden

        LlamaDecoderLayer.forward = forward

    in_process(1, 4, fail_once)
    run(folder, "scarce", sft)


def diverged(folder: Path) -> None:
    """Process 1 sees a loss that is not finite, and a gradient that is."""
    own, calls = sft.PolicyTrainer.compute_loss, []

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        loss = own(self, *args, **kwargs)
        return loss + float("inf") if self.world.rank == 1 and len(calls) == 3 else loss

    sft.PolicyTrainer.compute_loss = compute_loss
    try:
        run(folder, "diverged", sft)
    except DivergenceError as error:
        (folder / f"diverged-{World().rank}").write_text(error.problem)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for stage in (sft, reward):
        run(folder, "two", stage)
    for stage in (sft, reward):
        run(folder, "few-two", stage, *FEW)
    run(folder, "straight", sft, *DROPOUT)
    stopped(folder)
    out_of_memory(folder)
    diverged(folder)
    World().wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
