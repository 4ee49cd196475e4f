"""Sequences of different lengths -> padded microbatches under a token budget.

Shape legend: B sequence, L token of a padded sequence. Padding is on the right and known by lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.masking import length_mask

_PADDING = 0
"""Any valid token id: it is masked, never looked at."""


def group_by_tokens(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Split sequences into microbatches of at most `max_tokens` tokens, padding included.

    Args:
        packed: there is no padding.

    Sequences of like length go together. A sequence longer than the budget gets a microbatch of its own.

    Returns:
        indices into `lengths`, a list a microbatch, longest sequences first (so that memory peaks at once).
    """

    def tokens_of(group: Sequence[int]) -> int:
        if packed:
            return sum(lengths[index] for index in group)
        return lengths[group[0]] * len(group)

    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if groups and tokens_of([*groups[-1], index]) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class PaddingTally:
    """Counts the tokens of forward passes, and the padding among them."""

    def __init__(self) -> None:
        self._tokens = self._padding = 0

    def count(self, lengths: Sequence[int], *, packed: bool = False) -> None:
        """A pass over sequences of these lengths, padded to the longest unless they are packed."""
        size = sum(lengths) if packed else len(lengths) * max(lengths)
        self._tokens += size
        self._padding += size - sum(lengths)

    def take(self) -> tuple[int, int]:
        """Padding and all tokens, padding included, since this was last asked."""
        taken = self._padding, self._tokens
        self._tokens = self._padding = 0
        return taken


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of B sequences -> right-padded ids [B, L] and their bool mask [B, L]."""
    lengths_B = torch.tensor([len(sequence) for sequence in sequences])
    ids_BL = torch.full((len(sequences), int(lengths_B.max())), _PADDING, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BL[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return ids_BL.to(device), length_mask(lengths_B, ids_BL.shape[1]).to(device)


def pad_rows(rows: Sequence[Tensor], size: int) -> Tensor:
    """One-dimensional tensors of different lengths -> [B, size], zeros on the right."""
    padded = rows[0].new_zeros(len(rows), size)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
