"""Two starts on one run directory: the second is refused before it does anything, until the first is gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished_stages import light_config, publish

from flows.cli import main
from pipeline.config_file import load_config
from pipeline.errors import RunDirectoryError
from pipeline.run_directory import RunDirectory
from stages.inputs import parents_of
from stages.launch import ensure_stage

ROOT = Path(__file__).parents[2]
AT_WORK = """
import sys, time
from stages.command import stage_main
def run(loaded, directory):
    print("at work", flush=True)
    time.sleep(600)
stage_main("ppo", run, sys.argv[1:])
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return light_config(tmp_path)


@pytest.fixture
def at_work(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A real process of a stage that works on the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(line == "at work\n" for line in process.stdout)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_start_is_refused_before_anything_starts(config: Path, at_work: subprocess.Popen[str]) -> None:
    before = (config.parent / "run" / "config.json").read_bytes()
    with pytest.raises(RunDirectoryError, match=f"process {at_work.pid} has been at the ppo stage"):
        ensure_stage("sft", load_config(config, ["seed=5"]), force=False, on_line=print, on_progress=print)
    assert not (config.parent / "run" / "logs").exists(), "nothing was launched"
    assert (config.parent / "run" / "config.json").read_bytes() == before


def test_a_stage_that_needs_nothing_of_the_other_starts_beside_it(config: Path, at_work: subprocess.Popen[str]) -> None:
    """The evaluation reads what is being made; a reward model that PPO does not use is nobody's business."""
    loaded = load_config(config, ["ppo.rewards=[{function: judge.py:score}]"])
    with pytest.raises(RunDirectoryError, match=f"process {at_work.pid} has been at the ppo stage"):
        RunDirectory.open(loaded, ["evaluate"], parents_of("evaluate", loaded.config))
    with pytest.raises(RunDirectoryError, match=f"process {at_work.pid} has been at the ppo stage"):
        RunDirectory.open(loaded, ["reward"], parents_of("reward", loaded.config))
    at_work.kill()
    at_work.wait()
    run = RunDirectory.open(loaded)
    with run.locked("ppo", reads=parents_of("ppo", loaded.config), warn=pytest.fail):
        RunDirectory.open(loaded, ["reward"], parents_of("reward", loaded.config))


def test_the_command_line_refuses_too(
    config: Path, at_work: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trivet", "run", str(config)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main()
    output = capfd.readouterr()
    assert end.value.code == 2 and "the run directory is in use" in output.err and "Prefect" not in output.out


def test_what_a_killed_stage_held_and_left_is_no_obstacle(config: Path, at_work: subprocess.Popen[str]) -> None:
    run = RunDirectory(config.parent / "run")
    half = run.root / ".ppo-abcdefgh"
    half.mkdir()
    at_work.kill()
    at_work.wait()
    loaded = load_config(config)
    publish("sft", loaded, RunDirectory.open(loaded))
    assert not half.exists()
    assert ensure_stage("sft", loaded, force=False, on_line=print, on_progress=print).cached


def test_a_dry_run_looks_whose_folder_it_is_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    RunDirectory.open(load_config(config)).stage("sft").mkdir()
    other = config.with_name("other.yaml")
    config.rename(other)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    command = [sys.executable, "-m", "stages.sft", str(other), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "belongs to another config" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
