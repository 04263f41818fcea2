# SPDX-License-Identifier: LGPL-2.0-or-later
"""Reading ahead: a window of pieces before the reader, which grows while the reader has to wait."""

from __future__ import annotations

from collections import deque

from nbd._core.buffer import Buffer
from nbd._core.memory import BOUNCES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd._core.queue import Queue, Request

#: So many bytes one command reads or writes.
PIECE = 256 * 1024
#: The window has so many pieces at the most: 8 MiB.
_MOST_PIECES = 32


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
    """

    def __init__(self, queue: Queue, size: int) -> None:
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
        """Forget the window: the reader has gone elsewhere."""
        self._pieces.clear()
        self._most = 1

    def forget(self, start: int, end: int) -> None:
        """Forget the window if it has a part of a range, which will be written."""
        if self._pieces and self._pieces[0].start < end and start < self._pieces[-1].end:
            self._pieces.clear()

    def grow(self) -> None:
        """Read further ahead from now on: the reader has to wait."""
        self._most = min(2 * self._most, _MOST_PIECES)
        self._fill_up()

    def piece_at(self, at: int) -> Piece:
        """The piece with a place, which is asked for if it is not in the window."""
        if not self.covers(at):
            self._pieces.clear()
            self._add(at)
        while self._pieces[0].end <= at:
            self._pieces.popleft()
        self._fill_up()
        return self._pieces[0]

    def take(self, piece: Piece, view: memoryview, at: int) -> int:
        """Copy what a piece has from a place on, as far as view has room; returns how much."""
        start = at - piece.start
        count = min(len(view), piece.end - at)
        view[:count] = piece.view[start : start + count]
        if at + count == piece.end:
            self._pieces.popleft()
            self._keep(piece)
            if self._pieces:
                self._fill_up()
        return count

    def _keep(self, piece: Piece) -> None:
        """Keep the memory of a piece that was read, for another one."""
        if len(piece.view) == PIECE and len(self._free) < _MOST_PIECES:
            self._free.append((piece.memory, piece.view))

    def _fill_up(self) -> None:
        while len(self._pieces) < self._most and self._pieces[-1].end < self._size:
            self._add(self._pieces[-1].end)

    def _add(self, start: int) -> None:
        end = min(start - start % PIECE + PIECE, self._size)
        if end - start == PIECE and self._free:
            memory = self._free.pop()
        else:
            memory = new_memory(end - start)
        self._pieces.append(Piece(start, end, memory, self._queue.read(memory[0], start)))
