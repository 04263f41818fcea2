# SPDX-License-Identifier: LGPL-2.0-or-later
"""The shim's queue, as Python sees it: what nbd.queue.Queue and nbd.copy have in common.

csrc/queue.h is its manual.
"""

from __future__ import annotations

import os
from errno import ENOMEM
from math import isnan
from sys import is_finalizing
from time import monotonic

from nbd._binding.callbacks import forget, next_token, registry
from nbd._binding.convert import as_number
from nbd._binding.errors import Error, pending, report_pending, settle, settle_as
from nbd._binding.lifetime import is_owned, owned
from nbd._binding.shim import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd._binding.handle import Handle

TARGET, SOURCE = lib.NBDQUEUE_TARGET, lib.NBDQUEUE_SOURCE
READ, WRITE, ZERO = lib.NBDQUEUE_READ, lib.NBDQUEUE_WRITE, lib.NBDQUEUE_ZERO
TRIM, CACHE, FLUSH = lib.NBDQUEUE_TRIM, lib.NBDQUEUE_CACHE, lib.NBDQUEUE_FLUSH
COPY = lib.NBDQUEUE_COPY

_MAX_DEPTH = 4096
_MAX_PIECE = 32 * 1024 * 1024  # what every server takes (NBD's specification)
_MAX_OFFSET = 2**64 - 1
_MAX_INT = 2**31 - 1
#: How many requests that are done one call reports.
ROOM = 256
_NAMES = {
    READ: "reading",
    WRITE: "writing",
    ZERO: "zeroing",
    TRIM: "trimming",
    CACHE: "caching",
    FLUSH: "flushing",
}

nbdqueue_wait = lib.nbdqueue_wait
nbdqueue_step = lib.nbdqueue_step
nbdqueue_take = lib.nbdqueue_take


class Engine:
    """A queue of the shim.

    Attributes:
        q: The shim's queue.
        kept: What keeps the buffers of the requests in place, by the token of each request.  It
            lives until no command can use one of them, also if the engine itself does not.
    """

    q: Any = ffi.NULL

    def __init__(self, depth: int, piece: int) -> None:
        if not 1 <= depth <= _MAX_DEPTH:
            raise ValueError(f"depth: {depth} is not between 1 and {_MAX_DEPTH} commands")
        if not 1 <= piece <= _MAX_PIECE:
            raise ValueError(f"piece: {piece} is not between 1 and {_MAX_PIECE} bytes")
        token = next_token()
        self.kept: dict[int, Any] = {}
        made = ffi.new("struct nbdqueue *[1]")
        try:
            registry[token] = self.kept
            _check_made(lib.nbdqueue_make(made, depth, piece, token))
            self.q = owned(made[0], lib.nbdqueue_destroy)
        except BaseException:
            if made[0] and not is_owned(made[0]):  # a signal handler has raised in between
                lib.nbdqueue_destroy(made[0])
            forget(token, None)
            raise
        self._handles: list[Handle] = []
        # Arrays for `wait` and `step` that no call uses: a signal handler's call takes another one.
        self._arrays: list[Any] = []

    def add(self, end: int, handle: Handle) -> None:
        """Give one of the ends a handle, which has to be connected.

        A handle may join at any time, also while another thread waits.

        Raises:
            nbd.Error: The handle is not connected, or its export is too large.
            ValueError: The queue has it already, is closed, or has as many as it can; or the export
                is not the one of the other handles.
        """
        if handle in self._handles:
            raise ValueError("handles: the same handle is there twice")
        result = lib.nbdqueue_add(self.q, end, handle._h)
        if result == lib.NBDSHIM_TOO_MANY:
            raise ValueError(f"handles: a queue takes at most {lib.NBDQUEUE_MAX_HANDLES} of them")
        if result == lib.NBDSHIM_OTHER_EXPORT:
            raise ValueError(
                "handles: the size or the block sizes of its export differ from those of the "
                "others; all have to be connected to the same export"
            )
        if result == lib.NBDSHIM_CLOSED and not lib.nbdshim_check(handle._h):
            raise self.refused(result)
        if result < 0 or pending:
            settle_as(handle._h, result, "get_size")
        self._handles.append(handle)

    def add_file(self, end: int, fd: int, base: int, size: int) -> None:
        """Give one of the ends a file: size bytes of it, from base on."""
        lib.nbdqueue_add_file(self.q, end, fd, base, size)

    def submit(
        self, operation: int, token: int, pointer: Any, length: int, offset: int, flags: int
    ) -> None:
        """Add a request; the buffer has to be in `kept` already."""
        result = lib.nbdqueue_submit(self.q, operation, token, pointer, length, offset, flags)
        if result < 0:
            raise self.refused(result)

    def wait(self, least: int, timeout: float) -> tuple[Any, int]:
        """Wait as nbdqueue_wait does.

        Returns:
            An array of struct nbdqueue_done, and how many are in it: at most ROOM.  They are
            reported again until `take`, which is to be called in any case.
        """
        done = self._array()
        count = nbdqueue_wait(self.q, done, ROOM, least if least < _MAX_INT else _MAX_INT, timeout)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._settle(0)
        return done, count

    def fileno(self) -> int:
        """A descriptor that can be read when `step` has something to do; the queue closes it."""
        result: int = lib.nbdqueue_fd(self.q)
        if result == -1:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if result < 0:
            raise self.refused(result)
        return result

    def step(self) -> tuple[Any, int]:
        """Do what can be done without waiting; returns as `wait` does."""
        done = self._array()
        count = nbdqueue_step(self.q, done, ROOM)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._settle(0)
        return done, count

    def error_of(self, handle: Handle) -> int:
        """The errno with which the connection of a handle has ended; 0 if it has not."""
        return int(lib.nbdqueue_error(self.q, handle._h))

    def cancel(self, token: int) -> None:
        """Send no more commands for a request."""
        lib.nbdqueue_cancel(self.q, token)

    def take(self, done: Any, count: int) -> None:
        """Forget the requests that `wait` or `step` has reported; the array is not used again."""
        if count:
            nbdqueue_take(self.q, done, count)
        self._arrays.append(done)

    def last_moved(self) -> float:
        """When a byte last moved, by time.monotonic(); 0.0 if that has not happened yet."""
        return float(lib.nbdqueue_last_moved(self.q))

    def _array(self) -> Any:
        """An array for requests that are done, which no other call uses."""
        try:
            return self._arrays.pop()
        except IndexError:
            return ffi.new("struct nbdqueue_done[]", ROOM)

    def wake(self) -> None:
        """End the wait of another thread, or the next one."""
        lib.nbdqueue_wake(self.q)

    def drop(self) -> None:
        """Forget all requests, without waiting for the server.

        Buffers are kept only for commands that were sent and have no reply yet.
        """
        lib.nbdqueue_drop(self.q)
        for token in list(self.kept):
            if not lib.nbdqueue_uses(self.q, token):
                self.kept.pop(token, None)
        if pending:
            report_pending(self._handles[0]._h if self._handles else None)

    def end(self) -> None:
        """Drop the queue, and free it: nothing may use the engine any more."""
        self.drop()
        self.q = ffi.NULL

    def __del__(self) -> None:
        if is_finalizing():  # too late for upcalls: Python has ended
            lib.nbdshim_end_upcalls()
        if self.q:
            self.drop()

    def refused(self, result: int) -> Exception:
        """The exception for a refusal of the shim, unless a better one is raised here."""
        if result == lib.NBDSHIM_CLOSED:
            return ValueError("the queue is closed, or of the parent process; make a new one")
        if result == lib.NBDSHIM_NO_MEMORY:
            return MemoryError("no memory for a request")
        self._settle(result)
        return RuntimeError("unreachable")  # settle has raised

    def _settle(self, result: int) -> None:
        """Raise what a signal handler, or a callback of one of the handles, has raised."""
        for handle in self._handles[1:]:
            settle(handle._h, 0)
        settle(self._handles[0]._h if self._handles else None, result)


class IdleTimer:
    """How long an engine has moved no byte, for a `timeout` in seconds; None is for ever.

    A process that was suspended for longer than the timeout is not late for that: `Engine.wait`
    looks at the connections before it returns, also if its time is over.
    """

    def __init__(self, engine: Engine, timeout: float | None) -> None:
        self._engine = engine
        self._timeout = timeout
        self.restart()

    def restart(self) -> None:
        """Begin to count: the caller has just begun to wait."""
        self._since = monotonic()

    def remaining(self) -> float:
        """How many seconds to wait at once; -1.0 is for ever."""
        if self._timeout is None:
            return -1.0
        return max(0.0, self._since_last_move() + self._timeout - monotonic())

    def is_over(self) -> bool:
        """Whether nothing has moved for as long as the timeout says."""
        return self._timeout is not None and not self.remaining()

    def _since_last_move(self) -> float:
        return max(self._since, self._engine.last_moved())


def _check_made(errnum: int) -> None:
    """Raise if a queue could not be made: there is no descriptor left, or no memory."""
    if errnum == ENOMEM:
        raise MemoryError("no memory for a queue")
    if errnum:
        raise OSError(errnum, f"{os.strerror(errnum)}: a queue needs a descriptor")


def as_timeout(timeout: float | None) -> float:
    """The seconds that a wait may take, as nbdqueue_wait takes them: less than 0 is for ever.

    Raises:
        ValueError: It is NaN.
    """
    if timeout is None:
        return -1.0
    seconds = float(timeout)
    if isnan(seconds):
        raise ValueError("timeout: nan is not a number of seconds; None is for ever")
    return max(0.0, seconds)


def as_request(count: int, offset: int, flags: int) -> tuple[int, int, int]:
    """The numbers of a request as exact ints.

    Raises:
        TypeError: One of them is no int.
        ValueError: They are not a range of a disk, or not flags.
    """
    if not (type(count) is type(offset) is type(flags) is int):
        count, offset = as_number("count", count), as_number("offset", offset)
        flags = as_number("flags", flags)
    if not 0 <= offset <= _MAX_OFFSET or not 0 <= count <= _MAX_OFFSET - offset:
        raise ValueError(f"{count} bytes at offset {offset} are not a range of a disk")
    if not 0 <= flags < 2**32:
        raise ValueError(f"flags: {flags} is not between 0 and {2**32 - 1}")
    return count, offset, flags


def failure(operation: int, length: int, offset: int, errnum: int, at: int | None = None) -> Error:
    """The exception for a request that has failed; `at` is where, if not at its beginning."""
    what = _NAMES[operation]
    where = "" if operation == FLUSH else f" {length} bytes at offset {offset}"
    place = "" if at is None or at == offset or operation == FLUSH else f" at offset {at}"
    return Error(f"{what}{where} failed{place}: {os.strerror(errnum)}", errnum)
