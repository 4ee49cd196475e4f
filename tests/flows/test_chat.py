"""`trivet chat` as a person uses it: in a real terminal, with the keys that a person presses."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result
from usable_run import usable_run

from flows.chat import ChatSettings, Talk, _listening, _Session, printable
from flows.cli import app
from pipeline.config_file import LoadedConfig
from pipeline.finished_run import open_run
from pipeline.progress import _view_for_this_process
from pipeline.records import Message

ROOT = Path(__file__).parents[2]
SECONDS = 90.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    # The window is longer than any patience: an answer goes on until it is stopped.
    return usable_run(tmp_path_factory.mktemp("chat"), window=100_000)


def trivet(*arguments: str | Path, **more: Any) -> Result:
    _view_for_this_process.cache_clear()  # each call has streams of its own
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **more)


class Terminal:
    """A program in a pseudo-terminal: what it shows, and the keys that are pressed."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            preexec_fn=_with_this_terminal,
            close_fds=True,
        )
        os.close(theirs)
        self.shown = ""

    def read(self, seconds: float) -> bool:
        """Read what there is within this time; False at the end of the program."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return True
        try:
            found = os.read(self._ours, 65536)
        except OSError:  # what Linux says when the other side is closed
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.decode(errors="replace"))
        return bool(found)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until something is shown; returns where it ends."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown[after:]:
            assert time.monotonic() < deadline, f"waited in vain for {text!r}:\n{self.shown}"
            assert self.read(0.2) or text in self.shown[after:], f"ended without {text!r}:\n{self.shown}"
        return self.shown.index(text, after) + len(text)

    def press(self, keys: str) -> int:
        """Press keys; returns how much was shown before."""
        before = len(self.shown)
        os.write(self._ours, keys.encode())
        return before

    def press_until(self, key: str, text: str, after: int) -> None:
        """Press a key until something is shown: Python misses one that comes just before it waits for the next."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown[after:]:
            assert time.monotonic() < deadline, f"pressed {key!r} in vain:\n{self.shown}"
            time.sleep(0.3)
            self.press(key)
            self.read(2.0)

    def end(self) -> int:
        """The exit code, when the program has ended."""
        deadline = time.monotonic() + SECONDS
        while self.read(0.2) and self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.shown}"
        return self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def _with_this_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what is in the background without it
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(loaded: LoadedConfig) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal("chat", loaded.config.run_dir, *arguments))
        return opened[0]

    yield start
    for one in opened:
        one.close()


def test_a_talk_in_a_terminal(terminal: Any, loaded: LoadedConfig) -> None:
    """Streaming, Ctrl-C in an answer and at the prompt, taking over, side by side, Ctrl-D."""
    talk = terminal("--tokens", "4000", "--temperature", "0")
    talk.wait_for("you> ")
    assert "policy answers; here are: base, sft, policy." in talk.shown

    # An answer comes in pieces; Ctrl-C stops it at once and the program goes on.
    start = talk.press("sun\r")
    begun = talk.wait_for("policy> ", start)
    while len(talk.shown) < begun + 20:
        assert talk.read(SECONDS)
    assert "a second" not in talk.shown[begun:], "the answer was there before it was streamed"
    pressed = time.monotonic()
    talk.press("\x03")
    end = talk.wait_for("a second, stopped", begun)
    assert time.monotonic() - pressed < 10
    talk.wait_for("you> ", end)

    # At the prompt Ctrl-C gives up the line.
    before = talk.press("half a line")
    talk.wait_for("half a line", before)
    talk.press_until("\x03", "Ctrl-D leaves.", before)
    talk.wait_for("you> ", talk.wait_for("Ctrl-D leaves.", before))

    before = talk.press("/tokens 8\r/sft\r")
    talk.wait_for("sft now answers.", before)
    before = talk.press("sea\r")
    talk.wait_for("sft> ", before)
    talk.wait_for("8 tokens, ", before)

    end = talk.wait_for("base and sft and policy now answer.", talk.press("/compare\r"))
    talk.wait_for("you> ", end)
    before = talk.press("sky\r")
    end = talk.wait_for("policy", before)
    while not re.search(r"(\d+ tokens, .*){3}", talk.shown[end:]):
        assert talk.read(SECONDS)
    end = talk.wait_for("you> ", end)
    head = next(line for line in talk.shown[before:].splitlines() if re.search(r"base\s+sft\s+policy", line))
    assert head

    end = talk.wait_for("Forgotten.", talk.press("/reset\r"))
    talk.wait_for("you> ", end)
    time.sleep(0.3)
    talk.press("\x04")
    assert talk.end() == 0
    assert "Traceback" not in talk.shown


def test_a_second_ctrl_c_ends_it_all() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _listening() as is_enough:
        assert not is_enough()
        signal.raise_signal(signal.SIGINT)
        assert is_enough()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_questions_from_a_pipe(loaded: LoadedConfig) -> None:
    """The same seed gives the same answers, and a later question is answered in the light of the earlier ones."""
    arguments = ("chat", loaded.config.run_dir, "--tokens", "12", "--temperature", "0")
    first = trivet(*arguments, input="sun\nsea\n")
    assert first.exit_code == 0, first.output
    said = re.findall(r"^policy> (.*)$", first.stdout, re.MULTILINE)
    assert len(said) == 2 and "you>" not in first.stdout
    again = trivet(*arguments, input="sun\nsea\n")
    assert re.findall(r"^policy> (.*)$", again.stdout, re.MULTILINE) == said
    alone = trivet(*arguments, input="sea\n")
    (fresh,) = re.findall(r"^policy> (.*)$", alone.stdout, re.MULTILINE)
    forgotten = trivet(*arguments, input="sun\n/reset\nsea\n")
    assert re.findall(r"^policy> (.*)$", forgotten.stdout, re.MULTILINE) == [said[0], fresh]
    assert fresh != said[1]


@pytest.fixture(scope="module")
def session(loaded: LoadedConfig) -> _Session:
    from stages.answering import Speakers

    found = open_run(loaded.config.run_dir)
    console = Console(file=io.StringIO(), width=120, color_system=None)
    settings = ChatSettings("policy", max_new_tokens=8, temperature=1.0)
    return _Session(found, Speakers(found, found.speakers), settings, Talk(True), console)


def heard(session: _Session, *lines: str) -> str:
    session.console.file = io.StringIO()
    for line in lines:
        session.hear(line)
    return session.console.file.getvalue()


def test_the_speakers_differ_and_again_is_another_answer(session: _Session) -> None:
    said = {who: heard(session, "/reset", f"/{who}", "sun").split(f"{who}> ")[1] for who in ("base", "sft", "policy")}
    assert len({text.split("tokens")[0] for text in said.values()}) == 3
    again = heard(session, "/again").split("policy> ")[1]
    assert again.split("tokens")[0] != said["policy"].split("tokens")[0]
    assert session._talk.questions == 1


def test_faults_are_said_and_the_talk_goes_on(session: _Session) -> None:
    found = heard(session, "/nobody", "/temperature warm", "/tokens 0", "/tokens 200000", "/reset", "sun")
    assert "There is no /nobody." in found and "'warm' is not a number" in found and "'0' is not a number" in found
    assert "are more than the 100000 that the base reads" in found
    found = heard(session, "/tokens 4", "a forged <|im_end|> turn")
    assert "'<|im_end|>' for a token of its own" in found and "4 tokens" in found


def test_what_was_said_is_known_to_all_or_to_each_its_own() -> None:
    talk = Talk(True, system="Be kind.")
    talk.add("one", {"policy": "p1"})
    talk.add("two", {"sft": "s2", "policy": "p2"})
    asked = talk.prompt("sft", "three")
    assert [turn.content for turn in asked] == ["Be kind.", "one", "p1", "two", "s2", "three"]  # type: ignore[union-attr]
    assert talk.prompt("policy", "three")[4] == Message("assistant", "p2")
    assert talk.take_back() == "two" and talk.questions == 1
    talk.reset()
    assert talk.prompt("base", "x") == (Message("system", "Be kind."), Message("user", "x"))
    plain = Talk(False)
    plain.add("Once upon ", {"policy": "a time "})
    assert plain.prompt("sft", "there was") == "Once upon a time there was"


def test_codes_that_a_terminal_would_obey_are_left_out() -> None:
    assert printable("a\x1b[31mb\x07\nc\td\r") == "a[31mb\nc\td"


def test_a_base_without_a_template_goes_on_with_the_text(tmp_path: Path) -> None:
    rows = 'def rows():\n    for n in range(40):\n        yield {"prompt": f"word {n}", "chosen": "a", "rejected": "b",'
    (tmp_path / "plain.py").write_text(rows + ' "completion": "c"}\n')
    data = {kind: {"sources": [str(tmp_path / "plain.py:rows")]} for kind in ("instructions", "preferences", "prompts")}
    loaded = usable_run(tmp_path, ("sft", "reward", "ppo"), tokenizer_variant="no_template", data=data)
    arguments = ("chat", loaded.config.run_dir, "--tokens", "6", "--temperature", "0")
    result = trivet(*arguments, input="Once upon\n a time\n")
    assert result.exit_code == 0, result.output
    assert "There are no turns" in result.stdout and result.stdout.count("policy> ") == 2
    for refused in (("--turns",), ("--system", "x")):
        result = trivet(*arguments, *refused, input="x\n")
        assert result.exit_code == 2 and "turns" in result.stderr


def test_half_done_runs(tmp_path: Path) -> None:
    loaded = usable_run(tmp_path, ("sft", "reward"))
    result = trivet("chat", loaded.config.run_dir, "--tokens", "4", input="sun\n/policy\n")
    assert result.exit_code == 0, result.output
    assert "sft answers; here are: base, sft." in result.stdout and "ppo is waiting" in result.stdout
    assert "the ppo stage is not finished; it is waiting" in result.stdout
    result = trivet("chat", loaded.config.run_dir, "--who", "policy", input="sun\n")
    assert result.exit_code == 2 and "the ppo stage is not finished" in result.stderr


def test_what_cannot_be_talked_to_is_said_before_torch_is_there(tmp_path: Path, loaded: LoadedConfig) -> None:
    """No such run, nobody of that name: told by a process that has not loaded torch."""
    cases = [
        (["chat", str(tmp_path / "absent")], "there is no such folder"),
        (["chat", loaded.config.run_dir, "--who", "nobody"], "nobody is called 'nobody'"),
        (["generate", str(tmp_path), "in.jsonl", "out.jsonl"], "there is no run here"),
    ]
    program = f"""
import sys
from flows.cli import app
for arguments, _ in {cases!r}:
    try:
        app(arguments)
    except SystemExit as end:
        assert end.code == 2, end
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _, problem in cases:
        assert problem in done.stderr
