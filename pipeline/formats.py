"""Which of the known formats a source's rows are in, and how a row of each becomes a record.

A row of the wrong type is an error that names its line; a row that says nothing (an empty answer, a
conversation without one) is a `Dropped` with its reason, to be counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any, Generic, TypeVar

from pipeline.errors import DataError
from pipeline.records import Comparison, Demonstration, Message, Messages, Origin, Prompt, Text
from pipeline.sources import Cell, Row

Record = TypeVar("Record", Demonstration, Comparison, Prompt)

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
# What reward functions are called with besides the columns; a column of that name cannot be handed on.
_REWARD_ARGUMENTS = ("prompts", "completions")
# How a conversation begins that was written into one cell of a table, as JSON or (not to be read) as Python prints it.
_LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
_TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Dropped:
    """A well-formed row of which nothing can be learnt, and why."""

    reason: str


@dataclass(frozen=True)
class Format(Generic[Record]):
    """A way to write rows: its name, the columns that each row must have, and how a row is read."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Row, str], Record | Dropped]


def detect(formats: Sequence[Format[Record]], rows: Sequence[Row], source: str) -> Format[Record]:
    """The format of a source: the first whose columns some row has. Every row must then have them.

    Raises:
        DataError: no row fits a format, or one lacks a column that its fellows have.
    """
    filled = ({column for column, value in row.values.items() if value is not None} for row in rows)
    # Rows that have the columns with nothing in them are empty, which is counted, not unknown.
    named = (set(row.values) for row in rows)
    for present in chain(filled, named):
        found = next((known for known in formats if present.issuperset(known.required)), None)
        if found is not None:
            break
    else:
        columns = ", ".join(dict.fromkeys(column for row in rows[:100] for column in row.values)) or "none"
        raise DataError(
            f"the columns fit no known format: {columns}",
            where=source,
            remedy="Rename the columns to one of: "
            + "; ".join(f"{known.name} ({', '.join(known.required)})" for known in formats)
            + ".",
        )
    for row in rows:
        missing = [column for column in found.required if column not in row.values]
        if missing:
            raise DataError(
                f"the row has no '{missing[0]}', which other rows of the source have (format {found.name})",
                where=row.where,
                remedy=f"Add '{missing[0]}', or remove the row. Its columns: {', '.join(row.values) or 'none'}.",
            )
    return found


# ---- texts and messages


def _text(value: Any, row: Row, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"'{column}' is of type {type(value).__name__}, where a text is expected",
            where=row.where,
            remedy='Write a text, or a list of messages: [{"role": ..., "content": ...}].'
            if isinstance(value, Mapping)
            else "Put the value in quotes, or remove the row.",
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(
            f"'{column}' holds half of a surrogate pair, which is no character",
            where=row.where,
            remedy="Remove the \\ud... escape, or write both halves of it.",
        )
    return value


def _messages(value: Any, row: Row, column: str) -> Messages:
    if isinstance(value, str):
        # CSV has no lists: a conversation in a cell is JSON.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"'{column}' is not a list of messages",
            where=row.where,
            remedy='Write [{"role": ..., "content": ...}]; in a CSV cell as JSON, with double quotes.',
        )
    return tuple(_message(item, row, f"{column}[{position}]") for position, item in enumerate(value))


def _message(value: Any, row: Row, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"'{place}' is of type {type(value).__name__}, where a message is expected",
            where=row.where,
            remedy='Write {"role": ..., "content": ...}.',
        )
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            raise DataError(
                f"'{place}' has no '{key}'", where=row.where, remedy=f"Add it; a message has {role_key}, {content_key}."
            )
    role = value[role_key]
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise DataError(
            f"'{place}' has the unknown role {role!r}",
            where=row.where,
            remedy="Known roles: system, user (or human), assistant (or gpt).",
        )
    content = value[content_key]
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and "text" in part for part in content
    ):
        content = "".join(_text(part["text"], row, f"{place}.{content_key}") for part in content)
    return Message(_ROLES[role.lower()], _text(content, row, f"{place}.{content_key}"))


def _text_or_messages(value: Any, row: Row, column: str) -> Text:
    # Elsewhere a text is what somebody said, whatever it looks like.
    if isinstance(value, (list, tuple)) or (isinstance(value, Cell) and _LIST_OF_MESSAGES.match(value)):
        return _messages(value, row, column)
    return _text(value, row, column)


def _transcript(text: str) -> Messages | None:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ..."; None for a text that does not begin with a human turn."""
    parts = _TRANSCRIPT_TURN.split(text)
    if parts[0].strip() or len(parts) < 2 or parts[1] != "Human":
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Message(roles[speaker], content.strip()) for speaker, content in turns)


def _is_blank(text: Text) -> bool:
    """Whether a text, or any turn of a conversation but a system turn, has nothing in it."""
    if isinstance(text, str):
        return not text.strip()
    return not text or any(not message.content.strip() for message in text if message.role != "system")


def _fault(prompt: Text, *completions: Text) -> Dropped | None:
    """Why a prompt with its completions cannot be used; None if it can."""
    if _is_blank(prompt) or any(_is_blank(completion) for completion in completions):
        return Dropped("empty")
    if not isinstance(prompt, str) and prompt[-1].role != "user":
        return Dropped("no question")
    if any(not isinstance(text, str) and text[0].role != "assistant" for text in completions):
        return Dropped("no answer")
    return None


def _ending_with_assistant(messages: Messages) -> Messages:
    """The conversation without the turns that nobody answered."""
    end = len(messages)
    while end and messages[end - 1].role != "assistant":
        end -= 1
    return messages[:end]


def _without_answer(messages: Messages) -> Messages:
    end = len(messages)
    while end and messages[end - 1].role == "assistant":
        end -= 1
    return messages[:end]


def _joined(prompt: Text, completion: Text) -> tuple[Text, Text] | Dropped:
    """Prompt and completion in one form: both text, or both messages, the completion without the prompt's turns."""
    if isinstance(completion, str):
        if isinstance(prompt, str):
            return prompt, completion
        return prompt, (Message("assistant", completion),) if completion.strip() else ""
    completion = _ending_with_assistant(completion)
    asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if not completion:
        return Dropped("no answer")
    if completion[0].role == "assistant":
        return asked, completion
    # The completion repeats the prompt: a whole conversation stands in it.
    if isinstance(prompt, str):
        start = next((i for i, turn in enumerate(completion) if turn.role == "assistant"), len(completion))
        asked = completion[:start]
        if asked[-1].content.strip() != prompt.strip():
            return Dropped("prompt is not in the conversation")
        return asked, completion[start:]
    if completion[: len(asked)] != asked:
        return Dropped("prompt is not in the conversation")
    return asked, completion[len(asked) :]


# ---- instructions


def _demonstration(prompt: Text, completion: Text, row: Row, source: str) -> Demonstration | Dropped:
    return _fault(prompt, completion) or Demonstration(prompt, completion, Origin(source, row.number))


def _demonstration_from_turns(turns: Messages, row: Row, source: str) -> Demonstration | Dropped:
    turns = _ending_with_assistant(turns)
    if not turns:
        return Dropped("no answer")
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    if not any(turn.role == "user" for turn in turns[:first]):
        return Dropped("no question")
    return _demonstration(turns[:first], turns[first:], row, source)


def _from_messages(row: Row, source: str) -> Demonstration | Dropped:
    return _demonstration_from_turns(_messages(row.values["messages"], row, "messages"), row, source)


def _from_sharegpt(row: Row, source: str) -> Demonstration | Dropped:
    turns = row.values["conversations"]
    if isinstance(system := row.values.get("system"), str) and system.strip() and isinstance(turns, list):
        turns = [{"from": "system", "value": system}, *turns]
    return _demonstration_from_turns(_messages(turns, row, "conversations"), row, source)


def _from_prompt_and_completion(row: Row, source: str) -> Demonstration | Dropped:
    prompt = _text_or_messages(row.values["prompt"], row, "prompt")
    completion = _text_or_messages(row.values["completion"], row, "completion")
    joined = _joined(prompt, completion)
    return joined if isinstance(joined, Dropped) else _demonstration(*joined, row, source)


def _alpaca_question(row: Row) -> Messages:
    instruction = _text(row.values["instruction"], row, "instruction")
    context = _text(row.values.get("input"), row, "input")
    return (Message("user", f"{instruction}\n\n{context}" if context.strip() else instruction),)


def _from_alpaca(row: Row, source: str) -> Demonstration | Dropped:
    answer = Message("assistant", _text(row.values["output"], row, "output"))
    return _demonstration(_alpaca_question(row), (answer,), row, source)


INSTRUCTION_FORMATS: tuple[Format[Demonstration], ...] = (
    Format("messages", ("messages",), _from_messages),
    Format("prompt/completion", ("prompt", "completion"), _from_prompt_and_completion),
    Format("Alpaca", ("instruction", "output"), _from_alpaca),
    Format("ShareGPT", ("conversations",), _from_sharegpt),
)


# ---- preferences


def _comparison(prompt: Text, chosen: Text, rejected: Text, row: Row, source: str) -> Comparison | Dropped:
    fault = _fault(prompt, chosen, rejected)
    if fault is not None:
        return fault
    columns = {key: value for key, value in row.values.items() if key not in ("prompt", "chosen", "rejected", "margin")}
    return Comparison(prompt, chosen, rejected, Origin(source, row.number), _margin(row), columns)


def _margin(row: Row) -> float | None:
    value = row.values.get("margin")
    if value is None or value == "":
        return None
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(
            f"'margin' is {repr(value)[:60]}, where a finite number is expected",
            where=row.where,
            remedy="Write a number, or leave the margin out.",
        )
    return margin


def _from_pair_with_prompt(row: Row, source: str) -> Comparison | Dropped:
    prompt = _text_or_messages(row.values["prompt"], row, "prompt")
    sides = []
    for column in ("chosen", "rejected"):
        joined = _joined(prompt, _text_or_messages(row.values[column], row, column))
        if isinstance(joined, Dropped):
            return joined
        sides.append(joined)
    (prompt_chosen, chosen), (prompt_rejected, rejected) = sides
    if prompt_chosen != prompt_rejected:
        return Dropped("no common prompt")
    return _comparison(prompt_chosen, chosen, rejected, row, source)


def _from_pair_alone(row: Row, source: str) -> Comparison | Dropped:
    sides: list[Messages] = []
    for column in ("chosen", "rejected"):
        value = _text_or_messages(row.values[column], row, column)
        if isinstance(value, str):
            if not value.strip():
                return Dropped("empty")
            turns = _transcript(value)
            if turns is None:
                raise DataError(
                    f"'{column}' is a text without a prompt",
                    where=row.where,
                    remedy="Add a column 'prompt', or write messages, or a transcript that begins with 'Human:'.",
                )
            value = turns
        sides.append(_ending_with_assistant(value))
    chosen, rejected = sides
    if not chosen or not rejected:
        return Dropped("no answer")
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    # The prompt is what both share, up to a place where both go on with an answer.
    limit = min(common, len(chosen) - 1, len(rejected) - 1)
    for start in range(limit, 0, -1):
        if chosen[start].role == rejected[start].role == "assistant":
            return _comparison(chosen[:start], chosen[start:], rejected[start:], row, source)
    return Dropped("no common prompt")


PREFERENCE_FORMATS: tuple[Format[Comparison], ...] = (
    Format("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _from_pair_with_prompt),
    Format("chosen/rejected", ("chosen", "rejected"), _from_pair_alone),
)


# ---- prompts


def _prompt(prompt: Text, row: Row, source: str, *used: str) -> Prompt | Dropped:
    if not isinstance(prompt, str):
        prompt = _without_answer(prompt)
    columns = {key: value for key, value in row.values.items() if key not in (*used, *_REWARD_ARGUMENTS)}
    return _fault(prompt) or Prompt(prompt, Origin(source, row.number), columns)


def _prompt_from_prompt(row: Row, source: str) -> Prompt | Dropped:
    return _prompt(_text_or_messages(row.values["prompt"], row, "prompt"), row, source, "prompt")


def _prompt_from_messages(row: Row, source: str) -> Prompt | Dropped:
    return _prompt(_messages(row.values["messages"], row, "messages"), row, source, "messages")


def _prompt_from_alpaca(row: Row, source: str) -> Prompt | Dropped:
    return _prompt(_alpaca_question(row), row, source, "instruction", "input")


PROMPT_FORMATS: tuple[Format[Prompt], ...] = (
    Format("prompt", ("prompt",), _prompt_from_prompt),
    Format("messages", ("messages",), _prompt_from_messages),
    Format("Alpaca", ("instruction",), _prompt_from_alpaca),
)
