"""An epoch's steps are the same rows for any number of processes."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from pipeline.errors import ConfigError
from stages.projection import IGNORED
from stages.whole_batches import EXAMPLES, CollatorOfGaps, RowsWithGaps, WholeBatches, with_targets_of_rows


def whole(rows: int, batch: int, *, drop_last: bool = False, seed: int | None = 3) -> WholeBatches:
    return WholeBatches(RandomSampler(range(rows)), batch, seed=seed, drop_last=drop_last)


def steps(sampler: WholeBatches, processes: int, microbatch: int, batch: int) -> list[list[int]]:
    """The rows of each step, microbatch by microbatch in the processes' order, as Accelerate deals them out."""
    shares = []
    for rank in range(processes):
        sampler.set_epoch(0)
        shares.append(list(BatchSamplerShard(BatchSampler(sampler, microbatch, drop_last=False), processes, rank)))
    assert len({len(share) for share in shares}) == 1
    dealt = [rows for together in zip(*shares, strict=True) for rows in together]
    a_step = batch // microbatch
    return [list(chain(*dealt[start : start + a_step])) for start in range(0, len(dealt), a_step)]


@pytest.mark.parametrize("rows", [1, 7, 8, 29, 32])
@pytest.mark.parametrize("processes, microbatch", [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_steps_do_not_depend_on_processes_and_microbatches(rows: int, processes: int, microbatch: int) -> None:
    sampler = whole(rows, 8)
    found = steps(sampler, processes, microbatch, 8)
    sampler.set_epoch(0)
    order = list(sampler)
    assert found == [order[start : start + 8] for start in range(0, len(order), 8)]
    assert len(order) == len(sampler) == -(-rows // 8) * 8
    assert sorted(order[:rows]) == list(range(rows)) and set(order[rows:]) <= {-1}


def test_each_epoch_has_an_order_of_its_own_which_comes_again() -> None:
    sampler, other = whole(40, 8), whole(40, 8)
    first = list(sampler)
    sampler.set_epoch(1)
    other.set_epoch(1)
    assert first != list(sampler) == list(other)
    torch.manual_seed(0)
    assert list(whole(40, 8, seed=4)) != first == list(whole(40, 8))


def test_without_a_seed_the_order_is_the_one_of_torchs() -> None:
    torch.manual_seed(11)
    drawn = list(whole(20, 4, seed=None))
    assert drawn == list(whole(20, 4, seed=11)) != list(range(20))


def test_rows_of_an_incomplete_batch_can_be_left_out() -> None:
    assert len(list(whole(29, 8, drop_last=True))) == 24
    with pytest.raises(ConfigError, match="leaves nothing of 7 rows, since a batch has 8"):
        whole(7, 8, drop_last=True)


def test_rows_of_like_length_meet_in_the_batch_of_all_processes() -> None:
    lengths = [(7 * number) % 50 for number in range(400)]
    grouped = LengthGroupedSampler(1, lengths=lengths)  # of a process that sees one row a step
    order = list(WholeBatches(grouped, 8, seed=None, drop_last=False))
    batches = [[lengths[number] for number in order[start : start + 8]] for start in range(0, 400, 8)]
    spread = [max(batch) - min(batch) for batch in batches]
    assert sum(spread) / len(spread) < 5


def test_an_order_by_length_comes_again_for_its_epoch_whatever_else_was_drawn() -> None:
    def order(epoch: int) -> list[int]:
        torch.rand(epoch + 3)
        grouped = LengthGroupedSampler(1, lengths=[(7 * number) % 50 for number in range(100)])
        sampler = WholeBatches(grouped, 8, seed=5, drop_last=False)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1) != order(2)


def test_a_microbatch_is_smaller_by_its_gaps() -> None:
    rows = Dataset.from_dict({"value": [10, 11, 12]})
    collate = CollatorOfGaps(lambda taken: {"values": [row["value"] for row in taken]}, rows)
    with_gaps = RowsWithGaps(rows)
    assert len(with_gaps) == 3 and [row["value"] for row in with_gaps] == [10, 11, 12]  # type: ignore[index]
    assert collate([with_gaps[2], with_gaps[-1]]) == {"values": [12], EXAMPLES: 1}
    assert collate([with_gaps[-1], with_gaps[-1]]) == {"values": [10], EXAMPLES: 0}
    assert collate([with_gaps[0], with_gaps[1]]) == {"values": [10, 11], EXAMPLES: 2}


def test_only_targets_of_rows_are_counted() -> None:
    labels = torch.tensor([[IGNORED, 4, 5]])
    full, empty = {"labels": labels, EXAMPLES: 1}, {"labels": labels, EXAMPLES: 0}
    counted = with_targets_of_rows([full, empty, {EXAMPLES: 0}])
    assert torch.equal(counted[0]["labels"], labels) and set(counted[1]["labels"].flatten().tolist()) == {IGNORED}
    assert torch.equal(with_targets_of_rows([{"labels": labels}])[0]["labels"], labels)  # of an evaluation
    assert counted[2] == {EXAMPLES: 0} and torch.equal(empty["labels"], labels)
