"""What this machine computes with, and whether 4-bit arithmetic really works on it: a JSON report on standard output.

    python -m pipeline.device_check

A program of its own, because a library built for other hardware may end the process instead of raising.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

NF4_ERROR_LIMIT = 0.12
"""NF4 keeps normally distributed weights to a relative error of about 0.09; twice-quantized constants add little."""


@dataclass(frozen=True)
class Device:
    """One device. `nf4_error` is the relative error of a weight after quantizing; None where `problem` says why."""

    kind: str
    name: str
    memory_bytes: int | None
    nf4_error: float | None
    problem: str | None


def devices() -> list[Device]:
    """All devices that torch sees, the CPU last, each with the NF4 test done on it."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(_tested(f"cuda:{index}", properties.name, properties.total_memory))
    found.append(_tested("cpu", f"{torch.backends.cpu.get_cpu_capability()} instructions", None))
    return found


def nf4_round_trip(device: str) -> float:
    """Quantize a weight, multiply with it and take a gradient through it; returns the weight's relative error.

    Raises:
        RuntimeError: the layer's product or gradient is not that of the weight it stores.
    """
    import bitsandbytes
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator).to(device)
    inputs = torch.randn(4, 256, generator=generator).to(device).requires_grad_()
    layer = bitsandbytes.nn.Linear4bit(
        256, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True
    )
    layer.load_state_dict({"weight": weight.cpu()})
    layer = layer.to(device)
    # Read before the first product: on some CPUs that repacks the weight in place.
    stored = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    outputs = layer(inputs)
    outputs.sum().backward()
    assert inputs.grad is not None
    expected = inputs.detach() @ stored.t()
    if not torch.allclose(outputs, expected, atol=0.05 * float(expected.abs().max())):
        raise RuntimeError("the 4-bit layer's product is wrong")
    slope = stored.sum(dim=0).expand_as(inputs.grad)
    if not torch.allclose(inputs.grad, slope, atol=0.05 * float(slope.abs().max())):
        raise RuntimeError("the 4-bit layer's gradient is wrong")
    return float((stored - weight).norm() / weight.norm())


def _tested(kind: str, name: str, memory_bytes: int | None) -> Device:
    try:
        error = nf4_round_trip(kind)
    # Whatever a foreign library raises on foreign hardware is the finding.
    except Exception as fault:
        return Device(kind, name, memory_bytes, None, f"{type(fault).__name__}: {fault}")
    problem = None if error < NF4_ERROR_LIMIT else f"a weight comes back with a relative error of {error:.2f}"
    return Device(kind, name, memory_bytes, error, problem)


def main() -> None:
    """Print the report."""
    import torch

    report = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [asdict(one) for one in devices()]}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
