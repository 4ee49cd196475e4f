"""SIGTERM and SIGINT in a stage: the first asks it to stop where it loses nothing, a second ends it at once.

A loop runs inside `with deferred():`. There a signal only leaves a note; the loop asks `requested()` where its state
is whole, writes a checkpoint and raises `Interrupted`. Elsewhere, while a model is loaded say, a signal raises
`Interrupted` by itself. The stage then exits with `EXIT_INTERRUPTED`, and the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.distributed import World

EXIT_INTERRUPTED = 75
"""The exit code of a stage that was asked to stop and can go on; sysexits(3) calls it EX_TEMPFAIL."""

_SECONDS_OF_ONE_REQUEST = 1.0
"""Signals so close together are one request: torchrun and the supervisor both pass theirs on."""

_asked_at: float | None = None
_deferring = 0


class Interrupted(BaseException):
    """The stage stops because it was asked to; what a later start needs is on the disk."""


class StoppedInOrder(KeyboardInterrupt):
    """This program was asked to end while a stage ran, and the stage has stopped where it can go on.

    `happened` tells so of this process, also where what came of the signal was another exception.
    """

    happened = False


def install() -> None:
    """Handle SIGTERM and SIGINT of this process as the module says. Call it in the main thread."""
    withdraw()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


@contextmanager
def deferred() -> Iterator[None]:
    """A block that stops only where it asks itself; a request that came too late for that counts at its end.

    Raises:
        Interrupted: at the end of a block that went well, where a request has come meanwhile.
    """
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
    if requested() and not _deferring:
        raise Interrupted


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _asked_at is not None


def asked_of_any(world: World) -> bool:
    """Whether any of the processes was asked to stop. Every process must come here."""
    return bool(world.maximum(float(requested())))


def stop_together(world: World) -> None:
    """Stop all processes if one of them was asked to. Every process must come here.

    Raises:
        Interrupted: in all of them.
    """
    if asked_of_any(world):
        raise Interrupted


def stop_alone(world: World) -> None:
    """Stop at a point that others do not pass at the same time, if this process was asked to and is the only one.

    Raises:
        Interrupted: it was.
    """
    if world.size == 1 and requested():
        raise Interrupted


def request() -> None:
    """Ask this process to stop, as a signal does in a `deferred` block."""
    global _asked_at
    _asked_at = time.monotonic()


def withdraw() -> None:
    """Forget that this process was asked to stop."""
    global _asked_at
    _asked_at = None


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _asked_at is None:
        request()
        if not _deferring:
            raise Interrupted
    elif time.monotonic() - _asked_at > _SECONDS_OF_ONE_REQUEST:
        os._exit(128 + number)
