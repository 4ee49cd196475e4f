"""KL estimators against the exact divergence, controllers against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.kl import AdaptiveKL, FixedKL, kl_k1, kl_k3


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()
    p, q = logits.log_softmax(dim=-1)
    return p, q


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_expectation_is_the_exact_kl_in_the_named_direction(estimator):
    p, q = two_distributions()
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    reverse = sum(math.exp(b) * (b - a) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert abs(exact - reverse) > 0.01
    assert (p.exp() * estimator(p, q)).sum().item() == pytest.approx(exact)


def test_k3_is_never_negative_and_k1_is():
    p, q = two_distributions()
    assert (kl_k3(p, q) >= 0).all()
    assert (kl_k1(p, q) < 0).any()


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_equal_policies_have_exactly_no_kl(estimator):
    p, _ = two_distributions()
    assert estimator(p, p).eq(0).all()


def test_k3_of_tiny_differences_is_not_lost_to_rounding():
    # k3 is about x^2 / 2; exp(x) - 1 - x gives multiples of the float32 step, 1.2e-7.
    found = kl_k3(torch.zeros(1), torch.full((1,), 1e-3)).item()
    assert found == pytest.approx(5e-7, rel=1e-2)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_shapes_must_agree(estimator):
    with pytest.raises(ValueError, match="shape"):
        estimator(torch.zeros(2, 3), torch.zeros(2, 1))


def test_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(100.0, 10_000)
    assert controller.coefficient == 0.05


@pytest.mark.parametrize(
    ("observed", "samples", "expected"),
    [
        (6.0, 64, 0.2),  # on target
        (6.6, 64, 0.2 * 1.00064),  # error 0.1, times 64 / 10,000
        (5.4, 64, 0.2 * 0.99936),
        (60.0, 64, 0.2 * 1.00128),  # error 9 clipped to 0.2
        (0.0, 64, 0.2 * 0.99872),  # error -1 clipped to -0.2
        (-0.5, 64, 0.2 * 0.99872),  # an estimate may be negative
        (60.0, 1000, 0.2 * 1.02),
        (60.0, 0, 0.2),
    ],
)
def test_adaptive_step_is_the_one_worked_out_by_hand(observed, samples, expected):
    controller = AdaptiveKL(0.2)
    controller.update(observed, samples)
    assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_target_horizon_and_clip_are_obeyed():
    controller = AdaptiveKL(1.0, target=2.0, horizon=100, clip=0.5)
    controller.update(2.6, 10)  # error 0.3
    assert controller.coefficient == pytest.approx(1.03)
    controller.update(50.0, 10)  # clipped to 0.5
    assert controller.coefficient == pytest.approx(1.03 * 1.05)


def test_too_little_kl_lets_go_and_too_much_pulls_back_to_the_target():
    # A policy whose KL falls as beta rises settles where its KL is the target: here at beta = 0.5.
    controller = AdaptiveKL(0.01, target=6.0, horizon=100)
    for _ in range(2000):
        controller.update(3.0 / controller.coefficient, 10)
    assert controller.coefficient == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("make", [FixedKL, AdaptiveKL])
def test_state_survives_json_and_the_run_goes_on_as_if_never_stopped(make):
    uninterrupted = make(1 / 3)
    for _ in range(3):
        uninterrupted.update(7.3, 96)
    resumed = make(0.7)
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for controller in (uninterrupted, resumed):
        controller.update(2.1, 96)
    assert resumed.coefficient == uninterrupted.coefficient
    assert resumed.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("make", [FixedKL, AdaptiveKL])
@pytest.mark.parametrize("state", [{}, {"beta": 0.1}, {"coefficient": math.nan}, {"coefficient": -1.0}])
def test_a_state_that_makes_no_sense_is_refused_and_changes_nothing(make, state):
    controller = make(0.1)
    with pytest.raises(ValueError, match="coefficient"):
        controller.load_state_dict(state)
    assert controller.coefficient == 0.1


@pytest.mark.parametrize("observed", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused_and_changes_nothing(observed):
    controller = AdaptiveKL(0.1)
    with pytest.raises(ValueError, match="finite"):
        controller.update(observed, 64)
    assert controller.coefficient == 0.1


def test_a_step_that_could_turn_the_coefficient_negative_is_refused():
    # Even where this step's KL is harmless: it must fail in the first iteration, not some night later.
    with pytest.raises(ValueError, match="horizon must exceed 10000"):
        AdaptiveKL(0.1).update(6.0, 50_000)
    AdaptiveKL(0.1).update(6.0, 49_999)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (FixedKL, {"coefficient": -0.1}),
        (FixedKL, {"coefficient": math.inf}),
        (AdaptiveKL, {"coefficient": 0.0}),
        (AdaptiveKL, {"coefficient": 0.1, "target": 0.0}),
        (AdaptiveKL, {"coefficient": 0.1, "horizon": 0}),
        (AdaptiveKL, {"coefficient": 0.1, "clip": -0.2}),
    ],
)
def test_impossible_settings_are_refused(make, options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        make(**options)


def test_a_fixed_coefficient_of_0_switches_the_penalty_off():
    assert FixedKL(0).coefficient == 0.0
