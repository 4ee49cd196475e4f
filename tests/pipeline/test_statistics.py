"""Intervals against what defines them."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.statistics import (
    Proportion,
    accuracy_longer_wins,
    mean_interval,
    paired_difference,
    wilson_interval,
    win_rate,
)

Z95 = 1.959963984540054
TRIALS = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(TRIALS)
def test_wilson_bounds_are_where_the_score_test_just_rejects(trial):
    # The definition: the p for which |share - p| equals z standard errors, the error taken at p itself.
    successes, n = trial
    for bound in wilson_interval(successes, n):
        distance = (successes / n - bound) ** 2
        assert distance == pytest.approx(Z95**2 * bound * (1 - bound) / n, abs=1e-12)


@given(TRIALS)
def test_wilson_interval_holds_the_share_and_mirrors_with_it(trial):
    successes, n = trial
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_interval_of_a_textbook_case():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


def test_more_trials_narrow_and_more_confidence_widens():
    widths = [
        high - low
        for low, high in (
            wilson_interval(600, 1000),
            wilson_interval(60, 100),
            wilson_interval(60, 100, confidence=0.99),
            wilson_interval(0, 0),
        )
    ]
    assert widths == sorted(widths) and widths[-1] == 1


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (math.nan, 2), (0, -1)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence)
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], confidence)


def test_win_rate_counts_a_tie_half_and_keeps_the_count():
    rate = win_rate(wins=5, ties=4, losses=1)
    assert (rate.value, rate.n) == (0.7, 10)
    assert (rate.low, rate.high) == wilson_interval(7, 10)


def test_win_rate_of_ties_alone_is_a_half():
    assert win_rate(0, 8, 0).value == 0.5


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 2, 3), (1, -1, 1)])
def test_win_rate_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="win rate"):
        win_rate(*counts)


def test_a_proportion_is_frozen_json_able_data():
    rate = win_rate(3, 0, 1)
    assert isinstance(rate, Proportion)
    with pytest.raises(AttributeError):
        rate.value = 1.0
    assert Proportion(**json.loads(json.dumps(rate.as_dict()))) == rate


def test_mean_interval_of_a_case_worked_out_by_hand():
    # Mean 3, s^2 = (4 + 1 + 0 + 1 + 4) / 4 = 2.5, standard error sqrt(2.5 / 5).
    estimate = mean_interval([1, 2, 3, 4, 5])
    half = Z95 * math.sqrt(0.5)
    assert (estimate.value, estimate.n) == (3, 5)
    assert (estimate.low, estimate.high) == pytest.approx((3 - half, 3 + half))


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    generator = random.Random(0)
    covered = 0
    for _ in range(1000):
        estimate = mean_interval([generator.gauss(2.0, 3.0) for _ in range(60)], confidence=0.9)
        covered += estimate.low <= 2.0 <= estimate.high
    # 900 expected, standard deviation 9.5.
    assert 860 < covered < 940


@pytest.mark.parametrize(("n", "gaining", "losing"), [(20, 0.1, 0.1), (20, 0.3, 0.02), (60, 0.02, 0.0), (60, 0.3, 0.2)])
def test_paired_difference_covers_the_truth_as_often_as_it_says(n, gaining, losing):
    """Over every outcome of so many cases, each with its exact probability."""
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            ways = math.comb(n, gained) * math.comb(n - gained, lost)
            same = 1 - gaining - losing
            chance = ways * gaining**gained * losing**lost * same ** (n - gained - lost)
            found = paired_difference(gained, lost, n)
            covered += chance * (found.low <= gaining - losing <= found.high)
    assert covered > 0.94, "the plain interval falls to 0.70 in the third case, where hardly any pair differs"


def test_paired_difference_of_a_textbook_case():
    # Agresti, Categorical Data Analysis, on matched pairs: of 1144 people 132 and 107 say yes to one question alone.
    found = paired_difference(132, 107, 1144)
    assert (found.value, found.n) == (pytest.approx(0.0219, abs=5e-5), 1144)
    assert (found.low, found.high) == pytest.approx((-0.004, 0.048), abs=1e-3)
    assert paired_difference(107, 132, 1144).low == pytest.approx(-found.high)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0, 1))
def test_paired_difference_lies_in_its_interval_and_none_that_differ_is_not_certain(trial, share):
    differing, n = trial
    gained = differing * share
    found = paired_difference(gained, differing - gained, n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 1 / (n + 2)


@pytest.mark.parametrize("counts", [(1, 1, 1), (-1, 0, 3), (0, 0, 0)])
def test_paired_difference_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="gained"):
        paired_difference(*counts)


@pytest.mark.parametrize(("values", "expected"), [([], 0.0), ([4.5], 4.5)])
def test_mean_interval_of_fewer_than_two_values_has_no_width(values, expected):
    estimate = mean_interval(values)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (expected,) * 3 + (len(values),)


def test_mean_interval_refuses_values_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])


def test_longer_wins_counts_longer_equal_and_shorter():
    accuracy = accuracy_longer_wins([9, 5, 3, 8], [4, 5, 7, 1])
    assert (accuracy.value, accuracy.n) == (2.5 / 4, 4)


def test_longer_wins_refuses_lists_that_do_not_pair():
    with pytest.raises(ValueError, match="2 chosen lengths, 1 rejected"):
        accuracy_longer_wins([1, 2], [1])
    with pytest.raises(ValueError, match="comparisons"):
        accuracy_longer_wins([], [])


def test_the_module_does_not_import_torch():
    code = "import sys, pipeline.statistics; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
