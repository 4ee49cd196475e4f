"""Several processes of one stage over gloo, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_together(
    *arguments: str | Path, processes: int = 2, seconds: float = 300.0, variables: Mapping[str, str] | None = None
) -> None:
    """Start Python with these arguments once a process, and wait until all have ended well."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | shared | dict(variables or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in running:
            process.kill()
