"""Loads the base and quantizes it once; everything else sits on it as adapters.

The base is never trained. `fingerprint` proves that a stage left it as it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from pipeline.artifacts import BaseIdentity
from pipeline.base_files import as_folder, read_tokenizer
from pipeline.base_source import locate
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings
from pipeline.errors import BaseModelError, ConfigError
from pipeline.merged_model import int8_scale, nf4_constants
from pipeline.quantized_cache import intact, keep, kept_folder
from pipeline.sharding import unknown_to_libraries, whole_tensor

_UNREADABLE = (OSError, ValueError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Base:
    """A loaded base: the causal model, its chat format, and its identity."""

    model: PreTrainedModel
    chat: ChatFormat
    identity: BaseIdentity
    device: torch.device


def load_base(base: BaseSettings, device: torch.device | str | None = None, *, plain_attention: bool = True) -> Base:
    """Load the tokenizer, check it, then load and quantize the weights.

    Args:
        base: the config's section.
        device: where the weights go; None is the first CUDA device, or the CPU.
        plain_attention: whether `base.attention: auto` means plain products on a CPU.

    Raises:
        BaseModelError: the base is not there, or its architecture or tokenizer cannot be used.
    """
    device = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = as_folder(locate(base), base)
    chat = ChatFormat(read_tokenizer(folder, base))
    dtype = compute_dtype(base, device)
    identity = base_identity(base, chat, device)
    kept = kept_folder(base, identity, {"quant_storage": str(_quant_storage(base, dtype))}, device)

    def read(source: Path, **quantization: Any) -> Any:
        with unknown_to_libraries():
            return AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": device},
                **quantization,
                attn_implementation=_attention(base, device, plain_attention),
                trust_remote_code=base.trust_remote_code,
                use_safetensors=True,
            )

    model = None
    if kept is not None and kept.exists() and intact(kept):
        try:
            model = read(kept)  # its config says how it is quantized
        except _UNREADABLE:
            shutil.rmtree(kept, ignore_errors=True)  # it is made again
    if model is None:
        try:
            model = read(folder, quantization_config=_quantization(base, dtype))
        except _UNREADABLE as error:
            raise BaseModelError(
                f"the base cannot be loaded: {str(error).splitlines()[0]}",
                where=f"base.model={base.model}",
                remedy="trivet doctor shows what is installed; base.quantization and base.attention may ask for more.",
            ) from error
        if kept is not None:
            keep(model, kept)
    model.config._name_or_path = str(folder)
    model.requires_grad_(False)
    model.generation_config = type(model.generation_config)()  # sampling settings are trivet's, not the checkpoint's
    _keep_4bit_storage_as_it_is(model)
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return Base(cast(PreTrainedModel, model), chat, identity, device)


def base_identity(base: BaseSettings, chat: ChatFormat, device: torch.device) -> BaseIdentity:
    """What makes this base the one that it is on this device; known without its weights."""
    return BaseIdentity(
        model=base.model,
        revision=base.revision,
        weights=locate(base).weights,
        quantization=_quantization_name(base, compute_dtype(base, device)),
        tokenizer=chat.tokenizer_digest,
        chat_template=chat.template_digest,
    )


def compute_dtype(base: BaseSettings, device: torch.device) -> torch.dtype:
    """What the base computes in. `auto` is bfloat16 where the device has instructions for it, else float32."""
    if base.dtype != "auto":
        return cast(torch.dtype, getattr(torch, base.dtype))
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def require_agreed_dtype(base: BaseSettings, device: torch.device, precision: str) -> None:
    """Refuse a launcher that names another arithmetic than the one that the base computes in.

    Nothing would heed it: adapters learn in float32 and the base computes in `base.dtype`, in all stages alike.

    Args:
        precision: Accelerate's `mixed_precision`; `no` names none.

    Raises:
        ConfigError: they differ.
    """
    if precision == "no":
        return
    dtype = str(compute_dtype(base, device)).removeprefix("torch.")
    named = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    if dtype != named:
        auto = " (base.dtype=auto)" if base.dtype == "auto" else ""
        raise ConfigError(
            f"the launcher asks for mixed_precision '{precision}', but the base computes in {dtype} here{auto}",
            where="launch.mixed_precision",
            remedy=(f"Set base.dtype={named}, or" if named else "Choose one with base.dtype, and set")
            + " launch.mixed_precision=no (in a file of your own, mixed_precision).",
        )


def _attention(base: BaseSettings, device: torch.device, plain: bool) -> str | None:
    """The attention to ask for; None leaves it to transformers (SDPA, whose fused kernel is for GPUs).

    On a CPU the plain products are faster: SDPA's backward alone was a quarter of an update of 75 tokens a sequence,
    and up to 512 tokens a sequence it never won. Of 1,536 tokens on it takes less than half of their time.
    """
    if base.attention != "auto":
        return base.attention
    return "eager" if device.type == "cpu" and plain else None


def _quantization(base: BaseSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=base.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=_quant_storage(base, dtype),
        )
    if base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _quant_storage(base: BaseSettings, dtype: torch.dtype) -> torch.dtype:
    """What packed weights are kept as. FSDP shards floating numbers alone; Accelerate's launcher says that it is on."""
    if base.quant_storage != "auto":
        return cast(torch.dtype, getattr(torch, base.quant_storage))
    return dtype if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true") else torch.uint8


def _quantization_name(base: BaseSettings, dtype: torch.dtype) -> str:
    """Names the arithmetic: weights are cast to `dtype` before they are quantized, so it is part of it."""
    kind = "nf4-double" if base.quantization == "nf4" and base.double_quantization else base.quantization
    return f"{kind}/{str(dtype).removeprefix('torch.')}"


def _contiguous(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copy a strided input of the output head.

    A prefill hands it the last token of each sequence as a slice, which torch multiplies in 16 bits on a CPU by one
    copy of the head's weight per sequence: 3.6 GB for 64 sequences of a 135M model, instead of 6 MB.
    """
    return (arguments[0].contiguous(), *arguments[1:])


def _keep_4bit_storage_as_it_is(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place at the first inference forward.

    It does so on CPUs with AVX512-BF16, and computes differently afterwards: sampling and training would no
    longer see the same model, and the base would look changed.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base's own parameters, buffers and quantization constants, adapters and heads left out.

    Equal before and after a stage: the quantized base never changes. Where it is shared out, every process must come
    here; the weights are gathered one by one.
    """
    hasher = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *_quantization_constants(model)]:
        if any(part in name for part in ("lora_", "modules_to_save", "score.", "heads.")):
            continue
        hasher.update(name.replace("base_layer.", "").encode())
        flat = whole_tensor(tensor.detach()).contiguous().flatten().view(torch.uint8)
        for chunk in torch.split(flat, 1 << 26):
            hasher.update(chunk.cpu().numpy().tobytes())
    return hasher.hexdigest()


def require_unchanged(base: Base, before: str) -> None:
    """Refuse the result of a stage that touched the base.

    Args:
        before: the base's fingerprint when the stage began.

    Raises:
        BaseModelError: it has another fingerprint now.
    """
    after = fingerprint(base.model)
    if after != before:
        raise BaseModelError(
            f"the base changed during the stage (fingerprint {before[:12]} before, {after[:12]} after)",
            where=f"base.model={base.identity.model}",
            remedy="The result is not kept. This is a fault in trivet or in a library below it; please report it.",
        )


def _quantization_constants(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What quantized weights are scaled by; bitsandbytes keeps it beside the parameters."""
    for name, module in model.named_modules():
        found: dict[str, Any] = {}
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = nf4_constants(module)
            found = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            if state.nested:
                found |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            found = {"scale": int8_scale(module)}
        yield from ((f"{name}.{key}", tensor) for key, tensor in found.items() if tensor is not None)
