"""The arithmetic of memory against what torch really keeps: bytes of saved tensors, of weights and of peaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.merged_model
import pipeline.quantized_cache
import pipeline.scoring
import pipeline.sharding
from pipeline.base_model import _quantization_constants, load_base
from pipeline.cards import CARDS, Card
from pipeline.config import BaseSettings, LoraSettings, PipelineConfig
from pipeline.logprobs import token_logprobs
from pipeline.memory_plan import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GATHERED_SHARE,
    HEAP,
    LIBRARIES_BYTES,
    LOGIT_CHUNK_TOKENS,
    MERGED_SHARE,
    QUANTIZED_IS_KEPT_FROM,
    Device,
    StagePlan,
    constant_bytes,
    device_bytes,
    fits,
    forward_bytes_per_token,
    int8_kept_bytes_per_token,
    kv_cache_bytes,
    layer_transient_bytes_per_token,
    logit_bytes,
    mask_bytes,
    optimizer_bytes,
    plan_stages,
    rounded_adapter_bytes,
    saved_bytes_per_token,
    weight_bytes,
)
from pipeline.model_shape import PUBLIC_SHAPES, shape_of
from pipeline.roles import Roles
from pipeline.scoring import score_rewards

D, INNER, HEADS, RANK, TOKENS = 128, 352, 4, 8, 4 * 64


class Measured:
    """`peak` and what is left, `end`, of torch's CPU allocations in a block, in bytes."""

    peak = 0
    end = 0


@contextmanager
def measured() -> Iterator[Measured]:
    result = Measured()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield result
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        result.end += event.nbytes()
        result.peak = max(result.peak, result.end)


def roles_on(folder: Path, layers: int, quantization: str, dtype: str, *, attention: str = "auto") -> Roles:
    """A random Llama with one trainable and one reward adapter. No repeated heads: rows are not padded here."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=D, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=D // HEADS, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tree = {"model": str(folder), "quantization": quantization, "dtype": dtype, "attention": attention}
    settings = BaseSettings.model_validate(tree)
    roles = Roles(load_base(settings, "cpu"))
    roles.add_fresh("policy", LoraSettings(rank=RANK))
    roles.add_fresh("reward", LoraSettings(rank=RANK))
    roles.add_head("reward", bias=False)
    roles.set_trainable("policy")
    return roles


ARITHMETIC = [("nf4", "bfloat16"), ("nf4", "float32"), ("none", "bfloat16"), ("none", "float32"), ("int8", "bfloat16")]


def forward(roles: Roles, *, checkpointing: bool) -> tuple[Measured, Measured]:
    """A forward pass of the policy and its backward pass, after one to warm up."""
    ids_BL = torch.full((4, TOKENS // 4), 7)
    roles.training_mode(gradient_checkpointing=checkpointing)
    for _ in range(2):
        with roles.active("policy"):
            with measured() as there:
                hidden_BLD = roles.hidden_states(ids_BL, torch.ones_like(ids_BL).bool())
            with measured() as back:
                hidden_BLD.float().sum().backward()
            del hidden_BLD
    return there, back


@pytest.mark.parametrize(("quantization", "dtype"), ARITHMETIC)
def test_a_layer_keeps_what_the_formula_says(tmp_path: Path, quantization: str, dtype: str) -> None:
    two, _ = forward(roles_on(tmp_path / "2", 2, quantization, dtype), checkpointing=False)
    four, _ = forward(roles_on(tmp_path / "4", 4, quantization, dtype), checkpointing=False)
    shape = shape_of(BaseSettings(model=str(tmp_path / "2")))
    size = 4 if dtype == "float32" else 2
    wanted = TOKENS * saved_bytes_per_token(shape, RANK, size, eager_length=TOKENS // 4)
    wanted += rounded_adapter_bytes(shape.adapter_parameters(RANK), shape, size)
    assert (four.end - two.end) / 2 == pytest.approx(wanted, rel=0.002)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_a_fused_kernel_keeps_what_the_formula_says(tmp_path: Path, dtype: str, size: int) -> None:
    kept = [
        forward(roles_on(tmp_path / str(layers), layers, "nf4", dtype, attention="sdpa"), checkpointing=False)[0].end
        for layers in (2, 4)
    ]
    shape = shape_of(BaseSettings(model=str(tmp_path / "2")))
    wanted = TOKENS * saved_bytes_per_token(shape, RANK, size)
    wanted += rounded_adapter_bytes(shape.adapter_parameters(RANK), shape, size)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(wanted, rel=0.002)


def test_int8_keeps_the_inputs_of_its_products_in_spite_of_checkpointing(tmp_path: Path) -> None:
    kept = [forward(roles_on(tmp_path / str(n), n, "int8", "bfloat16"), checkpointing=True)[0].end for n in (2, 4)]
    shape = shape_of(BaseSettings(model=str(tmp_path / "2")))
    wanted = TOKENS * (int8_kept_bytes_per_token(shape, 2) + 2 * D)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(wanted, rel=0.03)  # and a state of the random numbers a layer


@pytest.mark.parametrize(("quantization", "dtype"), ARITHMETIC[:4])
def test_a_recomputed_layer_needs_what_the_formula_says(tmp_path: Path, quantization: str, dtype: str) -> None:
    """The peak of the backward pass lies above its start by one layer, its temporaries, less the last norm's copy."""
    roles = roles_on(tmp_path, 2, quantization, dtype)
    _, back = forward(roles, checkpointing=True)
    shape = shape_of(BaseSettings(model=str(tmp_path)))
    size = 4 if dtype == "float32" else 2
    wanted = saved_bytes_per_token(shape, RANK, size, eager_length=TOKENS // 4)
    wanted += layer_transient_bytes_per_token(shape, size)
    wanted += rounded_adapter_bytes(shape.adapter_parameters(RANK), shape, size) / TOKENS
    assert back.peak / TOKENS + 4 * D == pytest.approx(wanted, rel=0.06)


@pytest.mark.parametrize(("quantization", "dtype"), ARITHMETIC[:4])
def test_a_pass_without_gradients_needs_what_the_formula_says(tmp_path: Path, quantization: str, dtype: str) -> None:
    roles = roles_on(tmp_path, 2, quantization, dtype)
    sequences = [[7] * (TOKENS // 4)] * 4
    score_rewards(roles, sequences, max_tokens=TOKENS)
    with measured() as found:
        score_rewards(roles, sequences, max_tokens=TOKENS)
    shape = shape_of(BaseSettings(model=str(tmp_path)))
    size = 4 if dtype == "float32" else 2
    wanted = TOKENS * forward_bytes_per_token(shape, size, eager_length=TOKENS // 4) + mask_bytes(4, TOKENS // 4, size)
    assert found.peak == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_logits_of_a_chunk_need_what_the_formula_says(dtype: torch.dtype, entropy: bool) -> None:
    weight_VD, hidden_ND = torch.randn(4096, 16).to(dtype), torch.randn(700, 16).to(dtype)
    targets_N = torch.zeros(700, dtype=torch.long)
    with torch.no_grad(), measured() as found:
        token_logprobs(
            hidden_ND,
            targets_N,
            lambda hidden_CD: hidden_CD @ weight_VD.t(),
            chunk_tokens=LOGIT_CHUNK_TOKENS,
            with_entropy=entropy,
        )
    assert found.peak == pytest.approx(logit_bytes(700, 4096, dtype.itemsize, entropy=entropy), rel=0.02)


def test_constants_are_the_stages_own() -> None:
    assert pipeline.merged_model.SHARE_OF_MEMORY == MERGED_SHARE
    assert pipeline.sharding.SHARE_OF_MEMORY == GATHERED_SHARE
    assert pipeline.scoring.LOGIT_CHUNK_TOKENS == LOGIT_CHUNK_TOKENS
    assert pipeline.quantized_cache.WORTH_PARAMETERS == QUANTIZED_IS_KEPT_FROM


@pytest.mark.parametrize("double", [True, False])
def test_quantized_weights_and_constants_are_counted_to_the_byte(tmp_path: Path, double: bool) -> None:
    roles = roles_on(tmp_path, 2, "nf4", "bfloat16")
    del roles
    settings = {"model": str(tmp_path), "dtype": "bfloat16", "double_quantization": double}
    model = load_base(BaseSettings.model_validate(settings), "cpu").model
    shape = shape_of(BaseSettings(model=str(tmp_path)))
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert sum(p.nbytes for p in packed) == weight_bytes(shape.linear_parameters, "nf4", 2)
    constants = sum(tensor.nbytes for _, tensor in _quantization_constants(model))
    # The table of the second quantization is one tensor, which all matrices share in some versions.
    assert constants == pytest.approx(constant_bytes(shape, "nf4", double=double), rel=0.02)


def test_adapters_gradients_and_optimizer_are_counted_to_the_byte(tmp_path: Path) -> None:
    roles = roles_on(tmp_path, 2, "nf4", "float32")
    shape = shape_of(BaseSettings(model=str(tmp_path)))
    parameters = list(roles.parameters("policy").values())
    assert sum(parameter.numel() for parameter in parameters) == shape.adapter_parameters(RANK)
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(moment.nbytes for moment in moments) == optimizer_bytes(shape.adapter_parameters(RANK), "adamw")


@pytest.mark.parametrize("kind", ["PagedAdamW", "PagedAdamW8bit"])
def test_the_state_of_a_paged_optimizer_is_counted_to_the_byte(kind: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 4096))
    weight.grad = torch.ones_like(weight)
    optimizer = getattr(bitsandbytes.optim, kind)([weight])
    optimizer.step()
    state = optimizer.state[weight]
    own = [value for name, value in state.items() if isinstance(value, torch.Tensor) and not name.startswith("qmap")]
    assert sum(value.nbytes for value in own) == optimizer_bytes(weight.numel(), kind.lower())


# ---- whole plans


def config(**sections: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"run_dir": "x", "base": {"model": "m"}} | sections)


def plans(settings: PipelineConfig, **device: Any) -> dict[Any, StagePlan]:
    return plan_stages(settings, PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"], Device(2, **device))


def test_every_sum_is_its_parts() -> None:
    for plan in plans(config()).values():
        assert plan.tensor_bytes == sum(plan.parts.values())
        assert all(size > 0 for size in plan.parts.values())


def test_less_is_less() -> None:
    base = plans(config())
    for change, stages in (
        ({"base": {"model": "m", "double_quantization": False}}, ["sft", "reward", "ppo", "evaluate"]),
        ({"base": {"model": "m", "quantization": "none"}}, ["sft", "reward", "ppo", "evaluate"]),
        ({"sft": {"gradient_checkpointing": False}}, ["sft"]),
        ({"lora": {"rank": 64}}, ["sft", "reward", "ppo", "evaluate"]),
        ({"sft": {"max_length": 2048}}, ["sft"]),
        ({"ppo": {"rollout": {"batch_size": 128}, "prompts_per_iteration": 128}}, ["ppo"]),
        ({"ppo": {"rollout": {"weights": "merged"}}}, ["reward", "ppo", "evaluate"]),
    ):
        more = plans(config(**change))
        assert {name for name in base if more[name].tensor_bytes > base[name].tensor_bytes} >= set(stages), change
    assert plans(config(ppo={"critic": "head"}))["ppo"].tensor_bytes < base["ppo"].tensor_bytes


def test_ppo_keeps_the_moments_that_its_optimizer_keeps() -> None:
    whole = plans(config())["ppo"].static["optimizer"]
    assert plans(config(ppo={"optimizer": "paged_adamw"}))["ppo"].static["optimizer"] == whole
    assert 0.25 < plans(config(ppo={"optimizer": "paged_adamw_8bit"}))["ppo"].static["optimizer"] / whole < 0.26


def test_fsdp_shares_the_layers_and_nothing_else() -> None:
    alone, shared = plans(config())["ppo"], plans(config(), processes=8, sharding="fsdp")["ppo"]
    assert shared.static["quantized weights"] == alone.static["quantized weights"] // 8
    for part in ("quantization constants", "embeddings and head", "adapters", "optimizer"):
        assert shared.static[part] == alone.static[part]
    assert shared.host_bytes == 0
    offloaded = plans(config(), processes=8, sharding="fsdp", offload=True)["ppo"]
    assert "quantized weights" not in offloaded.static
    assert offloaded.host_bytes == shared.static["quantized weights"]
    # The layer in use and the buffer that it arrives in; without resharding all 32 and the buffer.
    never = plans(config(), processes=8, sharding="fsdp", reshard=False)["ppo"]
    layer = alone.static["quantized weights"] // 32
    assert (shared.static["FSDP buffers"], never.static["FSDP buffers"]) == (2 * layer, 33 * layer)


def test_a_base_that_is_shared_out_is_gathered_to_sample_where_it_is_small_beside_the_card() -> None:
    for settings, memory, gathered, merged in (
        (config(ppo={"rollout": {"weights": "adapter"}}), 24 * 2**30, True, False),
        (config(ppo={"rollout": {"weights": "adapter"}}), 6 * 2**30, False, False),
        (config(ppo={"rollout": {"weights": "merged"}}), 24 * 2**30, False, True),
    ):
        plan = plans(settings, processes=8, sharding="fsdp", memory_bytes=memory)["ppo"]
        (tokens,) = [moment for moment in plan.moments if moment.name == "sampling: last tokens"]
        assert (tokens.parts["gathered layers"] > 0, tokens.parts["merged copy"] > 0) == (gathered, merged)
    whole = plans(config())["ppo"].static["quantized weights"]
    assert (
        plans(config(ppo={"rollout": {"weights": "adapter"}}), processes=8, sharding="fsdp", memory_bytes=2**40)[
            "evaluate"
        ].parts["gathered layers"]
        == whole
    )


def test_weights_of_four_bits_are_whole_before_fsdp_shares_them() -> None:
    large = PUBLIC_SHAPES["meta-llama/Llama-3.1-70B"]
    plan = plan_stages(config(), large, Device(2, processes=8, sharding="fsdp"))["sft"]
    assert plan.peak_moment.name == "loading"
    alone = plan_stages(config(), large, Device(2))["sft"].static
    base = sum(alone[name] for name in ("quantized weights", "quantization constants", "embeddings and head"))
    largest = 8192 * 28672 * 2
    assert plan.tensor_bytes == pytest.approx(base + largest, rel=1e-6)


def test_a_cache_grows_with_answers_and_tokens() -> None:
    shape = PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"]
    # 32 layers x keys and values x 8 heads x 128 numbers x 2 bytes, and one layer's keys more.
    assert kv_cache_bytes(shape, 1, 1, 2) == 32 * 2 * 8 * 128 * 2 + 8 * 128 * 2


def test_on_a_cpu_the_first_stage_alone_maps_the_file_that_it_quantizes() -> None:
    """The others read what it has kept; of weights that are not quantized there is no such copy."""
    on_cpu: dict[str, Any] = {"is_gpu": False}
    found = plans(config(), **on_cpu)
    layers = PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"].linear_parameters
    assert found["sft"].static["mapped file"] == 2 * layers
    assert not any("mapped file" in found[stage].static for stage in ("reward", "ppo", "evaluate"))
    assert "mapped file" not in found["ppo"].at(found["ppo"].loading_moment)
    for plan in plans(config(base={"model": "b", "quantization": "none"}), **on_cpu).values():
        assert "mapped file" not in plan.static and plan.static["weights"] == 2 * layers


def test_a_mapped_file_wastes_nothing() -> None:
    plan = plans(config(), is_gpu=False)["sft"]
    mapped = plan.parts["mapped file"]
    needed = device_bytes(plan, is_gpu=False)
    assert needed == int((plan.tensor_bytes - mapped) * (1 + HEAP["sft"])) + mapped + LIBRARIES_BYTES


def test_a_card_must_hold_the_context_and_what_the_allocator_wastes() -> None:
    plan = plans(config())["sft"]
    needed = device_bytes(plan)
    assert needed == int(plan.tensor_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES
    assert fits(plan, Card("exactly", needed)) and not fits(plan, Card("less", needed - 1))
    assert all(card.memory_bytes % 2**20 == 0 for card in CARDS.values())
