"""What an unfinished PPO stage needs to go on: adapters, heads, optimizer, controller, counters.

A checkpoint is a folder that appears by one rename and carries the digest of each of its files. One that is
torn, edited or made from other inputs is passed over for the one before it. Safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import folder_files, seal, unseal
from pipeline.disk import writing
from pipeline.run_directory import read_json, replace_folder, sync_tree, write_json

STATE = "state.json"
_DRAFT = ".draft-"
_RETIRED = ".retired-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the JSON state in it."""

    folder: Path
    step: int
    state: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one stage.

    Args:
        root: folder that holds them, one folder a step. Only one process at a time writes there.
        inputs_digest: identity of what the stage is made from; checkpoints of other inputs do not count.
        keep_last: how many are kept.
    """

    def __init__(self, root: Path, *, inputs_digest: str, keep_last: int) -> None:
        self.root, self._inputs_digest, self._keep_last = root, inputs_digest, keep_last

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Write a checkpoint; it counts when it is whole.

        Args:
            step: iterations that are done.
            state: JSON-able counters and controller states.
            write: writes the tensors into the folder that it is given.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._put_back()
            for torn in self.root.glob(f"{_DRAFT}*"):  # of a process that was killed while it wrote
                shutil.rmtree(torn, ignore_errors=True)
            draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.root))
            try:
                write(draft)
                files = folder_files(draft)
                content = {"inputs_digest": self._inputs_digest, "step": step, "files": files, "state": dict(state)}
                write_json(draft / STATE, seal(content))
                sync_tree(draft)
                target = self.root / f"{step:08d}"
                replace_folder(target, draft, self.root / f"{_RETIRED}{target.name}")
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        # A later step is not this run's: it was passed over, and would push out what is written now.
        later = [path for path in self._folders() if int(path.name) > step]
        earlier = [path for path in self._folders() if int(path.name) <= step]
        for old in later + earlier[self._keep_last :]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(
        self, warn: Callable[[str], None], usable: Callable[[Checkpoint], bool] = lambda _: True
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole and was made from the same inputs; None if there is none.

        Args:
            warn: told of each one that is passed over, and why.
            usable: what else a checkpoint must satisfy.
        """
        self._put_back()
        found = (self._verified(folder, warn) for folder in self._folders())
        return next((checkpoint for checkpoint in found if checkpoint is not None and usable(checkpoint)), None)

    def at(self, step: int, warn: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint of that very step; None if it is not there, not whole or not from the same inputs."""
        self._put_back()
        folder = self.root / f"{step:08d}"
        return self._verified(folder, warn) if folder.exists() else None

    def _verified(self, folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
        name = f"{self.root.name}/{folder.name}"
        try:
            content = unseal(read_json(folder / STATE), folder / STATE, "")
            if content["inputs_digest"] != self._inputs_digest:
                warn(f"{name} was made from other data or settings; it is not used")
                return None
            found = folder_files(folder, besides=STATE)
            torn = sorted(set(found.items()) ^ set(content["files"].items()))
            if not torn:
                step, state = content["step"], content["state"]
                if step != int(folder.name) or not isinstance(state, dict):
                    raise ValueError("its state is of another form")
                return Checkpoint(folder, step, state)
            warn(f"{name} is damaged ({torn[0][0]}); it is not used")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{name} is not complete ({error}); it is not used")
        return None

    def _put_back(self) -> None:
        """Give a checkpoint its name again that was to be replaced when the process was killed."""
        for retired in self.root.glob(f"{_RETIRED}*"):
            target = self.root / retired.name.removeprefix(_RETIRED)
            if not target.exists():
                with contextlib.suppress(OSError):  # another process was first
                    os.rename(retired, target)
            shutil.rmtree(retired, ignore_errors=True)

    def _folders(self) -> Iterator[Path]:
        """Newest first."""
        if self.root.exists():
            yield from sorted((path for path in self.root.iterdir() if path.name.isdecimal()), reverse=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """An optimizer's state tensors under the names of their parameters: `NAME/KEY`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    """Read back what `optimizer_tensors` gave, from a safetensors file.

    Raises:
        KeyError: the file names a parameter that the optimizer does not have.
    """
    tensors = load_file(path)
    paged = isinstance(optimizer, Optimizer8bit)
    if paged:
        _allocate(optimizer, {named[key.rpartition("/")[0]] for key in tensors})
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = named[name]
        state = optimizer.state[parameter]
        if paged and entry == "step":
            state[entry] = int(tensor)
        elif paged:
            state[entry].copy_(tensor)
        else:
            # Adam keeps its step counter on the CPU, whatever the device of the parameter.
            state[entry] = tensor if entry == "step" else tensor.to(parameter.device)


def _allocate(optimizer: Any, parameters: set[nn.Parameter]) -> None:
    """Room for the state of some parameters as bitsandbytes makes it at the first step: in pages where it pages."""
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in parameters:
                optimizer.init_state(group, parameter, number, index)
