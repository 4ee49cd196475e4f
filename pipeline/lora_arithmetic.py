"""How an adapter's product joins the base's: y = W x + s B (A x), in the base's arithmetic, in one addition.

PEFT stores adapters in float32 and multiplies in it: it copies a 16-bit input to float32, and the product back, at
every layer. On a CPU that takes longer than the base's own products. Here the small matrices are rounded to the
arithmetic of the base instead, as under autocast; what is stored, and what the optimizer steps on, stays float32.
Over a float32 base nothing is rounded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from torch.nn import functional


class _InTheBasesArithmetic(LoraVariant):
    """PEFT's way in for another formula: it computes W x and leaves the rest to `forward`."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's product: x [..., inputs] and W x [..., outputs] -> [..., outputs]."""
        a = cast(Tensor, module.lora_A[active_adapter].weight).to(result.dtype)
        b = cast(Tensor, module.lora_B[active_adapter].weight).to(result.dtype)
        inner = functional.linear(module.lora_dropout[active_adapter](x.to(result.dtype)), a)
        outputs = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=module.scaling[active_adapter])
        return outputs.view(result.shape)


def compute_in_the_bases_arithmetic(model: PeftModel, adapter: str) -> None:
    """Let an adapter of plain LoRA compute as this module says."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            assert adapter not in module.lora_variant or isinstance(
                module.lora_variant[adapter], _InTheBasesArithmetic
            ), "only plain LoRA is known here"
            module.lora_variant[adapter] = _InTheBasesArithmetic()
            module.cast_input_dtype_enabled = False
