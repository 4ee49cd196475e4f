"""Progress: the rate is that of the last steps, nothing is claimed before the first, and one process prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import progress as module
from pipeline.progress import (
    MachineView,
    PlainView,
    Progress,
    ProgressUpdate,
    SilentView,
    TerminalView,
    duration,
    is_main_process,
    parse_machine_line,
    progress,
    view_for,
)

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that goes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Recorder:
    """A view that keeps what it is shown."""

    def __init__(self) -> None:
        self.updates: list[ProgressUpdate] = []

    def show(self, update: ProgressUpdate) -> None:
        self.updates.append(update)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def start(total: int = 40, done: int = 0) -> tuple[Progress, Recorder]:
    view = Recorder()
    return Progress(ProgressUpdate("ppo", "iterations", done, total, 0.0), view), view


def test_no_time_left_is_claimed_before_the_first_step_is_done(clock: Clock) -> None:
    _, view = start()
    assert view.updates[-1].seconds_left is None
    assert "left" not in view.updates[-1].line


def test_time_left_is_the_rest_at_the_measured_rate(clock: Clock) -> None:
    job, view = start(total=40)
    for _ in range(12):
        clock.now += 3.0
        job.advance(note="reward 0.31")
    assert view.updates[-1].seconds_left == pytest.approx(28 * 3.0)
    assert view.updates[-1].line == "ppo 12/40 iterations, 3.0 s each, 1 min 24 s left, reward 0.31"


def test_a_slow_start_is_forgotten(clock: Clock) -> None:
    job, view = start(total=1000)
    clock.now += 600.0  # compiling, say
    job.advance()
    for _ in range(16):
        clock.now += 1.0
        job.advance()
    assert view.updates[-1].seconds_each == pytest.approx(1.0)
    assert view.updates[-1].elapsed == pytest.approx(616.0)


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(clock: Clock) -> None:
    job, view = start(total=40, done=30)
    clock.now += 2.0
    job.advance()
    assert view.updates[-1].done == 31
    assert view.updates[-1].seconds_each == pytest.approx(2.0)


def test_several_units_at_once(clock: Clock) -> None:
    job, view = start(total=100)
    clock.now += 10.0
    job.advance(20)
    assert view.updates[-1].seconds_each == pytest.approx(0.5)
    assert view.updates[-1].seconds_left == pytest.approx(40.0)


def test_a_note_stays_until_the_next(clock: Clock) -> None:
    job, view = start()
    job.advance(note="loss 2")
    job.advance()
    assert view.updates[-1].note == "loss 2"


def test_the_end_is_shown_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    view = Recorder()
    monkeypatch.setattr(module, "_view_for_this_process", lambda: view)
    with pytest.raises(KeyError), progress(3, "sft") as job:
        job.advance()
        raise KeyError
    assert view.updates[-1].finished
    assert "stopped after" in view.updates[-1].line


def test_plain_lines_come_at_most_every_few_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    job = Progress(ProgressUpdate("ppo", "iterations", 0, 100, 0.0), PlainView(stream, seconds_between=5.0))
    for _ in range(100):
        clock.now += 1.0
        job.advance()
    job.finish()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/100", *(f"{n}/100" for n in range(5, 100, 5)), "100/100"]
    assert lines[-1] == "ppo 100/100 iterations, 1.0 s each, took 1 min 40 s"


def test_plain_lines_tell_jobs_apart(clock: Clock) -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    outer = Progress(ProgressUpdate("outer", "rounds", 0, 2, 0.0), view)
    inner = Progress(ProgressUpdate("inner", "answers", 0, 2, 0.0), view)
    inner.finish()
    outer.finish()
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["outer", "inner", "inner", "outer"]


def test_machine_lines_carry_every_field(clock: Clock) -> None:
    stream = io.StringIO()
    job = Progress(ProgressUpdate("sft", "steps", 0, 2, 0.0), MachineView(stream))
    for note in ("a", 'b "quoted" \u2028 ü'):
        clock.now += 1.0
        job.advance(note=note)
    job.finish()
    updates = [parse_machine_line(line)[0] for line in stream.getvalue().split("\n")[:-1]]
    assert [update.done for update in updates if update] == [0, 1, 2, 2]
    assert updates[-1] == ProgressUpdate("sft", "steps", 2, 2, 2.0, 1.0, 'b "quoted" \u2028 ü', finished=True)


def test_machine_lines_are_thinned_but_not_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    job = Progress(ProgressUpdate("sft", "steps", 0, 1000, 0.0), MachineView(stream))
    for _ in range(1000):
        clock.now += 0.001
        job.advance()
    job.finish()
    updates = [parse_machine_line(line)[0] for line in stream.getvalue().split("\n")[:-1]]
    assert 4 <= len(updates) <= 8
    assert updates[-1] is not None
    assert updates[-1].done == 1000


def test_what_was_printed_before_a_machine_line_is_kept() -> None:
    update = ProgressUpdate("sft", "steps", 1, 2, 0.5)
    assert parse_machine_line("half a line" + update.machine_line) == (update, "half a line")


@pytest.mark.parametrize("line", ["loss 2.5", "", "trivet-progress {}", '{"description": "sft"}'])
def test_ordinary_lines_are_not_progress(line: str) -> None:
    assert parse_machine_line(line) == (None, line)


def test_a_torn_machine_line_is_no_error() -> None:
    whole = ProgressUpdate("sft", "steps", 1, 2, 0.5).machine_line
    assert parse_machine_line(whole[: len(whole) // 2]) == (None, "")


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    assert is_main_process()
    for rank, local_rank, expected in (("0", "0", True), ("1", "1", False), ("8", "0", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert is_main_process() is expected


@pytest.mark.parametrize(("rank", "lines"), [("0", 2), ("1", 0)])
def test_a_child_writes_machine_lines_on_standard_error(rank: str, lines: int) -> None:
    program = "from pipeline.progress import progress\nwith progress(1, 'sft') as job: job.advance(note='loss 2')"
    environment = {"TRIVET_PROGRESS": "json", "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    updates = [parse_machine_line(line)[0] for line in done.stderr.split("\n")[:-1]]
    assert len(updates) == lines
    assert all(update is not None and update.description == "sft" for update in updates)


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(view_for(Terminal()), TerminalView)
    assert isinstance(view_for(io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view_for(Terminal()), PlainView)
    SilentView().show(ProgressUpdate("sft", "steps", 0, 1, 0.0))


def test_bars_of_nested_jobs_share_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    view = TerminalView(stream)
    outer = Progress(ProgressUpdate("outer", "rounds", 0, 2, 0.0), view)
    inner = Progress(ProgressUpdate("inner", "answers", 0, 4, 0.0), view)
    inner.advance(4, note="[not markup]")
    inner.finish()
    outer.advance(2)
    outer.finish()
    text = stream.getvalue()
    assert "2/2 rounds" in text
    assert "4/4 answers" in text
    assert "[not markup]" in text
    # A new job after the last one starts on a clean screen.
    Progress(ProgressUpdate("again", "steps", 0, 1, 0.0), view).finish()
    assert "0/1 steps" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (87, "1 min 27 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_machine_lines_are_json_behind_a_mark() -> None:
    line = ProgressUpdate("sft", "steps", 1, 2, 0.5).machine_line
    assert line.startswith("\x1e")
    assert line.count("\n") == 1
    assert json.loads(line[line.index("{") :])["total"] == 2
