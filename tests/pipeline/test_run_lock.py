"""The lock of a run: one holder, named to all others, and gone with it however it died."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.run_lock import hold

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.run_lock import hold
with hold(Path(sys.argv[1]), "the ppo stage", warn=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path, holder):
    for _ in range(2):  # who was refused leaves the holder's word as it was
        with pytest.raises(RunDirectoryError) as caught, hold(tmp_path / "lock", "mine", warn=pytest.fail):
            pass
        message = str(caught.value)
        assert f"process {holder.pid} has been at the ppo stage since " in message
        assert "-c " in message and str(tmp_path) in message and f"kill {holder.pid}" in message


def test_the_kernel_frees_the_lock_of_a_killed_holder(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid, "it had no time to say good-bye"
    with hold(tmp_path / "lock", "mine", warn=pytest.fail):
        pass
    assert (tmp_path / "lock").read_text() == ""


def test_a_holder_that_left_no_word_is_refused_all_the_same(tmp_path, holder):
    for content in ("", "{", "[1]"):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(RunDirectoryError, match="in use: another process"), hold(tmp_path / "lock", "", print):
            pass


def test_a_file_system_without_locks_brings_a_warning(tmp_path, monkeypatch):
    def unknown(descriptor, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    said: list[str] = []
    with hold(tmp_path / "lock", "mine", warn=said.append):
        ran = True
    assert ran and len(said) == 1 and "no locks" in said[0]
