"""The scalar head and the reward model: read at the last real token, in float32, in plain transformers' names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, loaded_tiny_base
from transformers import AutoModelForSequenceClassification

from pipeline.batching import pad
from pipeline.config import LoraSettings
from pipeline.roles import reward_model_for_training
from pipeline.scalar_head import RewardModel, ScalarHead, last_token, trunk_of, width_of

SEQUENCES = [[5, 9, 3], [7], [258, 258, 4, 258], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_the_head_starts_small_and_without_an_offset() -> None:
    torch.manual_seed(0)
    head = ScalarHead(100_000, bias=True)
    assert float(head.weight.std()) == pytest.approx(1 / math.sqrt(100_001), rel=0.02)
    assert float(head.weight.mean()) == pytest.approx(0, abs=1e-4)
    assert head.bias.item() == 0
    assert ScalarHead(8).bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_counts_in_float32_whatever_it_reads(dtype: torch.dtype) -> None:
    head = ScalarHead(64)
    hidden_BD = torch.randn(3, 64).to(dtype)
    found = head(hidden_BD)
    assert found.dtype == head.weight.dtype == torch.float32
    expected = hidden_BD.double() @ head.weight.double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_last_token_comes_from_the_mask() -> None:
    values_BL = torch.arange(12.0).view(3, 4)
    mask_BL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert last_token(values_BL, mask_BL).tolist() == [1, 7, 8]
    assert last_token(values_BL, mask_BL.bool()).tolist() == [1, 7, 8]
    # Padding on the left, too: the last real token is the last of all.
    assert last_token(values_BL, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])).tolist() == [3, 7, 11]
    values_BLD = torch.randn(3, 4, 2)
    assert torch.equal(last_token(values_BLD, mask_BL)[1], values_BLD[1, 3])


def score(model: RewardModel, sequences: list[list[int]], pad_id: int = 0) -> torch.Tensor:
    ids_BL, mask_BL = pad(sequences, torch.device("cpu"))
    ids_BL = ids_BL.masked_fill(~mask_BL, pad_id)
    with torch.no_grad():
        return model.eval()(input_ids=ids_BL, attention_mask=mask_BL.long()).logits.squeeze(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["chatml", "no_pad"])
def test_padding_changes_no_score(tmp_path: Path, architecture: str, variant: str) -> None:
    base = loaded_tiny_base(tmp_path, architecture, tokenizer_variant=variant)
    model = RewardModel(base.model)
    alone_B = torch.cat([score(model, [sequence]) for sequence in SEQUENCES])
    assert float(alone_B.std()) > 0.1
    # 258 is the EOS, which stands inside a sequence and at its end as well as in the padding.
    for pad_id in (0, 258, 17):
        torch.testing.assert_close(score(model, SEQUENCES, pad_id), alone_B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_names_and_scores_are_those_of_transformers_classifiers(tmp_path: Path, architecture: str) -> None:
    base = loaded_tiny_base(tmp_path, architecture)
    model = RewardModel(base.model)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / f"{architecture}-base", num_labels=1, dtype=torch.float32
    ).eval()
    assert set(model.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())
    # With a pad token they look for the last token that is another one, which skips an EOS of the same id.
    theirs.config.pad_token_id = None
    for sequence in SEQUENCES:
        with torch.no_grad():
            plain = theirs(input_ids=torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(score(model, [sequence]), plain, rtol=1e-5, atol=1e-6)


def test_it_shares_the_trunk_and_has_no_output_head(tmp_path: Path) -> None:
    base = loaded_tiny_base(tmp_path)
    model = RewardModel(base.model)
    assert model.trunk is trunk_of(base.model)
    assert model.score.in_features == width_of(base.model) == 64
    assert model.config.num_labels == 1
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert model.get_input_embeddings() is base.model.get_input_embeddings()


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_only_adapter_and_head_learn_and_in_float32(tmp_path: Path, quantization: str) -> None:
    base = loaded_tiny_base(tmp_path, quantization=quantization)
    model, reward_model = reward_model_for_training(base, LoraSettings(rank=4), None)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and all("lora_" in name or "score.modules_to_save" in name for name in trainable)
    assert {weight.dtype for weight in trainable.values()} == {torch.float32}
    assert isinstance(reward_model.score.modules_to_save["default"], ScalarHead)
    # TRL rounds the parameters of models that say so to bfloat16.
    assert not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False)
