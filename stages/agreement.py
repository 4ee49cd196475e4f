"""How far an exported model says what its adapter says, measured and not assumed.

Shape legend: T response token, V vocabulary.

The adapter answers a few of the run's own prompts greedily. The exported model is asked for its logits along these
very tokens, and for greedy answers of its own:

    difference of logits |z - z'|,   KL = sum_v p_v (log p_v - log p'_v) of a token,   share of equal likeliest tokens

A reward model is compared by the scores of held-out answers, and by which of two it prefers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.datasets import load_preferences, load_prompts
from pipeline.errors import DataError, TrivetError
from pipeline.finished_run import FinishedRun, as_text, prompts_seen
from pipeline.generation import SamplingSettings, generate
from pipeline.records import Text
from pipeline.roles import Role, Roles
from pipeline.scoring import score_rewards
from pipeline.statistics import Estimate, mean_interval, win_rate

PROMPTS, NEW_TOKENS, PAIRS = 16, 32, 32
"""How much is compared."""
_LONGEST = 1024


@dataclass(frozen=True)
class PolicyAgreement:
    """An exported policy beside its adapter. Logits are absolute differences, `kl` is in nats a token.

    `same_answers` are greedy answers that are equal from the first token to the last, `common` is the mean share of an
    answer's tokens before the first difference.
    """

    prompts: int
    tokens: int
    logits_mean: float
    logits_max: float
    logits_spread: float
    kl: Estimate
    likeliest: Estimate
    same_answers: Estimate
    common: float

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-able data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures as sentences, intervals of 95% in brackets."""
        return [
            f"Compared with the adapter on its quantized base, on {self.prompts} prompts, {self.tokens} tokens:",
            f"logits differ by {self.logits_mean:.2g} in the mean and by {self.logits_max:.2g} at the most"
            f" (they vary by {self.logits_spread:.2g}, one standard deviation);",
            f"KL {self.kl.value:.2g} [{self.kl.low:.2g}, {self.kl.high:.2g}] nats a token;",
            f"the likeliest next token is the same at {_share(self.likeliest)} of the tokens;",
            f"greedy answers are the same for {_share(self.same_answers)} of the prompts,"
            f" and up to {100 * self.common:.0f}% of their tokens in the mean.",
        ]


@dataclass(frozen=True)
class RewardAgreement:
    """An exported reward model beside its adapter: raw scores, and the preferences that follow from them."""

    answers: int
    score_mean: float
    score_max: float
    score_spread: float
    same_preference: Estimate

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-able data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures as sentences."""
        return [
            f"Compared with the adapter on its quantized base, on {self.answers} held-out answers:",
            f"scores differ by {self.score_mean:.2g} in the mean and by {self.score_max:.2g} at the most"
            f" (they vary by {self.score_spread:.2g}, one standard deviation);",
            f"the preferred answer is the same in {_share(self.same_preference)} of the pairs.",
        ]


def _share(share: Estimate) -> str:
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


# ---- policies


@dataclass(frozen=True)
class Answered:
    """What the adapter says: prompts and its greedy answers as tokens, and the logits [T, V] before each token."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    logits: Sequence[Tensor]


def comparison_prompts(found: FinishedRun, roles: Roles) -> list[list[int]]:
    """Prompts to compare by, as tokens: those that the run was judged on, or else held-out ones of its data.

    Raises:
        DataError: there are none, here or where the config says.
    """
    texts: Sequence[Text] = prompts_seen(found, 4 * PROMPTS)
    if not texts:
        try:
            texts = [record.prompt for record in load_prompts(found.config.data, roles.base.chat).held_out]
        except TrivetError as error:
            raise DataError(
                "there is nothing to compare the exported model by: the run has not been evaluated, and its prompts"
                f" cannot be read ({error.problem})",
                where=str(found.state.root),
                remedy="Put the data back where the config says, or evaluate the run first.",
            ) from None
    ids = [roles.base.chat.prompt_ids(text) for text in texts]
    window = getattr(roles.base.model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    short = [one for one in ids if len(one) + NEW_TOKENS <= min(window, _LONGEST)]
    if not short:
        raise DataError("all prompts are too long to compare the exported model by", where=str(found.state.root))
    return short[:PROMPTS]


@torch.no_grad()
def answers_of_adapter(roles: Roles, role: Role, prompts: Sequence[Sequence[int]]) -> Answered:
    """The adapter's greedy answers on the quantized base, and the logits along them."""
    # One by one: padding would change the rounding.
    sampling = SamplingSettings(NEW_TOKENS, temperature=0.0, batch_size=1)
    answers = [one.ids for one in generate(roles, role, prompts, sampling, seed=("export",))]
    with roles.active(role):
        logits = [_logits_along(roles.model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Answered(prompts, answers, logits)


@torch.no_grad()
def compare_policy(answered: Answered, model: Any, eos: int) -> PolicyAgreement:
    """An exported model beside what the adapter says.

    Args:
        answered: by the adapter.
        model: any causal model of transformers.
        eos: the token that ends an answer.
    """
    differences, spreads, kl, same_token = [], [], [], []
    same_answers, common = 0, []
    for prompt, answer, wanted_TV in zip(answered.prompts, answered.answers, answered.logits, strict=True):
        found_TV = _logits_along(model, prompt, answer)
        differences.append((found_TV - wanted_TV).abs().flatten())
        spreads.append(wanted_TV.flatten())
        ours_TV, theirs_TV = wanted_TV.log_softmax(dim=1), found_TV.log_softmax(dim=1)
        kl += (ours_TV.exp() * (ours_TV - theirs_TV)).sum(dim=1).tolist()
        same_token += (wanted_TV.argmax(dim=1) == found_TV.argmax(dim=1)).tolist()
        greedy = _greedy(model, prompt, eos)
        same_answers += greedy == list(answer)
        common.append(_common_share(greedy, answer))
    difference_N = torch.cat(differences)
    prompts, tokens, same = len(answered.prompts), len(same_token), sum(same_token)
    return PolicyAgreement(
        prompts=prompts,
        tokens=tokens,
        logits_mean=float(difference_N.mean(dtype=torch.float64)),
        logits_max=float(difference_N.max()),
        logits_spread=float(torch.cat(spreads).double().std()),
        kl=mean_interval(kl),
        likeliest=win_rate(same, 0, tokens - same),
        same_answers=win_rate(same_answers, 0, prompts - same_answers),
        common=sum(common) / len(common),
    )


def _logits_along(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [T, V] in float32 before each token of the answer."""
    ids_BL = torch.tensor([[*prompt, *answer]], device=model.device)
    logits_TV = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[0, len(prompt) - 1 : -1]
    return cast(Tensor, logits_TV.float().cpu())


def _greedy(model: Any, prompt: Sequence[int], eos: int) -> list[int]:
    ids_BQ = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=ids_BQ,
        attention_mask=torch.ones_like(ids_BQ),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def _common_share(first: Sequence[int], second: Sequence[int]) -> float:
    longest = max(len(first), len(second))
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second))) / (
        longest or 1
    )


# ---- reward models


@dataclass(frozen=True)
class Scored:
    """Answers by twos, the preferred one first, as tokens with their prompts, and the adapter's raw scores of them."""

    sequences: Sequence[Sequence[int]]
    scores: Tensor


def scores_of_adapter(found: FinishedRun, roles: Roles) -> Scored:
    """The adapter's raw scores of held-out pairs.

    Raises:
        DataError: there are none, here or where the config says.
    """
    chat = roles.base.chat
    texts = [tuple(map(as_text, (one.prompt, one.chosen, one.rejected))) for one in found.state.held_out]
    pairs: list[Any] = [pair for pair in texts if None not in pair]
    if not pairs:
        held_out = load_preferences(found.config.data, chat).held_out
        pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in held_out]
    sequences: list[Sequence[int]] = []
    for prompt, *both in pairs:
        ids = [chat.example(prompt, answer).ids for answer in both]
        if max(map(len, ids)) <= _LONGEST and len(sequences) < 2 * PAIRS:
            sequences += ids
    if not sequences:
        raise DataError("all pairs are too long to compare the exported model by", where=str(found.state.root))
    return Scored(sequences, score_rewards(roles, sequences, max_tokens=_LONGEST).cpu())


@torch.no_grad()
def compare_reward(scored: Scored, model: Any) -> RewardAgreement:
    """An exported classifier beside the adapter's scores; two answers at a time, padded as its config says."""
    pad = model.config.get_text_config().pad_token_id
    found: list[float] = []
    for start in range(0, len(scored.sequences), 2):
        both = scored.sequences[start : start + 2]
        longest = max(map(len, both))
        ids_BL = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in both], device=model.device)
        mask_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in both], device=model.device)
        found += model(input_ids=ids_BL, attention_mask=mask_BL).logits.squeeze(-1).float().tolist()
    wanted_P2, found_P2 = scored.scores.float().view(-1, 2), torch.tensor(found).view(-1, 2)
    difference_P2 = (wanted_P2 - found_P2).abs()
    same_P = (wanted_P2[:, 0] > wanted_P2[:, 1]) == (found_P2[:, 0] > found_P2[:, 1])
    same = int(same_P.sum())
    return RewardAgreement(
        answers=len(found),
        score_mean=float(difference_P2.mean()),
        score_max=float(difference_P2.max()),
        score_spread=float(wanted_P2.std()),
        same_preference=win_rate(same, 0, len(same_P) - same),
    )
