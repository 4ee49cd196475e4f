"""Many runs, one GPU: a stage waits until the device that it names is free.

The lock is the kernel's, on a file that all runs on the machine know by the device's name; it needs no server and is
free again however its holder died. The process that starts a stage holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DeviceLockError

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_BETWEEN_LINES = 300.0


@contextmanager
def device_lock(
    name: str | None, work: str, on_line: Callable[[str], None], *, between_tries: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Have a device to oneself during the block; waits for as long as another run has it.

    Args:
        name: what the runs that share the device call it. None: it is not shared, nothing is locked.
        work: what is going to run there, for the message to those who wait.
        on_line: told when there is something to wait for, and now and then that it still lasts.
        between_tries: called while it waits; may raise to give up.

    Raises:
        DeviceLockError: the lock's file cannot be opened.
    """
    if name is None:
        yield
        return
    path = lock_path(name)
    descriptor = _open(path)
    try:
        _wait_for(descriptor, name, on_line, between_tries)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} with {work}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def lock_path(name: str) -> Path:
    """The file that stands for a device on this machine, for all of its users."""
    return Path(tempfile.gettempdir()) / f"trivet-device-{name}.lock"


def _open(path: Path) -> int:
    try:
        try:
            # In a sticky folder the kernel may refuse O_CREAT on a file that another user has made.
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o666)  # whatever the umask: the other users wait for the same device
            return descriptor
    except OSError as error:
        raise DeviceLockError(
            f"the device's lock cannot be opened: {error.strerror}",
            where=str(path),
            remedy="Remove the file if nothing uses the device, or set launch.device=null to do without a lock.",
        ) from None


def _wait_for(descriptor: int, name: str, on_line: Callable[[str], None], between_tries: Callable[[], None]) -> None:
    waiting_since = said_at = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                on_line(f"The device {name!r} cannot be locked ({error.strerror}); two runs may meet there.")
                return
        now = time.monotonic()
        waiting_since = waiting_since or now
        if said_at is None or now - said_at >= _SECONDS_BETWEEN_LINES:
            said_at = now
            on_line(f"Waiting for the device {name!r}, which {_holder(descriptor)} has.")
        between_tries()
        time.sleep(_SECONDS_BETWEEN_TRIES)
    if waiting_since is not None:
        on_line(f"The device {name!r} is free after {time.monotonic() - waiting_since:.0f} s.")


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(descriptor, 500, 0).decode(errors="replace") or "another process"
    return "another process"
