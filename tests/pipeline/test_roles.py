"""Roles: which adapter computes, which learns, and what is saved is what plain PEFT reads.

Shape legend: B sequence, L token, D width, V vocabulary.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_models import ARCHITECTURES, loaded_tiny_base, tiny_base, tiny_config
from tiny_ppo import LORA, perturb, policy_roles, ppo_roles, publish_sft
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.artifacts import MANIFEST, BaseIdentity
from pipeline.base_model import Base, load_base
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings, LoraSettings
from pipeline.errors import ArtifactError, ConfigError, IncompatibleAdapterError
from pipeline.roles import ADAPTER_WEIGHTS, HEAD_WEIGHTS, Role, Roles
from pipeline.scoring import score_rewards

PPOS: tuple[Role, ...] = ("policy", "reference", "reward", "value")
"""The roles of PPO."""

IDS_BL = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [40, 41, 42, 43, 44, 45, 46, 47]])
MASK_BL = torch.ones_like(IDS_BL, dtype=torch.bool)


def logits_of(roles: Roles, role: Role | None) -> Tensor:
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        return roles.model(input_ids=IDS_BL, attention_mask=MASK_BL.long()).logits


def belongs(name: str, role: str) -> bool:
    """Independent of the code: an adapter's tensor is called `...lora_A.ROLE.weight`, a head's `heads.ROLE...`."""
    return f"lora_A.{role}." in name or f"lora_B.{role}." in name or name.startswith(f"heads.{role}.")


# ---- what learns


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_after_every_switch_exactly_the_declared_parameters_learn(tmp_path, critic):
    roles = ppo_roles(loaded_tiny_base(tmp_path), critic)
    every_name = {name for name, _ in roles.model.named_parameters()} | {
        f"heads.{role}.{name}" for role, head in roles.heads.items() for name, _ in head.named_parameters()
    }
    wanted = {name for name in every_name if belongs(name, "policy") or belongs(name, "value")}
    adapters = ("policy", "value") if critic == "adapter" else ("policy",)
    assert all(any(f"lora_B.{role}." in name for name in wanted) for role in adapters)
    assert {"heads.value.weight", "heads.value.bias"} <= wanted
    switches: list[Role | None] = [role for role in PPOS if role in roles.model.peft_config] + [None, "policy"]
    for role in switches:
        with roles.active(role):
            assert roles.trainable_names() == wanted == roles.declared_names(), role
        assert roles.trainable_names() == wanted, role


def test_loading_and_adding_adapters_changes_nothing_of_what_learns(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    roles.set_trainable("policy")
    before = roles.trainable_names()
    roles.save("reference", tmp_path / "saved")
    roles.add_weights("reward", tmp_path / "saved")
    assert roles.trainable_names() == before
    roles.copy("reward", "value")
    roles.add_head("value", bias=True)
    assert roles.trainable_names() == before
    with roles.active("policy"):
        roles.hidden_states(IDS_BL, MASK_BL).sum().backward()
    with_gradient = {name for name, p in roles.model.named_parameters() if p.grad is not None}
    assert with_gradient == before


def test_nothing_learns_where_nothing_is_declared(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    roles.set_trainable()
    for role in (*PPOS, None):
        with roles.active(role):
            assert roles.trainable_names() == set()


# ---- which adapter computes


def test_no_role_is_the_bare_base_and_the_reference_is_not(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    bare = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama-base", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = bare(input_ids=IDS_BL).logits
    assert torch.equal(logits_of(roles, None), wanted)
    assert not torch.allclose(logits_of(roles, "reference"), wanted, atol=1e-3)
    assert torch.equal(logits_of(roles, "reference"), logits_of(roles, "policy"))


def test_switching_back_restores_the_role_also_after_an_error(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    with roles.active("reward"):
        wanted = roles.hidden_states(IDS_BL, MASK_BL)
        with pytest.raises(RuntimeError, match="inside"), roles.active(None), roles.active("value"):
            raise RuntimeError("inside")
        assert torch.equal(roles.hidden_states(IDS_BL, MASK_BL), wanted)


def test_a_copy_stands_on_its_own(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    before = logits_of(roles, "reference")
    perturb(roles, "policy")
    assert torch.equal(logits_of(roles, "reference"), before)
    assert not torch.equal(logits_of(roles, "policy"), before)


def test_a_module_of_the_base_called_value_is_not_the_role(tmp_path):
    """BERT as a decoder has `attention.self.value` linear layers, which get adapters themselves."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", vocab_size=259, is_decoder=True, **shape)
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    identity = BaseIdentity("bert", None, "w", "none/float32", "t", "c")
    roles = Roles(Base(model, ChatFormat(tiny_tokenizer()), identity, torch.device("cpu")))
    roles.add_fresh("policy", LORA)
    roles.copy("policy", "value")
    for role in ("policy", "value"):
        found = set(roles.parameters(role))
        assert found and all(belongs(name, role) for name in found)
        assert any(".self.value.lora_A." in name for name in found)
    roles.set_trainable("value")
    assert roles.trainable_names() == set(roles.parameters("value"))
    roles.set_trainable("policy")
    assert roles.trainable_names() == set(roles.parameters("policy"))


@pytest.mark.parametrize(
    ("architecture", "option"),
    [("llama", {}), ("gemma2", {}), ("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})],
)
def test_logits_from_hidden_states_are_the_models_own(tmp_path, architecture, option):
    base = loaded_tiny_base(tmp_path, architecture)
    for name, value in option.items():
        setattr(base.model.config, name, value)
        for holder in (base.model, base.model.model):
            if hasattr(holder, name):
                setattr(holder, name, value)
    roles = policy_roles(base)
    roles.inference_mode()
    with torch.no_grad(), roles.active("policy"):
        found = roles.logits(roles.hidden_states(IDS_BL, MASK_BL))
    assert torch.allclose(found, logits_of(roles, "policy"), atol=1e-6)


# ---- gradient checkpointing


def gradients(roles: Roles, *, checkpointing: bool, active_at_backward: Role = "reward") -> dict[str, Tensor]:
    """Forward under `policy`, then under `value`, and only then backward, with any role active."""
    roles.training_mode(gradient_checkpointing=checkpointing)
    with roles.active("policy"):
        policy = roles.hidden_states(IDS_BL, MASK_BL)[..., 0].sum()
    with roles.active("value"):
        value = roles.hidden_states(IDS_BL, MASK_BL)[..., 1].sum()
    with roles.active(active_at_backward):
        (policy + 2 * value).backward()
    named = {**roles.parameters("policy"), **roles.parameters("value")}
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_recomputation_runs_under_its_own_role(tmp_path, monkeypatch, architecture):
    roles = ppo_roles(loaded_tiny_base(tmp_path, architecture))
    perturb(roles, "value", seed=7)
    wanted, found = gradients(roles, checkpointing=False), gradients(roles, checkpointing=True)
    assert wanted.keys() == found.keys() and len(wanted) > 10
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    # Without the pin the same lines give other gradients, so that this test could fail.
    monkeypatch.setattr(roles, "_pinned_to_active_role", lambda: (nullcontext(), nullcontext()))
    unpinned = gradients(roles, checkpointing=True, active_at_backward="value")
    assert any(name not in unpinned or not torch.allclose(unpinned[name], wanted[name]) for name in wanted)


def test_checkpointing_really_recomputes_each_layer(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    calls = []
    layers = [module for name, module in roles.model.named_modules() if name.endswith(("layers.0.mlp", "layers.1.mlp"))]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda *_: calls.append(1)
        )  # a recomputation stops early, inside the last layer
    gradients(roles, checkpointing=False)
    assert len(calls) == 4  # two layers, two roles
    calls.clear()
    gradients(roles, checkpointing=True)
    assert len(calls) == 8
    calls.clear()
    roles.inference_mode()
    with torch.no_grad():
        roles.hidden_states(IDS_BL, MASK_BL)
    assert len(calls) == 2


# ---- dtype and dropout


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_and_heads_are_float32_on_a_16_bit_base(tmp_path, quantization):
    folder = tiny_base(tmp_path / "base")
    base = load_base(BaseSettings(model=str(folder), quantization=quantization, dtype="bfloat16"), "cpu")
    roles = ppo_roles(base)
    roles.save("reward", tmp_path / "saved")
    fresh = Roles(load_base(BaseSettings(model=str(folder), quantization=quantization, dtype="bfloat16"), "cpu"))
    fresh.add_weights("reward", tmp_path / "saved")
    for holder, names in ((roles, PPOS), (fresh, ("reward",))):
        for role in names:
            assert {p.dtype for p in holder.parameters(role).values()} == {torch.float32}, role
    assert base.model.get_input_embeddings().weight.dtype == torch.bfloat16
    with roles.active("value"):
        values = roles.head_values("value", roles.hidden_states(IDS_BL, MASK_BL))
    assert values.dtype == torch.float32
    values.sum().backward()
    assert {p.grad.dtype for p in roles.parameters("value").values()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_dropout_of_base_or_adapter_is_left_in_training_mode(tmp_path, architecture):
    folder = tiny_base(tmp_path / "base", architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3, "attn_pdrop": 0.3}))
    roles = Roles(load_base(BaseSettings(model=str(folder), quantization="none", dtype="float32"), "cpu"))
    roles.add_fresh("policy", LORA.model_copy(update={"dropout": 0.5}))
    perturb(roles, "policy")
    roles.set_trainable("policy")
    still = roles.hidden_states(IDS_BL, MASK_BL)
    roles.inference_mode()
    still = roles.hidden_states(IDS_BL, MASK_BL)
    roles.training_mode(gradient_checkpointing=False)
    assert not torch.equal(roles.hidden_states(IDS_BL, MASK_BL), roles.hidden_states(IDS_BL, MASK_BL))
    roles.disable_dropout()
    assert torch.equal(roles.hidden_states(IDS_BL, MASK_BL), still)
    assert torch.equal(roles.hidden_states(IDS_BL, MASK_BL), still)


# ---- save and load


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_is_a_plain_peft_adapter(tmp_path, architecture, tied):
    roles = ppo_roles(loaded_tiny_base(tmp_path, architecture, tied=tied))
    roles.save("policy", tmp_path / "policy")
    roles.save("reward", tmp_path / "reward")
    wanted, scores_B = logits_of(roles, "policy"), score_rewards(roles, IDS_BL.tolist(), max_tokens=10_000)
    assert not any(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in load_file(_weights(tmp_path)))

    folder = tmp_path / f"{architecture}-base"
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "policy"
    ).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    classifier.config.pad_token_id = 0  # occurs in no sequence; without one it takes a single sequence only
    classifier = PeftModel.from_pretrained(classifier, tmp_path / "reward").eval()
    with torch.no_grad():
        found = plain(input_ids=IDS_BL, attention_mask=MASK_BL.long()).logits
        found_B = classifier(input_ids=IDS_BL, attention_mask=MASK_BL.long()).logits.squeeze(-1)
    # PEFT adds the adapter's product in two steps and attends with SDPA: the last bits of float32 may differ.
    assert torch.allclose(found, wanted, atol=2e-6)
    assert torch.allclose(found_B, scores_B, atol=1e-6)


def _weights(folder: Path) -> Path:
    return folder / "policy" / ADAPTER_WEIGHTS


def test_load_save_load_keeps_every_bit_of_adapters_and_heads(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    perturb(roles, "value", seed=9)
    for role in PPOS:
        roles.save(role, tmp_path / "first" / role)
    again = Roles(loaded_tiny_base(tmp_path))
    for role in PPOS:
        again.add_weights(role, tmp_path / "first" / role)
        again.save(role, tmp_path / "second" / role)
    for role in PPOS:
        mine, theirs = roles.parameters(role), again.parameters(role)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), role
        config = json.loads((tmp_path / "first" / role / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(config["target_modules"]), "the order depends on the process"
        files = sorted(path.name for path in (tmp_path / "first" / role).iterdir())
        assert (HEAD_WEIGHTS in files) == (role == "value")
        for name in files:
            first, second = (tmp_path / order / role / name for order in ("first", "second"))
            assert first.read_bytes() == second.read_bytes(), first
    first_B, second_B = (score_rewards(holder, IDS_BL.tolist(), max_tokens=64) for holder in (roles, again))
    assert torch.equal(first_B, second_B)


def test_the_head_starts_as_the_paper_says():
    from pipeline.scalar_head import ScalarHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = ScalarHead(4095, bias=True)
    assert head.weight.dtype == torch.float32 and float(head.bias.detach()) == 0.0
    assert float(head.weight.detach().std()) == pytest.approx(
        1 / 64, rel=0.05
    )  # 5 deviations of the estimate, 1/sqrt(2 * 4095)
    assert abs(float(head.weight.detach().mean())) < 5 / 64 / 64


def test_heads_are_neither_quantized_nor_given_an_adapter(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path, quantization="nf4"))
    for head in roles.heads.values():
        assert isinstance(head, nn.Linear) and head.weight.dtype == torch.float32
    assert not any("lm_head" in name for name, _ in roles.model.named_parameters() if "lora_" in name)


# ---- refused


def other_base(tmp_path: Path, field: str, settings: BaseSettings) -> BaseSettings:
    folder = tmp_path / "other-base"
    if field == "weights":
        tiny_base(folder, tied=True)
        return settings.model_copy(update={"model": str(folder)})
    if field == "quantization":
        return settings.model_copy(update={"quantization": "int8"})
    if field == "tokenizer":
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = "<|endoftext|>"
        folder.mkdir()
        for file in Path(settings.model).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(folder)
        return settings.model_copy(update={"model": str(folder)})
    if field == "revision":
        return settings.model_copy(update={"revision": "v2"})
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    return settings.model_copy(update={"chat_template": str(template)})


@pytest.mark.parametrize("field", ["weights", "quantization", "tokenizer", "chat_template", "revision"])
def test_an_adapter_of_another_base_is_refused_and_the_field_is_named(tmp_path, field):
    loaded = tiny_config(tmp_path)
    run = publish_sft(loaded)
    roles = Roles(load_base(other_base(tmp_path, field, loaded.config.base)))
    with pytest.raises(IncompatibleAdapterError, match=f"its {field} is .*this base's is") as caught:
        roles.add_from("reference", run.stage("sft"))
    assert caught.value.where == str(run.stage("sft")) and caught.value.remedy
    Roles(load_base(loaded.config.base)).add_from("reference", run.stage("sft"))


def spoil(folder: Path, how: str) -> str:
    weights = folder / ADAPTER_WEIGHTS
    if how == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        return weights.name
    if how == "missing file":
        weights.unlink()
        return weights.name
    if how == "added file":
        (folder / "notes.txt").write_text("mine")
        return "notes.txt"
    if how == "edited config":
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
        return config.name
    if how == "no manifest":
        (folder / MANIFEST).unlink()
        return folder.name
    (folder / MANIFEST).write_text("{}" if how == "empty manifest" else "{")
    return MANIFEST


@pytest.mark.parametrize(
    "how",
    ["flipped bit", "missing file", "added file", "edited config", "no manifest", "torn manifest", "empty manifest"],
)
def test_a_spoilt_adapter_is_refused_and_the_file_is_named(tmp_path, how):
    loaded = tiny_config(tmp_path)
    run = publish_sft(loaded)
    name = spoil(run.stage("sft"), how)
    with pytest.raises(ArtifactError) as caught:
        Roles(load_base(loaded.config.base)).add_from("reference", run.stage("sft"))
    assert name in str(caught.value)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    policy_roles(loaded_tiny_base(tmp_path, "gpt2")).save("policy", tmp_path / "saved")
    with pytest.raises(ArtifactError):
        Roles(loaded_tiny_base(tmp_path, "llama")).add_weights("policy", tmp_path / "saved")


def test_an_adapter_of_another_width_is_refused(tmp_path):
    policy_roles(loaded_tiny_base(tmp_path, "llama")).save("policy", tmp_path / "saved")
    config_file = tmp_path / "saved" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(ArtifactError):
        Roles(loaded_tiny_base(tmp_path, "llama")).add_weights("policy", tmp_path / "saved")


@pytest.mark.parametrize("modules", [["nope"], ["input_layernorm"]])
def test_modules_that_can_have_no_adapter_are_named(tmp_path, modules):
    settings = LoraSettings.model_validate({"target_modules": modules})
    with pytest.raises(ConfigError, match="no adapter can be put on these modules") as caught:
        Roles(loaded_tiny_base(tmp_path)).add_fresh("policy", settings)
    assert caught.value.where == "lora.target_modules"
