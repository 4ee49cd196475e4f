"""Tiny random models of several architectures, saved as a user's base would be, and configs that use them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.base_model import Base, load_base
from pipeline.config import BaseSettings
from pipeline.config_file import LoadedConfig, load_config

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2")


def tiny_base(
    folder: Path, architecture: str = "llama", *, tied: bool = False, tokenizer_variant: str = "chatml"
) -> Path:
    """Save a random two-layer model of width 64 and a byte-level tokenizer; returns the folder."""
    tokenizer = tiny_tokenizer(tokenizer_variant)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "gpt2":
        shape |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    else:
        shape |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
        }
    config = AutoConfig.for_model(architecture, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded_tiny_base(
    folder: Path,
    architecture: str = "llama",
    *,
    quantization: str = "none",
    dtype: str = "float32",
    **options: Any,
) -> Base:
    """A tiny base, saved, loaded and quantized."""
    path = folder / f"{architecture}-base"
    if not path.exists():
        tiny_base(path, architecture, **options)
    settings = BaseSettings.model_validate(
        {"model": str(path), "quantization": quantization, "dtype": dtype, "cache_dir": str(folder / "cache")}
    )
    return load_base(settings, "cpu")


TINY_DATA = '''
"""Toy data with a pattern to learn: the answer to a word is that word again."""

WORDS = ["sun", "sea", "sky", "ice", "oak", "elm", "fox", "owl", "bee", "ant", "cat", "dog", "hen", "cow", "pig", "rat",
         "bat", "eel", "cod", "ray", "gnu", "yak", "emu", "ape", "jay", "kid", "ram", "ewe", "cub", "pup", "bug", "fly",
         "hat", "cap", "cup", "pan", "pot", "jar", "box", "bag"]


def demonstrations():
    for word in WORDS:
        yield {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word + "!"}]}


def comparisons():
    for word in WORDS:
        yield {"prompt": [{"role": "user", "content": word}],
               "chosen": [{"role": "assistant", "content": word + "!"}],
               "rejected": [{"role": "assistant", "content": "zz " + word}]}


def prompts():
    for word in WORDS:
        yield {"prompt": [{"role": "user", "content": word}], "word": word}


def share_of_a(prompts, completions, **columns):
    return [text.count("a") / max(1, len(text)) for text in completions]
'''


def tiny_config(folder: Path, *overrides: str, architecture: str = "llama", **settings: Any) -> LoadedConfig:
    """A whole config on a tiny base and toy data, small enough for a test; `settings` replace whole sections."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{architecture}-base"
    if not base.exists():
        tiny_base(base, architecture)
    (folder / "tiny_data.py").write_text(textwrap.dedent(TINY_DATA))
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "base": {"model": str(base), "dtype": "float32", "cache_dir": str(folder / "cache")},
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            kind: {"sources": [f"tiny_data.py:{function}"], "held_out": 0.25}
            for kind, function in (
                ("instructions", "demonstrations"),
                ("preferences", "comparisons"),
                ("prompts", "prompts"),
            )
        },
        "sft": {"batch_size": 4, "microbatch_size": 2, "max_length": 128, "max_steps": 4, "log_every": 1},
        "reward": {"batch_size": 4, "microbatch_size": 2, "max_length": 128, "max_steps": 4, "calibration_prompts": 8},
        "ppo": {
            "iterations": 2,
            "prompts_per_iteration": 8,
            "minibatch_size": 4,
            "max_new_tokens": 8,
            "microbatch_tokens": 256,
            "rewards": [{"weight": 1.0}],
        },
        "evaluate": {"prompts": 8, "gold": "tiny_data.py:share_of_a", "samples": 2},
    }
    tree |= settings
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, overrides)
