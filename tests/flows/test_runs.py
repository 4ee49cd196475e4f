"""Runs in a terminal and in a pipe: what there is, how far it is, and the figures that count."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from finished_stages import light_config, publish
from reported_run import whole_run, write_metrics, write_samples
from rich.console import Console
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.runs import Pace, show_run, show_runs, watch_run
from pipeline.config_file import load_config
from pipeline.run_directory import RunDirectory
from pipeline.run_state import RunState, StageState, Status


def trivet(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def going_run(folder: Path) -> RunDirectory:
    """SFT is finished, PPO in its sixth round."""
    loaded = load_config(light_config(folder, run_dir=str(folder / "going"), ppo={"iterations": 8}))
    run = RunDirectory.open(loaded)
    publish("sft", loaded, run)
    write_metrics(run, "ppo", rounds=6, **{"seconds/total": [2.0] * 6})
    write_samples(run, rounds=6)
    return run


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=160, force_terminal=terminal, color_system=None)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_runs_in_a_pipe_are_lines(tmp_path: Path) -> None:
    whole_run(tmp_path / "a", name="whole")
    run = going_run(tmp_path / "b")
    with run.locked("ppo", warn=print):
        result = trivet("runs", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {Path(line.split("\t")[0]).name: line.split("\t")[1:] for line in result.stdout.splitlines()}
    assert rows["whole"][:2] == ["finished", "sft finished, reward finished, ppo finished, evaluate finished"]
    assert rows["whole"][2].startswith("better: 0.")
    assert rows["going"] == [
        "going",
        "sft finished, reward waiting, ppo going 75%, evaluate waiting",
        "ppo is at work, 75% done",
    ]


def test_runs_on_a_terminal_are_a_table(tmp_path: Path) -> None:
    whole_run(tmp_path, name="whole")
    found = console(terminal=True)
    show_runs(tmp_path, found)
    assert "verdict" in text(found) and "better: 0." in text(found) and "ago" in text(found)


def test_where_there_are_no_runs_it_is_said(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, "there are no runs here"), (tmp_path / "absent", "no such folder")):
        result = trivet("runs", folder)
        assert result.exit_code == 2 and problem in result.stderr


def test_one_run(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    result = trivet("show", loaded.config.run_dir)
    assert result.exit_code == 0, result.output
    for said in ("PPO is better than SFT", "score", "▁", "█", "2.48", "3.6 nats", "the last answers of the evaluation"):
        assert said in result.stdout, said
    assert "equal length 0.70 [0.52, 0.83]" in " ".join(result.stdout.split())
    assert trivet("show", loaded.path).stdout == result.stdout
    absent = trivet("show", tmp_path / "absent")
    assert absent.exit_code == 2 and "Runs there: " in absent.stderr


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    run = going_run(tmp_path)
    run.metrics("sft").write_text("garbage\n")
    found = console()
    with run.locked("ppo", warn=print):
        show_run(run.root, found)
    for said in (
        "going 75%",
        "round 6",
        "the last answer of round 6",
        "score 0.6: It is round 6.",
        "sft.jsonl, line 1",
    ):
        assert said in text(found), said


def test_a_model_cannot_command_the_terminal(tmp_path: Path) -> None:
    run = going_run(tmp_path)
    samples = run.metrics("ppo").with_name("ppo_samples.jsonl")
    samples.write_text('{"step": 1, "prompt": "[red]p[/red]", "response": "\\u001b[2J\\u0007clear", "score": 1}\n')
    found = console()
    show_run(run.root, found)
    assert "\x1b" not in text(found) and "\x07" not in text(found)
    assert "[red]p[/red]" in text(found) and "[2Jclear" in text(found)


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_follows_the_run_to_its_end(tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.runs._SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("flows.runs._SECONDS_BETWEEN_LINES", 0.0)
    run, found = going_run(tmp_path), console(terminal)

    def work() -> None:
        watcher = threading.Thread(target=watch_run, args=(run.root, found))
        with run.locked("ppo", warn=print):
            watcher.start()
            wait_for("round 6")
            write_metrics(run, "ppo", rounds=7)
            wait_for("round 7")
        watcher.join(10)
        assert not watcher.is_alive(), "it ends with the run"

    def wait_for(said: str) -> None:
        end = time.monotonic() + 20
        while said not in text(found):
            assert time.monotonic() < end, text(found)
            time.sleep(0.02)

    work()
    if not terminal:
        assert "\x1b" not in text(found)
        assert text(found).splitlines()[-1] == "ppo was interrupted"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_is_watched_shows_stage_time_left_figures_curves_and_what_it_says(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = going_run(tmp_path), console(terminal)

    def leave(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.runs.time.sleep", leave)
    with run.locked("ppo", warn=print), pytest.raises(KeyboardInterrupt):
        watch_run(run.root, found)
    words = " ".join(text(found).split())
    figures = ("score", "reward", "KL", "entropy", "length", "clipped")
    for said in ("going 75%", "4.0 s left", "round 6", "It is round 6.", "▁▄▅▆▇█", "▁▂▄▅▇█", *figures):
        assert said in words, said
    for value in ("1.79", "1.69", "1.8 nats", "1.7 nats", "26 tokens", "0.1"):
        assert value in words, value
    if not terminal:
        assert len(text(found).splitlines()) == 1
        assert words.endswith("last answer: It is round 6.")


def test_a_line_is_printed_for_news_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not because time has gone by."""
    monkeypatch.setattr("flows.runs._SECONDS_BETWEEN_LINES", 0.0)
    run, found, looks = going_run(tmp_path), console(), []

    def look_again(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            write_samples(run, rounds=7)
        elif len(looks) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("flows.runs.time.sleep", look_again)
    with run.locked("ppo", warn=print), pytest.raises(KeyboardInterrupt):
        watch_run(run.root, found)
    assert [line.rpartition(" round ")[2] for line in text(found).splitlines()] == ["6.", "7."]


def test_the_time_left_is_by_how_fast_the_share_grew_of_late() -> None:
    def state(done: float | None, status: Status = "going", **row: float) -> RunState:
        stage = StageState("sft", status, metrics=[{"step": 1, **row}], done=done)
        return RunState(Path(), {}, {}, (), None, (), {}, {"sft": stage})

    pace = Pace()

    def left(of: RunState, now: float) -> float | None:
        pace.look(of, now)
        return pace.seconds_left(of.stages["sft"])

    assert left(state(None), 0.0) is None
    assert left(state(0.1), 100.0) is None, "nobody knows when that was reached"
    assert left(state(0.2), 103.0) is None
    assert left(state(0.2), 104.0) is None
    assert left(state(0.3), 113.0) == pytest.approx(70.0)
    assert left(state(0.3), 118.0) == pytest.approx(65.0), "it runs down between two steps"
    assert left(state(0.3), 999.0) == 0.0
    assert left(state(1.0), 999.0) is None and pace.words(state(1.0).stages["sft"]) == ""
    assert left(state(0.3, "interrupted"), 999.0) is None
    assert left(state(0.3), 1000.0) is None, "started again"
    assert left(state(0.5, **{"seconds/total": 4.0}), 1001.0) == pytest.approx(4.0), "PPO's rounds tell it at once"
