# SPDX-License-Identifier: LGPL-2.0-or-later
"""Read-ahead and write-behind of a file.

ReadAhead keeps a window of pieces in front of the reader, and enlarges it whenever the reader has
to wait.  It never reads further ahead than the reader has read sequentially since the last jump, so
a program that jumps fetches at most twice what it uses.

WriteBehind copies the data of each write, sends it without waiting, and keeps the first error for a
later call.
"""

from __future__ import annotations

from collections import deque

from nbd._binding.buffer import Buffer
from nbd._binding.errors import DiskError
from nbd._binding.memory import BOUNCES, from_buffer
from nbd._disks.queue import PIECE, WRITE, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd._binding.errors import Error
    from nbd._disks.connections import Connections
    from nbd._disks.queue import Queue, Request

#: The smallest unit that a disk can fail to read, in bytes.
SECTOR = 512
#: The maximum number of pieces in the window: 8 MiB.
_MAX_PIECES = 32
#: The maximum number of writes in flight: 8 MiB.
_MAX_WRITES = 32


def new_memory(size: int) -> tuple[Any, memoryview]:
    """Return memory that a queue can read into without a copy, and a view of it."""
    if BOUNCES:
        memory = Buffer(size)
        return memory, memoryview(memory.to_buffer())
    whole = bytearray(size)
    return whole, memoryview(whole)


class Piece:
    """A part of the window: a range of the disk, its request, and the memory it is read into."""

    __slots__ = ("memory", "request", "start", "stop", "view")

    def __init__(
        self, start: int, stop: int, memory: tuple[Any, memoryview], request: Request
    ) -> None:
        self.start = start
        self.stop = stop
        self.memory, self.view = memory
        self.request = request


class ReadAhead:
    """The window of one file: adjacent pieces in front of the reader.  It never waits.

    The memory of a piece is reused when the reader has consumed the whole piece.  The memory of a
    piece that is dropped earlier is not reused, because the server may still write to it.

    Attributes:
        in_order: The number of bytes that were read sequentially since the last jump.
    """

    def __init__(self, queue: Queue, size: int) -> None:
        self.in_order = 0
        self._queue = queue
        self._size = size
        self._pieces: deque[Piece] = deque()
        self._limit = 1
        self._free: list[tuple[Any, memoryview]] = []

    def __len__(self) -> int:
        """The number of pieces in the window."""
        return len(self._pieces)

    def covers(self, at: int) -> bool:
        """Return whether the window contains a position."""
        return bool(self._pieces) and self._pieces[0].start <= at < self._pieces[-1].stop

    def reset(self) -> None:
        """Drop the window, because the reader has jumped, or a part cannot be read."""
        self._pieces.clear()
        self._limit = 1
        self.in_order = 0

    def forget(self, start: int, stop: int) -> None:
        """Drop the window if it overlaps a range that will be written."""
        if self._pieces and self._pieces[0].start < stop and start < self._pieces[-1].stop:
            self._pieces.clear()

    def reach(self, at: int) -> int:
        """Return a bound for where the window can end when `piece_at` is called now."""
        return min(at + self.in_order + PIECE, self._size)

    def grow(self, at: int) -> None:
        """Enlarge the window, because the reader has to wait."""
        self._limit = min(2 * self._limit, _MAX_PIECES)
        self._fill_up(at)

    def piece_at(self, at: int) -> Piece:
        """Return the piece that contains a position; submit it if it is not in the window."""
        if not self.covers(at):
            self._pieces.clear()
            stop = at + max(self.in_order, 1)
            self._add(at, stop + -stop % SECTOR)
        while self._pieces[0].stop <= at:
            self._pieces.popleft()
        self._fill_up(at)
        return self._pieces[0]

    def take(self, piece: Piece, view: memoryview, at: int) -> int:
        """Copy bytes of a piece, starting at a position, into a view; returns how many."""
        start = at - piece.start
        count = min(len(view), piece.stop - at)
        view[:count] = piece.view[start : start + count]
        self.in_order += count
        if at + count == piece.stop:
            self._pieces.popleft()
            self._keep(piece)
            if self._pieces:
                self._fill_up(at + count)
        return count

    def _keep(self, piece: Piece) -> None:
        """Keep the memory of a consumed piece for another one."""
        if len(piece.view) == PIECE and len(self._free) < _MAX_PIECES:
            self._free.append((piece.memory, piece.view))

    def _fill_up(self, at: int) -> None:
        """Submit more pieces, within the bounds of the window."""
        while len(self._pieces) < self._limit:
            start = self._pieces[-1].stop
            stop = self._stop_of_piece(start)
            if start == stop or stop > at + self.in_order:
                break
            self._add(start, stop)

    def _stop_of_piece(self, start: int) -> int:
        return min(start - start % PIECE + PIECE, self._size)

    def _add(self, start: int, stop: int) -> None:
        stop = min(stop, self._stop_of_piece(start))
        if stop - start == PIECE and self._free:
            memory = self._free.pop()
        else:
            memory = new_memory(stop - start)
        self._pieces.append(Piece(start, stop, memory, self._queue.read(memory[0], start)))


class _Write:
    """A write in flight, its memory, and the range of the program's call that it is a part of."""

    __slots__ = ("length", "memory", "offset", "request")

    def __init__(self, request: Request, memory: Any, length: int, offset: int) -> None:
        self.request = request
        self.memory = memory
        self.length = length
        self.offset = offset

    def error(self) -> Error | None:
        """Return the error for the whole call of the program; None if the write succeeded."""
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
        self._failure: Error | None = None  # the first error that was not raised yet

    def add(self, data: memoryview, at: int) -> None:
        """Copy data and send it in pieces; waits while _MAX_WRITES writes are in flight."""
        for start in range(0, len(data), PIECE):
            if len(self._flying) >= _MAX_WRITES:
                self._connections.wait_until(self._has_capacity)
            with data[start : start + PIECE] as piece:
                self._send(piece, at + start, len(data), at)

    def drain(self, start: int, stop: int) -> None:
        """Wait for the writes that overlap a range, as NBD does not order commands."""
        for write in self._flying:
            request = write.request
            if request.offset < stop and start < request.offset + request.length:
                self._connections.wait_for(request)
        self._reap()

    def raise_failure(self) -> None:
        """Raise the first error of the writes that are done; each is raised once."""
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
        # Do not pin a memoryview: until CPython 3.12.7 the garbage collector may clear one that is
        # pinned and crash (gh-77894), if an exception interrupts the call.
        pin = from_buffer(memory)
        request = self._connections.queue._submit(WRITE, len(piece), at, 0, pin, pin)
        self._flying.append(_Write(request, memory, length, offset))

    def _has_capacity(self) -> bool:
        self._reap()
        return len(self._flying) < _MAX_WRITES

    def _reap(self) -> None:
        """Remove the writes that are done, and store their first error."""
        for write in [one for one in self._flying if one.request.is_done]:
            if self._failure is None:
                self._failure = write.error()
            # The order matters: memory in both lists would be used by two writes, if a signal
            # handler raised in between.
            self._flying.remove(write)
            if not BOUNCES:
                self._free.append(write.memory)
