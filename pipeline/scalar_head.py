"""The one-number head of reward and value, and the reward model that TRL's RewardTrainer trains.

Shape legend: B sequence, L token of a padded sequence, D width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class ScalarHead(nn.Linear):
    """A linear map from a hidden state to one number, in float32 whatever the base's dtype.

    The weight starts from N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020), a bias at zero. The reward head has no
    bias: the pairwise loss cannot see one, and transformers' sequence classifiers have none either.
    """

    def __init__(self, width: int, *, bias: bool = False, device: torch.device | None = None) -> None:
        super().__init__(width, 1, bias=bias, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(self.in_features + 1))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] in any float dtype -> numbers [..., 1] in float32."""
        return super().forward(hidden.float())


def last_token(values_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Pick each sequence's entry at its last real token: [B, L, ...] and a mask [B, L] -> [B, ...].

    The position comes from the mask, never from a pad id, which may equal the EOS id.
    """
    positions_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    last_B = (positions_L * mask_BL.long()).argmax(dim=1)
    return values_BL[torch.arange(len(last_B), device=values_BL.device), last_B]


class RewardModel(PreTrainedModel):
    """A causal model's trunk under a scalar head, read at the last real token.

    Its module names are those of transformers' own sequence classifiers (the trunk under the
    architecture's prefix, the head as `score`), so that the adapters trained here load there. Unlike those it
    finds the last token by the attention mask, and works for any architecture with a trunk.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"

    def __init__(self, causal_model: PreTrainedModel) -> None:
        config = causal_model.config
        config.num_labels = 1
        super().__init__(config)
        self.base_model_prefix = causal_model.base_model_prefix
        trunk = trunk_of(causal_model)
        setattr(self, self.base_model_prefix, trunk)
        self.score = ScalarHead(width_of(causal_model), device=next(trunk.parameters()).device)

    @property
    def trunk(self) -> nn.Module:
        """The decoder without its output head."""
        return cast(nn.Module, getattr(self, self.base_model_prefix))

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self.trunk).get_input_embeddings())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool | None = None, **kwargs: Any
    ) -> SequenceClassifierOutputWithPast:
        """Token ids [B, L] and their mask [B, L] -> `logits` [B, 1], the scores."""
        hidden_BLD = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(last_token(hidden_BLD, attention_mask)))


def trunk_of(causal_model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a causal model, without its output head."""
    return cast(PreTrainedModel, getattr(causal_model, causal_model.base_model_prefix))


def width_of(causal_model: PreTrainedModel) -> int:
    """Width D of the hidden states that the output head reads."""
    return int(causal_model.get_output_embeddings().weight.shape[-1])
