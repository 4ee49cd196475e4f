"""What the roles say of finished sequences: log-probabilities, values, rewards.

Shape legend: B sequence, Q prompt token, T response token, L = Q + T, D width, N response token of any sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.batching import pad
from pipeline.errors import DivergenceError
from pipeline.logprobs import TokenLogprobs, token_logprobs
from pipeline.records import TokenizedExample
from pipeline.roles import Role, Roles
from pipeline.scalar_head import last_token

Result = TypeVar("Result")

LOGIT_CHUNK_TOKENS = 256
"""Response tokens whose logits exist at one time: 256 x 50k x 4 bytes = 50 MB, thrice with gradients."""


@dataclass(frozen=True)
class Episode:
    """A prompt and a response as ids, as they were sampled. Text is never encoded again."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes as tensors.

    `row_N` and `column_N` are the places in [B, L] of the hidden states that predict the response tokens
    `targets_N`, episode after episode; `lengths` are the response tokens of each episode.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    row_N: Tensor
    column_N: Tensor
    targets_N: Tensor
    lengths: tuple[int, ...]

    def rows(self, values_N: Tensor) -> list[Tensor]:
        """Split values of response tokens into one tensor an episode."""
        return list(torch.split(values_N, list(self.lengths)))


def batch_episodes(episodes: Sequence[Episode], device: torch.device) -> EpisodeBatch:
    """Pad episodes on the right and find their response tokens by length."""
    ids_BL, mask_BL = pad([episode.ids for episode in episodes], device)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, episode in enumerate(episodes):
        assert episode.prompt and episode.response, "an episode has a prompt and a response"
        first = len(episode.prompt) - 1  # the hidden state here predicts the first response token
        rows.extend([row] * len(episode.response))
        columns.extend(range(first, first + len(episode.response)))
        targets.extend(episode.response)
    return EpisodeBatch(
        ids_BL,
        mask_BL,
        torch.tensor(rows, device=device),
        torch.tensor(columns, device=device),
        torch.tensor(targets, device=device),
        tuple(len(episode.response) for episode in episodes),
    )


def policy_logprobs(
    roles: Roles, hidden_BLD: Tensor, batch: EpisodeBatch, *, temperature: float, with_entropy: bool = False
) -> TokenLogprobs:
    """Log-probabilities of the response tokens from the trunk's hidden states; prompt positions get no logits."""
    hidden_ND = hidden_BLD[batch.row_N, batch.column_N]
    return token_logprobs(
        hidden_ND,
        batch.targets_N,
        roles.logits,
        temperature=temperature,
        chunk_tokens=LOGIT_CHUNK_TOKENS,
        with_entropy=with_entropy,
    )


def head_values(roles: Roles, role: Role, hidden_BLD: Tensor, batch: EpisodeBatch) -> Tensor:
    """The role's head at the states before each response token: values [N] in float32."""
    return roles.head_values(role, hidden_BLD[batch.row_N, batch.column_N])


def score_logprobs(
    roles: Roles, role: Role | None, episodes: Sequence[Episode], *, temperature: float, max_tokens: int
) -> list[Tensor]:
    """Log-probability of every response token under a role, without gradients: a tensor [T] an episode."""

    def compute(hidden_BLD: Tensor, batch: EpisodeBatch) -> list[Tensor]:
        return batch.rows(policy_logprobs(roles, hidden_BLD, batch, temperature=temperature).logprobs_N)

    return _for_episodes(roles, role, episodes, max_tokens, compute)


def score_values(roles: Roles, episodes: Sequence[Episode], *, max_tokens: int) -> list[Tensor]:
    """The value adapter's value before every response token, without gradients: a tensor [T] an episode."""

    def compute(hidden_BLD: Tensor, batch: EpisodeBatch) -> list[Tensor]:
        return batch.rows(head_values(roles, "value", hidden_BLD, batch))

    return _for_episodes(roles, "value", episodes, max_tokens, compute)


def score_logprobs_and_values(
    roles: Roles, episodes: Sequence[Episode], *, temperature: float, max_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities under the policy, and the values of a head on its trunk (`critic: head`), from one pass.

    Returns:
        both as `score_logprobs` and `score_values` give them.
    """

    def compute(hidden_BLD: Tensor, batch: EpisodeBatch) -> list[tuple[Tensor, Tensor]]:
        logprobs_N = policy_logprobs(roles, hidden_BLD, batch, temperature=temperature).logprobs_N
        values_N = head_values(roles, "value", hidden_BLD, batch)
        return list(zip(batch.rows(logprobs_N), batch.rows(values_N), strict=True))

    both = _for_episodes(roles, "policy", episodes, max_tokens, compute)
    return [logprobs_T for logprobs_T, _ in both], [values_T for _, values_T in both]


def score_rewards(
    roles: Roles, sequences: Sequence[Sequence[int]], *, max_tokens: int, role: Role = "reward"
) -> Tensor:
    """A reward adapter's raw score at the last token of each sequence: [B] in float32, on the CPU."""
    scores_B = torch.empty(len(sequences), dtype=torch.float32)
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        for group in roles.microbatches([len(sequence) for sequence in sequences], max_tokens):
            roles.between_passes()
            ids_BL, mask_BL = pad([sequences[index] for index in group], roles.device)
            hidden_BLD = roles.hidden_states(ids_BL, mask_BL)
            scores_B[group] = roles.head_values(role, last_token(hidden_BLD, mask_BL)).cpu()
    return scores_B


def said_logprobs(roles: Roles, rows: Sequence[TokenizedExample]) -> Tensor:
    """What the assistant says in each row, under the active role: [B, 2] in float64, log-probability and tokens."""
    ids_BL, mask_BL = pad([row.ids for row in rows], roles.device)
    said_BL, _ = pad([row.loss_mask for row in rows], roles.device)
    hidden_BLD = roles.hidden_states(ids_BL, mask_BL)
    said_BT = said_BL[:, 1:].bool()  # the state before a token predicts it
    logprobs_N = token_logprobs(
        hidden_BLD[:, :-1][said_BT], ids_BL[:, 1:][said_BT], roles.logits, chunk_tokens=LOGIT_CHUNK_TOKENS
    ).logprobs_N
    count_B = said_BT.sum(dim=1)
    sums = [logprobs_T.double().sum() for logprobs_T in torch.split(logprobs_N, count_B.tolist())]
    return torch.stack([torch.stack(sums), count_B.double()], dim=1)


def require_finite(values: Tensor, what: str, *, where: str) -> Tensor:
    """The values, if they are numbers.

    Args:
        what: how the error calls one of them.
        where: the stage.

    Raises:
        DivergenceError: one is infinite or NaN.
    """
    if not bool(values.isfinite().all()):
        raise DivergenceError(
            f"a {what} is not finite",
            where=where,
            remedy="Train with a lower learning rate; with 16 bits, try base.dtype=float32.",
        )
    return values


def _for_episodes(
    roles: Roles,
    role: Role | None,
    episodes: Sequence[Episode],
    max_tokens: int,
    compute: Callable[[Tensor, EpisodeBatch], list[Result]],
) -> list[Result]:
    """What `compute` finds for each episode in the trunk's states [B, L, D] of a batch, in the episodes' order."""
    results: dict[int, Result] = {}
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        for group in roles.microbatches([len(episode.ids) for episode in episodes], max_tokens):
            roles.between_passes()
            batch = batch_episodes([episodes[index] for index in group], roles.device)
            hidden_BLD = roles.hidden_states(batch.ids_BL, batch.mask_BL)
            results.update(zip(group, compute(hidden_BLD, batch), strict=True))
    return [results[index] for index in range(len(episodes))]
