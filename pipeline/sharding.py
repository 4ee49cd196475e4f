"""The frozen base shared out among the processes with FSDP2: each keeps a part of every decoder layer.

A layer is gathered where it computes and given up after it. Only the layers are shared out:

- Adapters and heads stay whole in every process, and their gradients are summed as ever. They are a hundredth of the
  base, and whatever saves, restores or steps on them need not know of shards.
- Embeddings and output head stay whole: they are read outside of the layers, as often as a process has tokens to read,
  and gathering takes all processes at once.

As every layer's pass takes all processes, they pass in step: see `Shards.in_step`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import bitsandbytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.config import BaseSettings
from pipeline.distributed import World
from pipeline.errors import BaseModelError, ConfigError
from pipeline.merged_model import device_memory_bytes

SHARE_OF_MEMORY = 0.5
"""How much of the device's memory the whole base may take while it samples."""


_ASKED = "ACCELERATE_USE_FSDP"
"""What Accelerate's launcher asks for FSDP by."""


def sharers(world: World, base: BaseSettings) -> World | None:
    """The processes that are to share out the base: all, where the launcher asks for FSDP and there are several.

    Call it before the base is loaded.

    Raises:
        ConfigError: the base's weights are such as FSDP does not share out, or DeepSpeed's engine is asked for.
    """
    if _switch("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the launcher asks for DeepSpeed's engine, which no stage works with",
            where="ACCELERATE_USE_DEEPSPEED",
            remedy="Give the launcher's file to trivet itself (launch.accelerate_config=FILE), which shares the model"
            " out as the file says by other means.",
        )
    if world.size == 1 or not _switch(_ASKED):
        return None
    if base.quantization == "int8" or (base.quantization == "nf4" and base.quant_storage == "uint8"):
        key = "quantization" if base.quantization == "int8" else "quant_storage"
        raise ConfigError(
            f"the launcher asks for FSDP, which shares out no integers, and base.{key} is '{getattr(base, key)}'",
            where=f"base.{key}",
            remedy=f"Set base.{key}={'nf4' if key == 'quantization' else 'auto'}, or start the stage without FSDP.",
        )
    return world


@contextmanager
def unknown_to_libraries() -> Iterator[None]:
    """A block in which Accelerate and transformers do not learn that FSDP is asked for.

    Accelerate would share out the whole model, adapters and all, which its optimizer states and checkpoints would then
    have to know of; transformers would leave buffers of all processes but the first on the CPU.
    """
    asked = os.environ.pop(_ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_ASKED] = asked


def _switch(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


class Shards:
    """The decoder layers of a base, shared out. Every process must make one, with the same base.

    A share lies on the device, or in main memory where the launcher asks for that.

    Args:
        model: the causal model with an adapter on it already, since PEFT looks at the weights to choose its layers.
        trunk: its decoder.
        world: all processes.

    Raises:
        BaseModelError: it is not known which modules are the architecture's layers.
    """

    def __init__(self, model: PreTrainedModel, trunk: nn.Module, world: World) -> None:
        self._world = world
        # A launcher file may use the word that FSDP1 had for it.
        self._reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("1", "true", "full_shard")
        kinds = set(model._no_split_modules or ())
        layers = [module for module in trunk.modules() if type(module).__name__ in kinds]
        if not layers:
            raise BaseModelError(
                f"{type(model).__name__} does not say which modules are its layers",
                where="launch.strategy=fsdp",
                remedy="Set launch.strategy=ddp.",
            )
        self.whole_bytes = sum(_bytes(parameter) for layer in layers for parameter in _frozen(layer))
        mesh = init_device_mesh(world.device.type, (world.size,))
        place = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if _switch("FSDP_OFFLOAD_PARAMS") else None
        self._quantization: dict[nn.Module, dict[str, Any]] = {}
        for layer in layers:
            self._quantization |= _keep_quantization_constants(layer)
            learning = set(layer.parameters()) - set(_frozen(layer))
            fully_shard(
                layer,
                mesh=mesh,
                reshard_after_forward=self._reshard,
                offload_policy=place or OffloadPolicy(),
                ignored_params=learning,
            )
        self._layers = [cast(FSDPModule, layer) for layer in layers]

    @property
    def bytes_here(self) -> int:
        """What this process holds of the layers' weights now."""
        return sum(_bytes(parameter) for layer in self._layers for parameter in _frozen(cast(nn.Module, layer)))

    @property
    def sentence(self) -> str:
        """How much each process holds, for people."""
        held, whole = self.bytes_here, self.whole_bytes
        return f"The base is shared out: each process holds {held / whole:.0%} of its layers' {whole / 1e6:,.1f} MB."

    @property
    def fits_whole(self) -> bool:
        """Whether the layers may be gathered all at once. Depends on nothing that changes during a run."""
        return self.whole_bytes <= SHARE_OF_MEMORY * device_memory_bytes(self._world.device)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A block in which every process has the whole base, and computes without the others.

        Every process must come here.
        """
        for layer in self._layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(self._reshard)
            self.give_up()

    def give_up(self) -> None:
        """Let go of what is gathered, so that the layers hold their shares alone."""
        for layer in self._layers:
            layer.reshard()

    def show_quantization(self) -> None:
        """Say at each share how its weight is quantized, which PEFT reads there when it puts adapters on it."""
        self.give_up()
        for module, quantization in self._quantization.items():
            vars(module.weight).update(quantization)

    def in_step(self, groups: Sequence[list[int]]) -> list[list[int]]:
        """The same items in as many groups as the process with the most groups has: one forward pass each.

        Every process must come here, with as many items as the others.
        """
        groups = list(groups)
        wanted = int(self._world.maximum(float(len(groups))))
        while len(groups) < wanted:
            largest = max(range(len(groups)), key=lambda place: len(groups[place]))
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
        return groups


def whole_tensor(tensor: Tensor) -> Tensor:
    """A parameter gathered from its shards, or as it is. Every process must come here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _frozen(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" not in name]


def _bytes(parameter: nn.Parameter) -> int:
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return here.numel() * here.element_size()


def _keep_quantization_constants(layer: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """FSDP replaces a weight by a plain one; bitsandbytes then looks for its constants at the module.

    Returns:
        how the weight is quantized of each module where it is.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    for module in layer.modules():
        assert not isinstance(module, bitsandbytes.nn.Linear8bitLt), "integers cannot be shared out: see `sharers`"
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = cast(Any, module.weight)
            module.quant_state = weight.quant_state
            found[module] = {name: getattr(weight, name) for name in ("compress_statistics", "quant_type")}
    return found
