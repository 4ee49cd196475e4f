"""Pairs of answers as token ids: made, scored, and measured.

Shape legend: P pair, B sequence, N number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.chat import ChatFormat
from pipeline.records import Comparison, Text, as_plain
from pipeline.roles import Roles
from pipeline.scoring import score_rewards
from pipeline.statistics import accuracy_longer_wins, win_rate


@dataclass(frozen=True)
class Pair:
    """A comparison as token ids."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    comparison: Comparison


def tokenize(chat: ChatFormat, comparisons: Sequence[Comparison]) -> list[Pair]:
    """Comparisons -> token ids, by the function that PPO's sequences come from as well."""
    return [
        Pair(chat.example(row.prompt, row.chosen).ids, chat.example(row.prompt, row.rejected).ids, row)
        for row in comparisons
    ]


def score_pairs(roles: Roles, pairs: Sequence[Pair], max_tokens: int) -> Tensor:
    """Raw scores [P, 2] of the chosen and the rejected answers."""
    if not pairs:
        return torch.empty(0, 2)
    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    return score_rewards(roles, sequences, max_tokens=max_tokens).view(-1, 2)


def held_out_metrics(pairs: Sequence[Pair], scores_P2: Tensor) -> dict[str, Any]:
    """How often, and by how much, the preferred answer gets the higher score; and what its length alone would give."""
    if not pairs:
        return {"held_out_accuracy": None}
    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    wins, ties = int((margin_P > 0).sum()), int((margin_P == 0).sum())
    lengths = [(characters(pair.comparison.chosen), characters(pair.comparison.rejected)) for pair in pairs]
    flat = torch.tensor(lengths, dtype=torch.float64).flatten()
    return {
        "held_out_accuracy": win_rate(wins, ties, len(pairs) - wins - ties).as_dict(),
        "held_out_accuracy_longer_wins": accuracy_longer_wins(*zip(*lengths, strict=True)).as_dict(),
        "held_out_loss": float(-torch.nn.functional.logsigmoid(margin_P.double()).mean()),
        "held_out_margin": float(margin_P.mean()),
        "held_out_length_correlation": correlation(scores_P2.flatten(), flat),
    }


def write_scored(path: Path, pairs: Sequence[Pair], scores_P2: Tensor) -> None:
    """A JSON line a pair, as `pipeline.scored_pairs` reads it: its origin, texts, scores and lengths."""
    with path.open("w", encoding="utf-8") as file:
        for pair, (chosen, rejected) in zip(pairs, scores_P2.tolist(), strict=True):
            row: Mapping[str, Any] = {
                "source": pair.comparison.origin.source,
                "row": pair.comparison.origin.row,
                "prompt": as_plain(pair.comparison.prompt),
                "chosen": as_plain(pair.comparison.chosen),
                "rejected": as_plain(pair.comparison.rejected),
                "margin": pair.comparison.margin,
                "score_chosen": chosen,
                "score_rejected": rejected,
                "characters_chosen": characters(pair.comparison.chosen),
                "characters_rejected": characters(pair.comparison.rejected),
                "tokens_chosen": len(pair.chosen),
                "tokens_rejected": len(pair.rejected),
                "columns": dict(pair.comparison.columns),
            }
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def correlation(first_N: Tensor, second_N: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    pair_2N = torch.stack([first_N.double(), second_N.double()])
    pair_2N = pair_2N - pair_2N.mean(dim=1, keepdim=True)
    scale = float(pair_2N.norm(dim=1).prod())
    return float(pair_2N.prod(dim=0).sum()) / scale if scale > 0 else 0.0


def characters(text: Text) -> int:
    """Length of an answer in characters, whatever its form."""
    return len(text) if isinstance(text, str) else sum(len(message.content) for message in text)
