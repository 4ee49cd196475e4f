"""Who works on what in a run: one process at a time changes a result, while several may read it.

The kernel frees a lock however its holder died: nothing goes stale. Who holds one for itself alone writes into the
file what it does and what it reads, so that those who are refused can be told who keeps them out.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.disk import writing
from pipeline.errors import RunDirectoryError

_SECONDS_TO_TRY = 1.0
"""A start holds the lock for a moment to look whether it is free; that is not worth an error."""
LOCKS = "locks"
"""The folder of a run that holds its lock files, one a stage."""
_UNKNOWN_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def hold(
    path: Path,
    work: str,
    warn: Callable[[str], None],
    *,
    reads: Sequence[Path] = (),
    seconds: float = _SECONDS_TO_TRY,
) -> Iterator[None]:
    """Hold a lock file alone during the block, with what is known of this process written into it.

    Args:
        path: the file; its folder exists. It stays, empty, when the block ends.
        work: what the process does, as the message to others says it, such as "the ppo stage".
        warn: told where the file system knows no locks; the block then runs without.
        reads: further lock files in that folder, of what the block reads. Others may read it too.
        seconds: how long to try.

    Raises:
        RunDirectoryError: another process holds one of them otherwise; says which one.
    """
    with ExitStack() as held:
        descriptor = held.enter_context(_locked(path, fcntl.LOCK_EX, seconds, warn))
        for read in reads:
            held.enter_context(_locked(read, fcntl.LOCK_SH, seconds, lambda _: None))
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            _describe(descriptor, work, reads)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)


@contextmanager
def unless_held(path: Path) -> Iterator[bool]:
    """Hold a lock file alone during the block if nobody else holds it now; whether that is so.

    Where the file system knows no locks, what stands in the file decides, unless it is of a process that is gone.
    """
    with writing(path):
        descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = _is_gone(_written_down(path))
        yield free
    finally:
        os.close(descriptor)


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock file alone, as it wrote itself down; empty where it did not. None: nobody does.

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


def _is_gone(found: Mapping[str, Any]) -> bool:
    """Whether nobody wrote himself down, or a process of this machine that has ended."""
    if not found or found.get("host") != socket.gethostname():
        return not found
    with contextlib.suppress(PermissionError, TypeError, ValueError):
        try:
            os.kill(int(found.get("pid", 0)), 0)
        except ProcessLookupError:
            return True
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


@contextmanager
def _locked(path: Path, how: int, seconds: float, warn: Callable[[str], None]) -> Iterator[int]:
    """The file's descriptor, locked during the block."""
    with writing(path):
        descriptor = _open(path)
    try:
        try:
            _acquire(descriptor, path, how, seconds)
        except OSError as error:
            if error.errno not in _UNKNOWN_HERE:
                raise
            warn(f"{_place(path)}: this file system has no locks, so nothing keeps a second start out of this run.")
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, how: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _in_use(path) from None
            time.sleep(0.05)


def _describe(descriptor: int, work: str, reads: Sequence[Path]) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "work": work,
        "reads": [read.name for read in reads],
        "command": shlex.join(sys.orig_argv),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder, indent=2).encode() + b"\n", 0)


def _in_use(path: Path) -> RunDirectoryError:
    known = next(_who_keeps_out(path), {})
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
        where=str(_place(path)),
        remedy=f"Wait until it ends, {stop}, or choose another folder with run_dir=....",
    )


def _place(path: Path) -> Path:
    """The folder that a lock file is about."""
    return path.parent.parent if path.parent.name == LOCKS else path.parent


def _who_keeps_out(path: Path) -> Iterator[Mapping[str, Any]]:
    """Who holds the file alone, or holds another one beside it and reads what this one stands for."""
    if (found := holder(path)) is not None:
        yield found
    for other in sorted(path.parent.iterdir()) if path.parent.name == LOCKS else ():
        if other != path and (found := holder(other)) is not None and path.name in found.get("reads", ()):
            yield found
