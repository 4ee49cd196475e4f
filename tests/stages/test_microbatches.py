"""A microbatch that is cut gives the very microbatches that TRL would have made of the parts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stages.microbatches import cut_pairs, cut_rows, cut_sequence
from stages.projection import IGNORED

LENGTHS = (5, 9, 3, 12, 4, 4, 7)


def rows() -> list[dict[str, list[int]]]:
    """Rows of different lengths; in each, some tokens are no targets."""
    chance = random.Random(0)
    found = []
    for length in LENGTHS:
        ids = [chance.randint(3, 99) for _ in range(length)]
        found.append({"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]})
    return found


def require_same(part: dict[str, Any], expected: dict[str, Any]) -> None:
    assert part.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert part[name].dtype == value.dtype and torch.equal(part[name], value), name
        else:
            assert part[name] == value, name


def targets(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_padded_rows(size: int) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    whole = collate(rows())
    groups = [rows()[start : start + size] for start in range(0, len(LENGTHS), size)]
    parts = list(cut_rows(whole, size))
    for (part, share), group in zip(parts, groups, strict=True):
        require_same(part, collate(group))
        assert share == pytest.approx(targets(part) / targets(whole))
    assert sum(share for _, share in parts) == pytest.approx(1)


@pytest.mark.parametrize("tokens, groups", [(1, [1] * 7), (12, [1, 2, 1, 2, 1]), (16, [2, 2, 3]), (99, [7])])
def test_rows_that_share_a_sequence(tokens: int, groups: list[int]) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    whole = collate(rows())
    parts, left = list(cut_sequence(whole, tokens)), rows()
    for (part, share), count in zip(parts, groups, strict=True):
        require_same(part, collate(left[:count]))
        assert share == pytest.approx(targets(part) / targets(whole))
        left = left[count:]
    assert sum(share for _, share in parts) == pytest.approx(1)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pairs(size: int, margin: bool) -> None:
    collate = DataCollatorForPreference(pad_token_id=0)
    ids = [row["input_ids"] for row in rows()]
    pairs: list[dict[str, Any]] = [
        {"chosen_ids": chosen, "rejected_ids": rejected} | ({"margin": float(len(chosen))} if margin else {})
        for chosen, rejected in zip(ids[:3], ids[3:6], strict=True)
    ]
    parts = list(cut_pairs(collate(pairs), size))
    for (part, share), start in zip(parts, range(0, 3, size), strict=True):
        group = pairs[start : start + size]
        require_same(part, collate(group))
        assert share == len(group) / 3


def test_where_nobody_says_anything_no_share_is_0() -> None:
    silent = [row | {"labels": [IGNORED] * len(row["input_ids"])} for row in rows()]
    whole = DataCollatorForLanguageModeling(pad_token_id=0)(silent)
    assert [share for _, share in cut_rows(whole, 4)] == [1.0, 1.0]
