# SPDX-License-Identifier: LGPL-2.0-or-later
"""Writing behind: the writes of a file that the server has not answered, and their first error."""

from __future__ import annotations

from nbd._binding.errors import DiskError
from nbd._binding.memory import BOUNCES, from_buffer
from nbd._disks.queue import WRITE, failure
from nbd._disks.readahead import PIECE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd._binding.errors import Error
    from nbd._disks.connections import Connections
    from nbd._disks.queue import Request

#: At most this many writes are in flight: 8 MiB.
DEPTH = 32


class _Write:
    """A write in flight, the memory it is written from, and what the program has written."""

    __slots__ = ("length", "memory", "offset", "request")

    def __init__(self, request: Request, memory: Any, length: int, offset: int) -> None:
        self.request = request
        self.memory = memory
        self.length = length
        self.offset = offset

    def error(self) -> Error | None:
        """Why it has failed, in terms of what the program has written; None if it has not."""
        error = self.request.error
        if error is None:
            return None
        return failure(WRITE, self.length, self.offset, error.errnum, self.request.offset)


class WriteBehind:
    """The writes in flight of one file.

    Args:
        connections: The connections of the file.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._flying: list[_Write] = []
        self._free: list[bytearray] = []
        self._failure: Error | None = None  # the first that was not raised yet

    def add(self, data: memoryview, at: int) -> None:
        """Copy data and send it, in pieces; waits while too many writes are in flight."""
        for start in range(0, len(data), PIECE):
            if len(self._flying) >= DEPTH:
                self._connections.wait_until(self._has_room)
            with data[start : start + PIECE] as piece:
                self._send(piece, at + start, len(data), at)

    def finish(self, start: int, end: int) -> None:
        """Wait for the writes to a range: NBD does not order commands."""
        for write in self._flying:
            request = write.request
            if request.offset < end and start < request.offset + request.length:
                self._connections.wait_for(request)
        self._reap()

    def raise_failure(self) -> None:
        """Raise the first error of the writes that are done, once."""
        self._reap()
        failed = self._failure
        if failed is None:
            return
        try:
            raise DiskError(*failed.args)
        except DiskError:
            self._failure = None
            raise

    def _send(self, piece: memoryview, at: int, length: int, offset: int) -> None:
        if BOUNCES:
            memory: Any = bytes(piece)
        else:
            memory = self._free.pop() if self._free else bytearray(PIECE)
            with memoryview(memory) as view:
                view[: len(piece)] = piece
        # Not a memoryview: until CPython 3.12.7 the garbage collector may clear one that is pinned,
        # and crash (gh-77894), if an exception comes in the middle of a call.
        pin = from_buffer(memory)
        request = self._connections.queue._submit(WRITE, len(piece), at, 0, pin, pin)
        self._flying.append(_Write(request, memory, length, offset))

    def _has_room(self) -> bool:
        self._reap()
        return len(self._flying) < DEPTH

    def _reap(self) -> None:
        """Forget the writes that are done, and note the first error."""
        for write in [one for one in self._flying if one.request.is_done]:
            if self._failure is None:
                self._failure = write.error()
            # In this order: memory that is in both lists would be given to two writes.
            self._flying.remove(write)
            if not BOUNCES:
                self._free.append(write.memory)
