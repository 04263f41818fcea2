# SPDX-License-Identifier: LGPL-2.0-or-later
"""The connections of a file, its queue, and its waits.

A file can be used as soon as its first connection is made.  Further connections are an
optimisation: they are made while the file waits or is used, and join the queue when they are ready.
No thread is needed for that, unless a callable of the caller makes them.

This module refers to the connections of every open file until the file is closed, so that the
file's finalizer can still use them.  Otherwise the garbage collector could find a file and its
handles together, finalize a handle first, and thereby close it.  A file under a buffer is referred
to as well.  Nothing that is kept here may refer to objects of the program: they would never be
collected.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import deque
from contextlib import suppress
from time import monotonic

from nbd._binding.errors import ClosedHandle, DiskError, Error, Timeout
from nbd._binding.handle import hold, let_go
from nbd._binding.methods import NBD
from nbd._disks.background import Joining
from nbd._disks.connect import (
    CLOSE_TIMEOUT,
    agreed,
    begin_shutdown,
    close_all,
    finish_shutdown,
    prepared,
)
from nbd._disks.handles import WeakMaker, export_of
from nbd._disks.queue import TARGET, IdleTimer, Queue, timeout_error
from nbd._disks.reconnect import JOURNAL, Reconnector, other_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nbd._disks.handles import Maker
    from nbd._disks.queue import Request

#: Seconds between two checks of the connections that are being made.  The interval doubles while
#: none of them makes progress.
_MIN_CHECK_INTERVAL, _MAX_CHECK_INTERVAL = 0.001, 0.5

#: The connections of all open files, each with the file if that is under a buffer.
_kept: dict[Connections, Any] = {}


class _Borrowed(NBD):
    """The caller's handle, without the attributes that the program has set on it."""

    def __init__(self, handle: NBD) -> None:
        self._h = handle._h

    def __del__(self) -> None:
        """Close nothing."""


class _Adopted(NBD):
    """A handle that a callable has made, without the attributes that the program has set on it.

    From now on, the connection is closed when this object is dropped, and not the program's.
    """

    def __init__(self, handle: NBD) -> None:
        self._h = handle._h
        hold(self._h, _Adopted)

    def __del__(self) -> None:
        if let_go is None:  # see Handle.__del__
            return
        let_go(self._h, _Adopted)
        super().__del__()


class Connections:
    """The connections of one file.

    Args:
        handles: The connections that are made already, all to one export.
        is_ours: Whether they are closed with the file.
        is_of_program: Whether a callable of the program has made them, if they are ours.
        timeout: How many seconds nothing may move; None is for ever.
        depth, piece: Those of the queue.

    Attributes:
        ours: The handles that are closed with the file, including those that are being connected.
        queue: The queue over all connections.
        can_flush: Whether the server supports flush.
        is_stalled: Whether the last wait was stopped by an exception.
        is_hurried: Whether the file is about to be closed, so that its waits are short.
        failure: Why lost connections were given up, and none is left; or None.
    """

    def __init__(
        self,
        handles: list[NBD],
        timeout: float | None,
        depth: int,
        piece: int,
        *,
        is_ours: bool,
        is_of_program: bool = False,
    ) -> None:
        handles[0].get_size()  # raises if the size is too large for a file of Python's
        self.can_flush = handles[0].can_flush()
        self.ours: list[NBD] = []
        self._borrowed: list[_Borrowed] = []
        if is_ours:
            self.ours = [_Adopted(handle) for handle in handles] if is_of_program else handles
        else:
            self._borrowed = [_Borrowed(handle) for handle in handles]
        self.is_stalled = False
        self.is_hurried = False
        self._is_abandoned = False
        self._timeout = timeout
        self._joining: list[NBD] = []
        # Those that a callable makes: the thread that calls it, what it has made, and mistakes.
        self._maker_thread: Joining | None = None
        self._made: deque[NBD] = deque()
        self._mistakes: deque[Exception] = deque()
        self._check_at = 0.0
        self._interval = _MIN_CHECK_INTERVAL
        self._is_late = False
        self._is_of_program = is_of_program
        self._reconnector: Reconnector | None = None
        self._what = ""
        self._losses = 0
        self.failure: Error | None = None
        self.queue = Queue(self.ours or self._borrowed, depth=depth, piece=piece)

    def keep(self, file: Any) -> None:
        """Keep the connections, and the file if it is given, until `close` or `abandon`."""
        for handle in self._borrowed:
            hold(handle._h, self)
        _kept[self] = file

    def add(self, server: str | Maker, count: int) -> None:
        """Begin to make further connections; those that fail are left out."""
        if isinstance(server, str):
            self._begin_to_connect(server, count)
            return
        self._maker_thread = Joining(server, count, None, self._note_made, self._mistakes.append)
        self._maker_thread.start()

    def reconnect(
        self, server: str | Maker, seconds: float, timeout: float | None, what: str
    ) -> None:
        """Replace connections that are lost; called before the first request.

        Args:
            server: By which new ones can be made.
            seconds: For how long to try.
            timeout: How many seconds an attempt to connect to a URI may take.
            what: What was lost, for messages.
        """
        self._what = what
        self.queue._shim_queue.set_reconnect(TARGET, JOURNAL)
        kept = server if isinstance(server, str) else WeakMaker(server)  # the file keeps the Maker
        self._reconnector = Reconnector(
            kept, seconds, timeout, what, self.ours[0], self._replace, self._give_up
        )

    def _note_losses(self, reconnector: Reconnector) -> None:
        """Have connections made again that were lost since the last call."""
        queue = self.queue._shim_queue
        losses = queue.losses()
        if losses == self._losses:
            return
        for handle in list(self.ours):
            errnum = queue.error_of(handle)
            if errnum:
                error = Error(os.strerror(errnum), errnum)
                reconnector.lost(handle, error, queue.answers(TARGET))
        self._losses = losses  # last: if a signal handler raises, the next wait looks again

    def _replace(self, lost: NBD, made: NBD) -> None:
        """Use a new connection instead of a lost one; called in the thread that has made it."""
        if lost not in self.ours:  # it was reported again while this thread was replacing it
            made.__exit__(None, None, None)
            return
        handle = _Adopted(made) if self._is_of_program else made
        self.ours.append(handle)
        if self._is_abandoned:  # in this order: `abandon` closes it, or our caller does
            raise Error("the file is closed", errno.ECANCELED)
        try:
            self.queue._shim_queue.add(TARGET, handle)
        except BaseException as reason:
            self.ours.remove(handle)
            if isinstance(reason, ValueError):
                raise other_disk(self._what, str(reason)) from None
            raise
        self._drop(lost)

    def _give_up(self, lost: NBD, error: Error) -> None:
        """Go on without a lost connection, or fail if it was the last; called in the thread."""
        queue = self.queue._shim_queue
        alive = [
            one for one in list(self.ours) if one not in self._joining and not queue.error_of(one)
        ]
        if alive and error.errnum != errno.ESTALE:
            self._drop(lost)
            queue.wake()  # one that a callable has made may have to join
            return
        self.failure = error
        queue.give_up(TARGET, error.errnum)
        queue.wake()

    def _drop(self, lost: NBD) -> None:
        with suppress(ValueError):  # `abandon` has closed it
            self.ours.remove(lost)
        self.queue._shim_queue.forget(lost)
        lost.__exit__(None, None, None)

    def check(self) -> None:
        """Raise the reason why the connections were given up, unless the file is being closed."""
        failure = self.failure
        if failure is not None and not self.is_hurried:
            raise DiskError(failure.string, failure.errnum)

    def _begin_to_connect(self, uri: str, count: int) -> None:
        uri = agreed(uri, "", {})
        for _ in range(count):
            try:
                handle, _ = prepared(uri, [], None)
            except (Error, MemoryError):
                return
            self.ours.append(handle)
            self._joining.append(handle)
            try:
                handle.aio_connect_uri(uri)
            except Error:
                self._leave_out(handle)
                return

    def _note_made(self, handle: NBD) -> None:
        """Note what the callable has made; called in the thread."""
        adopted = _Adopted(handle)
        self.ours.append(adopted)
        self._made.append(adopted)
        if self._is_abandoned:  # in this order: `abandon` closes it, or this does
            raise ValueError("the file is closed")

    def _let_made_join(self) -> None:
        """Use what the callable has made."""
        while self._made:
            handle = self._made.popleft()
            with suppress(Error, ClosedHandle, ValueError):  # it is lost, or of another export
                if export_of(handle) == export_of(self.ours[0]):
                    self.queue._shim_queue.add(TARGET, handle)
                    continue
            handle.__exit__(None, None, None)

    def let_join(self) -> None:
        """Advance the connections that are being made, unless that was tried a moment ago."""
        if self._maker_thread is not None:
            self._let_made_join()
        if not self._joining or monotonic() < self._check_at:
            return
        has_moved = False
        for handle in list(self._joining):
            has_moved |= self._advance(handle)
        self._interval = (
            _MIN_CHECK_INTERVAL if has_moved else min(2 * self._interval, _MAX_CHECK_INTERVAL)
        )
        self._check_at = monotonic() + self._interval

    def wait_until(self, is_over: Callable[[], bool]) -> None:
        """Wait until a condition is met that depends on replies of the server.

        Raises:
            nbd.DiskError: A lost connection was not made again in time.
            nbd.Timeout: Nothing has moved on the connections for the whole timeout.
            TypeError, ValueError: The caller's callable has returned what cannot be a connection.
        """
        if is_over():
            if self.failure is not None:
                self.check()
            return
        if self._mistakes and not self.is_hurried:
            raise self._mistakes.popleft()
        self.is_stalled = True  # this stays if an exception stops the wait
        queue, shim_queue = self.queue, self.queue._shim_queue
        timer = IdleTimer(shim_queue, self._timeout)
        while True:
            self.let_join()
            if self._reconnector is not None:
                self._note_losses(self._reconnector)
            count = queue._finish(*shim_queue.wait(1, self._slice(timer.remaining())))
            queue._finished.clear()  # Request.is_done is enough
            if is_over():
                break
            if not count and timer.is_over():
                self._is_late = self.is_hurried
                raise self._timeout_error()
        self.is_stalled = False
        if self.failure is not None:
            self.check()

    def wait_for(self, request: Request) -> None:
        """Wait until a request is done, as `wait_until` does."""
        self.wait_until(lambda: request.is_done)

    def hurry(self) -> None:
        """Shorten the timeout, as the file is about to be closed."""
        self.is_hurried = True
        self._timeout = self.close_timeout

    @property
    def close_timeout(self) -> float:
        """How many seconds without progress a file that is being closed waits."""
        return CLOSE_TIMEOUT if self._timeout is None else min(CLOSE_TIMEOUT, self._timeout)

    def close(self) -> None:
        """Close the connections; if the server responds, shut them down first.

        Outstanding replies to reads are awaited for a moment: nbdkit 1.32 can abort if it cannot
        send them.
        """
        queue, was_hurried = self.queue, self.is_hurried
        is_over = False
        try:
            self.hurry()
            with suppress(Timeout):
                if not self._is_late:  # otherwise it has waited already
                    self.wait_until(lambda: not len(queue))
                    is_over = self._shut_down() or not was_hurried
            if not is_over:
                self._kill()
        except BaseException:  # such as Ctrl-C: do not wait any longer
            self._kill()
            raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the connections at once.  A second call does nothing."""
        self._is_abandoned = True
        try:
            if self._reconnector is not None:
                self._reconnector.stop()
            if self._maker_thread is not None:
                self._maker_thread.begin_to_stop()
            self.queue.close()
            close_all(list(self.ours))  # a copy, as the reconnector's thread may remove one
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for handle in self._borrowed:
            let_go(handle._h, self)
        _kept.pop(self, None)

    def _slice(self, seconds: float) -> float:
        """Shorten a wait so that the connections that are being made are checked in time."""
        if self._joining:
            pause = max(0.0, self._check_at - monotonic())
            return pause if seconds < 0 else min(pause, seconds)
        return seconds

    def _advance(self, handle: NBD) -> bool:
        """Advance a connection that is being made; returns whether it made progress."""
        try:
            if handle.aio_is_connecting():
                if not handle.poll(0):
                    return False
                while handle.aio_is_connecting() and handle.poll(0):
                    pass
            if not handle.aio_is_connecting():
                # A queue without requests yet would accept an export of another size.
                if handle.get_size() == self.queue.size:
                    self.queue._shim_queue.add(TARGET, handle)
                self._joining.remove(handle)
        except Error:
            self._leave_out(handle)
        except ValueError:  # it is in the queue already, or its export has other block sizes
            self._joining.remove(handle)
        return True

    def _leave_out(self, handle: NBD) -> None:
        """Close a connection that could not be made."""
        handle.__exit__(None, None, None)
        for handles in (self._joining, self.ours):
            if handle in handles:
                handles.remove(handle)

    def _shut_down(self) -> bool:
        """Shut down all connections, within `close_timeout` seconds altogether.

        Returns:
            Whether the server has ended them all in time.
        """
        until = monotonic() + self.close_timeout
        ready = [handle for handle in self.ours if handle not in self._joining]
        begin_shutdown(ready)  # everything was written and flushed
        finish_shutdown(ready, until)
        return all(_has_ended(handle) for handle in ready)

    def _kill(self) -> None:
        """Kill the server if a handle has started it: it hangs, and closing would wait for it."""
        for handle in self.ours:
            with suppress(Error, ClosedHandle):
                handle.kill_subprocess(signal.SIGKILL)

    def _timeout_error(self) -> Timeout:
        if self.is_hurried:
            advice = "the disk is closed, and what was written to it last may be lost"
        else:
            advice = "try again, or open the disk with a longer timeout"
        return timeout_error("the server has done nothing for", self._timeout, advice)


def _has_ended(handle: NBD) -> bool:
    """Return whether the server has closed a connection, or the connection is lost."""
    try:
        return handle.aio_is_closed() or handle.aio_is_dead()
    except (Error, ClosedHandle):
        return True
