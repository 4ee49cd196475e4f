"""The stages' common command line: what runs and what does not, and how errors end."""

from __future__ import annotations

import faulthandler
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_stages import light_config, publish

from pipeline.artifacts import Manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import DataError
from pipeline.run_directory import RunDirectory
from stages import interruption
from stages.command import plan, stage_main
from stages.interruption import Interrupted
from stages.launch import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stage's main sets up its process; undo that for the tests after it."""
    for name in (ERROR_FILE_VARIABLE, "RANK", "LOCAL_RANK", *QUIET_ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    enabled = faulthandler.is_enabled()
    with warnings.catch_warnings():
        yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interruption.withdraw()
    if not enabled:
        faulthandler.disable()


class Stage:
    """A stage that counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, loaded: LoadedConfig, run: RunDirectory) -> Manifest:
        self.runs += 1
        return publish("sft", loaded, run)


def main(stage: Any, *arguments: str | Path) -> int:
    """The exit code of `stages.sft ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        stage_main("sft", stage, [str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_stage_runs_once_and_then_says_why_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, stage = light_config(tmp_path), Stage()
    assert main(stage, path) == 0
    out = capfd.readouterr().out
    assert "sft: starting; not run yet." in out
    assert f"result in {tmp_path / 'run' / 'sft'}" in out
    assert main(stage, path) == 0
    assert "sft: nothing to do; unchanged" in capfd.readouterr().out
    assert stage.runs == 1


def test_force_runs_it_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, stage = light_config(tmp_path), Stage()
    main(stage, path)
    assert main(stage, "--force", path) == 0
    assert "run again on demand" in capfd.readouterr().out
    assert stage.runs == 2


def test_a_changed_setting_runs_it_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, stage = light_config(tmp_path), Stage()
    main(stage, path)
    assert main(stage, path, "sft.epochs=3") == 0
    assert "changed since the last run: settings" in capfd.readouterr().out
    assert stage.runs == 2


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    path, stage = light_config(tmp_path), Stage()
    assert main(stage, path, "sft.epochs=2", "--force", "seed=4") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 4


def test_a_dry_run_touches_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, stage = light_config(tmp_path), Stage()
    assert main(stage, path, "--dry-run", "sft.epochs=3") == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.split() == ["sft.epochs", "3.0", "override"] for line in lines)
    assert any(line.startswith("sft: a step takes 16 rows") for line in lines)
    assert lines[-1] == "sft: would run; not run yet."
    assert stage.runs == 0
    assert not (tmp_path / "run").exists()


def test_the_plan_follows_what_changes(tmp_path: Path) -> None:
    path = light_config(tmp_path)
    loaded = load_config(path)
    run = RunDirectory.open(loaded)
    for stage in ("sft", "reward", "ppo", "evaluate"):
        publish(stage, loaded, run)  # type: ignore[arg-type]

    def planned(*overrides: str, force: bool = False) -> dict[str, str]:
        lines = list(plan(load_config(path, overrides), ("sft", "reward", "ppo", "evaluate"), force=force))
        return dict(line.split(": ", 1) for line in lines[-4:])

    assert all(verdict.startswith("would not run; unchanged") for verdict in planned().values())
    assert all(verdict == "would run; --force." for verdict in planned(force=True).values())
    changed = planned("reward.epochs=2")
    assert changed["sft"].startswith("would not run")
    assert changed["reward"] == "would run; changed since the last run: settings."
    assert changed["ppo"] == "would run; after reward, if their results change."
    assert changed["evaluate"] == "would run; after reward and ppo, if their results change."


def test_an_error_of_ours_is_said_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def stage(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
        raise DataError("no rows", where="a.jsonl", remedy="Add some.")

    assert main(stage, light_config(tmp_path)) == 2
    assert capfd.readouterr().err == "a.jsonl: no rows\n  -> Add some.\n"


def test_an_arithmetic_that_the_launcher_alone_asks_for_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stage = light_config(tmp_path), Stage()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main(stage, config, "base.dtype=float32") == 2 and stage.runs == 0
    assert "'fp16', but the base computes in float32 here" in capfd.readouterr().err
    assert main(stage, config, "base.dtype=float16") == 0 and stage.runs == 1


def test_a_bad_config_is_such_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(Stage(), light_config(tmp_path), "sft.epoch=3") == 2
    assert "did you mean 'epochs'?" in capfd.readouterr().err


def test_a_parent_is_told_instead(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
        raise DataError("no rows", where="a.jsonl", remedy="Add some.")

    told = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(told))
    path = light_config(tmp_path)
    assert main(stage, path) == 2
    assert capfd.readouterr().err == ""
    expected = {"kind": "DataError", "problem": "no rows", "where": "a.jsonl", "remedy": "Add some."}
    assert json.loads(told.read_text()) == expected
    # The first of several processes to fail is believed.
    assert main(stage, path, "sft.epoch=3") == 2
    assert json.loads(told.read_text()) == expected


def test_a_fault_of_the_program_keeps_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
        return {}["absent"]

    told = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(told))
    assert main(stage, light_config(tmp_path)) == 1
    assert "Traceback" in capfd.readouterr().err
    assert json.loads(told.read_text())["problem"] == "KeyError: 'absent'"


def test_an_interruption_has_its_own_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
        raise Interrupted

    told = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(told))
    assert main(stage, light_config(tmp_path)) == 75
    assert "The same command goes on from there." in capfd.readouterr().out
    assert json.loads(told.read_text())["kind"] == "StageInterruptedError"


def test_only_the_main_process_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(Stage(), light_config(tmp_path)) == 0
    assert capfd.readouterr().out == ""


def test_sigterm_lets_a_stage_clean_up(tmp_path: Path) -> None:
    path = light_config(tmp_path)
    program = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
from stages.command import stage_main
def run(loaded, run):
    with run.publish("sft"):
        print("up", flush=True)
        time.sleep(600)
stage_main("sft", run, [{str(path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "starting" in process.stdout.readline()
    assert process.stdout.readline() == "up\n"
    run = tmp_path / "run"
    assert [entry.name for entry in run.iterdir() if entry.name.startswith(".sft-")]
    process.terminate()
    assert process.wait(60) == 75
    assert not [entry.name for entry in run.iterdir() if entry.name.startswith(".sft-")]
