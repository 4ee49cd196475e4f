"""What PPO's gain is measured against besides SFT's own answers: the best of n of them, and what was forgotten.

Best of n: SFT answers n times, and PPO's own reward chooses. That policy has KL(best of n || SFT) = log n - (n - 1) / n
nats where no two scores are equal, and less otherwise (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024, arXiv
2401.01879): how much reward PPO should get for that much KL.

Perplexity: exp of the mean negative log-likelihood of the assistant's tokens in held-out instructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.config import PPOSettings
from pipeline.records import TokenizedExample
from pipeline.rewards import RewardFunction
from pipeline.roles import Role, Roles
from pipeline.scoring import require_finite, said_logprobs
from pipeline.statistics import mean_interval
from stages.parts import Parts, batches_of


def best_of_n_kl(n: int) -> float:
    """KL of the best of n answers from the policy that gave them, in nats; an upper bound where scores may be equal."""
    return math.log(n) - (n - 1) / n


def best_of(totals: Sequence[float], n: int) -> list[int]:
    """Of each prompt's n answers, which stand one after the other, the number of the best one; the first of equals."""
    return [max(range(start, start + n), key=lambda index: totals[index]) for start in range(0, len(totals), n)]


def rewards_of(
    ppo: PPOSettings,
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[Any],
    texts: Sequence[str],
    finished: Sequence[bool],
    model_scores: Sequence[float] | None,
) -> list[float]:
    """PPO's score of each answer: the weighted sum of its terms, clipped, less the penalty for a missing EOS."""
    totals = [0.0] * len(texts)
    for source in ppo.rewards:
        terms = model_scores if source.function is None else functions[source.name](prompts, texts)
        assert terms is not None, "a model term needs model scores"
        totals = [total + source.weight * term for total, term in zip(totals, terms, strict=True)]
    if ppo.score_clip is not None:
        totals = [min(max(total, -ppo.score_clip), ppo.score_clip) for total in totals]
    return [total - (0.0 if ended else ppo.missing_eos_penalty) for total, ended in zip(totals, finished, strict=True)]


def perplexities(
    parts: Parts,
    roles: Roles,
    contestants: Sequence[tuple[str, Role | None]],
    rows: Sequence[TokenizedExample],
    batch_size: int,
    on_batch: Callable[[int], None],
) -> dict[str, Any]:
    """Each contestant's perplexity on the rows, and the mean difference of PPO's loss from SFT's, row by row.

    Raises:
        DivergenceError: a loss is not finite.
        Interrupted: the stage was asked to stop; what is done is kept.
    """
    batches = batches_of([len(row.ids) for row in rows], batch_size)
    found: dict[str, list[list[float]]] = {}
    for name, role in contestants:

        def measure(batch: Sequence[int], role: Role | None = role) -> list[list[float]]:
            chosen = [rows[index] for index in batch]
            return parts.budgets.fit_sequences(
                [len(row.ids) for row in chosen], lambda most: _logprobs(roles, role, chosen, most)
            )

        found[name] = parts.compute(f"perplexity-{name}", batches, measure, on_batch)
    figures: dict[str, Any] = {
        name: math.exp(min(-sum(row[0] for row in pairs) / sum(row[1] for row in pairs), 700.0))
        for name, pairs in found.items()
    }
    losses = {name: [-total / max(1.0, count) for total, count in pairs] for name, pairs in found.items()}
    rises = [ppo - sft for ppo, sft in zip(losses["ppo"], losses["sft"], strict=True)]
    return figures | {"loss_ppo_minus_sft": mean_interval(rises).as_dict(), "rows": len(rows)}


def _logprobs(roles: Roles, role: Role | None, rows: Sequence[TokenizedExample], most: int) -> list[list[float]]:
    """Log-probability and number of the assistant's tokens of each row."""
    results: dict[int, list[float]] = {}
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        for group in roles.microbatches([len(row.ids) for row in rows], most):
            roles.between_passes()
            sums = said_logprobs(roles, [rows[index] for index in group])
            results.update(zip(group, require_finite(sums, "log-probability", where="evaluate").tolist(), strict=True))
    return [results[index] for index in range(len(rows))]
