"""Length-controlled win rates: the right optimum, and lengths taken out."""

from __future__ import annotations

import math
import random

import pytest
import torch

from pipeline.length_control import length_controlled_win_rate
from pipeline.statistics import win_rate


def judged_by_length(count: int, theta: float, phi: float, shift: float, seed: int = 0) -> tuple[list, list]:
    """Comparisons by a judge of the regression's own kind, between answers that differ by about `shift` tokens."""
    chance = random.Random(seed)
    gaps = [chance.gauss(shift, 20) for _ in range(count)]
    scale = math.sqrt(sum(gap * gap for gap in gaps) / count)
    wins = [float(chance.random() < 1 / (1 + math.exp(-theta - phi * math.tanh(gap / scale)))) for gap in gaps]
    return wins, gaps


def test_a_judge_who_only_likes_length_sees_no_difference() -> None:
    wins, gaps = judged_by_length(2000, theta=0.0, phi=3.0, shift=30)
    raw = sum(wins) / len(wins)
    found = length_controlled_win_rate(wins, gaps)
    assert raw > 0.75 and found.low < 0.5 < found.high
    assert found.n == 2000


def test_a_judge_who_does_not_mind_length_is_left_alone() -> None:
    wins, gaps = judged_by_length(3000, theta=0.8, phi=0.0, shift=0)
    rate = win_rate(int(sum(wins)), 0, int(len(wins) - sum(wins)))
    found = length_controlled_win_rate(wins, gaps)
    assert found.value == pytest.approx(rate.value, abs=0.01)
    assert found.low == pytest.approx(rate.low, abs=0.01) and found.high == pytest.approx(rate.high, abs=0.01)


def test_the_truth_is_within_the_interval_about_as_often_as_said() -> None:
    truth = 1 / (1 + math.exp(-0.5))
    inside = 0
    for seed in range(200):
        found = length_controlled_win_rate(*judged_by_length(150, theta=0.5, phi=1.0, shift=10, seed=seed))
        inside += found.low <= truth <= found.high
    assert 0.90 <= inside / 200 <= 0.995


def test_the_optimum_is_that_of_another_optimizer() -> None:
    """The same penalised likelihood by L-BFGS on float64, and the interval from torch's own second derivatives."""
    chance = random.Random(3)
    gaps = [chance.gauss(5, 30) for _ in range(60)]
    points = [chance.choice([0.0, 0.5, 1.0, 1.0]) for _ in gaps]
    scale = math.sqrt(sum(gap * gap for gap in gaps) / len(gaps))
    x_N = torch.tensor([*(math.tanh(gap / scale) for gap in gaps), 0.0], dtype=torch.float64)
    y_N = torch.tensor([*points, 0.5], dtype=torch.float64)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        logits_N = parameters[0] + parameters[1] * x_N
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits_N, y_N, reduction="sum")
        return fit + parameters[1] ** 2 / 2

    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], tolerance_grad=1e-12, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    covariance = torch.linalg.inv(torch.autograd.functional.hessian(loss, parameters.detach()))
    theta, half = float(parameters[0].detach()), 1.959964 * math.sqrt(float(covariance[0, 0]))
    found = length_controlled_win_rate(points, gaps)
    for value, logit in ((found.value, theta), (found.low, theta - half), (found.high, theta + half)):
        assert value == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)


@pytest.mark.parametrize("gaps", [[0.0] * 40, [7.0] * 40, [1e9, -1e9] * 20])
@pytest.mark.parametrize("point", [0.0, 0.5, 1.0])
def test_one_sided_judgements_have_finite_answers(gaps: list[float], point: float) -> None:
    found = length_controlled_win_rate([point] * 40, gaps)
    assert 0 < found.low <= found.value <= found.high < 1
    if gaps[0] != 7.0:
        assert found.value == pytest.approx({0.0: 0.5 / 41, 0.5: 0.5, 1.0: 1 - 0.5 / 41}[point], abs=1e-6)


@pytest.mark.parametrize(("points", "gaps"), [([], []), ([1.0], [1.0, 2.0]), ([1.5], [0.0])])
def test_nonsense_is_refused(points: list[float], gaps: list[float]) -> None:
    with pytest.raises(ValueError, match="outcome"):
        length_controlled_win_rate(points, gaps)
