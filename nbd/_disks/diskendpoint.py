# SPDX-License-Identifier: LGPL-2.0-or-later
"""The side of a copy that is a disk: one NBD export, over one handle or several.

Every wait here is bounded by the copy's timeout, and ends soon after the copy was stopped.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from time import monotonic

from nbd._binding.constants import (
    CONTEXT_BASE_ALLOCATION,
    SIZE_MAXIMUM,
    SIZE_MINIMUM,
    STATE_ZERO,
)
from nbd._binding.errors import Error, Timeout
from nbd._binding.shim import ffi, lib
from nbd._disks.background import BackgroundThread, Joining
from nbd._disks.connect import (
    CLOSE_TIMEOUT,
    begin_shutdown,
    close_all,
    connect,
    finish_shutdown,
)
from nbd._disks.extents import Survey
from nbd._disks.queue import FLUSH, TARGET, IdleTimer, ShimQueue, timeout_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from nbd._binding.methods import NBD
    from nbd._disks.copy import Settings
    from nbd._disks.extents import Question

#: Seconds after which a wait looks whether the copy was stopped.
TICK = 0.1
_AT_LEAST = 0.1
#: How many seconds a copy that ends waits for replies while nothing moves.
QUIET = 0.25
#: A queue has room for the handles of two disks.
_MAX_HANDLES = lib.NBDQUEUE_MAX_HANDLES // 2


class Disk:
    """An NBD export.

    Args:
        handles: Its connections.
        is_ours: Whether the copy has made them, and closes them.
        name: What to call it in messages; None is the repr of the first handle.
        uri: Where further connections can be made; None if they cannot.
        further: How many of those.
        timeout: How many seconds one of them may take.
        is_command: Whether a handle of ours has started the server.

    Attributes:
        handles: Its connections; those that join later are appended.
        size: In bytes.
        name: What it is called in messages.
        settings: Those of the copy; None before it begins.
    """

    def __init__(
        self,
        handles: list[NBD],
        is_ours: bool,
        name: str | None = None,
        *,
        uri: str | None = None,
        further: int = 0,
        timeout: float | None = None,
        is_command: bool = False,
    ) -> None:
        self.handles = handles
        self.is_ours = is_ours
        self.size: int = handles[0].get_size()
        self.name = repr(handles[0]) if name is None else name
        self.settings: Settings | None = None
        self._uri = uri
        self._further = further if uri is not None else 0
        self._timeout = timeout
        self._is_command = is_command
        self._joining: Joining | None = None
        self._moved_at = 0.0
        self._goodbye_until: float | None = None

    @property
    def most_workers(self) -> int:
        """How many threads can share it, as each needs a handle of its own."""
        return len(self.handles) + self._further

    @property
    def is_read_only(self) -> bool:
        """Whether the server refuses writes."""
        return self.handles[0].is_read_only()

    def start_joining(self, count: int, add: Callable[[Disk, NBD], object]) -> None:
        """Make further connections, at most this many, and hand each to `add` in a thread."""
        count = min(count, self._further)
        if count > 0 and self._uri is not None:
            self._joining = Joining(
                self._uri, count, self._timeout, lambda handle: add(self, handle)
            )
            self._joining.start()

    def stop_joining(self) -> None:
        """Make no further connections, without waiting for one that is being made."""
        if self._joining is not None:
            self._joining.stop()

    def check_joining(self, handle: NBD) -> None:
        """Raise if a handle is connected to another export."""
        if _export_of(handle) != _export_of(self.handles[0]):
            raise ValueError("handles: the export is not the same")

    def add_to(self, engine: ShimQueue, end: int, worker: int, workers: int) -> None:
        """Give an engine the handles of one worker."""
        for handle in self.handles[worker::workers][:_MAX_HANDLES]:
            engine.add(end, handle)

    def is_lost(self, engine: ShimQueue) -> bool:
        """Whether an engine has lost one of the connections."""
        return any(map(engine.error_of, self.handles))

    def last_moved(self) -> float:
        """When a byte last moved that no engine has seen, by time.monotonic()."""
        return self._moved_at

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that read as zeroes, as far as the server reports: start and stop.

        Raises:
            nbd.Timeout: Nothing has moved on the connection for too long.
            nbd.Error: The server breaks the protocol.
        """
        handle = self.handles[worker]
        if not handle.can_meta_context(CONTEXT_BASE_ALLOCATION):
            return
        survey = Survey(handle, CONTEXT_BASE_ALLOCATION, start, stop)
        while not survey.is_complete:
            question = survey.question()
            if not self._ask(handle, survey.method, question):
                return  # holes are read as well as data
            found: Iterator[Any] = survey.learn(question)
            for extent in found:
                if extent.flags & STATE_ZERO:
                    yield extent.offset, extent.offset + extent.length

    def _ask(self, handle: NBD, method: str, question: Question) -> bool:
        """Ask the server for extents; returns whether it could answer.

        Not by the call that waits: its bound is the handle's timeout, and while it waits nobody can
        stop it.  Nor does it depend on the completion, which a signal handler may interrupt.
        """
        moves: Any = self  # it has last_moved(), as an engine has
        timer = IdleTimer(moves, self._seconds())
        reply = _Reply(handle)
        try:
            reply.cookie = getattr(handle, f"aio_{method}")(
                question.count, question.offset, question.note, reply.complete
            )
            while not reply.has_come():
                self._check()
                if reply.poll(timer.remaining(TICK)):
                    self._moved_at = monotonic()
                elif timer.is_over():
                    raise late(self._seconds())
        except Error as reason:
            if isinstance(reason, Timeout) or self._is_stopped():
                raise
            return False  # if the connection is lost, the next read says so
        finally:
            reply.await_briefly()
        return reply.error == 0

    def flush(self) -> None:
        """Have the server write everything to its disk, if it has a command for that."""
        if not self.handles[0].can_flush():
            return
        engine = ShimQueue(1, 4096)
        try:
            engine.add(TARGET, self.handles[0])
            engine.submit(FLUSH, 1, ffi.NULL, 0, 0, 0)
            timer = IdleTimer(engine, self._seconds())
            count = 0
            while not count:
                self._check()
                done, count = engine.wait(1, timer.remaining(TICK))
                if not count and timer.is_over():
                    raise late(self._seconds())
            if done[0].error:
                reason = os.strerror(done[0].error)
                text = f"nbd.copy: flushing the target {self.name} failed: {reason}"
                raise Error(text, done[0].error)
        finally:
            engine.close()

    def close(self) -> None:
        """Close our handles at once; calls of other threads on them return."""
        self.stop_joining()
        if not self.is_ours:
            return
        if self._is_command:
            self._close_command()
        close_all(self.handles)

    def _close_command(self) -> None:
        """Close handles of which libnbd waits for the server's process, without waiting for long.

        Only a thread can do that: nothing interrupts waitpid.
        """
        close = partial(self.handles[0].__exit__, None, None, None)
        thread = BackgroundThread(close, close)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            return
        until = self._goodbye_until  # of a copy that is done
        thread.join(CLOSE_TIMEOUT if until is None else max(_AT_LEAST, until - monotonic()))

    def say_goodbye(self, count: int) -> None:
        """Ask the server to end our connections, without waiting for that."""
        self.stop_joining()
        begin_shutdown(self.handles if self.is_ours else ())  # all is written and flushed

    def await_goodbye(self, until: float) -> None:
        """Wait until the server has ended our connections, but no longer than until a time."""
        self._goodbye_until = until
        finish_shutdown(self.handles if self.is_ours else (), until)

    def _check(self) -> None:
        if self.settings is not None:
            self.settings.check()

    def _is_stopped(self) -> bool:
        return self.settings is not None and self.settings.is_stopped

    def _seconds(self) -> float | None:
        return None if self.settings is None else self.settings.timeout


class _Reply:
    """The reply to a command of a handle.

    Attributes:
        cookie: The command's; 0 before it was sent.
        error: The errno of the command; None before the reply has come.
    """

    def __init__(self, handle: NBD) -> None:
        self._handle = handle
        self.cookie = 0
        self.error: int | None = None

    def complete(self, error: Any) -> int:
        """What libnbd calls when the reply has come."""
        self.error = error.value
        return 1  # libnbd is to forget the command

    def has_come(self) -> bool:
        """Whether the reply has come.

        Raises:
            nbd.Error: The command has failed.
        """
        if self.error is None and self._handle.aio_command_completed(self.cookie):
            self.error = 0
        return self.error is not None

    def poll(self, seconds: float) -> bool:
        """Let libnbd continue; returns whether something has moved."""
        try:
            return self._handle.poll(int(1000 * seconds)) > 0
        except Timeout:  # the handle's own is shorter, but bytes may have moved before
            return False

    def await_briefly(self) -> None:
        """Wait for the reply of a command that nobody needs any more, if it comes soon.

        nbdkit 1.32 can abort, for all of its clients, if it cannot send a reply.
        """
        until = monotonic() + QUIET
        with suppress(Error):
            while self.cookie and not self.has_come() and monotonic() < until:
                self.poll(max(0.001, until - monotonic()))


def connected(what: Any, connections: int | None, timeout: float | None, most: int) -> Disk:
    """A disk over one connection; others are made when the copy begins.

    Args:
        what: A URI, or the command line of a server.
        connections: How many the caller wants; None is as many as `most`.
        timeout: How many seconds each may take.
        most: How many to make if the caller has not said.
    """
    is_uri = isinstance(what, str)
    handle = connect(what, timeout=timeout)
    try:
        further = (connections or most) - 1 if is_uri and handle.can_multi_conn() else 0
        return Disk(
            [handle],
            is_ours=True,
            name=what if is_uri else repr(what),
            uri=what if is_uri else None,
            further=further,
            timeout=timeout,
            is_command=not is_uri,
        )
    except BaseException:
        handle.__exit__(None, None, None)
        raise


def late(seconds: float | None) -> Timeout:
    """The exception for a copy in which nothing moves."""
    return timeout_error("nbd.copy: nothing was copied for", seconds)


def _export_of(handle: NBD) -> tuple[int, ...]:
    """What is the same on all connections to one export."""
    sizes = (handle.get_block_size(which) for which in (SIZE_MINIMUM, SIZE_MAXIMUM))
    return handle.get_size(), *sizes
