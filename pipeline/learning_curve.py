"""A reward model's accuracy against the number of pairs that it learnt from: would more pairs help?

Every point is measured on the same held-out pairs. Two points are therefore compared pair by pair, which tells far
smaller differences apart than their two intervals do. No torch, so that reports stay light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from pipeline import scored_pairs
from pipeline.scored_pairs import ScoredPair
from pipeline.statistics import Estimate, Proportion, paired_difference

CURVE = "curve.json"
"""File of the learning curve's folder: which results it is made of."""


@dataclass(frozen=True)
class Share:
    """A line of that file: which share of the training pairs, whether the run's own reward stage has learnt it, and
    the digest of the result."""

    fraction: float
    own: bool
    reward: str

    @classmethod
    def parse(cls, entry: Any) -> Share:
        """One as it stands in the file.

        Raises:
            ValueError: it is none.
        """
        found = entry if isinstance(entry, Mapping) else {}
        fraction, own, reward = (found.get(name) for name in ("fraction", "own", "reward"))
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError("fraction is no number above 0 and up to 1")
        if not isinstance(own, bool) or not isinstance(reward, str):
            raise ValueError("own is not true or false, or reward is no digest")
        return cls(float(fraction), own, reward)


@dataclass(frozen=True)
class CurvePoint:
    """The reward model of one share: how many pairs it learnt from, and the held-out pairs as it scores them."""

    fraction: float
    pairs: int
    held_out: Sequence[ScoredPair]

    @cached_property
    def accuracy(self) -> Proportion:
        """How often the preferred answer scores higher."""
        return scored_pairs.accuracy(self.held_out)

    @cached_property
    def longer_wins(self) -> Proportion:
        """How often it is the longer one."""
        return scored_pairs.longer_wins(self.held_out)

    @cached_property
    def right(self) -> dict[tuple[str, int], float]:
        """By held-out row whether the model is right: 1, 0, or one half for equal scores.

        A row's file goes by its name alone, since a run may have been moved between two points.
        """
        return {
            (PurePath(pair.source).name, pair.row): 0.5 + 0.5 * ((pair.lead > 0) - (pair.lead < 0))
            for pair in self.held_out
        }


@dataclass(frozen=True)
class LearningCurve:
    """Points with growing numbers of pairs. `left_out` says of results that are no part of it why, in words."""

    points: Sequence[CurvePoint]
    left_out: Sequence[str] = ()

    @cached_property
    def last_step(self) -> Estimate | None:
        """What the last step has changed; None where no two points have scored the same pairs."""
        return difference(self.points[-2], self.points[-1]) if len(self.points) > 1 else None

    @cached_property
    def whole(self) -> Estimate | None:
        """What all steps together have changed."""
        return difference(self.points[0], self.points[-1]) if len(self.points) > 1 else None

    @property
    def headline(self) -> str:
        """What it means, in a few words."""
        if len(self.points) < 2:
            return "One point is no curve yet"
        if self.last_step is None or self.whole is None:
            return "The points were measured on different pairs"
        if self.last_step.low > 0:
            return "Still rising: more pairs like these should help"
        if self.last_step.high < 0:
            return "Falling: the last pairs have done harm"
        if self.whole.low > 0:
            return "Risen, and flat within the interval at the end"
        return "Flat within the intervals"

    @property
    def sentence(self) -> str:
        """The changes, each with its interval, and how far they tell what more pairs would bring."""
        if len(self.points) < 2:
            return "A second fraction shows whether more pairs help."
        if self.last_step is None or self.whole is None:
            return "Nothing compares them; trivet learning-curve CONFIG makes those again that are out of date."
        first, before, last = self.points[0], self.points[-2], self.points[-1]
        said = (
            f"From {before.pairs} to {last.pairs} training pairs the accuracy changes by {_signed(self.last_step)},"
            f" compared on the same {self.last_step.n} held-out pairs"
        )
        said += f"; from {first.pairs} to {last.pairs} by {_signed(self.whole)}." if len(self.points) > 2 else "."
        if self.last_step.low <= 0 <= self.last_step.high:
            said += (
                f" A further step like the last one may bring up to {self.last_step.high:+.3f}:"
                f" {self.last_step.n} held-out pairs do not tell it more closely."
            )
        return said


def difference(before: CurvePoint, after: CurvePoint) -> Estimate | None:
    """By how much a point's accuracy exceeds another one's, on the pairs that both have scored; None without such."""
    shared = before.right.keys() & after.right.keys()
    changes = [after.right[row] - before.right[row] for row in shared]
    gained, lost = sum(max(0.0, change) for change in changes), sum(max(0.0, -change) for change in changes)
    return paired_difference(gained, lost, len(shared)) if shared else None


def _signed(change: Estimate) -> str:
    return f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
