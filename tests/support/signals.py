"""Signal handlers and timers that a test sets, and restores when it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Callable

Handler = Callable[[int, "FrameType | None"], object]

SHORT = 0.05  # seconds that a call may wait, or until a signal arrives
AGAIN = 20  # seconds until the signal is sent again


class Stop(Exception):
    """The exception that the signal handler of a test raises."""


def stop(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising Stop."""
    raise Stop


@contextmanager
def handling(handler: Handler, number: int = signal.SIGALRM) -> Iterator[None]:
    """Install a signal handler; afterwards, stop the timer and restore the previous handler."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for _ in range(1000):  # Python runs the handler of a signal that is pending here
            pass
        signal.signal(number, before)


@contextmanager
def alarm(handler: Handler = stop, seconds: float = SHORT) -> Iterator[None]:
    """Send SIGALRM after some time.

    If the handler happens to run inside a finalizer, which PyPy calls at any time, its exception is
    lost.  The signal is therefore sent again, much later.
    """
    with handling(handler):
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
