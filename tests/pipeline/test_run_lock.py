"""The lock of a run: one holder, named to all others, and gone with it however it died."""

from __future__ import annotations

import errno
import fcntl
import json
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.run_lock import hold, unless_held

ROOT = Path(__file__).parents[2]
GONE = 2**22 + 1
"""No process has such a number."""
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.run_lock import hold
with hold(Path(sys.argv[1]), "the ppo stage", warn=print, reads=[Path(path) for path in sys.argv[2:]]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(*paths):
    command = [sys.executable, "-c", HOLDER, *map(str, paths)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def holder(tmp_path):
    with holding(tmp_path / "lock") as process:
        yield process


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


def test_what_is_read_stays_and_may_be_read_by_others(tmp_path):
    locks = tmp_path / "run" / "locks"
    locks.mkdir(parents=True)
    sft, reward, ppo = (locks / name for name in ("sft", "reward", "ppo"))
    with holding(ppo, sft) as reader:
        with hold(reward, "the reward stage", warn=pytest.fail, reads=[sft]):
            pass
        with pytest.raises(RunDirectoryError, match=f"process {reader.pid} has been at the ppo stage") as caught:
            hold(sft, "the sft stage", warn=pytest.fail).__enter__()
        assert caught.value.where == str(tmp_path / "run")
    with hold(sft, "the sft stage", warn=pytest.fail):
        pass
    with (
        holding(sft) as writer,
        pytest.raises(RunDirectoryError, match=f"process {writer.pid} has been at the ppo stage"),
        hold(ppo, "the ppo stage", warn=pytest.fail, reads=[sft]),
    ):
        pass
    assert json.loads(ppo.read_text())["pid"] == reader.pid, "who was refused says nothing of itself"


def test_a_lock_is_taken_only_if_it_is_free(tmp_path, holder):
    with unless_held(tmp_path / "lock") as free:
        assert not free
    holder.kill()
    holder.wait()
    with unless_held(tmp_path / "lock") as free:
        assert free
        with pytest.raises(RunDirectoryError, match="in use"), hold(tmp_path / "lock", "", warn=pytest.fail):
            pass


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
    with hold(tmp_path / "lock", "mine", warn=said.append), unless_held(tmp_path / "lock") as free:
        assert not free, "what stands in the file is all there is to know"
    assert len(said) == 1 and "no locks" in said[0]
    with unless_held(tmp_path / "lock") as free:
        assert free
    for pid, host, gone in ((GONE, socket.gethostname(), True), (GONE, "elsewhere", False)):
        (tmp_path / "lock").write_text(json.dumps({"pid": pid, "host": host, "work": "the ppo stage"}))
        with unless_held(tmp_path / "lock") as free:
            assert free is gone
