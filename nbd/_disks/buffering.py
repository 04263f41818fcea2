# SPDX-License-Identifier: LGPL-2.0-or-later
"""Read-ahead and write-behind of a file.

Reading ahead keeps a window of pieces in front of the reader, which grows while the reader has to
wait.  It is bounded by how much was read in order since the last jump, so that a program that jumps
fetches at most twice what it uses.

Writing behind sends copies of what is written, and keeps the first error for a later call.
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

#: The smallest unit that a disk fails to read.
SECTOR = 512
#: The window has at most this many pieces: 8 MiB.
_MAX_PIECES = 32
#: At most this many writes are in flight: 8 MiB.
DEPTH = 32


def new_memory(size: int) -> tuple[Any, memoryview]:
    """Memory that a queue reads into without a copy, and a view of it."""
    if BOUNCES:
        memory = Buffer(size)
        return memory, memoryview(memory.to_buffer())
    whole = bytearray(size)
    return whole, memoryview(whole)


class Piece:
    """A part of the window: which bytes are read into which memory."""

    __slots__ = ("end", "memory", "request", "start", "view")

    def __init__(
        self, start: int, end: int, memory: tuple[Any, memoryview], request: Request
    ) -> None:
        self.start = start
        self.end = end
        self.memory, self.view = memory
        self.request = request


class ReadAhead:
    """The window of one file: pieces that follow each other.  It waits for nothing.

    Memory goes to the next piece only after its own was read to the end.  The memory of a piece
    that is forgotten is not used again: the server may still answer.

    Attributes:
        in_order: How many bytes were read in order since the last jump.
    """

    def __init__(self, queue: Queue, size: int) -> None:
        self.in_order = 0
        self._queue = queue
        self._size = size
        self._pieces: deque[Piece] = deque()
        self._most = 1
        self._free: list[tuple[Any, memoryview]] = []

    def __len__(self) -> int:
        """How many pieces it has."""
        return len(self._pieces)

    def covers(self, at: int) -> bool:
        """Whether the window has a place."""
        return bool(self._pieces) and self._pieces[0].start <= at < self._pieces[-1].end

    def stop(self) -> None:
        """Forget the window: the reader has jumped, or a part cannot be read."""
        self._pieces.clear()
        self._most = 1
        self.in_order = 0

    def forget(self, start: int, end: int) -> None:
        """Forget the window if it has a part of a range, which will be written."""
        if self._pieces and self._pieces[0].start < end and start < self._pieces[-1].end:
            self._pieces.clear()

    def reach(self, at: int) -> int:
        """Where the window ends at most, if it is asked for a place now."""
        return min(at + self.in_order + PIECE, self._size)

    def grow(self, at: int) -> None:
        """Read further ahead from now on: the reader has to wait."""
        self._most = min(2 * self._most, _MAX_PIECES)
        self._fill_up(at)

    def piece_at(self, at: int) -> Piece:
        """The piece with a place, which is asked for if it is not in the window."""
        if not self.covers(at):
            self._pieces.clear()
            end = at + max(self.in_order, 1)
            self._add(at, end + -end % SECTOR)
        while self._pieces[0].end <= at:
            self._pieces.popleft()
        self._fill_up(at)
        return self._pieces[0]

    def take(self, piece: Piece, view: memoryview, at: int) -> int:
        """Copy what a piece has from a place on, as far as view has room; returns how much."""
        start = at - piece.start
        count = min(len(view), piece.end - at)
        view[:count] = piece.view[start : start + count]
        self.in_order += count
        if at + count == piece.end:
            self._pieces.popleft()
            self._keep(piece)
            if self._pieces:
                self._fill_up(at + count)
        return count

    def _keep(self, piece: Piece) -> None:
        """Keep the memory of a piece that was read, for another one."""
        if len(piece.view) == PIECE and len(self._free) < _MAX_PIECES:
            self._free.append((piece.memory, piece.view))

    def _fill_up(self, at: int) -> None:
        """Ask for more pieces, as far ahead as what was read in order allows."""
        while len(self._pieces) < self._most:
            start = self._pieces[-1].end
            end = self._end_of_piece(start)
            if start == end or end > at + self.in_order:
                break
            self._add(start, end)

    def _end_of_piece(self, start: int) -> int:
        return min(start - start % PIECE + PIECE, self._size)

    def _add(self, start: int, end: int) -> None:
        end = min(end, self._end_of_piece(start))
        if end - start == PIECE and self._free:
            memory = self._free.pop()
        else:
            memory = new_memory(end - start)
        self._pieces.append(Piece(start, end, memory, self._queue.read(memory[0], start)))


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
