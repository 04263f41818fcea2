# SPDX-License-Identifier: LGPL-2.0-or-later
"""Background work: threads, and further connections to a server that one of them makes.

The threads are safe for a caller whom a signal handler may interrupt at any bytecode.  Those of
threading are not: if a handler raises inside `Thread.start`, CPython's thread ends with a KeyError
and stays listed for ever, or `start` waits for a thread that never begins.
"""

from __future__ import annotations

import atexit
import os
from _thread import TIMEOUT_MAX, RLock, allocate_lock, start_new_thread
from contextlib import suppress
from time import monotonic

from nbd._disks.connect import connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nbd._binding.methods import NBD
    from nbd._disks.handles import Maker

#: How many seconds the end of the program waits for the threads that it has stopped.
_EXIT_TIMEOUT = 0.5

#: The threads that are running.
running: set[BackgroundThread] = set()


class BackgroundThread:
    """A thread that does not keep the program from ending.

    Args:
        work: What the thread calls, once.
        stop: Called when the program ends; makes `work` return soon.
    """

    def __init__(self, work: Callable[[], object], stop: Callable[[], object]) -> None:
        self.stop = stop
        self._work = work
        # Either the thread or `cancel` stores what it is here, whichever comes first.  setdefault
        # is atomic, and can be repeated if a signal handler's exception has hidden its result.
        self._decided: dict[str, object] = {}
        self._process = os.getpid()
        self._has_ended = False
        self._ended = allocate_lock()
        self._ended.acquire()

    def start(self) -> None:
        """Start the thread; called again, it does nothing.

        Raises:
            RuntimeError: The system has no thread left, or the program is ending.
        """
        start_new_thread(self._run, ())

    def cancel(self) -> bool:
        """Keep the thread from calling `work`; returns False if it has done so already."""
        return self._decided.setdefault("by", "cancel") == "cancel"

    def join(self, seconds: float | None = None) -> bool:
        """Wait until a thread that was started ends.

        Args:
            seconds: How long to wait at most; None waits for ever.

        Returns:
            Whether it has ended.
        """
        if self._has_ended or os.getpid() != self._process:  # a fork does not copy threads
            return True
        return self._ended.acquire(timeout=-1 if seconds is None else min(seconds, TIMEOUT_MAX))

    def _run(self) -> None:
        thread = object()
        if self._decided.setdefault("by", thread) is not thread:
            return
        running.add(self)
        try:
            # `work` handles its own exceptions: here they could only be printed.
            with suppress(Exception):
                self._work()
        finally:
            running.discard(self)
            self._has_ended = True
            self._ended.release()


class Joining:
    """Connects further handles in a background thread, one after the other.

    More connections are an optimisation: work begins on the first one, and others join it.  Nobody
    waits for a connection that never completes, as with a server that admits no further client.

    `stop` does not wait for the thread, and the end of the program waits only for a moment, because
    the look-up of a host's name cannot be interrupted, nor can a callable of the caller.  A handle
    that is connected too late is closed.  The thread refers to `add` and to the callable until it
    ends, so nothing that is reachable from them is collected before.

    Args:
        server: The URI of the server, or the caller's callable.
        count: How many connections to make at most.
        timeout: How many seconds one connection to a URI may take; None is for ever.
        add: Called in the thread with each connected handle, which it takes over.  If it raises,
            the handle is closed and no other is made.  It must not wait for a lock that a caller
            of `stop` holds.
        fail: Called in the thread, and under the same condition, if a callable returns what is not
            a handle, or the same one again.
    """

    def __init__(
        self,
        server: str | Maker,
        count: int,
        timeout: float | None,
        add: Callable[[NBD], object],
        fail: Callable[[Exception], object] | None = None,
    ) -> None:
        self._server: str | Maker | None = server
        self._count = count
        self._timeout = timeout
        self._add = add
        self._fail = fail
        self._process = os.getpid()
        self._lock = RLock()  # held while a handle is handed over
        self._is_stopped = False
        self._connecting: NBD | None = None
        self._thread = BackgroundThread(self._run, self.stop)

    def start(self) -> None:
        """Start the thread; called once."""
        # RuntimeError: the system has no thread left, or the program is ending.
        with suppress(RuntimeError):
            self._thread.start()
            return
        self._server = None

    def stop(self) -> None:
        """Abandon the connection that is being made, and make no other.

        `add` is not called any more once this has returned.  Stopping twice does nothing.
        """
        self.begin_to_stop()
        if os.getpid() != self._process:
            return  # the parent's thread, which the fork did not copy, may have held the lock
        with self._lock:
            connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.__exit__(None, None, None)  # makes the thread's call return

    def begin_to_stop(self) -> None:
        """Make no other connection; `add` may still be called once.

        No lock is taken that an exception of a signal handler could leave locked.
        """
        self._is_stopped = True
        self._server = None  # a callable may refer to anything, also to the owner of this object

    def _run(self) -> None:
        # The program works without the connection, whatever is raised here; nobody else could
        # handle what a callable raises, such as SystemExit.
        with suppress(BaseException):
            for _ in range(self._count):
                self._hand_over(self._connected())
        self._server = None

    def _connected(self) -> NBD:
        server = self._server
        if server is None:
            raise RuntimeError("the connection is not needed any more")
        if isinstance(server, str):
            return connect(server, timeout=self._timeout, prepare=self._note)
        return self._checked(server, server.call())

    def _checked(self, maker: Maker, made: object) -> NBD:
        """Return what a callable has made; report a mistake of its author."""
        try:
            return maker.checked(made)
        except (TypeError, ValueError) as raised:
            # Without its traceback, whose frames refer to the callable.
            mistake = raised.with_traceback(None)
        with self._lock:
            self._check()
            if self._fail is not None:
                self._fail(mistake)
        raise RuntimeError("the callable cannot make a connection")

    def _note(self, handle: NBD) -> None:
        """Remember a handle that is about to be connected, so that `stop` can close it."""
        with self._lock:
            self._check()
            self._connecting = handle

    def _hand_over(self, handle: NBD) -> None:
        try:
            with self._lock:
                self._check()
                self._connecting = None
                self._add(handle)
        except BaseException:
            handle.__exit__(None, None, None)
            raise

    def _check(self) -> None:
        if self._is_stopped:
            raise RuntimeError("the connection is not needed any more")


@atexit.register
def _stop_all() -> None:
    """Get all threads out of libnbd before the end of the program frees what they use there."""
    threads = list(running)
    for thread in threads:
        thread.stop()
    deadline = monotonic() + _EXIT_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))


os.register_at_fork(after_in_child=running.clear)
