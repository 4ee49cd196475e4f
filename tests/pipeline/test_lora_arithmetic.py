"""An adapter's product in the base's arithmetic: PEFT's own formula in float64, with the same gradients.

Shape legend: B sequence, L token, D width.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pipeline.lora_arithmetic import compute_in_the_bases_arithmetic


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype, *, ours: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(TwoLayers().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    if ours:
        compute_in_the_bases_arithmetic(model, "default")
    return model


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    output.double().pow(2).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24)])
def test_it_is_pefts_formula(shape):
    """In float64, where the order of two additions does not matter."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = outputs_and_gradients(adapted(torch.float64, ours=False), x)
    found = outputs_and_gradients(adapted(torch.float64, ours=True), x)
    assert len(found) == 2 + 4
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    bare = adapted(torch.float64, ours=True)
    with bare.disable_adapter():
        assert not torch.allclose(bare(x), found[0], atol=1e-2)


def test_over_16_bits_the_product_is_rounded_and_the_gradient_is_not():
    x = torch.randn((3, 5, 24), generator=torch.Generator().manual_seed(1))
    wanted = outputs_and_gradients(adapted(torch.float64, ours=False), x.double())
    model = adapted(torch.bfloat16, ours=True)
    found = outputs_and_gradients(model, x.bfloat16())
    assert found[0].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in found[2:]} == {torch.float32}, "what the optimizer steps on is float32"
    for ours, exact in zip(found, wanted, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.02  # bfloat16 has 8 bits: 0.4% a rounding


def test_no_float32_copy_of_the_input_is_made():
    """It is what made PEFT's adapters slower than the base on a CPU."""
    model = adapted(torch.bfloat16, ours=True)
    x = torch.randn((4, 64, 24)).bfloat16()
    with torch.profiler.profile(record_shapes=True) as profile:
        model(x)
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    assert copied and all(4 * 64 not in shape and len(shape) == 2 for shape in copied)  # the adapter's own matrices
