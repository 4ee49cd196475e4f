"""The processes of a stage, seen from one of them; seeding and determinism.

PPO needs no wrapper around the model for data parallelism: every process holds the same adapters, and their
gradients, which are small, are summed after the last microbatch. A loss that is a sum over tokens divided by
the global token count then does not depend on the number of processes.
"""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from pipeline.errors import LostProcessError
from pipeline.memory import is_out_of_memory

Item = TypeVar("Item")


class World:
    """All processes of the stage. With one process every operation is the identity."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available())

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return cast(torch.device, self._state.device)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a list that all processes hold, in equal contiguous parts."""
        each = len(items) // self.size
        assert each * self.size == len(items), f"{len(items)} items do not divide among {self.size} processes"
        return items[self.rank * each : (self.rank + 1) * each]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def maximum(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every parameter's gradient over all processes, in place; a missing one counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """All processes' items, in the order of their ranks."""
        if self.size == 1:
            return list(items)
        return cast(list[Item], gather_object(list(items)))

    def concatenate(self, tensor: Tensor) -> Tensor:
        """All processes' tensors [B, ...], which have one shape, in the order of their ranks: [B * size, ...]."""
        if self.size == 1:
            return tensor
        # Bytes, since not every backend moves booleans.
        mine = tensor.contiguous().to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8))
        return torch.cat(parts).to(tensor.device)

    def wait(self) -> None:
        """Return when every process has come here."""
        self._state.wait_for_everyone()


def this_device() -> torch.device:
    """The kind of device that a process of a stage has here; asking starts nothing."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def meet(seconds: float) -> None:
    """Join the other processes of the stage, if it has any. From then on each waits for another one only so long.

    Args:
        seconds: how long, here and whenever something takes all processes. Of NCCL it is the watchdog's time.

    Raises:
        LostProcessError: not all have come.
    """
    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=seconds))
    except dist.DistError as error:
        raise LostProcessError(
            f"not all processes of the stage have come within {seconds:g} s: {_first_line(error)}", remedy=_TOGETHER
        ) from error


def as_lost_process(error: Exception) -> LostProcessError | None:
    """What an error says of another process, if it came up in an operation that takes all of them; None otherwise."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_out_of_memory(error):
        return None
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if not isinstance(error, RuntimeError) or not last.startswith(os.path.dirname(dist.__file__)):
        return None
    return LostProcessError(
        f"another process of the stage has ended, or did not take part in time: {_first_line(error)}",
        remedy=f"What happened to it stands in the logs of the other machines, or above. {_TOGETHER}",
    )


_TOGETHER = (
    "The same command goes on from the last checkpoint: on several machines run it on each, with its own"
    " launch.machine_rank. Raise launch.timeout if they may take longer."
)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed the global generators; with `deterministic`, ask for kernels that give the same bytes again.

    PPO's sampling and shuffling do not use the global generators: their seeds are derived from what they are for.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        if torch.cuda.is_available():
            # With warnings alone, these kernels of attention keep a backward pass whose sums have no order there.
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, numpy, torch, and of this process's CUDA device if it has one."""
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where `random_states` found them."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
