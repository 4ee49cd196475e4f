"""Win rates with the part taken out that is owed to length. No torch, so that reports stay light.

After length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): a logistic regression explains who wins,

    P(challenger wins on prompt i) = sigmoid(theta + phi * tanh(d_i / s))

with d_i the challenger's length less the incumbent's in tokens, and s the root mean square of the d_i. The
length-controlled win rate is sigmoid(theta): what the model expects where both answers are equally long. Left out is
their term for a prompt's difficulty, which takes the judgements of many models.

So that a judge who always prefers one side has a finite answer, one comparison more, half won, stands at length
difference 0, and phi is drawn to 0 by phi^2 / 2 (a standard normal prior). The interval is the normal one for theta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from pipeline.statistics import Estimate

_STEPS = 100
_CLOSE = 1e-10


def length_controlled_win_rate(
    outcomes: Sequence[float], length_differences: Sequence[float], confidence: float = 0.95
) -> Estimate:
    """The win rate that is expected of answers of equal length.

    Args:
        outcomes: 1 where the challenger wins, 0 where it loses, 0.5 for a tie; a comparison each.
        length_differences: the challenger's length less the incumbent's, of the same comparisons.
        confidence: the share of such intervals that hold the true rate.

    Raises:
        ValueError: lists of different length, empty ones, or an outcome outside 0..1.
    """
    if len(outcomes) != len(length_differences) or not outcomes:
        raise ValueError(f"{len(outcomes)} outcomes, {len(length_differences)} length differences")
    if not all(0 <= outcome <= 1 for outcome in outcomes):
        raise ValueError("an outcome lies between 0 (lost) and 1 (won)")
    scale = math.sqrt(sum(gap * gap for gap in length_differences) / len(length_differences)) or 1.0
    rows = [(math.tanh(gap / scale), outcome) for gap, outcome in zip(length_differences, outcomes, strict=True)]
    rows.append((0.0, 0.5))
    theta, variance = _fit(rows)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Estimate(_sigmoid(theta), _sigmoid(theta - half), _sigmoid(theta + half), len(outcomes))


def _fit(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """theta at the maximum of the penalised likelihood, and its variance, by Newton's method with halved steps."""
    theta, phi = 0.0, 0.0
    value = _log_posterior(rows, theta, phi)
    for _ in range(_STEPS):
        (slope_theta, slope_phi), (tt, tp, pp) = _derivatives(rows, theta, phi)
        determinant = tt * pp - tp * tp
        step_theta = (pp * slope_theta - tp * slope_phi) / determinant
        step_phi = (tt * slope_phi - tp * slope_theta) / determinant
        share = 1.0
        while share > 1e-8:
            new = _log_posterior(rows, theta + share * step_theta, phi + share * step_phi)
            if new >= value:
                break
            share /= 2
        theta, phi, value = theta + share * step_theta, phi + share * step_phi, max(value, new)
        if abs(share * step_theta) + abs(share * step_phi) < _CLOSE:
            break
    _, (tt, tp, pp) = _derivatives(rows, theta, phi)
    return theta, pp / (tt * pp - tp * tp)


def _log_posterior(rows: Sequence[tuple[float, float]], theta: float, phi: float) -> float:
    total = -phi * phi / 2
    for x, outcome in rows:
        logit = theta + phi * x
        # log sigmoid, for either sign without overflow
        total -= max(logit, 0.0) - outcome * logit + math.log1p(math.exp(-abs(logit)))
    return total


def _derivatives(
    rows: Sequence[tuple[float, float]], theta: float, phi: float
) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """The slope of the log posterior, and minus its second derivatives (theta twice, both, phi twice)."""
    slope_theta, slope_phi, tt, tp, pp = 0.0, -phi, 0.0, 0.0, 1.0
    for x, outcome in rows:
        chance = _sigmoid(theta + phi * x)
        weight = chance * (1 - chance)
        slope_theta += outcome - chance
        slope_phi += (outcome - chance) * x
        tt, tp, pp = tt + weight, tp + weight * x, pp + weight * x * x
    return (slope_theta, slope_phi), (tt, tp, pp)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
