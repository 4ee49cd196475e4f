"""The shape of a base from its config alone, against the parameters of the model that transformers builds from it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_base
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import BaseSettings
from pipeline.errors import BaseModelError
from pipeline.model_shape import PUBLIC_SHAPES, ModelShape, context_length, shape_from_config, shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}


def shape(**changes: Any) -> ModelShape:
    return shape_from_config(LLAMA | changes, name="m", where="config.json")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"])
def test_the_parameters_are_those_of_the_real_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    folder = tiny_base(tmp_path / "base", architecture, tied=tied)
    config = AutoConfig.from_pretrained(folder)
    real = AutoModelForCausalLM.from_config(config)
    found = shape_of(BaseSettings(model=str(folder)))
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.file_bytes_per_parameter == 4
    linear = [p for name, p in real.named_parameters() if name.endswith("proj.weight")]
    assert found.linear_parameters == sum(parameter.numel() for parameter in linear)


def test_public_models_have_the_parameters_that_their_makers_count() -> None:
    counted = {name.rpartition("/")[2]: round(shape.parameters / 1e9, 2) for name, shape in PUBLIC_SHAPES.items()}
    assert counted == {
        "Llama-3.2-1B": 1.24,
        "Llama-3.2-3B": 3.21,
        "Llama-3.1-8B": 8.03,
        "Qwen2.5-14B": 14.77,
        "Qwen2.5-32B": 32.76,
        "Llama-3.1-70B": 70.55,
    }
    assert shape_of(BaseSettings(model="Qwen/Qwen2.5-14B-Instruct")) == PUBLIC_SHAPES["Qwen/Qwen2.5-14B"]


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(BaseModelError, match=rf"config\.json: the model's config does not say {key}"):
        shape(**{key: None})


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(BaseModelError, match="num_local_experts=8"):
        shape(num_local_experts=8)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        shape_of(BaseSettings(model=str(tmp_path)))


def test_a_nested_text_config_is_found() -> None:
    nested = shape_from_config({"model_type": "x", "text_config": LLAMA}, name="m", where="here")
    assert nested == shape()


def gguf(path: Path, pairs: dict[str, Any], tensors: list[str]) -> Path:
    """A header as llama.cpp writes it, by another hand than the reader's."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        if isinstance(item, list):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        return struct.pack("<II", 4, item)

    body = b"".join(text(key) + value(item) for key, item in pairs.items())
    body += b"".join(text(name) + struct.pack("<I2QIQ", 2, 64, 64, 0, 0) for name in tensors)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + body)
    return path


def gguf_shape(path: Path) -> ModelShape:
    return shape_of(BaseSettings(model=str(path)))


PAIRS = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["a", "bc", "d"],
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def test_a_gguf_header_tells_the_shape(tmp_path: Path) -> None:
    found = gguf_shape(gguf(tmp_path / "m.gguf", PAIRS, ["token_embd.weight"]))
    assert (found.width, found.inner, found.layers, found.heads, found.kv_heads) == (64, 128, 2, 4, 2)
    assert (found.vocabulary, found.head_width, found.tied) == (3, 16, True)
    assert not gguf_shape(gguf(tmp_path / "m.gguf", PAIRS, ["token_embd.weight", "output.weight"])).tied


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (LLAMA | {"max_position_embeddings": 8192}, 8192),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 7}, 4096),
        ({"model_type": "bloom"}, None),
        ({"max_position_embeddings": "many"}, None),
    ],
)
def test_the_config_says_how_many_tokens_the_base_reads(
    tmp_path: Path, settings: dict[str, Any], tokens: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert context_length(BaseSettings(model=str(tmp_path))) == tokens


def test_a_gguf_header_says_how_many_tokens_the_base_reads(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", PAIRS | {"llama.context_length": 2048}, [])
    assert context_length(BaseSettings(model=str(path))) == 2048
    assert context_length(BaseSettings(model=str(gguf(path, PAIRS, [])))) is None


def test_a_torn_gguf_header_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", PAIRS, ["token_embd.weight"])
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BaseModelError, match="header of the GGUF file cannot be read"):
            gguf_shape(path)


def test_the_config_of_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"base\.model=nobody/nothing-at-all"):
        shape_of(BaseSettings(model="nobody/nothing-at-all"))


def test_json_of_a_released_config_is_read_as_it_is(tmp_path: Path) -> None:
    """Llama-3.1-8B's own fields, as they are published."""
    published = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    found = shape_of(BaseSettings(model=str(tmp_path)))
    assert found.parameters == PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"].parameters
