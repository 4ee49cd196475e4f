"""The merged copy says what base and adapter say together, and leaves both as they are.

Shape legend: B sequence, L token.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, loaded_tiny_base
from tiny_ppo import favour_token, perturb, policy_roles, ppo_roles, sharp_base
from torch import Tensor

from pipeline import merged_model
from pipeline.base_model import fingerprint
from pipeline.generation import SamplingSettings, generate
from pipeline.merged_model import copy_bytes, merged_copy
from pipeline.roles import Role, Roles

IDS_BL = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 41, 42, 43, 44, 45]])
PROMPTS = [[5, 6, 7], [9] * 17, [40, 41, 42, 43, 44, 45], [77], [100, 3] * 6]


def logits_of(roles: Roles, role: Role | None) -> Tensor:
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        return roles.model(input_ids=IDS_BL).logits


def merged_logits(roles: Roles, role: Role | None) -> Tensor:
    roles.inference_mode()
    with torch.no_grad(), roles.sampling_model(role, "merged") as model:
        return model(input_ids=IDS_BL).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_says_what_base_and_adapter_say(tmp_path, architecture):
    roles = ppo_roles(loaded_tiny_base(tmp_path, architecture))
    perturb(roles, "policy", 0.1)
    for role in ("policy", "reference", None):
        assert torch.allclose(merged_logits(roles, role), logits_of(roles, role), atol=1e-5), role
    assert not torch.allclose(merged_logits(roles, "policy"), merged_logits(roles, "reference"), atol=1e-2)


@pytest.mark.parametrize(("quantization", "gap"), [("nf4", 1e-5), ("int8", 0.05)])
def test_a_quantized_base_is_dequantized_and_stays_as_it_is(tmp_path, quantization, gap):
    """int8 kernels round the activations too, which the copy does not."""
    roles = policy_roles(loaded_tiny_base(tmp_path, quantization=quantization))
    perturb(roles, "policy", 0.1)
    wanted = logits_of(roles, "policy")
    before = fingerprint(roles.base.model)
    assert torch.allclose(merged_logits(roles, "policy"), wanted, atol=gap)
    assert torch.equal(logits_of(roles, "policy"), wanted)
    assert fingerprint(roles.base.model) == before


def test_it_computes_in_the_bases_dtype_and_shares_what_no_adapter_changes(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path, quantization="nf4", dtype="bfloat16"))
    copy = merged_copy(roles.base.model, "policy")
    own = {tensor.data_ptr() for tensor in roles.base.model.parameters()}
    fresh = [parameter for parameter in copy.parameters() if parameter.data_ptr() not in own]
    assert {parameter.dtype for parameter in fresh} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in fresh) * 2 == copy_bytes(roles.base.model)
    assert copy.get_output_embeddings() is roles.base.model.get_output_embeddings()
    assert not any(parameter.requires_grad for parameter in fresh)
    assert type(copy) is type(roles.base.model)


def test_samples_are_the_same_as_with_the_adapter(tmp_path):
    """In float32, with the hooks of the base's modules."""
    roles = policy_roles(sharp_base(tmp_path))
    perturb(roles, "policy", 0.2)
    favour_token(roles, roles.base.chat.eos_token_id, 3.0)
    answers = [
        generate(roles, "policy", PROMPTS * 3, SamplingSettings(8, weights=weights), seed=(0,))
        for weights in ("adapter", "merged")
    ]
    for one, other in zip(*answers, strict=True):
        assert one.ids == other.ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert {found.finished for found in answers[0]} == {True, False}


def test_the_copy_is_left_to_machines_that_have_the_memory(tmp_path, monkeypatch):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    size = copy_bytes(roles.base.model)
    for memory, wanted in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(merged_model, "device_memory_bytes", lambda device, memory=memory: memory)
        assert roles.merges("auto") is wanted
        with roles.sampling_model("policy", "auto") as model:
            assert (model is not roles.model) is wanted
    assert roles.merges("merged") and not roles.merges("adapter")
