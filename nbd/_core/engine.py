# SPDX-License-Identifier: LGPL-2.0-or-later
"""The shim's queue, as Python sees it: what nbd.queue.Queue and nbd.copy have in common.

csrc/nbdqueue.h is its manual.
"""

from __future__ import annotations

import os
from sys import is_finalizing

from nbd._core.callbacks import forget, next_token, registry
from nbd._core.convert import as_number
from nbd._core.errors import Error, pending, report_pending, settle
from nbd._core.lifetime import owned
from nbd._core.shim import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd._core.handle import Handle

TARGET, SOURCE = lib.NBDQUEUE_TARGET, lib.NBDQUEUE_SOURCE
READ, WRITE, ZERO = lib.NBDQUEUE_READ, lib.NBDQUEUE_WRITE, lib.NBDQUEUE_ZERO
TRIM, CACHE, FLUSH = lib.NBDQUEUE_TRIM, lib.NBDQUEUE_CACHE, lib.NBDQUEUE_FLUSH
COPY = lib.NBDQUEUE_COPY

_MOST_DEPTH = 4096
_MOST_PIECE = 32 * 1024 * 1024  # what every server takes (NBD's specification)
_MOST = 2**64 - 1
_ROOM = 256
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
        if not 1 <= depth <= _MOST_DEPTH:
            raise ValueError(f"depth: {depth} is not between 1 and {_MOST_DEPTH} commands")
        if not 1 <= piece <= _MOST_PIECE:
            raise ValueError(f"piece: {piece} is not between 1 and {_MOST_PIECE} bytes")
        token = next_token()
        self.kept: dict[int, Any] = {}
        registry[token] = self.kept
        try:
            made = lib.nbdqueue_create(depth, piece, token)
            if not made:
                raise MemoryError("no memory for a queue")
            self.q = owned(made, lib.nbdqueue_destroy)
        except BaseException:
            forget(token, None)
            raise
        self._handles: list[Handle] = []
        self._room = _ROOM
        self._done = ffi.new("struct nbdqueue_done[]", _ROOM)

    def add(self, end: int, handle: Handle) -> None:
        """Give one of the ends a handle, which has to be connected."""
        if handle in self._handles:
            raise ValueError("handles: the same handle is there twice")
        result = lib.nbdqueue_add(self.q, end, handle._h)
        if result == lib.NBDSHIM_NO_MEMORY:
            raise ValueError(f"handles: a queue takes {lib.NBDQUEUE_MOST_HANDLES} at the most")
        if result < 0 or pending:
            settle(handle._h, result)
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
            An array of struct nbdqueue_done, and how many are in it.  They come again until `take`.
        """
        if least > self._room:
            self._done = ffi.new("struct nbdqueue_done[]", least)
            self._room = least
        count = nbdqueue_wait(self.q, self._done, self._room, least, timeout)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._settle(0)
        return self._done, count

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
        count = nbdqueue_step(self.q, self._done, self._room)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._settle(0)
        return self._done, count

    def error_of(self, handle: Handle) -> int:
        """The errno with which the connection of a handle has ended; 0 if it has not."""
        return int(lib.nbdqueue_error(self.q, handle._h))

    def cancel(self, token: int) -> None:
        """Send no more commands for a request."""
        lib.nbdqueue_cancel(self.q, token)

    def take(self, count: int) -> None:
        """Forget the first requests that wait has told of."""
        nbdqueue_take(self.q, count)

    def wake(self) -> None:
        """End the wait of another thread, or the next one."""
        lib.nbdqueue_wake(self.q)

    def drop(self) -> None:
        """Forget all requests, without waiting for the server."""
        lib.nbdqueue_drop(self.q)
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
            return ValueError("the queue is closed; make a new one")
        if result == lib.NBDSHIM_NO_MEMORY:
            return MemoryError("no memory for a request")
        self._settle(result)
        return RuntimeError("unreachable")  # settle has raised

    def _settle(self, result: int) -> None:
        """Raise what a signal handler, or a callback of one of the handles, has raised."""
        for handle in self._handles[1:]:
            settle(handle._h, 0)
        settle(self._handles[0]._h if self._handles else None, result)


def as_request(count: int, offset: int, flags: int) -> tuple[int, int, int]:
    """The numbers of a request as exact ints.

    Raises:
        TypeError: One of them is no int.
        ValueError: They are not a range of a disk, or not flags.
    """
    if not (type(count) is type(offset) is type(flags) is int):
        count, offset = as_number("count", count), as_number("offset", offset)
        flags = as_number("flags", flags)
    if not 0 <= offset <= _MOST or not 0 <= count <= _MOST - offset:
        raise ValueError(f"{count} bytes at offset {offset} are not a range of a disk")
    if not 0 <= flags < 2**32:
        raise ValueError(f"flags: {flags} is not between 0 and {2**32 - 1}")
    return count, offset, flags


def failure(operation: int, length: int, offset: int, errnum: int) -> Error:
    """The exception for a request that has failed."""
    what = _NAMES[operation]
    where = "" if operation == FLUSH else f" {length} bytes at offset {offset}"
    return Error(f"{what}{where} failed: {os.strerror(errnum)}", errnum)
