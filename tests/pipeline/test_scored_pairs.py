"""What scores of pairs say of a reward model, against what defines it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_run import lines, pairs

from pipeline import scored_pairs
from pipeline.scored_pairs import ScoredPair, parse_pair, read_scored


def pair(first: float, second: float, lengths: tuple[int, int] = (10, 10), **more: object) -> ScoredPair:
    """With the scores of the preferred and of the other answer."""
    return ScoredPair("file", 1, first, second, *lengths, **more)  # type: ignore[arg-type]


def test_accuracy_counts_ties_half() -> None:
    found = scored_pairs.accuracy([pair(1, 0), pair(0, 1), pair(2, 2), pair(3, 0)])
    assert (found.value, found.n) == (2.5 / 4, 4)


@given(st.floats(-700, 700), st.floats(-700, 700))
def test_the_probability_is_the_sigmoid_of_the_lead(chosen: float, rejected: float) -> None:
    found, turned = pair(chosen, rejected).probability, pair(rejected, chosen).probability
    assert 0 <= found <= 1
    assert found + turned == pytest.approx(1)
    assert found == pytest.approx(math.exp(min(0, chosen - rejected)) / (1 + math.exp(-abs(chosen - rejected))))


def test_the_log_loss_is_that_of_the_probabilities() -> None:
    found = [pair(1.5, 0), pair(0, 2.5), pair(1, 1)]
    expected = -sum(math.log(one.probability) for one in found) / 3
    assert scored_pairs.log_loss(found) == pytest.approx(expected)
    assert scored_pairs.log_loss([pair(0, 0)]) == pytest.approx(math.log(2))
    assert scored_pairs.log_loss([pair(0, 5000)]) == 5000


def of_a_calibrated_model(count: int, sharpened: float = 1.0) -> list[ScoredPair]:
    """A model whose probabilities are true, if they are not sharpened."""
    chance = random.Random(7)
    found = []
    for _ in range(count):
        lead = chance.gauss(0, 2)
        is_right = chance.random() < 1 / (1 + math.exp(-abs(lead)))
        found.append(pair(abs(lead) * sharpened if is_right else -abs(lead) * sharpened, 0.0))
    return found


def test_the_calibration_error_tells_a_true_confidence_from_a_boast() -> None:
    honest = scored_pairs.calibration(of_a_calibrated_model(20_000))
    boastful = scored_pairs.calibration(of_a_calibrated_model(20_000, sharpened=4.0))
    assert scored_pairs.calibration_error(honest) < 0.01
    assert scored_pairs.calibration_error(boastful) > 0.1
    for one in honest:
        assert one.low <= one.confidence <= one.high
        assert one.accuracy.value == pytest.approx(one.confidence, abs=0.03)


def test_the_calibration_error_is_its_definition() -> None:
    found = [pair(0.2, 0), pair(0.2, 0), pair(0, 0.2), pair(3, 0)]
    sure, very = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(-3))
    expected = 3 / 4 * abs(2 / 3 - sure) + 1 / 4 * abs(1 - very)
    bins = scored_pairs.calibration(found)
    assert [one.accuracy.n for one in bins] == [3, 1]
    assert scored_pairs.calibration_error(bins) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(-5, 5)), min_size=1, max_size=80))
def test_a_cut_has_every_pair_once(rows: list[tuple[int, int, float]]) -> None:
    found = [
        ScoredPair("ab"[index % 2], index, lead, 0.0, *lengths, margin=float(index % 5), columns={"kind": index % 3})
        for index, (*lengths, lead) in enumerate(rows)
    ]
    for title, cut in scored_pairs.slices(found).items():
        assert sum(one.accuracy.n for one in cut) == len(found), title
        wins = sum(one.accuracy.value * one.accuracy.n for one in cut)
        assert wins == pytest.approx(scored_pairs.accuracy(found).value * len(found))


def test_slices_by_length_say_which_answer_is_longer() -> None:
    found = [pair(1, 0, (10, 100)), pair(1, 0, (80, 100)), pair(1, 0, (95, 100)), pair(0, 1, (100, 80))]
    found += [pair(1, 0, (100, 10)), pair(1, 0, (100, 100))]
    cut = {one.name: one.accuracy for one in scored_pairs.slices(found)["The preferred answer is ..."]}
    assert {name: one.n for name, one in cut.items()} == {
        "over a third shorter": 1,
        "shorter": 1,
        "equally long within 10%": 2,
        "longer": 1,
        "over a third longer": 1,
    }
    assert cut["longer"].value == 0


def test_a_model_that_only_counts_letters_is_found_out() -> None:
    chance = random.Random(1)
    lengths = [(chance.randint(1, 99), chance.randint(1, 99)) for _ in range(200)]
    found = [pair(float(chosen), float(rejected), (chosen, rejected)) for chosen, rejected in lengths]
    longer = next(scored_pairs.baselines(found))
    assert longer.name == "the longer answer wins"
    assert longer.agreement.value == pytest.approx(1 - sum(a == b for a, b in lengths) / 400)
    assert longer.accuracy == scored_pairs.longer_wins(found)
    assert longer.model_where_right is not None and longer.model_where_right.value == 1
    assert longer.model_where_wrong is not None and longer.model_where_wrong.value == 0
    assert scored_pairs.length_correlation(found) == pytest.approx(1)
    assert scored_pairs.length_correlation([pair(2, 1, (5, 5))]) == 0


def test_rules_that_read_the_texts_need_texts() -> None:
    texts = {"prompt": "how do tides work", "chosen": "tides work\nso", "rejected": "no idea"}
    names = [one.name for one in scored_pairs.baselines([pair(1, 0, **texts)])]
    assert names == ["the longer answer wins", "more lines win", "more of the prompt's words win"]
    lines_win, echo = list(scored_pairs.baselines([pair(1, 0, **texts)]))[1:]
    assert lines_win.accuracy.value == echo.accuracy.value == 1
    assert len(list(scored_pairs.baselines([pair(1, 0, **texts), pair(1, 0)]))) == 1


def test_the_hardest_are_the_most_wrong() -> None:
    found = [pair(0, lead) for lead in (0.5, 3.0, -2.0, 1.0, 0.0)]
    assert [one.lead for one in scored_pairs.hardest(found)] == [-3.0, -1.0, -0.5]
    assert [one.lead for one in scored_pairs.hardest(found, 1)] == [-3.0]


def test_subsets_come_from_their_column() -> None:
    found = [pair(1, 0, columns={"subset": "a"}), pair(0, 1, columns={"subset": "a"}), pair(1, 0, columns={})]
    assert [(one.name, one.accuracy.value, one.accuracy.n) for one in scored_pairs.subsets(found)] == [
        ("a", 0.5, 2),
        ("(none)", 1.0, 1),
    ]
    assert scored_pairs.subsets([pair(1, 0)]) == []


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in pairs(4)]
    rows[1] = rows[1][:40]
    rows[2] = rows[2].replace('"score_chosen": ', '"score_chosen": NaN, "was": ')
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(rows))
    found, faults = read_scored(path)
    assert [one.row for one in found] == [1, 4]
    assert [fault.removeprefix(f"{path}, ") for fault in faults] == [
        "line 2: not JSON; it is left out",
        "line 3: score_chosen is no number; it is left out",
    ]
    assert read_scored(tmp_path / "absent") == ([], [])


@pytest.mark.parametrize("row", [[], {}, {"score_chosen": True}, {"score_chosen": "1"}])
def test_what_is_no_pair_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match=r"no number|not a JSON object"):
        parse_pair(row)


def test_pairs_of_an_older_version_have_no_texts(tmp_path: Path) -> None:
    old = [
        {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected", "margin")}
        for row in pairs(3)
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text(lines(old))
    found, faults = read_scored(path)
    assert faults == [] and [one.chosen for one in found] == [None] * 3
