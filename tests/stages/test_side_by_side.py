"""Two stages at once in threads of one process: they have the device together, and both stop when asked."""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from finished_stages import light_config
from real_runs import ROOT, wait_for

from pipeline.config import LaunchSettings
from pipeline.errors import StageInterruptedError
from stages.device_lock import device_lock
from stages.launch import launch_stage
from stages.side_by_side import SideBySide

STAGE = """
import sys, time
from stages.command import stage_main
from stages.interruption import Interrupted, deferred, requested
def run(loaded, run):
    with deferred():
        print("at work", flush=True)
        end = time.monotonic() + 60
        while not requested():
            assert time.monotonic() < end, "nobody asked"
            time.sleep(0.05)
        print("checkpoint written", flush=True)
        raise Interrupted
stage_main("NAME", run)
"""


@pytest.fixture(autouse=True)
def _locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[SideBySide, str, list[str]], None]:
    """Launches a made-up stage that works until it is asked to stop."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))
    config = light_config(tmp_path, reward={"start_from": "base", "calibrate_on": "base"})

    def launch(beside: SideBySide, stage: str, lines: list[str]) -> None:
        (modules / f"made_up_{stage}.py").write_text(textwrap.dedent(STAGE.replace("NAME", stage)))
        launch_stage(
            stage,  # type: ignore[arg-type]
            config,
            [],
            LaunchSettings(),
            tmp_path / f"{stage}.log",
            force=False,
            on_line=lines.append,
            on_progress=lambda update: None,
            module=f"made_up_{stage}",
            beside=beside,
        )

    return launch


def test_both_stop_in_order_when_asked(launch: Callable[[SideBySide, str, list[str]], None]) -> None:
    beside, said = SideBySide(), {stage: list[str]() for stage in ("sft", "reward")}
    with ThreadPoolExecutor() as threads:
        ends = {stage: threads.submit(launch, beside, stage, said[stage]) for stage in said}
        wait_for(lambda: all("at work" in lines for lines in said.values()), "both are at work", 120, lambda: str(said))
        beside.stop()
        for stage, end in ends.items():
            with pytest.raises(StageInterruptedError, match=f"{stage}: stopped as asked"):
                end.result(120)
    assert all("checkpoint written" in lines for lines in said.values())


def test_one_that_starts_after_the_others_were_asked_ends_at_once(
    launch: Callable[[SideBySide, str, list[str]], None],
) -> None:
    beside = SideBySide()
    beside.stop()
    lines: list[str] = []
    with pytest.raises(StageInterruptedError), beside.device(None, "sft", "", lines.append):
        pass
    started = time.monotonic()
    with pytest.raises(Exception, match="sft"):
        launch(beside, "sft", lines)
    assert "at work" not in lines and time.monotonic() - started < 20


OTHER_RUN = """
import sys
from stages.device_lock import device_lock
with device_lock("shared", "the ppo stage of another run", lambda line: print(line, flush=True)):
    print("has it", flush=True)
    sys.stdin.readline()
"""


def other_run() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_they_wait_for_another_run_together_and_keep_it_out_until_both_are_through() -> None:
    beside, lines, inside = SideBySide(), list[str](), threading.Barrier(2, timeout=60)
    leave = {stage: threading.Event() for stage in ("sft", "reward")}

    def work(stage: str) -> None:
        with beside.device("shared", stage, f"the {stage} stage", lines.append):  # type: ignore[arg-type]
            inside.wait()  # nobody gets through alone
            leave[stage].wait(60)

    with other_run() as first, ThreadPoolExecutor() as threads:
        assert first.stdout and first.stdin and first.stdout.readline() == "has it\n"
        ends = [threads.submit(work, stage) for stage in leave]
        wait_for(lambda: lines, "they wait", 30)
        assert "which process" in lines[0] and "the ppo stage of another run has" in lines[0]
        first.stdin.close()
        wait_for(lambda: inside.n_waiting == 0 and len(lines) == 2, "they go on", 30, lambda: str(lines))
        with other_run() as second:
            assert second.stdout and second.stdin
            assert second.stdout.readline().startswith("Waiting for the device 'shared'")
            leave["sft"].set()
            ends[0].result(30)
            said, _, _ = select.select([second.stdout], [], [], 2.0)
            leave["reward"].set()
            assert not said, "it still waits"
            assert second.stdout.readline().startswith("The device 'shared' is free")
            second.stdin.close()
        ends[1].result(30)
    with device_lock("shared", "", pytest.fail):
        pass


def test_asked_to_stop_they_no_longer_wait_for_the_device() -> None:
    beside, lines = SideBySide(), list[str]()

    def work(stage: str) -> None:
        with beside.device("shared", stage, "", lines.append):  # type: ignore[arg-type]
            raise AssertionError("another run has the device")

    with other_run() as other, ThreadPoolExecutor() as threads:
        assert other.stdout and other.stdin and other.stdout.readline() == "has it\n"
        ends: list[Future[None]] = [threads.submit(work, stage) for stage in ("sft", "reward")]
        wait_for(lambda: lines, "they wait", 30)
        beside.stop()
        try:
            for end in ends:
                with pytest.raises(StageInterruptedError, match="before it began"):
                    end.result(10)
        finally:
            other.stdin.close()
