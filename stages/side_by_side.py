"""Stages that run at the same time in threads of one process: they share a device, and all stop when one has to.

A signal reaches the main thread alone. It then asks the stages here, each of which stops as it would by itself: it
writes a checkpoint, and the same command goes on from there.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from pipeline.errors import StageInterruptedError
from pipeline.run_directory import StageName
from stages.device_lock import device_lock


class SideBySide:
    """The stages of one run that run at the same time."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._changing = threading.Lock()
        self._device, self._at_device = ExitStack(), 0
        self._waiting = threading.Lock()

    def stop(self) -> None:
        """Ask all of them to stop; asked a second time, they end at once."""
        with self._changing:
            self._asked.set()
            for process in self._processes:
                process.terminate()

    def require_wanted(self, stage: StageName) -> None:
        """Refuse to begin, or to go on waiting, once they were asked to stop.

        Raises:
            StageInterruptedError: they were.
        """
        if self._asked.is_set():
            raise StageInterruptedError(
                f"{stage}: stopped as asked, before it began", remedy="The same command goes on from there."
            )

    @contextmanager
    def stopping(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """A block in which `stop` reaches this process, also where it was called before."""
        with self._changing:
            self._processes.add(process)
            if self._asked.is_set():
                process.terminate()
        try:
            yield
        finally:
            with self._changing:
                self._processes.discard(process)

    @contextmanager
    def device(self, name: str | None, stage: StageName, work: str, on_line: Callable[[str], None]) -> Iterator[None]:
        """Have a device together during the block: the first stage waits for it, the last one gives it back.

        Args: as for `stages.device_lock.device_lock`; `stage` is the one that needs the device.

        Raises:
            DeviceLockError: the lock's file cannot be opened.
            StageInterruptedError: they were asked to stop meanwhile.
        """
        with self._waiting:
            self.require_wanted(stage)
            if self._at_device == 0:
                given_up = partial(self.require_wanted, stage)
                self._device.enter_context(device_lock(name, work, on_line, between_tries=given_up))
            self._at_device += 1
        try:
            yield
        finally:
            with self._waiting:
                self._at_device -= 1
                if self._at_device == 0:
                    self._device.close()
