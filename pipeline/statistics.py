"""How sure a number is: intervals for proportions and means. No torch, so that reports stay light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """A number from `n` observations, and the interval `low`..`high` around it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """The same as JSON-able data."""
        return asdict(self)


class Proportion(Estimate):
    """A share within 0..1 and its Wilson interval."""


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval for a proportion (Wilson 1927): honest near 0 and 1 and for small n.

    Args:
        successes: how many of `n`, 0..n. May be fractional where a tie counts half; ties vary less than
            coin flips, so the interval is then a little too wide.
        n: number of trials. With 0 nothing is known: the interval is 0..1.
        confidence: the share of such intervals that hold the true proportion.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: successes outside 0..n, or a confidence outside 0..1.
    """
    z = _normal_quantile(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie within 0..n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At shares of 0 and 1 a bound equals the share, but for rounding.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def win_rate(wins: int, ties: int, losses: int) -> Proportion:
    """The share of comparisons won, a tie counting half, with its 95% Wilson interval.

    Raises:
        ValueError: a negative count, or no comparison at all.
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses == 0:
        raise ValueError(f"a win rate needs comparisons, got {wins} wins, {ties} ties, {losses} losses")
    n = wins + ties + losses
    successes = wins + 0.5 * ties
    return Proportion(successes / n, *wilson_interval(successes, n), n)


def paired_difference(gained: float, lost: float, n: int, confidence: float = 0.95) -> Estimate:
    """The difference of two accuracies on the same `n` cases: (gained - lost) / n.

    The interval is Agresti and Min's (2005): Wald's for matched pairs after half a case more in each of the four cells,
    so that few cases, or none that differ, do not look certain.

    Args:
        gained: cases that the second alone gets right. May be fractional where a tie counts half.
        lost: cases that the first alone gets right.
        n: all cases.
        confidence: the share of such intervals that hold the true difference.

    Raises:
        ValueError: counts that are negative or more than `n`, no case at all, or a confidence outside 0..1.
    """
    z = _normal_quantile(confidence)
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(f"of {n} cases {gained} gained and {lost} lost")
    value, centre = (gained - lost) / n, (gained - lost) / (n + 2)
    variance = (gained + lost + 1) / (n + 2) - centre**2
    half = z * math.sqrt(variance / (n + 2))
    return Estimate(value, max(-1.0, centre - half), min(1.0, centre + half), n)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean and its interval in the normal approximation: mean -+ z * s / sqrt(n), s with n - 1.

    With one value the interval is that value, and with none everything is 0: a spread cannot be known, and
    `n` says so.

    Raises:
        ValueError: a value that is not finite, or a confidence outside 0..1.
    """
    z = _normal_quantile(confidence)
    if not all(math.isfinite(value) for value in values):
        raise ValueError("the mean of values that are not finite has no interval")
    n = len(values)
    mean = fmean(values) if n else 0.0
    half = z * stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(mean, mean - half, mean + half, n)


def accuracy_longer_wins(chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]) -> Proportion:
    """The accuracy of always preferring the longer answer: what a reward model must beat to know more.

    Equal lengths count half, as a coin flip would.

    Raises:
        ValueError: lists of different length, or empty ones.
    """
    if len(chosen_lengths) != len(rejected_lengths):
        raise ValueError(f"{len(chosen_lengths)} chosen lengths, {len(rejected_lengths)} rejected ones")
    pairs = list(zip(chosen_lengths, rejected_lengths, strict=True))
    longer = sum(chosen > rejected for chosen, rejected in pairs)
    equal = sum(chosen == rejected for chosen, rejected in pairs)
    return win_rate(longer, equal, len(pairs) - longer - equal)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
