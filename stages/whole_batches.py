"""Epochs whose steps are the same rows for any number of processes, also where the rows are no multiple of a batch.

An epoch's last batch has as many microbatches as the others. Where rows run out there are gaps, and a microbatch is
smaller by its gaps, so that processes take as many microbatches each, no row counts twice, and none is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from pipeline.errors import ConfigError
from stages.projection import IGNORED

Row = dict[str, Any]

EXAMPLES = "examples"
"""Under this name a collated microbatch says how many rows it has; with none, what it holds is not to be learned."""
_GAP = -1
"""In place of a row's number."""


class WholeBatches(Sampler[int]):
    """The rows' numbers in another sampler's order, then gaps up to a whole batch.

    Args:
        order: numbers each row once an epoch. What is random of it is drawn from seed and epoch, the same in every
            process, and again after a resume.
        batch_size: rows of a step, of all processes together.
        seed: of the random order; None takes what torch was seeded with.
        drop_last: leave out the rows of an incomplete batch instead.

    Raises:
        ConfigError: there are fewer rows than a batch has, and such are to be left out.
    """

    def __init__(self, order: Sampler[int], batch_size: int, *, seed: int | None, drop_last: bool) -> None:
        if isinstance(order, RandomSampler):
            order = SeedableRandomSampler(order.data_source, data_seed=seed)
        elif isinstance(order, LengthGroupedSampler):
            order = _ByLength(order, batch_size, torch.initial_seed() if seed is None else seed)
        self._order = order
        rows = len(order)  # type: ignore[arg-type]
        batches = rows // batch_size if drop_last else -(-rows // batch_size)
        if batches == 0:
            raise ConfigError(
                f"dataloader_drop_last leaves nothing of {rows} rows, since a batch has {batch_size}",
                remedy="Lower batch_size, or remove dataloader_drop_last.",
            )
        self._length = batches * batch_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        numbers = list(self._order)[: self._length]
        yield from numbers + [_GAP] * (self._length - len(numbers))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next, where the order depends on it."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)


class _ByLength(Sampler[int]):
    """transformers' order by length, for the batch of all processes, drawn from seed and epoch."""

    def __init__(self, order: LengthGroupedSampler, batch_size: int, seed: int) -> None:
        self._order, self._seed, self._epoch = order, seed, 0
        order.batch_size = batch_size  # it knows of this process's part alone
        order.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        self._order.generator.manual_seed(self._seed + self._epoch)
        return iter(self._order)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class RowsWithGaps(Dataset[Row | None]):
    """Rows by their numbers, and None for a gap.

    Args:
        rows: as the trainer has them.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row | None:
        return None if number == _GAP else self._rows[number]


class CollatorOfGaps:
    """Collates rows and gaps: the rows as another collator does it, with their number under `EXAMPLES`.

    Where all are gaps it is the first of all rows, with the number 0. A class, since workers that load data may have to
    pickle it.

    Args:
        collate: rows -> microbatch.
        rows: all of them.
    """

    def __init__(self, collate: Callable[[list[Row]], dict[str, Any]], rows: Any) -> None:
        self._collate, self._rows = collate, rows

    def __call__(self, taken: Sequence[Row | None]) -> Row:
        rows = [row for row in taken if row is not None]
        return self._collate(rows or [self._rows[0]]) | {EXAMPLES: len(rows)}


def with_targets_of_rows(microbatches: Sequence[Row]) -> list[Row]:
    """The microbatches as they count for a loss over tokens: all labels ignored where there are only gaps."""
    counted = []
    for microbatch in microbatches:
        if microbatch.get(EXAMPLES) == 0 and "labels" in microbatch:
            microbatch = microbatch | {"labels": torch.full_like(microbatch["labels"], IGNORED)}
        counted.append(microbatch)
    return counted
