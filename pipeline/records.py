"""What data is made of, before and after tokenization.

Shape legend: B sequence, Q prompt token, T response token, L = Q + T.

A text is either a plain string (continued as it stands, no template) or a tuple of chat messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Messages = tuple[Message, ...]
Text = str | Messages


def as_plain(text: Text) -> Any:
    """The text as JSON-able data: the string itself, or a list of `{"role", "content"}`."""
    if isinstance(text, str):
        return text
    return [{"role": message.role, "content": message.content} for message in text]


@dataclass(frozen=True)
class Origin:
    """Where a record came from: the source's name as the config gives it, and its 1-based row."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate. The loss runs over the assistant turns of `completion`."""

    prompt: Text
    completion: Text
    origin: Origin


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, of which people (or a judge) preferred `chosen`.

    `margin` is by how much, in units of the reward difference (Touvron et al. 2023); None if unknown.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. `columns` are the row's other columns, handed to reward functions."""

    prompt: Text
    origin: Origin
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedExample:
    """A whole sequence as token ids. `loss_mask` is True on what the assistant said, EOS included."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
