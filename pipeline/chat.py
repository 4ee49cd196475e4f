"""Text to token ids and back: the only place that touches tokenizers' chat templates.

SFT, the reward model and PPO all get their sequences from `ChatFormat`, so that the same words are the same
tokens in every stage. A completion is tokenized apart from its prompt, because that is how PPO sees the two.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from pipeline.errors import BaseModelError, DataError
from pipeline.records import Message, Messages, Text, TokenizedExample, as_plain

# Some templates write today's date into the system turn, which would change the data overnight. They get this
# day instead: the one that Llama 3's own template falls back to. A macro, as transformers hands no functions on.
_TEMPLATE_DATE = date(2024, 7, 26)
_STANDING_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{_TEMPLATE_DATE.strftime('%' + code)}')" for code in "aAbBdjmyYHMS")
    + " }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class _TurnEnd:
    """What the template writes after an assistant turn: `before`, the EOS (None: no EOS), then `after`."""

    token_id: int | None
    before: str
    token: str
    after: str

    @property
    def whole(self) -> str:
        return self.before + self.token + self.after


class ChatFormat:
    """A tokenizer together with the template that turns messages into text.

    Args:
        tokenizer: a transformers tokenizer. It is not changed.
        chat_template: Jinja source that replaces the tokenizer's own template. None keeps its own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._template: str | None = chat_template if chat_template is not None else _own_template(tokenizer)

    # ---- ids

    def prompt_ids(self, prompt: Text) -> list[int]:
        """The tokens that a response follows.

        Messages go through the template and end with the opening of an assistant turn. Plain text gets what
        the tokenizer itself puts before a text (a BOS, or nothing).

        Raises:
            BaseModelError: messages, but no chat template.
            DataError: the template refuses the conversation.
        """
        if isinstance(prompt, str):
            ids = self._encode(prompt)
            opening = self._opening_ids
            return ids if ids[: len(opening)] == opening else opening + ids
        return self._encode(self._render(prompt, generation_prompt=True))

    def example(self, prompt: Text, completion: Text) -> TokenizedExample:
        """A prompt and its completion as one sequence, which starts with exactly `prompt_ids(prompt)`.

        It ends with exactly one EOS, the one that closes the last assistant turn: what a template writes after
        it is cut off, and where there is none it is appended. The loss mask covers what the assistant says in
        the completion, with the EOS that ends each of its turns; a user turn inside the completion is context.

        Args:
            prompt: text or messages.
            completion: text, or messages that start and end with an assistant turn. A text that follows messages
                is an assistant turn.

        Raises:
            BaseModelError: no EOS, no template, or one that renders a turn differently once others follow.
            DataError: the template refuses the conversation.
        """
        ids = self.prompt_ids(prompt)
        mask = [False] * len(ids)

        def add(more: list[int], said: bool) -> None:
            ids.extend(more)
            mask.extend([said] * len(more))

        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise ValueError("a completion of messages needs a prompt of messages")
            add([*self._encode_after(completion), self.eos_token_id], True)
        else:
            turns = (Message("assistant", completion),) if isinstance(completion, str) else completion
            for context, said, closed in self._assistant_turns(prompt, turns):
                add(self._encode_after(context), False)
                add([*self._encode_after(said), *([self.eos_token_id] if closed else [])], True)
        return TokenizedExample(tuple(ids), tuple(mask))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    # ---- what the tokenizer and the template are

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a response.

        It is the special token with which the template closes an assistant turn, which is not always what the
        tokenizer calls its EOS (Gemma's turns end with `<end_of_turn>`); without such a one, the tokenizer's EOS.

        Raises:
            BaseModelError: there is neither.
        """
        token_id = self._turn_end.token_id
        if token_id is None:
            token_id = self.tokenizer.eos_token_id
        if token_id is None:
            raise BaseModelError(
                "the tokenizer has no EOS token, so that a response could never end",
                where="base.model",
                remedy="Set base.chat_template to a template that closes assistant turns with a special token,"
                " or give the tokenizer an eos_token in its tokenizer_config.json.",
            )
        return int(token_id)

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered at all."""
        return self._template is not None

    @cached_property
    def template_digest(self) -> str:
        """SHA-256 of the template's source; of nothing where there is no template."""
        return hashlib.sha256((self._template or "").encode()).hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of all that decides how text becomes tokens: vocabulary, merges, rules, special tokens.

        Padding and truncation are left out: they are settings of the moment, and trivet reads neither.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            rules = json.loads(backend.to_str())
            rules.pop("padding", None)
            rules.pop("truncation", None)
        else:
            rules = {"class": type(self.tokenizer).__name__, "vocab": self.tokenizer.get_vocab()}
        description = {"rules": rules, "opening": self._opening_ids, "eos": self.tokenizer.eos_token_id}
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def special_tokens_in(self, text: str) -> list[str]:
        """The special tokens that a text spells out, in order: each would become one token, not its letters."""
        return self._special_pattern.findall(text) if self._special_tokens else []

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        listed = getattr(self.tokenizer, "added_tokens_decoder", {})
        # Some tokenizers do not flag the tokens that open a turn as special.
        template = self._template or ""

        def opens_turns(text: str) -> bool:
            return len(text.strip()) > 2 and text in template

        tokens = {str(one): token_id for token_id, one in listed.items() if one.special or opens_turns(str(one))}
        tokens.update(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        return {token: int(token_id) for token, token_id in tokens.items() if token}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in longest_first))

    # ---- tokens

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def _encode_after(self, text: str) -> list[int]:
        """Tokens of a text that stands inside a sequence: without the space some tokenizers put before a text."""
        if not text:
            return []
        if self._anchor_ids is None:
            return self._encode(text)
        anchored = self._encode("\n" + text)
        width = len(self._anchor_ids)
        return anchored[width:] if anchored[:width] == self._anchor_ids else self._encode(text)

    @cached_property
    def _anchor_ids(self) -> list[int] | None:
        """The tokens of a line break, for tokenizers that begin every text with a space; None for the others."""
        anchor = self._encode("\n")
        return None if self._encode("\na") == anchor + self._encode("a") else anchor

    @cached_property
    def _opening_ids(self) -> list[int]:
        """What the tokenizer puts before a plain text: usually a BOS or nothing."""
        bare, dressed = self._encode("a"), self._encode("a", add_special_tokens=True)
        starts = [start for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare]
        return dressed[: starts[-1]] if starts else []

    # ---- templates

    @cached_property
    def _timeless_template(self) -> str:
        template = self._template or ""
        return _STANDING_CLOCK + template if "strftime_now" in template else template

    def _render(self, messages: Messages, *, generation_prompt: bool) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._template is None:
            raise BaseModelError(
                "the data holds conversations, but the tokenizer has no chat template",
                where="base.model",
                remedy="Set base.chat_template to a Jinja file, or use data with plain-text prompts.",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                as_plain(messages),
                chat_template=self._timeless_template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                date_string=_TEMPLATE_DATE.strftime("%d %b %Y"),
            )
        except TemplateSyntaxError as error:
            raise BaseModelError(
                f"the chat template is not valid Jinja: {error.message}",
                where=f"chat template, line {error.lineno}",
                remedy="Correct base.chat_template.",
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template refuses a conversation with the turns {roles}: {error}",
                remedy="Change or remove such rows, or set base.chat_template to a template that takes them.",
            ) from None
        return str(text)

    def _assistant_turns(self, prompt: Messages, completion: Messages) -> list[tuple[str, str, bool]]:
        """The completion as a list of (context before the turn, what the assistant says, whether EOS follows).

        Found by rendering longer and longer prefixes of the conversation. The first context is empty, as the
        prompt's rendering already opens the first turn.
        """
        if not completion or completion[0].role != "assistant" or completion[-1].role != "assistant":
            raise ValueError("a completion starts and ends with an assistant turn")
        end = self._turn_end
        turns: list[tuple[str, str, bool]] = []
        rendered = self._render(prompt, generation_prompt=True)
        for position, message in enumerate(completion):
            if message.role != "assistant":
                continue
            said_before = prompt + completion[:position]
            opened = self._render(said_before, generation_prompt=True)
            closed = self._render((*said_before, message), generation_prompt=False)
            if not opened.startswith(rendered) or not closed.startswith(opened):
                raise BaseModelError(
                    "the chat template writes a turn differently once another follows it, so that a completion"
                    f" cannot be told from its prompt (turn {len(said_before) + 1} of the conversation)",
                    where="chat template",
                    remedy="Set base.chat_template to a template in which adding a turn only adds text at the end.",
                )
            said = closed[len(opened) :]
            if end.whole and said.endswith(end.whole):
                said = said[: len(said) - len(end.whole)] + end.before
            turns.append((opened[len(rendered) :], said, bool(end.token)))
            rendered = opened + said + end.token
        # A response ends somehow, whatever the template does.
        context, said, _ = turns[-1]
        turns[-1] = (context, said, True)
        return turns

    @cached_property
    def _turn_end(self) -> _TurnEnd:
        """How the template closes an assistant turn, read off a conversation of one question and one answer."""
        nothing = _TurnEnd(None, "", "", "")
        if self._template is None:
            return nothing
        question, answer = Message("user", "question"), Message("assistant", "answer")
        try:
            closed = self._render((question, answer), generation_prompt=False)
        except DataError:
            return nothing
        _, found, tail = closed.rpartition(answer.content)
        if not found or question.content not in closed:
            raise BaseModelError(
                "the chat template leaves out what is said: a conversation comes out without its question or answer",
                where=f"the template begins {self._template[:60]!r}",
                remedy="Set base.chat_template to a template that writes every message.",
            )
        first = self._special_pattern.search(tail) if self._special_tokens else None
        if first is None:
            return _TurnEnd(None, "", "", tail)
        token = first.group()
        return _TurnEnd(self._special_tokens[token], tail[: first.start()], token, tail[first.end() :])


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return template.get("default")
    return template
