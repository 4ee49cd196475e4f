"""A 16-bit copy of the base with one adapter merged in, for sampling: W' = W + s B A, dequantized.

Decoding takes one token a sequence through every layer: over a quantized base most of its time goes into dequantizing
each weight for each token, and into the adapter's small products. The copy has neither. It exists while it samples,
shares whatever no adapter changes (embeddings, norms, output head) with the base, and never touches the quantized
weights. Its logits differ from the adapter's by the rounding of W'; what that does to log-probabilities is measured in
every round of PPO as `sampler/logprob_gap_mean`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import bitsandbytes
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.memory import main_memory_bytes

SHARE_OF_MEMORY = 0.25
"""How much of the device's memory a copy may take where the choice is left to us."""

_ACCELERATES_HOOKS = ("forward", "_old_forward", "_hf_hook")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def merged_copy(causal_model: PreTrainedModel, adapter: str | None) -> PreTrainedModel:
    """The causal model with an adapter merged into its layers, in the dtype it computes in.

    Args:
        causal_model: with PEFT's layers in it.
        adapter: which of them; None for the bare base.

    Where the base is shared out, every process must come here; one layer after the other is gathered.
    """
    with torch.no_grad():
        return cast(PreTrainedModel, _copy(causal_model, adapter, causal_model.dtype))


def copy_bytes(causal_model: PreTrainedModel) -> int:
    """How much memory a merged copy takes beside the base."""
    layers = (module for module in causal_model.modules() if isinstance(module, LoraLayer))
    return int(sum(layer.in_features * layer.out_features for layer in layers) * causal_model.dtype.itemsize)


def device_memory_bytes(device: torch.device) -> int:
    """All memory of the device, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return main_memory_bytes()


def fits(causal_model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a merged copy is small beside the device's memory. Depends on nothing that changes during a run."""
    return copy_bytes(causal_model) <= SHARE_OF_MEMORY * device_memory_bytes(device)


def _copy(module: nn.Module, adapter: str | None, dtype: torch.dtype, *, share: bool = True) -> nn.Module:
    """The same module where no layer in it has adapters; else one of its kind, with copies of its children.

    Args:
        share: False copies also what no adapter changes.
    """
    if isinstance(module, LoraLayer):
        return merged_layer(module, adapter, dtype)
    if isinstance(module, FSDPModule):
        return _gathered_copy(module, adapter, dtype)
    if not any(isinstance(inner, LoraLayer) for inner in module.modules()):
        return module if share else copy.deepcopy(module)
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {name: value for name, value in module.__dict__.items() if name not in _ACCELERATES_HOOKS}
    children = {
        name: child if child is None else _copy(child, adapter, dtype, share=share)
        for name, child in module._modules.items()
    }
    copied.__dict__["_modules"], copied.__dict__["_parameters"] = children, dict(module._parameters)
    return copied


def _gathered_copy(layer: FSDPModule, adapter: str | None, dtype: torch.dtype) -> nn.Module:
    """A copy of a shared-out layer that shares nothing with it: its weights are gone when it is given up again."""
    sharded = cast(nn.Module, layer)
    whole = sharded.__class__.__bases__[1]  # FSDP has put a class of its own above the layer's
    assert issubclass(whole, nn.Module) and not issubclass(whole, FSDPModule)
    layer.unshard()
    try:
        plain = whole.__new__(whole)
        plain.__dict__ = {**sharded.__dict__, **{name: type(sharded.__dict__[name])() for name in _HOOKS}}
        copied = _copy(plain, adapter, dtype, share=False)
        kept = {parameter for name, parameter in sharded.named_parameters() if "lora_" not in name}
        for module in copied.modules():
            for name, parameter in module._parameters.items():
                if parameter in kept:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    finally:
        layer.reshard()
    return copied


def dequantized(layer: nn.Module) -> Tensor:
    """The layer's weight as plain numbers. PEFT's function for it spoils an int8 layer that has not computed yet."""
    weight = cast(Any, layer.weight)
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return cast(Tensor, bitsandbytes.functional.dequantize_4bit(weight.data, nf4_constants(layer)))
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return cast(Tensor, bitsandbytes.functional.int8_vectorwise_dequant(weight.data, int8_scale(layer)))
    return cast(Tensor, weight.detach())


def nf4_constants(layer: bitsandbytes.nn.Linear4bit) -> Any:
    """What the blocks of a 4-bit weight are scaled by; FSDP leaves it at the layer alone."""
    constants = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if constants is None else constants


def int8_scale(layer: bitsandbytes.nn.Linear8bitLt) -> Tensor:
    """What the rows of an int8 weight are scaled by; the layer's first forward pass moves it."""
    scale = cast(Any, layer.weight).SCB
    return cast(Tensor, cast(Any, layer.state).SCB if scale is None else scale)


def merged_layer(layer: Any, adapter: str | None, dtype: torch.dtype) -> nn.Module:
    """A plain layer with W + s B A, added in float32 and rounded once."""
    base = layer.get_base_layer()
    weight = dequantized(base)
    if adapter is not None and adapter in layer.lora_A:
        weight = weight.float() + layer.get_delta_weight(adapter).float()
    plain: nn.Linear | Conv1D
    if isinstance(base, Conv1D):
        plain = Conv1D.__new__(Conv1D)
        plain.__dict__ = {**base.__dict__, "_parameters": dict(base._parameters)}
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None, device="meta")
        plain.bias = base.bias
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return plain.eval()
