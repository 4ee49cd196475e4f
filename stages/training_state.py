"""What of PPO changes from step to step, kept so that a run that ends anywhere goes on with the same bytes.

RUN/working/ppo/
  checkpoints/ITERATIONS   state after so many iterations; `ppo.keep_last` of them
  within/STEPS             state inside an iteration, written when the stage is asked to stop
  rounds/RANK/ITERATION    responses and scores of an iteration, which are then not sampled again
  best/ITERATIONS          the policy that was best on held-out prompts
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.background import Background
from pipeline.checkpoint import Checkpoint, CheckpointFolder, load_optimizer, optimizer_tensors
from pipeline.config import PipelineConfig
from pipeline.distributed import World
from pipeline.errors import ArtifactError
from pipeline.kl import KLController
from pipeline.roles import Roles
from pipeline.tensor_tree import save_tensors
from stages.experience import Budgets
from stages.update import UpdateStatistics

Say = Callable[[str], None]


@dataclass
class TrainingState:
    """Policy, critic and optimizer; the KL controller; what has been learned of memory; figures so far.

    `started_from` is the digest of the adapter that the policy started as; `best` are the figures of the best policy
    so far, with its `iteration`; `metrics` those of the last iteration.
    """

    roles: Roles
    optimizer: torch.optim.Optimizer
    kl: KLController
    budgets: Budgets
    world: World
    started_from: str
    best: dict[str, float] | None = None
    metrics: dict[str, float] | None = None

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {**self.roles.parameters("policy"), **self.roles.parameters("value")}

    def digest(self) -> str:
        """SHA-256 of what learns: equal digests mean equal bytes."""
        found = hashlib.sha256()
        for name, parameter in sorted(self.learning.items()):
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().numpy().data)
        return found.hexdigest()

    def numbers(self) -> dict[str, Any]:
        """The state that is no tensor, for a checkpoint's JSON. Every process must come here."""
        return {
            "kl": self.kl.state_dict(),
            "started_from": self.started_from,
            "budgets": self.world.gather([self.budgets.sizes]),
            "best": self.best,
            "metrics": self.metrics,
        }

    def copied(self) -> Callable[[Path], None]:
        """A copy of the state that is tensors, by parameter name, as what writes it into a folder."""
        learning, optimizer = _copies(self.learning), _copies(optimizer_tensors(self.optimizer, self.learning))

        def write(folder: Path) -> None:
            save_tensors(learning, folder / "roles.safetensors")
            save_tensors(optimizer, folder / "optimizer.safetensors")

        return write

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `numbers` and `copied` gave."""
        self.restore_roles(checkpoint)
        load_optimizer(checkpoint.folder / "optimizer.safetensors", self.optimizer, self.learning)
        state = checkpoint.state
        self.kl.load_state_dict(state["kl"])
        sizes = state["budgets"]
        # Processes that share out the base work on equally many parts.
        own = self.roles.shards is None and len(sizes) == self.world.size
        self.budgets.lower(*([sizes[self.world.rank]] if own else sizes))
        self.best, self.metrics = state["best"], state["metrics"]

    def restore_roles(self, checkpoint: Checkpoint) -> None:
        """Put back policy and critic alone."""
        learning: Mapping[str, nn.Parameter] = self.learning
        with torch.no_grad():
            for name, tensor in load_file(checkpoint.folder / "roles.safetensors").items():
                learning[name].copy_(tensor)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In main memory, so that the originals may change."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Position:
    """Where a run goes on: in `iteration`, after the optimizer steps that `statistics` tell of.

    `sampled_by` is the digest of the policy that this iteration's responses come from; None at its beginning.
    """

    iteration: int = 0
    statistics: UpdateStatistics | None = None
    sampled_by: str | None = None

    def __str__(self) -> str:
        steps = f" and {self.statistics.steps} steps" if self.statistics is not None else ""
        return f"{self.iteration}{steps}"


class Checkpoints:
    """The checkpoints of a PPO run, at the end of iterations and within them.

    Every process must call each method; the main one writes.

    Args:
        folder: the stage's working folder.
        config: the run's.
        inputs_digest: identity of what the run is made from.
        world: all processes.
        warn: told of each checkpoint that cannot be used.
        background: writes them, so that one is on the disk when it has finished. None: they are written at once.
    """

    def __init__(
        self,
        folder: Path,
        config: PipelineConfig,
        inputs_digest: str,
        world: World,
        warn: Say,
        background: Background | None = None,
    ) -> None:
        self._world, self._background = world, background
        self._steps = config.ppo.epochs * config.minibatches_per_epoch
        self._saved: tuple[int, Any] | None = None

        def warning(text: str) -> None:
            warn(f"warning: {text}")

        self._warn = warning
        keep_last = config.ppo.keep_last
        self._whole = CheckpointFolder(folder / "checkpoints", inputs_digest=inputs_digest, keep_last=keep_last)
        self._within = CheckpointFolder(folder / "within", inputs_digest=inputs_digest, keep_last=1)
        # As many as can come up since the oldest checkpoint, and the one that this knew.
        between = keep_last * config.ppo.checkpoint_every // (config.ppo.held_out.every or 1)
        self._best = CheckpointFolder(folder / "best", inputs_digest=inputs_digest, keep_last=2 + between)

    def save(self, iterations: int, state: TrainingState) -> None:
        """The state after so many iterations, unless it is on the disk already."""
        numbers = state.numbers()
        if iterations and self._saved != (iterations, numbers["budgets"]):
            self._write(self._whole, iterations, numbers, state)
            self._saved = (iterations, numbers["budgets"])

    def save_unfinished(self, position: Position, state: TrainingState) -> None:
        """The state within an iteration, between two optimizer steps or before the first one."""
        if position.statistics is None or position.statistics.steps == 0:
            self.save(position.iteration, state)
            return
        numbers = state.numbers() | {
            "iteration": position.iteration,
            "sampled_by": position.sampled_by,
            "statistics": self._world.gather([position.statistics.state_dict()]),
        }
        self._write(self._within, position.iteration * self._steps + position.statistics.steps, numbers, state)

    def save_best(self, iterations: int, state: TrainingState) -> None:
        """The policy and critic that are the best so far."""
        self._write(self._best, iterations, state.numbers(), state)

    def _write(self, folder: CheckpointFolder, step: int, numbers: dict[str, Any], state: TrainingState) -> None:
        if self._world.is_main:
            save = partial(folder.save, step, numbers, state.copied())
            if self._background is None:
                save()
            else:
                self._background.do(save)

    def restore_best(self, state: TrainingState) -> None:
        """Put back the policy and critic that `state.best` tells of. The background must have finished.

        Raises:
            ArtifactError: their checkpoint is lost or damaged.
        """
        assert state.best is not None
        found = self._best.at(int(state.best["iteration"]), self._warn)
        if found is None:
            raise ArtifactError(
                f"the checkpoint of the best policy (iteration {state.best['iteration']:.0f}) is lost or damaged",
                where=str(self._best.root),
                remedy="The same command goes on from a checkpoint before it.",
            )
        state.restore_roles(found)

    def restore(self, state: TrainingState, round_exists: Callable[[int, str], bool]) -> Position:
        """Put back the newest state that can be used; the beginning where there is none.

        Args:
            round_exists: whether every process has its responses of an iteration, sampled by a policy of that
                digest. Without them a state within the iteration is of no use.
        """

        def usable(found: Checkpoint) -> bool:
            best = found.state["best"]
            if best is not None and self._best.at(int(best["iteration"]), self._warn) is None:
                self._warn(f"{found.folder.name} is not used: the best policy that it tells of is lost")
                return False
            if found.state["started_from"] != state.started_from:
                self._warn(f"{found.folder.name} is not used: its policy started as another one")
                return False
            return True

        whole, within = self._whole.latest(self._warn, usable), self._within.latest(self._warn, usable)
        reached = whole.step if whole is not None else 0
        if within is not None and int(within.state["iteration"]) >= reached:
            iteration, sampled_by = int(within.state["iteration"]), str(within.state["sampled_by"])
            if round_exists(iteration, sampled_by):
                state.restore(within)
                statistics = UpdateStatistics.from_state(within.state["statistics"][self._world.rank])
                return Position(iteration, statistics, sampled_by)
            self._warn(f"the responses of iteration {iteration + 1} are lost; it is done again")
        if whole is not None:
            state.restore(whole)
            self._saved = (whole.step, whole.state["budgets"])
        return Position(reached)
