"""A collated microbatch of TRL's, cut into smaller ones whose losses add up to the loss of the whole.

Shape legend: B row, L token of a padded row or of all rows in one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stages.projection import IGNORED

Microbatch = dict[str, Any]


def cut_rows(inputs: Microbatch, rows: int) -> Iterator[tuple[Microbatch, float]]:
    """Padded rows of SFT, at most so many at once.

    Args:
        inputs: `input_ids` [B, L], `labels` [B, L] and whatever else has a row for each of B.

    Yields:
        each part, and its share of the tokens that the loss is over.
    """
    targets_B = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
    for part_B in torch.split(torch.arange(len(targets_B)), rows):
        yield _trimmed(_take(inputs, part_B, len(targets_B))), _share(targets_B[part_B.to(targets_B.device)], targets_B)


def cut_pairs(inputs: Microbatch, pairs: int) -> Iterator[tuple[Microbatch, float]]:
    """Pairs of the reward model, at most so many at once.

    Args:
        inputs: `input_ids` [2B, L], first the B chosen answers and then the rejected ones; maybe `margin` [B].

    Yields:
        each part, and its share of the pairs.
    """
    both = len(inputs["input_ids"])
    for part_B in torch.split(torch.arange(both // 2), pairs):
        part = _take(inputs, torch.cat([part_B, part_B + both // 2]), both) | _take(
            {name: value for name, value in inputs.items() if name == "margin"}, part_B, both // 2
        )
        yield _trimmed(part), len(part_B) / (both // 2)


def cut_sequence(inputs: Microbatch, tokens: int) -> Iterator[tuple[Microbatch, float]]:
    """Rows of SFT that share one sequence, as packing has them; cut between rows, at most so many tokens at once.

    Args:
        inputs: `input_ids`, `labels` and `position_ids` [1, L]; a row begins where the position is 0.

    Yields:
        each part, and its share of the tokens that the loss is over. A row longer than `tokens` is a part of its own.
    """
    position_ids_L = inputs["position_ids"][0]
    starts = [*(position_ids_L == 0).nonzero().flatten().tolist(), len(position_ids_L)]
    cuts = [0]
    for start, end in pairwise(starts):
        if end - cuts[-1] > tokens and start > cuts[-1]:
            cuts.append(start)
    targets_L = inputs["labels"][0] != IGNORED
    for start, end in zip(cuts, [*cuts[1:], len(position_ids_L)], strict=True):
        part = {
            name: value[:, start:end] if _is_along(value, position_ids_L) else value for name, value in inputs.items()
        }
        yield (
            _with_boundaries(part, [place - start for place in starts if start <= place <= end]),
            _share(targets_L[start:end], targets_L),
        )


def _take(inputs: Microbatch, rows_B: Tensor, count: int) -> Microbatch:
    return {
        name: value[rows_B.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in inputs.items()
    }


def _trimmed(inputs: Microbatch) -> Microbatch:
    """Without the columns that are padding in all rows."""
    mask_BL: Tensor = inputs["attention_mask"]
    longest = int(mask_BL.sum(dim=1).max())
    return {
        name: value[:, :longest] if isinstance(value, Tensor) and value.shape[1:] == mask_BL.shape[1:] else value
        for name, value in inputs.items()
    }


def _is_along(value: Any, position_ids_L: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == (1, len(position_ids_L))


def _with_boundaries(part: Microbatch, boundaries: list[int]) -> Microbatch:
    """The part with what the attention kernels are told about where its rows end."""
    ends = torch.tensor(boundaries, dtype=torch.int32, device=part["input_ids"].device)
    longest = int(ends.diff().max())
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    if "seq_idx" in part:
        told["seq_idx"] = part["seq_idx"] - part["seq_idx"][:, :1]
    return part | {name: value for name, value in told.items() if name in part}


def _share(part: Tensor, whole: Tensor) -> float:
    """Where there is no target the loss is 0, and any share will do."""
    return int(part.sum()) / max(1, int(whole.sum())) or 1.0
