"""Base and adapter as one plain checkpoint: W' = W + s B A in 16 bits, for programs that know neither of the two.

W is what the adapter was trained on: the quantized base, dequantized, not the checkpoint that it was quantized from.
Each product is added in float32 and rounded once. All weights together lie in main memory while they are saved, at the
size that they have on the disk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from pipeline.base_model import Base
from pipeline.chat import ChatFormat
from pipeline.errors import OutputError
from pipeline.merged_model import dequantized, merged_layer
from pipeline.roles import Role, Roles

_SHARD = "5GB"


def plain_state(
    causal_model: PreTrainedModel, adapter: str | None, dtype: torch.dtype, plain: nn.Module
) -> dict[str, Tensor]:
    """All weights of the model with an adapter merged in, by the names that they have in a plain one.

    Args:
        causal_model: with PEFT's layers in it, quantized or not.
        adapter: which of them; None for the bare base.
        dtype: of all weights.
        plain: the model that they are for, without weights: GPT-2's layers keep theirs the other way round, but not
            where they are quantized.

    Returns:
        tensors in main memory. A weight that two modules share comes once, under the first one's name.
    """
    state: dict[str, Tensor] = {}
    turned = {name for name, module in plain.named_modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for name, module in _layers(causal_model):
            layer = _merged(module, adapter, dtype)
            for key, value in _own_tensors(layer):
                if key == "weight" and name in turned and not isinstance(layer, Conv1D):
                    value = value.t()
                state[f"{name}.{key}".lstrip(".")] = value.to("cpu", _plain_dtype(value, dtype)).contiguous()
    return _without_tied(state, causal_model)


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module, but nothing inside of those that an adapter has wrapped."""
    yield prefix, model
    if not isinstance(model, LoraLayer):
        for name, child in model.named_children():
            yield from _layers(child, f"{prefix}.{name}".lstrip("."))


def _merged(module: nn.Module, adapter: str | None, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, LoraLayer):
        return merged_layer(module, adapter, dtype)
    if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(dequantized(module), requires_grad=False), module.bias
        return plain
    return module


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value.detach()


def _plain_dtype(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def _without_tied(state: dict[str, Tensor], causal_model: PreTrainedModel) -> dict[str, Tensor]:
    """Without the output head where it is the embedding: a plain model ties the two again."""
    head, embedding = causal_model.get_output_embeddings(), causal_model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return state
    names = {module: name for name, module in causal_model.named_modules()}
    return {name: value for name, value in state.items() if name != f"{names[head]}.weight"}


def save_merged(roles: Roles, role: Role, dtype: torch.dtype, folder: Path) -> None:
    """Write a role as a plain checkpoint with its tokenizer: a causal model, or a classifier for a role with a head.

    Raises:
        OutputError: transformers has no classifier of this architecture.
    """
    config = _plain_config(roles.base)
    tokenizer = roles.base.chat.tokenizer
    if role in roles.heads:
        config.num_labels = 1
        config.get_text_config().pad_token_id = _pad_beside_eos(roles.base.chat)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.get_text_config().pad_token_id)
        skeleton = _skeleton_of_classifier(config, dtype)
        state = plain_state(roles.base.model, role, dtype, skeleton)
        wanted = skeleton.state_dict().keys()
        state = {name: value for name, value in state.items() if name in wanted}
        state["score.weight"] = roles.heads[role].weight.detach().to("cpu", dtype).contiguous()
    else:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
        skeleton.generation_config = _generation_config(roles.base)
        state = plain_state(roles.base.model, role, dtype, skeleton)
    skeleton.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)


def _plain_config(base: Base) -> Any:
    config = copy.deepcopy(base.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""  # a folder of this machine
    return config


def _skeleton_of_classifier(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, AutoModelForSequenceClassification.from_config(config, dtype=dtype))
    except ValueError:
        raise OutputError(
            f"transformers has no sequence classifier of the architecture '{config.model_type}'",
            remedy="Export the reward model with --form adapter.",
        ) from None


def _pad_beside_eos(chat: ChatFormat) -> int:
    """A pad token that no answer ends with: classifiers of transformers read the last token that is none.

    Raises:
        OutputError: the tokenizer has no other special token.
    """
    tokenizer = chat.tokenizer
    ends = {chat.eos_token_id, tokenizer.eos_token_id}
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids):
        if token is not None and token not in ends:
            return int(token)
    for token in sorted(tokenizer.added_tokens_decoder):
        if token not in ends:
            return int(token)
    raise OutputError(
        "the tokenizer's one special token ends every answer, so that a classifier could not tell it from padding",
        remedy="Export the reward model with --form adapter.",
    )


def _generation_config(base: Base) -> GenerationConfig:
    """When an answer ends, which is the template's to say, and what pads."""
    tokenizer = base.chat.tokenizer
    ends = list(dict.fromkeys(token for token in (base.chat.eos_token_id, tokenizer.eos_token_id) if token is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def load_plain(folder: Path, dtype: torch.dtype, device: torch.device, *, classifier: bool) -> PreTrainedModel:
    """The checkpoint as anybody loads it, with transformers alone."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, device_map={"": device}, use_safetensors=True)
    return cast(PreTrainedModel, model.eval())


def save_requantized(
    merged: Path, dtype: torch.dtype, device: torch.device, *, double: bool, classifier: bool, folder: Path
) -> None:
    """Write a plain checkpoint with its linear layers in bitsandbytes' NF4.

    Args:
        merged: the plain checkpoint.
        dtype: what it computes in.
        device: that quantizes.
        double: quantize the constants too.
        classifier: whether it is one; its head stays as it is.
        folder: where to.
    """
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_pretrained(
        merged,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score", "lm_head"],
        ),
    )
    model.config._name_or_path = ""
    model.save_pretrained(folder, max_shard_size=_SHARD)
