"""Microbatches: every sequence once, within the budget, padded by length alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batching import group_by_tokens, pad, pad_rows

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 600))
def test_groups_hold_every_sequence_once_and_keep_to_the_budget(lengths, max_tokens):
    groups = group_by_tokens(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= max_tokens or len(group) == 1


@given(LENGTHS, st.integers(1, 600))
def test_the_longest_come_first_and_like_lengths_together(lengths, max_tokens):
    order = [lengths[index] for group in group_by_tokens(lengths, max_tokens) for index in group]
    assert order == sorted(lengths, reverse=True)


@given(LENGTHS)
def test_a_large_budget_makes_one_group(lengths):
    assert len(group_by_tokens(lengths, 200 * 40)) == 1


def test_groups_are_filled_up():
    assert group_by_tokens([10, 10, 10, 10], 20) == [[0, 1], [2, 3]]
    assert group_by_tokens([10, 10, 10, 10], 19) == [[0], [1], [2], [3]]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_is_known_by_length_whatever_the_ids_are(sequences):
    ids_BL, mask_BL = pad(sequences, torch.device("cpu"))
    assert ids_BL.shape == mask_BL.shape == (len(sequences), max(map(len, sequences)))
    for row, sequence in enumerate(sequences):
        assert ids_BL[row][mask_BL[row]].tolist() == sequence
        assert mask_BL[row].tolist() == [True] * len(sequence) + [False] * (ids_BL.shape[1] - len(sequence))


def test_rows_are_filled_with_zeros_on_the_right():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert pad_rows(rows, 3).tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
