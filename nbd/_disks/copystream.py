# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies of which one side is a stream: in order, and by the calling thread alone.

A disk on the other side has a queue of its own, so that several commands are in flight.  What ends
a copy before its end drops the queue: nothing is flushed, and the first exception is the one that
comes out.
"""

from __future__ import annotations

import errno
from collections import deque
from time import monotonic

from nbd._binding.errors import DiskError, Error
from nbd._binding.memory import BOUNCES
from nbd._disks.buffering import new_memory
from nbd._disks.endpoints import Disk, File, Stream
from nbd._disks.queue import READ, WRITE, Queue
from nbd._disks.rescue import await_some, failure, rescued

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Union

    from nbd._disks.copy import Settings
    from nbd._disks.endpoints import End
    from nbd._disks.queue import Request
    from nbd._disks.streamendpoint import Data

    Reader = Union["_DiskReader", "_FileReader", "_StreamReader"]
    Writer = Union["_DiskWriter", "_FileWriter", "_StreamWriter"]

#: What is read or written at once: one request of the queue, however many commands it is.
_CHUNK = 1024 * 1024
#: The size of the largest command.
_COMMAND = 256 * 1024
#: What is written for a hole.
_ZEROES = bytes(_CHUNK)
#: Seconds between two calls of `progress`.
_TICK = 0.1
#: Seconds that a copy which has failed waits for the replies to its commands: nbdkit 1.32 can abort
#: when it cannot send them.
_GRACE = 1.0
#: The same where it was stopped while it waited for the server, which may be hanging.
_SHORT_GRACE = 0.1


def copy_stream(source: End, target: End, settings: Settings) -> tuple[int, int]:
    """Copy everything.

    Returns:
        How many bytes were copied, and how many were zeroed.
    """
    copied = zeroed = 0
    reported_at = 0.0
    writer: Writer | None = None
    reader = _reader(source, settings)
    try:
        writer = _writer(target, settings)
        for chunk, is_hole in reader.chunks():
            settings.check()
            writer.write(chunk)
            if is_hole:
                zeroed += len(chunk)
            else:
                copied += len(chunk)
            if settings.progress is not None and monotonic() - reported_at >= _TICK:
                reported_at = monotonic()
                settings.progress(copied + zeroed, source.size)
        writer.finish()
    finally:
        try:
            reader.drop()
        finally:
            if writer is not None:
                writer.drop()
    if settings.progress is not None:
        settings.progress(copied + zeroed, source.size)
    return copied, zeroed


def _reader(source: End, settings: Settings) -> Reader:
    if isinstance(source, Stream):
        return _StreamReader(source)
    if isinstance(source, File):
        return _FileReader(source, settings)
    return _DiskReader(source, settings)


def _writer(target: End, settings: Settings) -> Writer:
    if isinstance(target, Stream):
        return _StreamWriter(target)
    if isinstance(target, File):
        return _FileWriter(target)
    return _DiskWriter(target, settings)


class _StreamReader:
    def __init__(self, source: Stream) -> None:
        self._source = source

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """The bytes in order, and whether they are a hole."""
        for chunk in self._source.chunks():
            yield chunk, False

    def drop(self) -> None:
        """Do nothing: its owner closes it."""


class _FileReader:
    def __init__(self, source: File, settings: Settings) -> None:
        self._source = source
        self._settings = settings

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """The bytes in order, and whether they are a hole."""
        buffer = memoryview(bytearray(_CHUNK))
        for start, stop, is_hole in _parts(self._source, _CHUNK, self._settings.sparse):
            if is_hole:
                yield from _hole(stop - start)
            else:
                yield self._read(buffer[: stop - start], start), False

    def _read(self, view: memoryview, start: int) -> memoryview:
        try:
            self._source.read_into(view, start)
        except DiskError as reason:
            number = reason.errnum
        else:
            return view
        return rescued(self._source, start, len(view), self._settings, number)

    def drop(self) -> None:
        """Do nothing: its owner closes it."""


class _StreamWriter:
    def __init__(self, target: Stream) -> None:
        self.write = target.write

    def finish(self) -> None:
        """Do nothing: everything is written."""

    def drop(self) -> None:
        """Do nothing: its owner closes it."""


class _FileWriter:
    def __init__(self, target: File) -> None:
        target.grow(0)
        self._target = target
        self._at = 0

    def write(self, data: Data) -> None:
        """Write the next bytes."""
        self._target.write(memoryview(data), self._at)
        self._at += len(data)

    def finish(self) -> None:
        """Do nothing: everything is written."""

    def drop(self) -> None:
        """Do nothing: its owner closes it."""


class _DiskSide:
    """The commands in flight of a disk that is read or written in order."""

    def __init__(self, disk: Disk, settings: Settings) -> None:
        self._settings = settings
        #: How many requests keep as many commands in flight as the copy's depth.
        self._depth = -(-settings.depth * _COMMAND // _CHUNK) + 1
        self._queue = Queue(disk.handles[:1], depth=settings.depth, piece=_COMMAND)
        self._free: list[tuple[Any, memoryview]] = []
        self._is_waiting = False

    def _wait(self) -> None:
        """Wait until some requests are done."""
        self._is_waiting = True
        await_some(self._queue, self._settings)
        self._is_waiting = False

    def drop(self) -> None:
        """Close the queue, after a moment for the replies to what is in flight."""
        try:
            if len(self._queue):
                self._queue.wait(len(self._queue), _SHORT_GRACE if self._is_waiting else _GRACE)
        finally:
            self._queue.close()

    def _memory(self) -> tuple[Any, memoryview]:
        return self._free.pop() if self._free else new_memory(_CHUNK)


class _Part:
    """A part of a disk that is being read, or a hole, for which there is no request."""

    __slots__ = ("length", "memory", "request", "view")

    def __init__(self, length: int, request: Request | None, memory: Any, view: memoryview) -> None:
        self.length = length
        self.request = request
        self.memory = memory
        self.view = view


class _DiskReader(_DiskSide):
    """Reads ahead."""

    def __init__(self, source: Disk, settings: Settings) -> None:
        super().__init__(source, settings)
        self._source = source

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """The bytes in order, and whether they are a hole.

        Raises:
            nbd.Error: The server could not read some of them.
        """
        parts = _parts(self._source, _CHUNK, self._settings.sparse)
        window: deque[_Part] = deque()
        is_ended = False
        while True:
            while not is_ended and len(window) < self._depth:
                part = next(parts, None)
                if part is None:
                    is_ended = True
                else:
                    window.append(self._asked_for(*part))
            if not window:
                return
            yield from self._arrived(window.popleft())

    def _asked_for(self, start: int, stop: int, is_hole: bool) -> _Part:
        length = stop - start
        if is_hole:
            return _Part(length, None, None, memoryview(b""))
        memory, view = self._memory() if length == _CHUNK else new_memory(length)
        return _Part(length, self._queue.read(memory, start), memory, view)

    def _arrived(self, part: _Part) -> Iterator[tuple[Data, bool]]:
        """The bytes of a part, for which this waits."""
        request = part.request
        if request is None:
            yield from _hole(part.length)
            return
        while not request.is_done:
            self._wait()
        if request.error is not None:
            yield self._rescued(request, request.error.errnum), False
            return
        yield part.view, False
        if part.length == _CHUNK:
            self._free.append((part.memory, part.view))

    def _rescued(self, request: Request, errnum: int) -> memoryview:
        """What can be read of a range that could not be read at once."""
        place = request.offset, request.length
        if self._source.is_lost(self._queue._shim_queue):
            raise failure(READ, self._source, *place, errnum)
        return rescued(self._source, *place, self._settings, errnum)


class _DiskWriter(_DiskSide):
    """Writes behind."""

    def __init__(self, target: Disk, settings: Settings) -> None:
        super().__init__(target, settings)
        self._target = target
        self._size = target.size
        self._at = 0  # where the next byte goes
        self._filling: tuple[Any, memoryview] | None = None
        self._filled = 0
        self._flying: list[tuple[Request, tuple[Any, memoryview]]] = []

    def write(self, data: Data) -> None:
        """Take the next bytes; waits while too many writes are in flight."""
        if len(data) > self._size - self._at:
            raise Error(
                f"nbd.copy: the target has {self._size} bytes and the source has more; "
                "copy to a larger one",
                errno.ENOSPC,
            )
        rest = memoryview(data)
        while rest:
            if self._filling is None:
                self._filling = self._memory()
            count = min(len(rest), _CHUNK - self._filled)
            self._filling[1][self._filled : self._filled + count] = rest[:count]
            self._filled += count
            self._at += count
            rest = rest[count:]
            if self._filled == _CHUNK:
                self._send()

    def finish(self) -> None:
        """Write what is left, and wait for all writes."""
        if self._filled:
            self._send()
        while self._flying:
            self._reap()

    def _send(self) -> None:
        """Write the piece that is filled."""
        if self._filling is None:
            return
        while len(self._flying) >= self._depth:
            self._reap()
        memory, view = self._filling
        whole: Any = view[: self._filled]
        if BOUNCES:  # PyPy: an nbd.Buffer needs no copy
            whole = memory if self._filled == _CHUNK else bytes(whole)
        request = self._queue.write(whole, self._at - self._filled)
        self._flying.append((request, self._filling))
        self._filling, self._filled = None, 0

    def _reap(self) -> None:
        """Wait for some writes, and raise the error of one that has failed."""
        self._wait()
        left = []
        for request, memory in self._flying:
            if not request.is_done:
                left.append((request, memory))
            elif request.error is not None:
                place = request.offset, request.length
                raise failure(WRITE, self._target, *place, request.error.errnum)
            else:
                self._free.append(memory)
        self._flying = left


def _parts(source: Disk | File, length: int, is_sparse: bool) -> Iterator[tuple[int, int, bool]]:
    """The data of a source, cut to a length, and its holes: start, stop and whether it is one."""
    at = 0
    for start, stop in source.zeroes(0, source.size, 0) if is_sparse else ():
        yield from _cut(at, start, length)
        yield start, stop, True
        at = stop
    yield from _cut(at, source.size, length)


def _cut(start: int, stop: int, length: int) -> Iterator[tuple[int, int, bool]]:
    while start < stop:
        end = min(start - start % length + length, stop)
        yield start, end, False
        start = end


def _hole(length: int) -> Iterator[tuple[Data, bool]]:
    for done in range(0, length, _CHUNK):
        yield _ZEROES[: length - done], True  # all of it is not copied
