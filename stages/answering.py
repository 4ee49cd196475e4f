"""The speakers of a finished run on its one base: they answer at once, token by token, or many prompts in batches.

base: nobody's adapter,   sft: the policy that PPO started from,   policy: what PPO made of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.base_model import load_base
from pipeline.chat import ChatFormat
from pipeline.errors import DataError
from pipeline.finished_run import STAGE_OF, FinishedRun, Speaker
from pipeline.generation import SamplingSettings, generate
from pipeline.records import Text
from pipeline.roles import Role, Roles
from stages.command import quiet

ROLE_OF: dict[Speaker, Role | None] = {"base": None, "sft": "reference", "policy": "policy"}
"""Under which role each speaks."""


@dataclass(frozen=True)
class Said:
    """An answer: its text, its tokens, and whether it ended by itself, at the limit, or because it was stopped."""

    text: str
    tokens: int
    ending: str


class _Enough(BaseException):
    """Whoever listens has heard enough."""


class Speakers:
    """The base with the adapters of those who are to speak.

    Args:
        found: the run.
        who: the speakers to load; those whose stages are not finished are left out.

    Raises:
        BaseModelError: the base cannot be loaded.
        ArtifactError, IncompatibleAdapterError: an adapter does not fit it.
    """

    def __init__(self, found: FinishedRun, who: Sequence[Speaker]) -> None:
        quiet()
        base = load_base(found.base)
        self.roles = Roles(base)
        # The base alone is spoken for by an adapter that is switched off.
        with_adapter = [one for one in who if one in STAGE_OF] or [found.speakers[-1]]
        for one in with_adapter:
            role = ROLE_OF[one]
            if role is not None and STAGE_OF[one] in found.adapters:
                self.roles.add_from(role, found.run.stage(STAGE_OF[one]))
        self.roles.set_trainable()
        self.roles.inference_mode()

    @property
    def chat(self) -> ChatFormat:
        """How text becomes tokens."""
        return self.roles.base.chat

    @property
    def window(self) -> int | None:
        """How many tokens the base reads at the most, prompt and answer together; None where it does not say."""
        size = getattr(self.roles.base.model.config.get_text_config(), "max_position_embeddings", None)
        return int(size) if size else None

    def require_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises:
            DataError: prompt and answer are longer than what the base reads.
        """
        if self.window is not None and prompt_tokens + new_tokens > self.window:
            raise DataError(
                f"{prompt_tokens} tokens so far and {new_tokens} for the answer are more than the {self.window} that"
                " the base reads",
                remedy="Begin anew, or allow fewer tokens for the answer.",
            )

    def stream(
        self,
        who: Speaker,
        prompt: Text,
        sampling: SamplingSettings,
        *,
        seed: tuple[int | str, ...],
        on_text: Callable[[str], None],
        is_enough: Callable[[], bool],
    ) -> Said:
        """Answer one prompt, handing on its text as it comes.

        Args:
            who: speaks.
            prompt: text to continue, or messages that end with a user's turn.
            sampling: how to draw.
            seed: parts of the seed; the same ones give the same answer.
            on_text: told each piece of text as soon as its letters are complete.
            is_enough: asked before each token; True ends the answer there.

        Raises:
            DataError: the prompt leaves no room for the answer, or the template refuses it.
        """
        ids = self.chat.prompt_ids(prompt)
        self.require_room(len(ids), sampling.max_new_tokens)
        said = _Pieces(self.chat, on_text)

        def stop_if_enough() -> None:
            if is_enough():
                raise _Enough

        try:
            (response,) = generate(
                self.roles,
                ROLE_OF[who],
                [ids],
                sampling,
                seed=seed,
                on_token=stop_if_enough,
                on_drawn=lambda drawn: said.add(drawn[0]),
            )
        except _Enough:
            return Said(said.end(), len(said.ids), "stopped")
        return Said(said.end(), len(response.ids), "by itself" if response.finished else "at the limit")


class _Pieces:
    """Tokens to text in pieces that, one after the other, are the text of all tokens.

    A token may hold a part of a letter, and how it reads may depend on the one before it (a leading space), so that
    each piece is what the newest tokens add to the text of a few before them.
    """

    def __init__(self, chat: ChatFormat, on_text: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self._chat, self._on_text = chat, on_text
        self._before, self._told = 0, 0

    def add(self, token: int) -> None:
        """One more token."""
        self.ids.append(token)
        told = self._chat.decode(self.ids[self._before : self._told])
        now = self._chat.decode(self.ids[self._before :])
        if len(now) > len(told) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self._on_text(now[len(told) :])
            self._before, self._told = self._told, len(self.ids)

    def end(self) -> str:
        """Tell what is left, complete or not; returns the whole text."""
        told = self._chat.decode(self.ids[self._before : self._told])
        if rest := self._chat.decode(self.ids[self._before :])[len(told) :]:
            self._on_text(rest)
        self._before = self._told = len(self.ids)
        return self._chat.decode(self.ids)
