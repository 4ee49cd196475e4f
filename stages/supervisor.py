"""Runs a command and sees to it that the command's whole process tree ends when it must.

    python -I -S supervisor.py LIFELINE GRACE COMMAND...

LIFELINE is the reading end of a pipe whose writing end the parent holds: the kernel closes it however the
parent died, SIGKILL included. On that, on SIGTERM, SIGINT or SIGHUP, or when the command itself is gone,
every descendant gets SIGTERM and, GRACE seconds later or at a second signal, SIGKILL. Descendants that opened
sessions of their own, as torchrun's workers do, are found too: on Linux the supervisor adopts whatever its
children orphan.

Standard library only, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_UNTIL_GIVING_UP = 5.0


class Supervisor:
    """One command, its descendants and what it ended with.

    Args:
        lifeline: file descriptor of the pipe's reading end.
        grace: seconds between SIGTERM and SIGKILL.
        command: the program and its arguments.
    """

    def __init__(self, lifeline: int, grace: float, command: list[str]) -> None:
        self._lifeline, self._grace, self._command = lifeline, grace, command
        self._child: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._signals = 0
        self._stop = False

    def run(self) -> int:
        """Run the command to its end or to ours; returns the exit code for this process."""
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            # Never waited for through this object: `_reap` collects it along with the orphans.
            self._child = subprocess.Popen(self._command)
        except OSError as error:
            print(f"cannot start {self._command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        while self._status is None and not self._stop:
            with contextlib.suppress(InterruptedError):
                if select.select([self._lifeline], [], [], 0.05)[0]:
                    self._stop = True  # Nothing is ever written: readable means closed.
            self._reap()
        self._end_descendants()
        if self._status is None:
            return 128 + signal.SIGKILL
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._stop = True
        if self._signals > 1:
            self._grace = 0.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._child is not None and pid == self._child.pid:
                self._status = status

    def _end_descendants(self) -> None:
        asked: set[int] = set()
        started = time.monotonic()
        while alive := descendants():
            waited = time.monotonic() - started
            if waited > self._grace + _SECONDS_UNTIL_GIVING_UP:
                with contextlib.suppress(OSError):  # The parent that reads this may be gone.
                    print(f"processes that cannot be ended: {alive}", file=sys.stderr, flush=True)
                return
            for pid in alive:
                if waited >= self._grace or pid not in asked:
                    asked.add(pid)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL if waited >= self._grace else signal.SIGTERM)
            time.sleep(0.02)
            self._reap()


def descendants() -> list[int]:
    """The living processes below this one, parents first."""
    children: dict[int, list[int]] = {}
    for pid, parent in _linux_processes() if sys.platform == "linux" else _other_processes():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        below = children.get(todo.pop(0), [])
        found += below
        todo += below
    return found


def _linux_processes() -> list[tuple[int, int]]:
    pairs = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    text = file.read()
            except OSError:
                continue  # It has ended meanwhile.
            # The second field is the program's name in parentheses, which may hold anything.
            state, parent = text[text.rindex(")") + 2 :].split()[:2]
            if state not in "ZX":
                pairs.append((int(name), int(parent)))
    return pairs


def _other_processes() -> list[tuple[int, int]]:
    with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True) as listing:
        lines = listing.communicate()[0].splitlines()
    fields = [line.split(None, 2) for line in lines]
    return [
        (int(pid), int(parent))
        for pid, parent, state in fields
        if not state.startswith("Z") and int(pid) != listing.pid
    ]


if __name__ == "__main__":
    # No exit handlers: whatever the command did is over.
    os._exit(Supervisor(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]).run())
