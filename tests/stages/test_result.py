"""What a stage's manifest says of its time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.run_directory import RunDirectory
from stages.result import StageClock


def started(run: RunDirectory, inputs_digest: str = "same") -> StageClock:
    """A start of SFT that has come as far as its loop."""
    clock = StageClock()
    clock.go_on(run, "sft", inputs_digest)
    return clock


def killed_after(run: RunDirectory, seconds: float) -> None:
    """A start whose last checkpoint was written so long after it began."""
    checkpoint = run.working("sft") / "checkpoints" / "1" / "state.json"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text("{}")
    began = json.loads((run.working("sft") / "clock.json").read_text())["started"]
    os.utime(checkpoint, (began + seconds, began + seconds))


def test_a_stage_that_is_not_interrupted_counts_from_its_start(tmp_path: Path) -> None:
    clock = StageClock(started=time.monotonic() - 7)
    clock.go_on(RunDirectory(tmp_path), "sft", "same")
    assert clock.seconds == pytest.approx(7, abs=1)


def test_interrupted_starts_count_up_to_their_last_sign_of_life(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    started(run)
    killed_after(run, 100)
    assert started(run).seconds == pytest.approx(100, abs=1)
    killed_after(run, 40)
    assert started(run).seconds == pytest.approx(140, abs=2)
    run.metrics("sft").parent.mkdir()
    run.metrics("sft").write_text("{}\n")  # a sign of life as well
    os.utime(run.metrics("sft"), (time.time() + 60, time.time() + 60))
    assert started(run).seconds == pytest.approx(200, abs=3)


def test_starts_from_other_inputs_do_not_count(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    started(run)
    killed_after(run, 100)
    assert started(run, "other").seconds < 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs_digest": "same", "before": "x", "started": null}'])
def test_an_account_that_cannot_be_read_counts_for_nothing(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    started(run)
    killed_after(run, 100)
    (run.working("sft") / "clock.json").write_text(text)
    assert started(run).seconds < 1


def test_other_processes_of_a_launch_keep_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    started(RunDirectory(tmp_path))
    assert not list(tmp_path.rglob("*"))
