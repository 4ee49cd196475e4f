"""Signals in a stage: the first one stops it in order, a second one at once. In processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import time
from stages.interruption import Interrupted, deferred, install, requested
install()
try:
    with deferred():
        print("up", flush=True)
        for beat in range(600):
            if requested() and {heeds}:
                print("whole", flush=True)
                raise Interrupted
            time.sleep(0.05)
except Interrupted:
    print("stopped", flush=True)
    raise SystemExit(75)
"""


def start(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_deferred_block_ends_where_it_asks(number: signal.Signals) -> None:
    process = start(PROGRAM.format(heeds=True))
    process.send_signal(number)
    process.send_signal(number)  # so close to the first that it is the same request, passed on twice
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("whole\nstopped\n", 75)


def test_a_second_signal_ends_the_process_at_once() -> None:
    process = start(PROGRAM.format(heeds=False))
    process.terminate()
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 128 + signal.SIGINT)


def test_outside_of_such_a_block_a_signal_stops_at_once() -> None:
    waiting = """
import time
from stages.interruption import Interrupted, install
install()
try:
    print("up", flush=True)
    time.sleep(600)
except Interrupted:
    print("stopped", flush=True)
"""
    process = start(waiting)
    process.terminate()
    assert process.communicate(timeout=60)[0] == "stopped\n"


def test_a_request_that_the_block_did_not_see_counts_at_its_end() -> None:
    process = start(PROGRAM.format(heeds=False).replace("range(600)", "range(10)"))
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("stopped\n", 75)
