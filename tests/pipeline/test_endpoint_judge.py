"""A judge behind an endpoint: asked in both orders, patient, honest about failures, and silent about the key."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from judge_server import Asked, judge_server, longer_wins

from pipeline.config import JudgeSettings
from pipeline.endpoint_judge import EndpointJudge, Opinion, read_choice
from pipeline.errors import ConfigError

KEY = "sk-very-secret-0123456789"
PAIRS = [("Say it.", "a long answer", "short"), ("Say it.", "short", "a long answer"), ("Say it.", "same", "size")]


def settings(address: str, **more: Any) -> JudgeSettings:
    return JudgeSettings.model_validate({"endpoint": address, "model": "judge-1", **more})


def judge(address: str, waits: list[float] | None = None, **more: Any) -> EndpointJudge:
    pauses = [] if waits is None else waits
    return EndpointJudge(settings(address, **more), {"JUDGE_KEY": KEY}, wait=pauses.append)


def test_each_pair_is_asked_about_in_both_orders() -> None:
    with judge_server(longer_wins) as server:
        assert judge(server.address, concurrency=1).compare(PAIRS) == [Opinion(1.0), Opinion(0.0), Opinion(0.5)]
    shown = [(asked.between("answer_A"), asked.between("answer_B")) for asked in server.asked]
    assert shown == [order for _, ours, theirs in PAIRS for order in ((ours, theirs), (theirs, ours))]
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
    assert {(asked.body["model"], asked.body["temperature"]) for asked in server.asked} == {("judge-1", 0)}


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_who_favours_a_position_decides_nothing(favourite: str) -> None:
    with judge_server(lambda _: favourite) as server:
        assert judge(server.address).compare(PAIRS) == [Opinion(0.5)] * 3


def test_one_opinion_and_a_tie_decide() -> None:
    def undecided_when_second(asked: Asked) -> str:
        return "A" if asked.between("answer_A") == "good" else "tie"

    with judge_server(undecided_when_second) as server:
        assert judge(server.address).compare([("?", "good", "bad"), ("?", "bad", "good")]) == [
            Opinion(1.0),
            Opinion(0.0),
        ]


def test_equal_answers_are_a_tie_without_a_question() -> None:
    with judge_server(longer_wins) as server:
        assert judge(server.address).compare([("?", "same", "same")]) == [Opinion(0.5)]
    assert not server.asked


def test_conversations_and_instructions_are_shown() -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    with judge_server(longer_wins) as server:
        judge(server.address, instructions="Prefer kindness.").compare([(prompt, "hi", "hello")])
    assert server.asked[0].between("request") == "system: Be kind.\nuser: Hello?"
    assert server.asked[0].body["messages"][0]["content"].startswith("Prefer kindness.")


# -- failures


def failing(times: int, status: int = 503, headers: dict[str, str] | None = None) -> Any:
    """A server that fails some times and then judges."""
    left = [times]

    def reply(asked: Asked) -> Any:
        left[0] -= 1
        return (status, "overloaded", headers or {}) if left[0] >= 0 else longer_wins(asked)

    return reply


def test_a_failure_that_passes_is_waited_for_longer_and_longer() -> None:
    waits: list[float] = []
    with judge_server(failing(3)) as server:
        assert judge(server.address, waits, concurrency=1).compare(PAIRS[:1]) == [Opinion(1.0)]
    assert waits == [1.0, 2.0, 4.0] and len(server.asked) == 5


def test_the_endpoint_s_own_wish_is_heeded_up_to_a_minute() -> None:
    waits: list[float] = []
    with judge_server(failing(1, 429, {"Retry-After": "7"})) as server:
        judge(server.address, waits, concurrency=1).compare(PAIRS[:1])
    with judge_server(failing(1, 429, {"Retry-After": "9999"})) as server:
        judge(server.address, waits, concurrency=1).compare(PAIRS[:1])
    assert waits == [7.0, 60.0]


def test_what_fails_for_good_is_left_out_with_its_reason() -> None:
    def one_of_them(asked: Asked) -> Any:
        return (500, "no", {}) if "cursed" in asked.body["messages"][-1]["content"] else longer_wins(asked)

    pairs = [PAIRS[0], ("cursed", "long answer", "b"), PAIRS[1]]
    with judge_server(one_of_them) as server:
        found = judge(server.address, retries=1, concurrency=1).compare(pairs)
    assert [opinion.score for opinion in found] == [1.0, None, 0.0]
    assert found[1].error is not None and "HTTP 500" in found[1].error


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_endpoint_refuses_of_one_pair_costs_that_pair_alone(status: int) -> None:
    def too_long(asked: Asked) -> Any:
        return (status, "too long", {}) if "cursed" in asked.body["messages"][-1]["content"] else longer_wins(asked)

    pairs = [PAIRS[0], ("cursed", "long answer", "b"), PAIRS[1]]
    waits: list[float] = []
    with judge_server(too_long) as server:
        found = judge(server.address, waits, retries=3, concurrency=1).compare(pairs)
    assert [opinion.score for opinion in found] == [1.0, None, 0.0]
    assert f"HTTP {status}" in str(found[1].error)
    assert waits == [] and len(server.asked) == 5, "it is not asked again"


def test_an_endpoint_that_refuses_everything_is_asked_a_few_times_only() -> None:
    pairs = [(f"prompt {n}", "one", "other answer") for n in range(40)]
    with judge_server(lambda _: (400, "no such model", {})) as server:
        found = judge(server.address, concurrency=1).compare(pairs)
    assert [opinion.score for opinion in found] == [None] * 40 and len(server.asked) == 8


@pytest.mark.parametrize("status", [401, 402, 403, 404, 302])
def test_a_refusal_of_the_account_or_the_address_ends_the_asking(status: int) -> None:
    with judge_server(lambda _: (status, "no", {})) as server:
        found = judge(server.address, concurrency=1).compare(PAIRS)
    assert [opinion.score for opinion in found] == [None] * 3 and len(server.asked) == 1


def test_a_refused_key_is_not_tried_again_and_again() -> None:
    with judge_server(lambda _: (401, f"bad key {KEY}", {})) as server:
        found = judge(server.address, api_key_variable="JUDGE_KEY", concurrency=1).compare(PAIRS)
    assert len(server.asked) == 1
    assert all(opinion.score is None and "HTTP 401" in str(opinion.error) for opinion in found)
    assert KEY not in str(found), "an endpoint may repeat the key in its complaint"


def test_an_endpoint_where_nobody_is_costs_a_few_attempts_only() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits: list[float] = []
    pairs = [(f"prompt {n}", "one", "other answer") for n in range(40)]
    found = judge(address, waits, retries=2, concurrency=1).compare(pairs)
    assert [opinion.score for opinion in found] == [None] * 40
    assert "refused" in str(found[0].error) and len(waits) == 8 * 2


@pytest.mark.parametrize("reply", ["I cannot say.", ""])
def test_a_reply_that_names_nobody_is_asked_for_again(reply: str) -> None:
    with judge_server(lambda _: reply) as server:
        (found,) = judge(server.address, retries=2).compare(PAIRS[:1])
    assert found.score is None and "neither A, B nor tie" in str(found.error) and len(server.asked) == 3


@pytest.mark.parametrize("body", ["not json", "{}", '{"choices": []}', '{"choices": [{"message": null}]}', "[1]"])
def test_a_reply_of_another_shape_is_an_error_not_a_crash(body: str) -> None:
    with judge_server(lambda _: (200, body, {})) as server:
        (found,) = judge(server.address, retries=0).compare(PAIRS[:1])
    assert found.score is None and found.error


def test_the_key_does_not_follow_a_redirect() -> None:
    with judge_server(longer_wins) as other, judge_server(lambda _: (302, "", {"Location": other.address})) as server:
        (found,) = judge(server.address, api_key_variable="JUDGE_KEY").compare(PAIRS[:1])
    assert found.score is None and not other.asked


# -- the key


def test_the_key_is_sent_where_it_is_asked_for_and_only_there() -> None:
    with judge_server(longer_wins) as server:
        judge(server.address, api_key_variable="JUDGE_KEY").compare(PAIRS[:1])
        judge(server.address).compare(PAIRS[:1])
    sent = [asked.headers.get("Authorization") for asked in server.asked]
    assert sent == [f"Bearer {KEY}"] * 2 + [None] * 2


def test_a_key_that_is_not_there_is_missed_at_once() -> None:
    with pytest.raises(ConfigError, match="the environment variable NO_KEY") as caught:
        EndpointJudge(settings("http://127.0.0.1:1/v1", api_key_variable="NO_KEY"), {})
    assert "export NO_KEY=" in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "first"),
        ("B.", "second"),
        ("tie", "tie"),
        ("**Tie**", "tie"),
        ("A is fluent, but B is right: B", "second"),
        ("Answer A is better", "first"),
        ("I prefer B", "second"),
        ("B. A is rambling.", "second"),
        ("**B** - A is wrong", "second"),
        ("tie: A and B both say so. Tie", "tie"),
        ("Tie. A and B are alike", "tie"),
        ("Answer: B (A hedges)", "second"),
        ("**Verdict:** Answer B\nA hedges", "second"),
        ("My winner: [[B]], since A hedges", "second"),
        ("B\n\nA is rambling", "second"),
        ("A is fluent, B is right.\n\nB", "second"),
        ("A: fluent\nB: right\nVerdict: B since A is wrong", "second"),
        ("Answer A: fluent\nAnswer B: right\nAnswer B", "second"),
    ],
)
def test_the_choice_is_told_from_its_reasons(reply: str, choice: str) -> None:
    assert read_choice(reply) == choice


@pytest.mark.parametrize("reply", ["A is better than B", "A. fluent\nB. right\nSo B wins", "Answer: A\n...\nB"])
def test_a_reply_that_begins_with_one_and_ends_with_the_other_is_asked_for_again(reply: str) -> None:
    with judge_server(lambda _: reply) as server:
        (found,) = judge(server.address, retries=1).compare(PAIRS[:1])
    assert found.score is None and "names both" in str(found.error) and len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "score"),
    [("B", 0.5), ("B. A is rambl", 0.5), ("Answer A is fluent, but B", None), ("Let us see: A", None)],
)
def test_of_a_reply_that_was_cut_off_only_its_beginning_counts(reply: str, score: float | None) -> None:
    body = json.dumps({"choices": [{"message": {"content": reply}, "finish_reason": "length"}]})
    with judge_server(lambda _: (200, body, {})) as server:
        (found,) = judge(server.address, retries=0).compare(PAIRS[:1])
    assert found.score == score
    assert score is not None or "cut off at max_tokens" in str(found.error)


@pytest.mark.parametrize("address", ["ftp://x/v1", "http://user:password@host/v1", "http://host/v1?key=1", "host/v1"])
def test_addresses_that_hold_a_key_or_are_none_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        settings(address)
