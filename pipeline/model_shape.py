"""The shape of a base from its config alone: a folder's config.json, the hub's, or a GGUF file's header; and how
many tokens it reads.

Nothing here reads weights or imports torch, so that `trivet plan` answers at once.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.base_source import PACKAGE_PREFIX, fetched_from_hub, in_package
from pipeline.config import BaseSettings
from pipeline.errors import BaseModelError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs: Llama and its relatives.

    D `width`, I `inner`, V `vocabulary`; `file_bytes_per_parameter` is what a weight takes in the files.
    """

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    norms_per_layer: int = 2
    head_norms: bool = False
    file_bytes_per_parameter: int = 2

    @property
    def query_width(self) -> int:
        """heads x head_width."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """kv_heads x head_width."""
        return self.kv_heads * self.head_width

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """One layer's linear maps: name -> (inputs, outputs)."""
        width, inner, query, kv = self.width, self.inner, self.query_width, self.kv_width
        return {
            "q_proj": (width, query),
            "k_proj": (width, kv),
            "v_proj": (width, kv),
            "o_proj": (query, width),
            "gate_proj": (width, inner),
            "up_proj": (width, inner),
            "down_proj": (inner, width),
        }

    @property
    def linear_parameters(self) -> int:
        """Parameters that are quantized: sum of inputs x outputs over all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """V x D, twice where the output head has its own."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def other_parameters(self) -> int:
        """Norms and biases, which stay in the dtype that the base computes in."""
        biases = (self.query_width + 2 * self.kv_width) * self.attention_bias + self.width * self.output_bias
        norms = self.norms_per_layer * self.width + 2 * self.head_width * self.head_norms
        return self.layers * (norms + biases) + self.width

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Parameters of a LoRA adapter: rank x (inputs + outputs) for each map that has one.

        Args:
            targets: names of the maps; None is all of them.
        """
        chosen = [sides for name, sides in self.linears.items() if targets is None or name in targets]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)


def _llama(name: str, layers: int, width: int, inner: int, heads: int, *, tied: bool = False) -> ModelShape:
    return ModelShape(name, layers, width, inner, heads, 8, 64 if width == 2048 else 128, 128_256, tied)


def _qwen2(name: str, layers: int, inner: int) -> ModelShape:
    return ModelShape(name, layers, 5120, inner, 40, 8, 128, 152_064, tied=False, attention_bias=True)


PUBLIC_SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _llama("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, tied=True),
        _llama("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, tied=True),
        _llama("meta-llama/Llama-3.1-8B", 32, 4096, 14_336, 32),
        _qwen2("Qwen/Qwen2.5-14B", 48, 13_824),
        _qwen2("Qwen/Qwen2.5-32B", 64, 27_648),
        _llama("meta-llama/Llama-3.1-70B", 80, 8192, 28_672, 64),
    )
}
"""Released models whose config needs no look-up, by hub id without `-Instruct`; some are behind a licence."""


def shape_of(base: BaseSettings) -> ModelShape:
    """The shape of the config's base, wherever it lies.

    Raises:
        BaseModelError: there is no config, it misses a field, or its architecture is not reckoned with.
    """
    known = PUBLIC_SHAPES.get(base.model.removesuffix("-Instruct"))
    if known is not None and not os.path.exists(base.model):
        return known
    path = _config_file(base)
    return shape_from_config(_settings_in(path), name=path.stem if _is_gguf(path) else base.model, where=str(path))


def context_length(base: BaseSettings) -> int | None:
    """How many tokens the config's base reads at the most; None where its config does not say.

    Raises:
        BaseModelError: there is no config, or it cannot be read.
    """
    settings = _settings_in(_config_file(base))
    nested = settings.get("text_config")
    for found in (nested if isinstance(nested, Mapping) else {}, settings):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(found.get(name), int) and found[name] > 0:
                return int(found[name])
    return None


def _config_file(base: BaseSettings) -> Path:
    """The file that tells the shape: config.json, or a GGUF file."""
    if base.model.startswith(PACKAGE_PREFIX):
        path = in_package(base.model)
    elif base.model.startswith(("/", ".", "~")) or os.path.exists(base.model):
        path = Path(base.model).expanduser()
    else:
        path = _config_from_hub(base)
    return path if path.name == "config.json" or _is_gguf(path) else path / "config.json"


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and os.path.isfile(path)


def _settings_in(path: Path) -> Mapping[str, Any]:
    if _is_gguf(path):
        return read_gguf_settings(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"the model's config cannot be read: {error}",
            where=str(path),
            remedy="Set base.model to a folder with config.json, a .gguf file, or a hub id.",
        ) from None
    if not isinstance(settings, Mapping):
        raise BaseModelError("this is no model's config", where=str(path), remedy="config.json holds a JSON object.")
    return settings


def shape_from_config(settings: Mapping[str, Any], *, name: str, where: str) -> ModelShape:
    """The shape that a config.json tells.

    Args:
        settings: the file as JSON.
        name: what to call the model.
        where: the file, for errors.

    Raises:
        BaseModelError: a field is missing or no number; the model is none that the arithmetic knows.
    """
    nested = settings.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else settings
    kind = str(text.get("model_type") or settings.get("model_type") or "")
    experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None)
    if experts is not None:
        raise BaseModelError(
            f"the memory of a mixture of experts ({experts}={text[experts]}) is not reckoned with",
            where=where,
            remedy="trivet plan knows dense decoders with gated MLPs: Llama, Mistral, Qwen, Gemma, SmolLM, Granite.",
        )
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in wanted if not isinstance(text.get(key), int) or text[key] < 1]
    if missing:
        raise BaseModelError(
            f"the model's config does not say {', '.join(missing)} (a positive number each)",
            where=where,
            remedy="trivet plan knows dense decoders with gated MLPs: Llama, Mistral, Qwen, Gemma, SmolLM, Granite.",
        )
    width, heads = text["hidden_size"], text["num_attention_heads"]
    dtype = str(text.get("dtype") or text.get("torch_dtype") or settings.get("dtype") or "bfloat16")
    gemma = kind.startswith("gemma")
    return ModelShape(
        name=name,
        layers=text["num_hidden_layers"],
        width=width,
        inner=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_width=text.get("head_dim") or width // heads,
        vocabulary=text["vocab_size"],
        # transformers leaves a value out where it is the architecture's default.
        tied=bool(text.get("tie_word_embeddings", settings.get("tie_word_embeddings", gemma))),
        attention_bias=bool(text.get("attention_bias", kind.startswith("qwen2"))),
        output_bias=bool(text.get("attention_bias", False)) and not kind.startswith("qwen2"),
        norms_per_layer=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        head_norms=kind.startswith(("qwen3", "gemma3")),
        file_bytes_per_parameter=_BYTES.get(dtype.removeprefix("torch."), 2),
    )


def _config_from_hub(base: BaseSettings) -> Path:
    from huggingface_hub import hf_hub_download

    what, refused = "the model's config", "this model's config"
    return fetched_from_hub(
        base, what, refused, lambda: hf_hub_download(base.model, "config.json", revision=base.revision)
    )


# The value types of GGUF's metadata that have a fixed size: struct's letter.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def read_gguf_settings(path: Path) -> Mapping[str, Any]:
    """What a GGUF file's header tells, under the names of a config.json; None for what it does not tell.

    Its weights are converted to float32 once, before they are loaded.

    Raises:
        BaseModelError: it is no GGUF file, or is torn.
    """
    try:
        with path.open("rb") as file:
            found, tensors = _read_gguf_header(file)
    except (OSError, ValueError, struct.error, MemoryError) as error:
        raise BaseModelError(
            f"the header of the GGUF file cannot be read: {error}", where=str(path), remedy="Download it again."
        ) from None
    kind = str(found.get("general.architecture", ""))

    def field(name: str) -> Any:
        return found.get(f"{kind}.{name}")

    return {
        "model_type": kind,
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "vocab_size": field("vocab_size") or found.get("tokenizer.ggml.tokens"),
        "num_local_experts": field("expert_count"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": field("context_length"),
        "dtype": "float32",
    }


def _read_gguf_header(file: IO[bytes]) -> tuple[dict[str, Any], set[str]]:
    """Metadata (of an array only its length) and the names of the tensors."""

    def read(letter: str) -> Any:
        size = struct.calcsize(f"<{letter}")
        return struct.unpack(f"<{letter}", file.read(size))[0]

    def text() -> str:
        length = read("Q")
        if length > 1 << 24:
            raise ValueError(f"a text of {length} bytes")
        return file.read(length).decode(errors="replace")

    def value(kind: int) -> Any:
        if kind == _GGUF_STRING:
            return text()
        if kind == _GGUF_ARRAY:
            inner, length = read("I"), read("Q")
            if length > 1 << 24:
                raise ValueError(f"an array of {length} values")
            if inner in _GGUF_SCALARS:
                file.seek(length * struct.calcsize(f"<{_GGUF_SCALARS[inner]}"), os.SEEK_CUR)
            else:
                for _ in range(length):
                    value(inner)
            return length
        if kind not in _GGUF_SCALARS:
            raise ValueError(f"an unknown kind of value, {kind}")
        return read(_GGUF_SCALARS[kind])

    if file.read(4) != b"GGUF":
        raise ValueError("this is not a GGUF file, whatever its name")
    read("I")
    tensors, pairs = read("Q"), read("Q")
    if max(tensors, pairs) > 1 << 20:
        raise ValueError(f"{tensors} tensors and {pairs} settings")
    found = {}
    for _ in range(pairs):
        key = text()
        found[key] = value(read("I"))
    names = set()
    for _ in range(tensors):
        names.add(text())
        sides = read("I")
        file.seek(8 * sides + 4 + 8, os.SEEK_CUR)
    return found, names
