"""Runs in real processes, as a user starts them, and what of them is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(cache: Path) -> dict[str, str]:
    """That of a user who has never heard of Prefect."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "TRIVET_", "PYTEST_"))}
    return kept | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "HOME": str(cache / "home")}


def processes_with(variable: str) -> dict[int, str]:
    """The command lines of all processes whose environment holds this text, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


@contextmanager
def held_still(variable: str, program: str) -> Iterator[None]:
    """Such processes make no step during the block, however fast the machine; they keep what they hold."""
    held = [pid for pid, line in processes_with(variable).items() if program in line]
    assert held, f"no process of {program}"
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def no_process_with(variable: str, seconds: float = 60.0) -> bool:
    """Whether they all end within this time."""
    end = time.monotonic() + seconds
    while processes_with(variable):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def wait_for(condition: Callable[[], object], what: str, seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until something is so; `told` is what a failure shows, such as a log."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {seconds:g} s: {what}\n{told()}"
        time.sleep(0.1)
