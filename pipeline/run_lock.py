"""One process at a time works on a run. The kernel frees the lock however its holder died: nothing goes stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.disk import writing
from pipeline.errors import RunDirectoryError

_SECONDS_TO_TRY = 1.0
"""A start holds the lock for a moment to look whether it is free; that is not worth an error."""
_UNKNOWN_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def hold(path: Path, work: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file during the block, with what is known of this process written into it.

    Args:
        path: the file; its folder exists. It stays, empty, when the block ends.
        work: what the process does, as the message to others says it, such as "the ppo stage".
        warn: told where the file system knows no locks; the block then runs without.

    Raises:
        RunDirectoryError: another process holds it; says which one.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    held = False
    try:
        try:
            _acquire(descriptor, path)
            held = True
        except OSError as error:
            if error.errno not in _UNKNOWN_HERE:
                raise
            warn(f"{path.parent}: this file system has no locks, so nothing keeps a second start out of this run.")
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            _describe(descriptor, work)
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock file, as it wrote itself down; empty where it did not. None: nobody does.

    Looking takes no lock that would keep a start out, but for the moment of the look.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _written_down(path)
    except OSError:  # A file system without locks: what stands there is all there is to know.
        return _written_down(path) or None
    finally:
        os.close(descriptor)


def _written_down(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _acquire(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_TRY
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _in_use(path) from None
            time.sleep(0.05)


def _describe(descriptor: int, work: str) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "work": work,
        "command": shlex.join(sys.orig_argv),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder, indent=2).encode() + b"\n", 0)


def _in_use(path: Path) -> RunDirectoryError:
    known = _written_down(path)
    if not known:
        who, stop = "another process", "stop it"
    else:
        there = "" if known.get("host") == socket.gethostname() else f" on {known.get('host')}"
        who = (
            f"process {known.get('pid')}{there} has been at {known.get('work')} since {known.get('since')}"
            f" ({known.get('command')})"
        )
        stop = f"stop it (kill {known.get('pid')}{there})"
    return RunDirectoryError(
        f"the run directory is in use: {who}",
        where=str(path.parent),
        remedy=f"Wait until it ends, {stop}, or choose another folder with run_dir=....",
    )
