"""The demo's data and judge: varied, deterministic, apart from each other, and hard to please by tricks."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataSettings
from pipeline.datasets import load_instructions, load_preferences, load_prompts, prompt_key
from pipeline.functions import load_function

CONFIGS = Path(__file__).parents[2] / "configs"
DATA, JUDGE = CONFIGS / "quickstart_data.py", CONFIGS / "quickstart_judge.py"
judge = load_function(f"{JUDGE}:judge")
criteria = load_function(f"{JUDGE}:criteria")

ASKED = "How do I look after a house plant?"
GOOD = "Happy to help! Water the house plant when its soil feels dry, and turn the pot towards the window once a week."


def score(answer: str, asked: Any = ASKED) -> float:
    return float(judge([asked], [answer])[0])


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return sys.modules[load_function(f"{DATA}:prompts").__module__]


def rows(name: str) -> list[dict[str, Any]]:
    return list(load_function(f"{DATA}:{name}")())


# ---- the judge


def test_a_good_answer_gets_the_full_score() -> None:
    assert score(GOOD) == 1.0
    assert set(criteria(ASKED, GOOD).values()) == {1.0}


WORSE = {
    "short": "Happy to help! Water the house plant weekly in hot summers.",
    "complete": GOOD.rsplit(" ", 3)[0],
    "on_topic": "Happy to help! Restart the laptop when it gets slow, and free some space on the disk once a week.",
    "substance": "Happy to help! How do you look after a house plant, and what do you do after that?",
    "polite": GOOD.removeprefix("Happy to help! "),
    "fresh": "Happy to help! Water the house plant when dry. Water the house plant when dry. Water it near the window.",
    "readable": "Happy to help! House plant soil water dry pot window turn week light leaf care room warm.",
}


@pytest.mark.parametrize("name", WORSE)
def test_each_criterion_costs_something_by_itself(name: str) -> None:
    values = criteria(ASKED, WORSE[name])
    assert values[name] < 1
    assert {other for other, value in values.items() if value < 1} <= {name, "short"}
    assert score(WORSE[name]) < 0.95


def test_length_is_graded_on_both_sides() -> None:
    word = iter(f"{a}{b}" for a in "bcdfghklmn" for b in ("ane", "ilt", "orm", "ush", "ent", "ack"))
    pieces = [f"the {next(word)}" for _ in range(24)]
    texts = {2 * n: f"Thanks! Keep the house plant warm, {', '.join(pieces[:n])}." for n in range(1, 24)}
    lengths = {6 + count: criteria(ASKED, text)["short"] for count, text in texts.items()}
    assert [n for n, value in lengths.items() if value == 1.0] == list(range(12, 31, 2))
    assert lengths[8] == pytest.approx(8 / 12) and lengths[36] == pytest.approx(0.6) and lengths[46] == 0.0
    values = list(lengths.values())
    assert values == sorted(values[:6]) + sorted(values[6:], reverse=True)


def test_a_cut_answer_keeps_a_part_for_its_finished_sentences() -> None:
    whole = "Thank you. Water the house plant when the soil feels dry. Turn the pot towards the light."
    cut = whole.removesuffix(" the light.")
    assert 0 < criteria(ASKED, cut)["complete"] < 0.7 < criteria(ASKED, whole)["complete"] == 1.0
    assert criteria(ASKED, "Water the plant")["complete"] == 0.0
    assert criteria(ASKED, 'Say "water it!"')["complete"] == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        # A sentence, a run of words, one word.
        "Thanks! Water it. Water it. Turn the pot towards the light of the window.",
        "Thanks! Water the plant now and water the plant now or water the plant now.",
        "Thanks! Plant care is for a plant whose plant pot has one plant or another plant.",
    ],
)
def test_repetition_of_every_size_costs_freshness(answer: str) -> None:
    assert criteria(ASKED, answer)["fresh"] < 0.5


def test_one_courtesy_is_right_and_more_are_not() -> None:
    body = "Water the house plant when its soil feels dry, and turn the pot once a week."
    scores = [score(" ".join([*courtesies, body])) for courtesies in ([], ["Of course!"], ["Of course!", "Thanks!"])]
    assert scores[1] > scores[2] > scores[0] > 0.4
    assert criteria(ASKED, f"Of course! Thanks! {body} Good luck!")["polite"] == 0.0


HACKS = {
    "nothing": "",
    "space": " \n ",
    "punctuation": "...!!!",
    "only courtesy": "Happy to help!",
    "all courtesies": "Happy to help! Thank you! Good question! I hope this helps! Good luck! Let me know! Have fun!",
    "keywords": "plant house plant house plant house plant house plant house plant house plant.",
    "many keywords": "House plant soil water dry pot window turn week light leaf care room warm root seed.",
    "the question": "How do I look after a house plant?",
    "the question with courtesy": "Happy to help! How do I look after a house plant? How do I look after it?",
    "one sentence again and again": "Happy to help! Water the plant. Water the plant. Water the plant. Water it.",
    "small words": "Happy to help! It is what it is and that is how it is for all of us.",
    "endless": GOOD + " And then there is more to say about this and that." * 6,
    "another alphabet": "植物に水をやってください。" * 3,
    "noise": "xq zzv kk plant house ee rrt wq pp lk mn bv cx zz aq.",
}


@pytest.mark.parametrize("name", HACKS)
def test_tricks_score_low(name: str) -> None:
    assert score(HACKS[name]) < 0.35


@pytest.mark.parametrize("name", ["nothing", "space", "punctuation", "another alphabet"])
def test_no_words_score_nothing(name: str) -> None:
    assert score(HACKS[name]) == 0.0


def test_mending_a_fault_never_lowers_the_score() -> None:
    blunt = "Water the house plant when its soil feels dry, and turn the pot towards the window once a week"
    steps = ["Water it.", "Water the plant.", "Water the house plant when dry.", f"{blunt}.", f"Of course! {blunt}."]
    scores = [score(step) for step in steps]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert score(f"Of course! {blunt}") < score(f"Of course! {blunt}.")


@settings(max_examples=200, deadline=None)
@given(asked=st.text(max_size=60), answer=st.text(max_size=300) | st.lists(st.sampled_from(GOOD.split())).map(" ".join))
def test_the_score_lies_between_0_and_1_whatever_is_said(asked: str, answer: str) -> None:
    values = criteria(asked, answer)
    assert 0.0 <= score(answer, asked) <= 1.0
    assert all(0.0 <= value <= 1.0 for value in values.values())
    assert score(answer, asked) == score(answer, [{"role": "user", "content": asked}])


def test_the_judge_takes_batches_conversations_and_columns() -> None:
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "A"},
    ]
    prompts = [[*talk, {"role": "user", "content": ASKED}], ASKED, "Which wine?"]
    scores = judge(prompts=prompts, completions=[GOOD, GOOD, GOOD], kind=["care"] * 3)
    assert scores[0] == scores[1] == 1.0 > scores[2]
    with pytest.raises(ValueError):
        judge(["a"], [])


def test_a_topic_is_found_in_another_form_of_the_word() -> None:
    for answer in ("plants", "planting", "Plant's", "PLANTED"):
        assert criteria("What about a plant?", answer)["on_topic"] == 1.0
    assert criteria("What should I do?", "Anything.")["on_topic"] == 1.0


# ---- the data


def test_there_is_enough_of_everything_and_no_question_twice() -> None:
    counts = {name: len(rows(name)) for name in ("demonstrations", "comparisons", "prompts", "held_out_prompts")}
    assert counts["demonstrations"] >= 300 and counts["comparisons"] >= 400
    assert counts["prompts"] >= 300 and counts["held_out_prompts"] >= 128
    keys = [prompt_key(row["prompt"][0]["content"]) for name in ("prompts", "held_out_prompts") for row in rows(name)]
    assert len(set(keys)) == len(keys)


def test_nothing_of_the_evaluation_is_seen_in_training(tables: ModuleType) -> None:
    asked = {row["prompt"][0]["content"] for row in rows("held_out_prompts")}
    seen = {row["prompt"][0]["content"] for name in ("demonstrations", "comparisons", "prompts") for row in rows(name)}
    assert not asked & seen
    told = " ".join(
        turn["content"]
        for name, parts in (("demonstrations", ["completion"]), ("comparisons", ["chosen", "rejected"]))
        for row in rows(name)
        for part in ["prompt", *parts]
        for turn in row[part]
    )
    for kind in tables.KINDS:
        for topic in kind.topics[-tables.HELD_OUT_TOPICS_PER_KIND :]:
            assert topic.name not in told
            assert not any(point in told for point in topic.points if len(point.split()) > 5)


def test_the_first_hundred_held_out_prompts_are_of_all_kinds(tables: ModuleType) -> None:
    kinds = Counter(row["kind"] for row in rows("held_out_prompts")[:100])
    assert len(kinds) == len(tables.KINDS) and min(kinds.values()) >= 4


def test_topics_are_complete(tables: ModuleType) -> None:
    for kind in tables.KINDS:
        assert len(kind.topics) == 6 and len(set(kind.questions)) == 7
        for topic in kind.topics:
            assert len(set(topic.points)) == 4
            assert all(2 <= len(point.split()) <= 12 for point in topic.points), topic
    assert sum(share for _, share in tables.STYLES) == 100


def test_the_data_does_not_depend_on_the_process() -> None:
    # Python's own hashes of texts differ from process to process; the data must not follow them.
    program = f"import runpy, json; print(json.dumps(list(runpy.run_path({str(DATA)!r})['comparisons']())))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {json.dumps(rows("comparisons")).encode() + b"\n"}


def test_the_answers_are_a_mixture_with_room_above_it() -> None:
    scores = [score(row["completion"][0]["content"], row["prompt"]) for row in rows("demonstrations")]
    assert 0.45 <= statistics.mean(scores) <= 0.55
    assert statistics.pstdev(scores) > 0.3
    assert sum(value > 0.9 for value in scores) / len(scores) > 0.2
    assert sum(value < 0.2 for value in scores) / len(scores) > 0.2


def test_every_style_is_what_it_is_called(tables: ModuleType) -> None:
    asks = tables._questions(held_out=False)
    means = {
        write.__name__: statistics.mean(score(write(ask, f"x {ask.text}"), ask.text) for ask in asks)
        for write, _ in tables.STYLES
    }
    assert means.pop("_good") > 0.95
    assert all(value < 0.55 for value in means.values())


def test_answers_are_short_enough_for_a_laptop() -> None:
    answers = [row["completion"][0]["content"] for row in rows("demonstrations")]
    words = [len(answer.split()) for answer in answers]
    assert 12 <= statistics.median(words) <= 26 and max(words) <= 38
    assert max(len(answer) for answer in answers) <= 220


def test_pairs_follow_the_judge_but_for_one_label_in_twenty(tables: ModuleType) -> None:
    differences = [
        score(row["chosen"][0]["content"], row["prompt"]) - score(row["rejected"][0]["content"], row["prompt"])
        for row in rows("comparisons")
    ]
    wrong = sum(difference < 0 for difference in differences) / len(differences)
    assert 0.02 <= wrong <= 0.08
    assert min(map(abs, differences)) >= tables.TIE


def test_the_longer_answer_is_not_simply_the_better_one() -> None:
    longer = [len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows("comparisons")]
    assert 0.4 <= sum(longer) / len(longer) <= 0.7


def test_trivet_reads_it_without_dropping_a_row() -> None:
    data = DataSettings.model_validate(
        {
            "instructions": {"sources": [f"{DATA}:demonstrations"]},
            "preferences": {"sources": [f"{DATA}:comparisons"]},
            "prompts": {"sources": [f"{DATA}:prompts"], "held_out": [f"{DATA}:held_out_prompts"]},
        }
    )
    for split in (load_instructions(data), load_preferences(data), load_prompts(data)):
        assert all(not report.dropped for report in split.reports)
        assert split.train and split.held_out
    assert set(load_prompts(data).held_out[0].columns) == {"kind"}
