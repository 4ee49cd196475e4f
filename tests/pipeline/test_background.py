"""Work beside the computation: in order, all of it, and no fault unheard."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.background import Background


def test_it_is_done_in_order_beside_the_caller() -> None:
    done: list[int] = []
    go = threading.Event()
    with Background() as background:
        background.do(lambda: done.append(1 if go.wait() else 0))
        background.do(lambda: done.append(2))
        assert done == [], "the caller goes on"
        go.set()
    assert done == [1, 2]


def test_a_fault_comes_up_at_the_next_call_or_the_end() -> None:
    def fail() -> None:
        raise OSError("disk")

    with Background() as background:
        background.do(fail)
        while not background._waiting[0].done():
            time.sleep(0.001)
        with pytest.raises(OSError, match="disk"):
            background.do(lambda: None)
    with pytest.raises(OSError, match="disk"), Background() as background:
        background.do(fail)


def test_what_ended_the_block_is_not_hidden_and_all_is_done_all_the_same() -> None:
    done: list[str] = []

    def work() -> None:
        done.append("work")
        raise OSError("disk")

    with pytest.raises(KeyError), Background() as background:
        background.do(work)
        raise KeyError
    assert done == ["work"]


def test_little_waits_at_a_time() -> None:
    go = threading.Event()
    with Background() as background:
        for _ in range(3):
            background.do(lambda: assert_set(go))
        waiting = threading.Thread(target=background.do, args=(lambda: None,))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive(), "a fourth piece waits for the first"
        go.set()
        waiting.join()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)
