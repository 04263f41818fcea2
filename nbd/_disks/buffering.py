# SPDX-License-Identifier: LGPL-2.0-or-later
"""Read-ahead and write-behind of a file.

ReadAhead keeps a window of pieces in front of the reader, and enlarges it if the reader has to wait
for long.  It never reads further ahead than the reader has read sequentially since the last jump,
so a program that jumps fetches at most twice what it uses.

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
#: Pieces end at multiples of this size, as servers read their disks in blocks.
_BLOCK = 4096
#: A wait of this many seconds for a piece is long: more pieces in flight would shorten it.
_SLOW = 0.0005


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

    A run is what the program reads sequentially, from one jump to the next.  What a call of the
    program asks for is read at once, in as many pieces as it needs.  Beyond that, at most as many
    bytes are read as the run had before the call, so that a program which jumps fetches at most
    twice what it uses, and only what it uses if it jumps before each call.

    No piece is submitted in advance for the first call after a seek, as the next seek may drop it.

    The memory of a piece is reused when the reader has consumed the whole piece.  The memory of a
    piece that is dropped earlier is not reused, because the server may still write to it.

    Args:
        queue: The queue of the disk.
        size: The size of the disk in bytes.
        credit: How many bytes count as read sequentially before the first call.

    Attributes:
        stop: A bound for where the window ends, since the last `aim`.
    """

    def __init__(self, queue: Queue, size: int, credit: int) -> None:
        self.stop = 0
        self._queue = queue
        self._size = size
        self._pieces: deque[Piece] = deque()
        self._run = -credit  # where the run began
        self._needed = 0  # where the program's call ends
        self._limit = 0  # how many pieces the window has; none is read ahead until it is 2
        self._quick = 0  # how many waits were short since a long one
        self._free: list[tuple[Any, memoryview]] = []

    def __len__(self) -> int:
        """The number of pieces in the window."""
        return len(self._pieces)

    def covers(self, at: int) -> bool:
        """Return whether the window contains a position."""
        return bool(self._pieces) and self._pieces[0].start <= at < self._pieces[-1].stop

    def drop(self) -> None:
        """Drop the window, as it may be outdated.  The run continues if the next read does."""
        self._pieces.clear()
        self._limit = 0

    def jump(self, at: int) -> None:
        """Begin a run, because the reader has jumped, or a part cannot be read."""
        self.drop()
        self._run = at
        self._quick = 0

    def forget(self, start: int, stop: int) -> None:
        """Drop the window if it overlaps a range that will be written."""
        if self._pieces and self._pieces[0].start < stop and start < self._pieces[-1].stop:
            self._pieces.clear()

    def aim(self, start: int, stop: int) -> None:
        """Note which range a call of the program asks for."""
        if self._limit < 2:
            self._limit += 1
        ahead = stop + start - self._run
        self._needed = min(stop, self._size)
        self.stop = min(max(stop, ahead - ahead % _BLOCK), self._size)

    def waited(self, seconds: float) -> None:
        """Enlarge the window if the reader has waited long, and has done so a moment ago, too.

        The window of a server that is near stays small, and so in the processor's cache: a process
        that the system has put aside waits long once, but not again within two windows.
        """
        if seconds < _SLOW:
            self._quick += 1
            return
        count = max(self._limit, len(self._pieces))
        if self._limit > 1 and self._quick <= 2 * count:
            self._limit = min(2 * count, _MAX_PIECES)
        self._quick = 0

    def piece_at(self, at: int) -> Piece | None:
        """Return the piece that contains a position; submit it if the program asks for it."""
        pieces = self._pieces
        if not self.covers(at):
            pieces.clear()
        while pieces and pieces[0].stop <= at:
            pieces.popleft()
        self._fill_up(at)
        return pieces[0] if pieces else None

    def take(self, piece: Piece, view: memoryview, at: int) -> int:
        """Copy bytes of a piece, starting at a position, into a view; returns how many."""
        start = at - piece.start
        count = min(len(view), piece.stop - at)
        view[:count] = piece.view[start : start + count]
        if at + count == piece.stop:
            self._pieces.popleft()
            self._keep(piece)
            self._fill_up(at + count)
        return count

    def _keep(self, piece: Piece) -> None:
        """Keep the memory of a consumed piece for another one."""
        if len(piece.view) == PIECE and len(self._free) < _MAX_PIECES:
            self._free.append((piece.memory, piece.view))

    def _fill_up(self, at: int) -> None:
        """Submit more pieces, within the bounds of the window."""
        pieces = self._pieces
        while len(pieces) < _MAX_PIECES:
            start = pieces[-1].stop if pieces else at
            if start >= self._needed:
                stop = min(start + PIECE, self._size)
                is_full = self._limit < 2 or len(pieces) >= self._limit
                if is_full or start == stop or stop > self.stop:
                    break
            self._add(start, self._stop_of_piece(start))

    def _stop_of_piece(self, start: int) -> int:
        stop = start + PIECE
        return self.stop if stop >= self.stop else stop - stop % _BLOCK

    def _add(self, start: int, stop: int) -> None:
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
        if not self._flying:
            return
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
