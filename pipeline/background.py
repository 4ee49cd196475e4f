"""Work that goes on beside the computation: checkpoints and samples on their way to the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_MOST_WAITING = 3
"""Pieces of work: each may hold a copy of all that learns."""


class Background:
    """One thread that does what it is given, one piece after the other, in the order of the calls.

    As a context manager it ends only when all is done, whatever ended the block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trivet-background")
        self._waiting: deque[Future[None]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Have it done soon. What it needs must not change meanwhile.

        Raises:
            Exception: what an earlier piece of work has raised.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def finish(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: what one of them has raised; the first one.
        """
        faults = [fault for future in self._waiting if (fault := future.exception()) is not None]
        self._waiting.clear()
        if faults:
            raise faults[0]

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception:
            if error is None:
                raise
        finally:
            self._pool.shutdown()
