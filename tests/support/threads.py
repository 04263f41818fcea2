"""Run the same work in several threads, which switch as often as possible."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

from support.forms import SOAK
from support.servers import TIMEOUT

THREADS = 8
SECONDS = 20 if SOAK else 1  # for which the threads of a stress test run


@contextmanager
def hurried() -> Iterator[None]:
    """Let the interpreter switch threads as often as possible, if it has the GIL."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run work(0), work(1), ... at the same time, and raise the first exception."""
    raised: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(TIMEOUT)
            work(number)
        except BaseException as error:
            raised.append(error)

    # Daemons: a thread that hangs fails the test, and does not keep the test's process from ending.
    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    with hurried():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 3 * TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if raised:
        raise raised[0]


def rounds() -> Iterator[int]:
    """Count the rounds of a stress test: at least one, and then until its time is over."""
    end = time.monotonic() + SECONDS
    turn = 0
    while not turn or time.monotonic() < end:
        yield turn
        turn += 1


def stress(work: Callable[[int, int], None], count: int = THREADS) -> int:
    """Call work(number, turn) again and again in each thread; returns how often it was called."""
    turns = [0] * count  # each thread has an item of its own

    def run(number: int) -> None:
        for turn in rounds():
            work(number, turn)
            turns[number] += 1

    in_threads(run, count)
    return sum(turns)
