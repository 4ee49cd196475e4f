"""The learning curve: points compared pair by pair, what is said of them, and what of the files can be damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reported_run import lines, pairs, whole_run

from pipeline.artifacts import read_manifest
from pipeline.learning_curve import CURVE, CurvePoint, LearningCurve, Share, difference
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_learning_curve, read_run
from pipeline.scored_pairs import ScoredPair
from pipeline.statistics import paired_difference


def point(fraction: float, leads: Sequence[float], count: int = 100) -> CurvePoint:
    """A reward model that gives the preferred answers these leads."""
    scored = [ScoredPair("f", row, lead, 0.0, 2, 1) for row, lead in enumerate(leads)]
    return CurvePoint(fraction, round(fraction * count), scored)


def rights(right: int, wrong: int, ties: int = 0) -> list[float]:
    return [1.0] * right + [-1.0] * wrong + [0.0] * ties


def test_points_are_compared_on_the_pairs_that_both_have_scored() -> None:
    chance = random.Random(0)
    one, other = ([chance.choice((1.0, 0.0, -1.0)) for _ in range(60)] for _ in range(2))
    before, after = point(0.5, one[:50]), point(1.0, other)
    after = CurvePoint(1.0, 100, after.held_out[::-1])  # whatever the order of the lines
    gained = lost = 0.0
    for first, second in zip(one[:50], other[:50], strict=True):
        change = {1.0: 1.0, 0.0: 0.5, -1.0: 0.0}[second] - {1.0: 1.0, 0.0: 0.5, -1.0: 0.0}[first]
        gained, lost = gained + max(change, 0), lost + max(-change, 0)
    assert difference(before, after) == paired_difference(gained, lost, 50)
    assert difference(point(0.5, []), after) is None


def test_a_difference_shows_that_two_intervals_hide() -> None:
    """Ten of a hundred pairs more, and none lost: the intervals of the two accuracies overlap all the same."""
    curve = LearningCurve([point(0.5, rights(60, 40)), point(1.0, rights(70, 30))])
    before, after = curve.points
    assert before.accuracy.high > after.accuracy.low
    assert curve.last_step is not None and curve.last_step.low > 0
    assert curve.headline == "Still rising: more pairs like these should help"
    assert "From 50 to 100 training pairs the accuracy changes by +0.100 [+0.0" in curve.sentence
    assert "may bring" not in curve.sentence


@pytest.mark.parametrize(
    ("leads", "headline"),
    [
        ([rights(50, 50), rights(70, 30), rights(71, 29)], "Risen, and flat within the interval at the end"),
        ([rights(70, 30), rights(71, 29), rights(70, 30)], "Flat within the intervals"),
        ([rights(50, 50), rights(80, 20), rights(60, 40)], "Falling: the last pairs have done harm"),
        ([rights(70, 30)], "One point is no curve yet"),
        ([], "One point is no curve yet"),
    ],
)
def test_what_is_said_of_a_curve(leads: list[list[float]], headline: str) -> None:
    curve = LearningCurve([point(0.5**number, found) for number, found in enumerate(leads)])
    assert curve.headline == headline
    flat = "flat" in headline.lower()
    assert ("A further step like the last one may bring up to +0." in curve.sentence) == flat
    if len(leads) == 3:
        assert curve.whole is not None and curve.last_step is not None
        assert curve.whole.value == pytest.approx(curve.points[2].accuracy.value - curve.points[0].accuracy.value)
        assert f"{curve.whole.value:+.3f} [{curve.whole.low:+.3f}" in curve.sentence


def test_points_without_a_pair_in_common_are_not_compared() -> None:
    other = CurvePoint(1.0, 100, [ScoredPair("another file", 1, 1.0, 0.0, 2, 1)])
    curve = LearningCurve([point(0.5, rights(5, 5)), other])
    assert curve.headline == "The points were measured on different pairs" and curve.sentence


def test_a_run_that_was_moved_keeps_its_points_together() -> None:
    here, there = (
        CurvePoint(share, 100, [ScoredPair(f"/{folder}/f.jsonl", 1, 1.0, 0.0, 2, 1)])
        for share, folder in ((0.5, "here"), (1.0, "there"))
    )
    found = difference(here, there)
    assert found is not None and found.n == 1


# ---- as it lies in a run's folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(whole_run(tmp_path).config.run_dir)


def entries(run: RunDirectory) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.learning_curve / CURVE).read_text())["points"]
    return found


def test_a_curve_is_read_with_its_pairs_and_scores(run: RunDirectory) -> None:
    state = read_run(run.root)
    assert state.faults == [] and state.curve is not None and not state.curve.left_out
    assert [(one.fraction, one.pairs) for one in state.curve.points] == [(0.25, 100), (0.5, 200), (1.0, 400)]
    for one, lead in zip(state.curve.points, (0.0, 0.7, 1.5), strict=True):
        right = sum(row["score_chosen"] > row["score_rejected"] for row in pairs(lead=lead))
        assert one.accuracy.value == pytest.approx(right / 60)
    assert read_run(run.root, with_files=False).curve is None


def test_no_curve_is_no_fault(tmp_path: Path) -> None:
    faults: list[str] = []
    assert read_learning_curve(RunDirectory(tmp_path), faults) is None and faults == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "curve.json: cannot be read: not JSON"),
        ("[]", "curve.json: cannot be read: not JSON"),
        ('{"points": 7}', "curve.json, point 1: fraction is no number above 0 and up to 1"),
        ('{"points": [null]}', "point 1: fraction is no number"),
        ('{"points": [{"fraction": 2, "own": false, "reward": "d"}]}', "point 1: fraction is no number"),
        ('{"points": [{"fraction": true, "own": false, "reward": "d"}]}', "point 1: fraction is no number"),
        ('{"points": [{"fraction": 0.5, "own": 1, "reward": "d"}]}', "point 1: own is not true or false"),
        ('{"points": [{"fraction": 0.5, "own": false}]}', "point 1: own is not true or false, or reward is no digest"),
        ('{"points": [{"fraction": 0.75, "own": false, "reward": "d"}]}', "there is no finished stage here"),
    ],
)
def test_a_damaged_file_is_named_and_not_fatal(run: RunDirectory, content: str, said: str) -> None:
    (run.learning_curve / CURVE).write_text(content)
    state = read_run(run.root)
    assert state.curve is None and len(state.held_out) == 60
    (fault,) = state.faults
    assert said in fault


def test_a_damaged_point_is_named_and_the_others_are_shown(run: RunDirectory) -> None:
    (run.share(0.25).stage("reward") / "adapter.txt").write_text("flipped")
    held_out = run.share(0.5).stage("reward") / "held_out.jsonl"
    state = read_run(run.root)
    assert state.curve is not None and [one.fraction for one in state.curve.points] == [0.5, 1.0]
    (fault,) = state.faults
    assert "0.25/reward/adapter.txt" in fault
    held_out.write_text(lines(pairs(3)))
    assert any("0.5/reward/held_out.jsonl" in fault for fault in read_run(run.root).faults)


def test_a_result_that_was_replaced_since_is_no_part_of_the_curve(run: RunDirectory) -> None:
    edited = [one | {"reward": "0" * 64} if one["own"] else one for one in entries(run)]
    (run.learning_curve / CURVE).write_text(json.dumps({"points": edited}))
    curve = read_run(run.root).curve
    assert curve is not None and [one.fraction for one in curve.points] == [0.25, 0.5]
    assert curve.left_out == ["1: another reward model lies there by now"]


def test_a_share_is_read_as_it_is_written(run: RunDirectory) -> None:
    own = Share.parse(entries(run)[-1])
    assert own == Share(1.0, True, read_manifest(run.stage("reward")).digest)
