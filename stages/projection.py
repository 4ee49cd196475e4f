"""Makes TRL's SFT loss cheap on CPUs: no logits for tokens that nobody is to learn.

Shape legend: B sequence, T predicted token of a padded sequence, N predicted token of any sequence, C token of one
chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import trl

from pipeline.logprobs import token_logprobs
from pipeline.roles import Roles
from pipeline.scalar_head import trunk_of
from pipeline.scoring import LOGIT_CHUNK_TOKENS

IGNORED = -100
"""The label of a token that the loss does not see."""


def project_only_targets(roles: Roles) -> None:
    """Give the vocabulary's logits to the positions that predict something, and to no other.

    TRL's loss does so on GPUs, but elsewhere it projects prompts and padding too: more than half of the time of a
    step of a small model on a CPU. Only the projection is replaced; the loss made of it stays TRL's. A TRL that
    works in another way keeps its own.
    """
    model = roles.base.model
    of_trl = model.forward
    output_class = getattr(trl.trainer.utils, "FusedCausalLMOutput", None)
    if output_class is None or getattr(model.config.get_text_config(), "output_router_logits", False):
        return

    @functools.wraps(of_trl)
    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return of_trl(*args, **({"fused_lm_head": True} if fused_lm_head else {}), labels=labels, **kwargs)
        hidden_BTD = trunk_of(model)(*args, **kwargs).last_hidden_state[:, :-1]
        targets_BT = labels[:, 1:]
        mask_BT = targets_BT != IGNORED
        guesses: list[torch.Tensor] = []

        def logits(hidden_CD: torch.Tensor) -> torch.Tensor:
            logits_CV = roles.logits(hidden_CD)
            guesses.append(logits_CV.detach().argmax(dim=-1))
            return logits_CV

        targets_N = targets_BT[mask_BT]
        result = token_logprobs(
            hidden_BTD[mask_BT], targets_N, logits, chunk_tokens=LOGIT_CHUNK_TOKENS, with_entropy=True
        )
        assert result.entropy_N is not None
        is_top1_N = (torch.cat(guesses) == targets_N).float()

        def spread(values_N: torch.Tensor) -> torch.Tensor:
            return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)

        return output_class(
            log_probs=spread(result.logprobs_N),
            entropy=spread(result.entropy_N),
            is_top1=spread(is_top1_N),
            label_mask=mask_BT,
        )

    model.forward = forward
