# SPDX-License-Identifier: LGPL-2.0-or-later
"""How lost connections are made again: for how long, with which pauses, and by which thread.

The queue keeps the commands of a lost connection, and what was written and not flushed (see
csrc/queue.h).  What is left to do is to make a new connection to the same disk.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock, get_ident
from contextlib import suppress
from sys import modules
from time import monotonic, sleep

from nbd._binding.convert import as_seconds
from nbd._binding.errors import Error
from nbd._binding.methods import NBD
from nbd._disks.background import BackgroundThread
from nbd._disks.connect import connect
from nbd._disks.handles import export_of, has_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from nbd._disks.handles import Maker, WeakMaker

#: How many bytes of unflushed data are kept, to be written again.
JOURNAL = 64 * 1024 * 1024
#: How many bytes a copy writes before it flushes: they are read again from the source.
COPY_JOURNAL = 1024 * 1024 * 1024
#: Seconds between two attempts to connect.
_MIN_PAUSE, _MAX_PAUSE = 0.01, 1.0
#: Errnos of a connection that was refused or lost, not of a server that has answered.
_LOST = (
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ESHUTDOWN),
)
#: What export_of compares.
_PROPERTIES = ("export name", "read-only flag", "size", "minimum block size", "maximum block size")


def as_reconnect(reconnect: float | None) -> float | None:
    """Convert the caller's argument `reconnect`: a number of seconds, which may be 0, or None.

    Raises:
        TypeError, ValueError: It is something else.
    """
    if reconnect is None or (isinstance(reconnect, (int, float)) and not reconnect):
        return reconnect
    try:
        return as_seconds("reconnect", reconnect)
    except ValueError:
        raise ValueError(
            f"reconnect: {reconnect} is not a number of seconds that is at least 0; None does not "
            "reconnect"
        ) from None


def refuse_to_reconnect(name: str, what: str) -> NoReturn:
    """Raise for a disk whose connection cannot be made again: `what` is "a handle", for example."""
    raise ValueError(
        f"{name}: {what} cannot be connected again; pass a URI, or a callable that makes "
        "connections, such as functools.partial(nbd.connect, uri); or leave out reconnect"
    )


def check_can_reconnect(name: str, what: Any) -> None:
    """Refuse what the caller has named if a connection to it cannot be made again.

    Raises:
        ValueError: It is a handle, a list of handles, or a command.
    """
    if isinstance(what, NBD):
        refuse_to_reconnect(name, "a handle")
    if isinstance(what, (list, tuple)):
        is_handles = any(isinstance(one, NBD) for one in what)
        refuse_to_reconnect(name, "a list of handles" if is_handles else "a started command")


class Outage:
    """The time during which a lost connection is tried to be made again.

    Args:
        seconds: How long that is.
        what: What was lost, for messages.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._answers = -1
        self._first: Error | None = None
        self._since = 0.0
        self._pause = 0.0

    def lost(self, error: Error, answers: int, is_idle: bool = False) -> None:
        """Note that a connection was lost.

        A new outage begins, unless the server has answered no command since the last loss: then
        the connection that was made again was worth nothing.

        Args:
            error: How it was lost.
            answers: How many commands were answered so far.
            is_idle: Whether no command waits.  Then a new outage begins, too, because the server
                had nothing to answer; but the pauses go on to grow.
        """
        if answers != self._answers:
            self._pause = 0.0
        elif not is_idle:
            return
        self._answers = answers
        self._first = error
        self._since = monotonic()

    def remaining(self) -> float:
        """Return how many seconds are left."""
        return max(0.0, self._since + self._seconds - monotonic())

    def next_pause(self) -> float | None:
        """Return how many seconds to wait before the next attempt; None if the time is over."""
        remaining = self.remaining()
        if not remaining:
            return None
        import random  # only now: its modules take longer to import than the rest of the package

        pause = min(self._pause * random.uniform(0.5, 1.0), remaining)
        self._pause = min(max(_MIN_PAUSE, 2 * self._pause), _MAX_PAUSE)
        return pause

    def elapsed(self) -> float:
        """Return how many seconds ago the connection was lost."""
        return monotonic() - self._since

    def failure(self, reason: BaseException | None = None) -> Error:
        """Return the exception for a connection that was not made again.

        Args:
            reason: Why no further attempt was made; None if the time was over.  Only its text is
                kept, as an exception of the program's refers to objects of the program.
        """
        first = self._first or Error("unknown", errno.ENOTCONN)
        why = f"within {self._seconds:g} seconds"
        if reason is not None:
            why = f"as the callable has raised {type(reason).__name__}: {reason}"
        return Error(
            f"{self._what} was lost ({first.string}), and could not be made again {why}",
            first.errnum or errno.ENOTCONN,
        )


class FirstConnection:
    """The attempts to make the first connection, while it is refused or lost.

    Args:
        seconds: For how long to try.
    """

    def __init__(self, seconds: float) -> None:
        self._outage = Outage(seconds, "the connection")
        self._outage.lost(Error("refused", errno.ECONNREFUSED), 0)

    def next_pause(self, reason: Error) -> float | None:
        """Return how many seconds to wait before the next attempt; None to raise the reason."""
        return self._outage.next_pause() if was_lost(reason) else None


def was_lost(error: Error) -> bool:
    """Whether a connection attempt has failed because it was refused or lost.

    Otherwise the server has refused what was asked for, or the argument was wrong.  libnbd reports
    a connection that ends during the handshake without an errno, one that ends before it as an
    event that is invalid in the handle's state (EINVAL), and both an export and a socket that does
    not exist as ENOENT.
    """
    if error.errnum == errno.EINVAL:
        return "external event" in error.string or "is invalid in state CONNECT" in error.string
    if error.errnum == errno.ENOENT:
        return "server has no export" not in error.string
    if error.errnum == 0:
        return "disconnected" in error.string
    return error.errnum in _LOST


def is_worth_retrying(error: Error) -> bool:
    """Whether a further attempt to make a lost connection again may succeed."""
    return error.errnum not in (errno.EPERM, errno.ESTALE)


def other_disk(what: str, text: str) -> Error:
    """Return the exception for a server that has come back with another disk."""
    return Error(f"{what} was made again, but to another disk: {text}", errno.ESTALE)


def check_same(what: str, export: tuple[object, ...], handle: NBD) -> None:
    """Raise if a new connection is not to the export of the first one, as export_of returns it.

    Raises:
        nbd.Error: It is to another (ESTALE).
    """
    for name, before, now in zip(_PROPERTIES, export, export_of(handle)):
        if before != now:
            raise other_disk(what, f"its {name} was {before!r}, and is {now!r} now")


def log_reconnected(what: str, outage: Outage) -> None:
    """Write the log line for a connection that was made again.

    Without a handler of the program, it is not shown.
    """
    import logging  # only now, for the same reason

    logger = logging.getLogger("nbd")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.warning("%s was lost, and was made again after %.2f s", what, outage.elapsed())


class Reconnector:
    """Makes the lost connections of one disk again, in a background thread.

    The thread is started at the first loss.  It calls `replace` and `give_up`, which must not wait
    for a lock that a caller of `stop` holds.

    Args:
        server: The URI of the server, or the caller's callable; a WeakMaker if nobody calls `stop`
            when the program drops what it has.
        seconds: For how long to try after a loss.
        timeout: How many seconds one attempt may take; None is as long as there is time.
        what: What was lost, for messages: "nbd.open: the connection to URI".
        first: The first connection; new ones have to be to the same export.
        replace: Called with a lost handle and the new one, which it takes over.  If it raises an
            nbd.Error, the new one is closed and another is made; after ESTALE, none is.
        give_up: Called with a lost handle, and the reason why it was not replaced.
    """

    def __init__(
        self,
        server: str | Maker | WeakMaker,
        seconds: float,
        timeout: float | None,
        what: str,
        first: NBD,
        replace: Callable[[NBD, NBD], object],
        give_up: Callable[[NBD, Error], object],
    ) -> None:
        self._server: str | Maker | WeakMaker | None = server
        self._timeout = timeout
        self._what = what
        self._export = export_of(first)
        self._replace = replace
        self._give_up = give_up
        self._outage = Outage(seconds, what)
        self._lost: list[NBD] = []
        self._thread: BackgroundThread | None = None
        self._has_begun = False
        self._is_stopped = False
        self._process = os.getpid()
        self._connecting: NBD | None = None
        self._wake = allocate_lock()  # the thread sleeps in acquire
        self._wake.acquire()

    def lost(self, handle: NBD, error: Error, answers: int) -> None:
        """Have a lost connection made again.  Calling this twice for one is harmless.

        A signal handler may raise at any place of this: then it is to be called again.

        Args:
            handle: The connection.
            error: How it was lost.
            answers: How many commands its server has answered so far.
        """
        if self._is_stopped:
            return
        if handle not in self._lost:
            self._outage.lost(error, answers)
            self._lost.append(handle)
        if self._thread is None:
            self._thread = BackgroundThread(self._run, self.stop)
        if not self._has_begun:
            try:
                self._thread.start()  # a second start does nothing
            except RuntimeError:  # the system has no thread left, or the program is ending
                self._lost.remove(handle)
                self._give_up(handle, self._outage.failure())
                return
        self._notify()

    def stop(self) -> None:
        """Make no further connection, without waiting for the thread."""
        self._is_stopped = True
        self._server = None  # a callable may refer to anything
        self._notify()
        connecting = self._connecting
        if connecting is not None and os.getpid() == self._process:
            connecting.__exit__(None, None, None)  # makes the thread's call return

    def _notify(self) -> None:
        with suppress(RuntimeError):  # it is not locked
            self._wake.release()

    def _run(self) -> None:
        self._has_begun = True
        try:
            while not self._is_stopped:
                if self._lost:
                    self._make_again(self._lost[0])
                else:
                    self._wake.acquire()
        finally:
            # logging has made an entry for this thread, which nobody else removes before 3.12.
            getattr(modules.get("threading"), "_active", {}).pop(get_ident(), None)

    def _make_again(self, lost: NBD) -> None:
        """Replace a lost connection, or give it up."""
        try:
            while not self._try(lost):
                if self._is_stopped:
                    return
        except Error as reason:
            failure = reason
        except BaseException as reason:  # of the caller's callable: nobody else could handle it
            failure = self._outage.failure(reason)
        else:
            self._lost.remove(lost)
            return
        self._lost.remove(lost)
        if not self._is_stopped:
            self._give_up(lost, failure)

    def _try(self, lost: NBD) -> bool:
        """Try to replace a lost connection; returns whether that has succeeded.

        Raises:
            nbd.Error: The time is over, or another attempt would be pointless.
        """
        pause = self._outage.next_pause()
        if pause is None:
            raise self._outage.failure()
        if pause:
            self._wake.acquire(timeout=pause)
        try:
            made = self._connected()
        except Error as reason:
            if is_worth_retrying(reason) or self._is_stopped:
                return False
            raise
        try:
            if self._is_stopped:
                raise Error("the connection is not needed any more", errno.ECANCELED)
            check_same(self._what, self._export, made)
            self._replace(lost, made)
        except BaseException as reason:
            made.__exit__(None, None, None)
            self._forget(made)
            if isinstance(reason, Error) and is_worth_retrying(reason):
                return False
            raise
        self._forget(lost)
        with suppress(Exception):  # of a filter of the program
            log_reconnected(self._what, self._outage)
        return True

    def _forget(self, closed: NBD) -> None:
        """Let the callable's Maker drop its reference: it would keep one for each loss."""
        server = self._server
        if server is not None and not isinstance(server, str):
            with suppress(Error):  # the Maker is gone
                server.forget(closed)

    def _connected(self) -> NBD:
        server, remaining = self._server, self._outage.remaining()
        if server is None:
            raise Error("the connection is not needed any more", errno.ECANCELED)
        if not isinstance(server, str):
            made = server.checked(server.call())
            if has_process(made):
                made.__exit__(None, None, None)
                raise TypeError("the callable has started a server of its own")
            return made
        timeout = max(0.001, remaining if self._timeout is None else min(self._timeout, remaining))
        try:
            made = connect(server, timeout=timeout, prepare=self._note)
        finally:
            self._connecting = None
        made.settimeout(self._timeout)  # as the first one has
        return made

    def _note(self, handle: NBD) -> None:
        """Remember a handle that is about to be connected, so that `stop` can close it."""
        self._connecting = handle
        if self._is_stopped:
            raise Error("the connection is not needed any more", errno.ECANCELED)


def first_connection(
    make: Callable[[], NBD], seconds: float | None, check: Callable[[], object] | None = None
) -> NBD:
    """Make the first connection, and try again while it is refused or lost.

    Args:
        make: Makes one attempt.
        seconds: For how long to try; None tries once.
        check: Called between two attempts; raises if no connection is needed any more.
    """
    if seconds is None:
        return make()
    first = FirstConnection(seconds)
    while True:
        try:
            return make()
        except Error as reason:
            pause = first.next_pause(reason)
            if pause is None:
                raise
        sleep(pause)
        if check is not None:
            check()
