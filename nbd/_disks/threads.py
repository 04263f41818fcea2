# SPDX-License-Identifier: LGPL-2.0-or-later
"""Threads for callers that a signal handler may stop at any bytecode.

threading.Thread is not made for that: if a handler raises inside of `start`, CPython's thread ends
with a KeyError and is listed for ever, or `start` waits for a thread that does not begin.
"""

from __future__ import annotations

import atexit
import os
from _thread import TIMEOUT_MAX, allocate_lock, start_new_thread
from contextlib import suppress
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: How many seconds the end of the program waits for the threads that it has stopped.
_AT_EXIT = 0.5

#: The threads that run.
running: set[Helper] = set()


class Helper:
    """A thread, which the end of the program does not wait for.

    Args:
        work: What the thread calls, once.
        stop: What to call when the program ends, so that `work` returns soon.
    """

    def __init__(self, work: Callable[[], object], stop: Callable[[], object]) -> None:
        self.stop = stop
        self._work = work
        # The first one to store its name here decides: the thread, or the one who cancels it.
        self._decided: dict[str, str] = {}
        self._process = os.getpid()
        self._has_ended = False
        self._ended = allocate_lock()
        self._ended.acquire()

    def start(self) -> None:
        """Begin; called once.

        Raises:
            RuntimeError: The system has no thread left, or the program is ending.
        """
        start_new_thread(self._run, ())

    def cancel(self) -> bool:
        """If it has not begun to work, it never will; returns whether that is so."""
        return self._decided.setdefault("by", "cancel") == "cancel"

    def join(self, seconds: float | None = None) -> bool:
        """Wait for its end; None is for ever.  It has to be started.

        Returns:
            Whether it has ended.
        """
        if self._has_ended or os.getpid() != self._process:  # a fork leaves threads behind
            return True
        return self._ended.acquire(timeout=-1 if seconds is None else min(seconds, TIMEOUT_MAX))

    def _run(self) -> None:
        if self._decided.setdefault("by", "thread") != "thread":
            return
        running.add(self)
        try:
            # Exceptions are the business of `work`: nobody else could handle them.
            with suppress(Exception):
                self._work()
        finally:
            running.discard(self)
            self._has_ended = True
            self._ended.release()


@atexit.register
def _stop_all() -> None:
    """Have no thread inside libnbd while the program ends, as libnbd then frees what it uses."""
    helpers = list(running)
    for one in helpers:
        one.stop()
    until = monotonic() + _AT_EXIT
    for one in helpers:
        one.join(max(0.0, until - monotonic()))


os.register_at_fork(after_in_child=running.clear)
