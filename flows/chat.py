"""`trivet chat`: a talk with the policies of a run in the terminal, one at a time or side by side, on the one base."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError, DataError, TrivetError
from pipeline.finished_run import SPEAKERS, FinishedRun, Speaker, learnt_conversations
from pipeline.records import Message
from pipeline.records import Text as Prompt
from stages.command import quiet

if TYPE_CHECKING:
    from stages.answering import Said, Speakers

_BESIDE = {"both": ("sft", "policy"), "compare": SPEAKERS}
WHO = (*SPEAKERS, *_BESIDE)
"""Whom `--who` and the commands of that name ask: a speaker, or several side by side."""

HELP = """\
/base /sft /policy    who answers from now on
/both                 SFT and policy side by side; /compare: the base too
/again                another answer to the last question
/reset                forget what was said
/system TEXT          what stands before the talk; without a text: nothing
/temperature X        0 takes the likeliest token
/tokens N             tokens of an answer at the most
/help                 this list
A line that ends with \\ goes on in the next one; //TEXT says /TEXT.
Ctrl-C stops an answer, Ctrl-D leaves."""


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made. `who` is one of `WHO`; `system` stands before the talk; `seed` fixes every answer."""

    who: str
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    system: str | None = None


@dataclass
class Talk:
    """What was said so far, as each speaker knows it.

    Whoever did not speak knows the answer of who did, so that one can take over from another; side by side each goes
    on with its own.

    Args:
        turns: whether there are turns, for the chat template; else one text goes on and on.
    """

    turns: bool
    system: str | None = None
    _said: dict[Speaker, list[Message]] = field(default_factory=dict)

    def prompt(self, who: Speaker, question: str) -> Prompt:
        """What the speaker answers."""
        so_far = self._said.get(who, [])
        if not self.turns:
            return "".join(message.content for message in so_far) + question
        before = [Message("system", self.system)] if self.system else []
        return (*before, *so_far, Message("user", question))

    @property
    def questions(self) -> int:
        """How many were asked."""
        return max((len(said) // 2 for said in self._said.values()), default=0)

    def add(self, question: str, answers: dict[Speaker, str]) -> None:
        """Remember a question with its answer, or with those of several."""
        first = next(iter(answers.values()))
        for who in SPEAKERS:
            turn = [Message("user", question), Message("assistant", answers.get(who, first))]
            self._said.setdefault(who, []).extend(turn)

    def take_back(self) -> str | None:
        """Forget the last question and its answers; returns the question, None where there is none."""
        last = None
        for said in self._said.values():
            if said:
                last = said[-2].content
                del said[-2:]
        return last

    def reset(self) -> None:
        """Forget all but what stands before the talk."""
        self._said.clear()


def chat(found: FinishedRun, settings: ChatSettings, turns: bool | None, console: Console) -> None:
    """Talk until the input ends.

    Args:
        found: the run.
        settings: how to begin.
        turns: whether there are turns. None: as the run was trained.
        console: where to.

    Raises:
        ArtifactError: who is to speak has no finished stage.
        ConfigError: turns are wanted of a base without a chat template, or a system text without turns.
        BaseModelError: the base cannot be loaded.
    """
    for who in speakers_of(settings.who):
        found.require(who)
    for caution in found.cautions:
        console.print(f"warning: {caution}", style="yellow", markup=False, highlight=False)
    console.print("Loading the base ...", style="dim")
    quiet()
    from stages.answering import Speakers

    speakers = Speakers(found, found.speakers)
    turns = _has_turns(found, speakers, turns)
    if settings.system is not None and not turns:
        raise ConfigError("a system text needs turns, but here a plain text goes on", where="--system")
    session = _Session(found, speakers, settings, Talk(turns, settings.system), console)
    session.greet()
    for line in _lines(session):
        session.hear(line)


def speakers_of(who: str) -> tuple[Speaker, ...]:
    """Who answers to a name of `WHO`.

    Raises:
        ConfigError: nobody is called so.
    """
    if who not in WHO:
        raise ConfigError(f"nobody is called '{who}'", where="--who", remedy=f"Choose one of: {', '.join(WHO)}.")
    return _BESIDE.get(who) or (who,)  # type: ignore[return-value]


def _has_turns(found: FinishedRun, speakers: Speakers, wanted: bool | None) -> bool:
    if wanted and not speakers.chat.has_template:
        raise ConfigError(
            "the base has no chat template, so there are no turns",
            where="--turns",
            remedy="Leave it out: the policy goes on with your text, as it was trained.",
        )
    return wanted if wanted is not None else speakers.chat.has_template and learnt_conversations(found) is not False


def _lines(session: _Session) -> Iterator[str]:
    """What is typed, until the input ends. Ctrl-C gives up a line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its keys and its memory
    while True:
        try:
            line = input(session.prompt if is_terminal else "")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("   > " if is_terminal else "")
        except EOFError:
            if is_terminal:
                session.console.file.write("\n")
            return
        except KeyboardInterrupt:
            session.note("\nCtrl-D leaves.")
            continue
        yield line


class _Session:
    """A talk in a terminal."""

    def __init__(
        self, found: FinishedRun, speakers: Speakers, settings: ChatSettings, talk: Talk, console: Console
    ) -> None:
        self.console = console
        self._found, self._speakers, self._settings, self._talk = found, speakers, settings, talk
        self._tries = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "again": self._again,
            "reset": self._reset,
            "system": self._system,
            "temperature": self._temperature,
            "tokens": self._tokens,
            "help": lambda _: self.note(HELP),
        }

    @property
    def prompt(self) -> str:
        """What stands before the line that is typed."""
        return "you> " if self._talk.turns else "text> "

    def note(self, text: str) -> None:
        """Say something that no speaker says."""
        self.console.print(text, style="dim", markup=False, highlight=False)

    def greet(self) -> None:
        """Say who is here, and how to leave."""
        form = "" if self._talk.turns else " There are no turns: the policy goes on with your text."
        self.note(
            f"{self._settings.who} answers; here are: {', '.join(self._found.speakers)}.{form}"
            " /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."
        )
        if "policy" not in self._found.speakers:
            self.note(f"The policy is not here: ppo is {self._found.state.stages['ppo'].status}.")

    def hear(self, line: str) -> None:
        """Do what a line says: a command, or something to answer."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            elif line.strip():
                self._tries = 0
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
        except (TrivetError, ValueError) as error:
            self.console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)

    def _obey(self, line: str) -> None:
        name, _, argument = line[1:].strip().partition(" ")
        if name in WHO:
            for who in speakers_of(name):
                self._found.require(who)
            self._settings = replace(self._settings, who=name)
            self.note(f"{' and '.join(speakers_of(name))} now answer{'s' if name in SPEAKERS else ''}.")
        elif name in self._commands:
            self._commands[name](argument.strip())
        else:
            self.note(f"There is no /{name}.\n{HELP}")

    def _again(self, _: str) -> None:
        question = self._talk.take_back()
        if question is None:
            self.note("Nothing was asked yet.")
            return
        self._tries += 1
        self._answer(question)

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self.note("Forgotten.")

    def _system(self, text: str) -> None:
        if not self._talk.turns:
            raise ConfigError("a system text needs turns, but here a plain text goes on", where="/system")
        self._talk.system = text or None
        self.note("It stands before the talk." if text else "Nothing stands before the talk.")

    def _temperature(self, text: str) -> None:
        value = _number(text, "/temperature", least=0.0)
        self._settings = replace(self._settings, temperature=value)

    def _tokens(self, text: str) -> None:
        self._settings = replace(self._settings, max_new_tokens=int(_number(text, "/tokens", least=1.0)))

    def _answer(self, question: str) -> None:
        if forged := self._speakers.chat.special_tokens_in(question):
            self.note(f"Mind that the model takes {forged[0]!r} for a token of its own, not for these letters.")
        names = speakers_of(self._settings.who)
        with _listening() as is_enough:
            if len(names) == 1:
                said = {names[0]: self._speak(names[0], question, is_enough)}
            else:
                said = self._speak_beside(names, question, is_enough)
        if any(one.text for one in said.values()):  # else it was stopped before a word
            self._talk.add(question, {who: one.text for who, one in said.items()})

    def _speak(self, who: Speaker, question: str, is_enough: Callable[[], bool]) -> Said:
        self.console.print(f"{who}> ", style="cyan", end="", markup=False, highlight=False)

        def show(piece: str) -> None:
            self.console.file.write(printable(piece))
            self.console.file.flush()

        try:
            said, seconds = self._stream(who, question, show, is_enough)
        finally:
            self.console.file.write("\n")
        self.note(_measure(said, seconds))
        return said

    def _speak_beside(
        self, names: Sequence[Speaker], question: str, is_enough: Callable[[], bool]
    ) -> dict[Speaker, Said]:
        """One after the other on the one base, shown in columns."""
        texts: dict[Speaker, str] = dict.fromkeys(names, "")
        measures: dict[Speaker, str] = {}
        said: dict[Speaker, Said] = {}
        # What is longer than the screen is cut off while it grows; the whole comes at the end.
        with Live(console=self.console, transient=True, vertical_overflow="ellipsis") as live:
            for who in names:

                def show(piece: str, who: Speaker = who) -> None:
                    texts[who] += printable(piece)
                    live.update(_columns(texts, measures))

                said[who], seconds = self._stream(who, question, show, is_enough)
                measures[who] = _measure(said[who], seconds)
        self.console.print(_columns(texts, measures))
        return said

    def _stream(
        self, who: Speaker, question: str, show: Callable[[str], None], is_enough: Callable[[], bool]
    ) -> tuple[Said, float]:
        from pipeline.generation import SamplingSettings

        settings, started = self._settings, time.monotonic()
        sampling = SamplingSettings(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        prompt = self._talk.prompt(who, question)
        seed = (settings.seed, "chat", self._talk.questions, self._tries)
        said = self._speakers.stream(who, prompt, sampling, seed=seed, on_text=show, is_enough=is_enough)
        return said, time.monotonic() - started


@contextmanager
def _listening() -> Iterator[Callable[[], bool]]:
    """While an answer comes, the first Ctrl-C is a request to end it, at the next token; a second one ends it all."""
    asked = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """A text for a terminal, without codes that it would obey."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _columns(texts: dict[Speaker, str], measures: dict[Speaker, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for who in texts:
        table.add_column(who, ratio=1, overflow="fold", header_style="cyan")
    table.add_row(*(Text(text) for text in texts.values()))
    table.add_row(*(Text(measures.get(who, ""), "dim") for who in texts))
    return table


def _measure(said: Said, seconds: float) -> str:
    ending = {"stopped": ", stopped", "at the limit": ", cut off at the limit (/tokens)"}.get(said.ending, "")
    return f"{said.tokens} tokens, {said.tokens / max(seconds, 1e-9):.0f} a second{ending}"


def _number(text: str, where: str, *, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise DataError(f"'{text}' is not a number from {least:g} on", where=where)
    return value
