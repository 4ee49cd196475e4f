"""Two runs, one device: the second waits, and goes on however the first one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import ROOT

from pipeline.errors import DeviceLockError
from stages.device_lock import device_lock, lock_path

HOLDER = """
import sys, time
from stages.device_lock import device_lock
with device_lock(sys.argv[1], f"the ppo stage of {sys.argv[2]}", lambda line: print(line, flush=True)):
    print("has it", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    def start(name: str, run: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HOLDER, name, run],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_the_second_waits_for_the_first(killed: bool, start: Callable[..., subprocess.Popen[str]]) -> None:
    with start("gpu", "runs/a") as first:
        assert first.stdout and first.stdin
        assert first.stdout.readline() == "has it\n"
        with start("gpu", "runs/b") as second, start("other", "runs/c") as elsewhere:
            assert second.stdout and second.stdin and elsewhere.stdout
            said = second.stdout.readline()
            assert (
                said == f"Waiting for the device 'gpu', which process {first.pid} with the ppo stage of runs/a has.\n"
            )
            assert elsewhere.stdout.readline() == "has it\n"
            assert second.poll() is None
            if killed:
                first.send_signal(signal.SIGKILL)
            else:
                first.stdin.close()
            assert second.stdout.readline().startswith("The device 'gpu' is free after")
            assert second.stdout.readline() == "has it\n"


def test_without_a_name_nothing_is_locked(tmp_path: Path) -> None:
    lines: list[str] = []
    with device_lock(None, "work", lines.append):
        assert list(tmp_path.iterdir()) == []
    with device_lock("gpu", "work", lines.append):
        assert lock_path("gpu").parent == tmp_path
    assert lines == []


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    lock_path("gpu").mkdir()
    with (
        pytest.raises(DeviceLockError, match=r"(?s)trivet-device-gpu\.lock.*launch\.device=null"),
        device_lock("gpu", "w", print),
    ):
        pass


def test_the_lock_ends_with_an_error_in_the_block() -> None:
    with pytest.raises(KeyError), device_lock("gpu", "w", print):
        raise KeyError
    waited: list[str] = []
    with device_lock("gpu", "w", waited.append):
        assert waited == []
