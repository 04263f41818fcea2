# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies in order, by the calling thread alone: those of which one side is a stream.

A disk on the other side has a queue, which keeps several commands in flight.  If the copy fails,
the queue is dropped: nothing is flushed, and the first exception is the one that is raised.
"""

from __future__ import annotations

import errno
from collections import deque, namedtuple
from time import monotonic

from nbd._binding.errors import Error
from nbd._binding.memory import BOUNCES
from nbd._binding.shim import ffi, lib
from nbd._disks.buffering import new_memory
from nbd._disks.endpoints import (
    CHUNK,
    DRAIN_IDLE_HUNG,
    DRAIN_TIMEOUT,
    TICK,
    BoundedWait,
    Reader,
    Writer,
)
from nbd._disks.queue import PIECE, READ, Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nbd._disks.diskendpoint import Disk
    from nbd._disks.endpoints import Data, Endpoint, Settings
    from nbd._disks.queue import Request

_Counts = namedtuple("_Counts", ("copied", "zeroed", "read", "written"))


class Counts(_Counts):
    """What a copy has done, in bytes; nbd.Copied defines the numbers."""

    __slots__ = ()


#: What is written for a hole.
_ZEROES = bytes(CHUNK)


def copy_stream(source: Endpoint, target: Endpoint, settings: Settings) -> Counts:
    """Copy everything in order."""
    copied = zeroed = 0
    reported_at = 0.0
    writer: Writer | None = None
    reader = source.reader()
    try:
        writer = target.writer()
        for chunk, is_hole in reader.chunks():
            settings.check()
            writer.write(chunk)
            if is_hole:
                zeroed += len(chunk)
            else:
                copied += len(chunk)
            if settings.progress is not None and monotonic() - reported_at >= TICK:
                reported_at = monotonic()
                settings.progress(copied + zeroed, source.size)
        writer.drain()
    finally:
        try:
            reader.close()
        finally:
            if writer is not None:
                writer.close()
    if settings.progress is not None:
        settings.progress(copied + zeroed, source.size)
    lost = sum(length for _, length in settings.bad)  # was written as zeroes
    copied -= lost
    return Counts(copied - writer.zeroed, zeroed + lost + writer.zeroed, copied, writer.written)


def await_some(queue: Queue, disk: Endpoint) -> list[Request]:
    """Wait until at least one request of a queue of a disk is done.

    Raises:
        nbd.Timeout: Nothing has moved for longer than the copy's timeout.
        nbd.Error: The copy was stopped.
    """
    wait = BoundedWait(disk.settings, moves=queue._shim_queue)
    while True:
        disk.note_losses(queue._shim_queue)
        done = queue.wait(1, wait.slice())
        if done:
            return done
        wait.check()


class FileReader(Reader):
    """Reads an endpoint with offsets by one call after the other, without commands in flight."""

    def __init__(self, source: Endpoint) -> None:
        self._source = source

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """All bytes in order, and whether they are a hole."""
        buffer = memoryview(bytearray(CHUNK))
        for start, stop, is_hole in _ranges(self._source):
            if is_hole:
                yield from _hole(stop - start)
            else:
                yield self._source.read_at(buffer[: stop - start], start), False


class FileWriter(Writer):
    """Writes an endpoint with offsets by one call after the other."""

    def __init__(self, target: Endpoint) -> None:
        target.grow(0)
        self._target = target
        self._offset = 0

    def write(self, data: Data) -> None:
        """Write the next bytes, or make holes where they are zeroes."""
        zeroed, written = write_runs(self._target, data, self._offset)
        self.zeroed += zeroed
        self.written += written
        self._offset += len(data)

    def drain(self) -> None:
        """Give the file its size, also if it ends with a hole."""
        self._target.grow(self._offset)


def write_runs(target: Endpoint, data: Data, offset: int, minimum: int = 1) -> tuple[int, int]:
    """Write bytes to a target with offsets, or zero it where the settings ask to find zeroes.

    Args:
        minimum: The minimum size of a block of zeroes, in bytes.

    Returns:
        How many bytes were found to be zeroes, and how many were written.
    """
    settings = target.settings
    block = max(settings.sparse, minimum) if settings.sparse and not target.discards else 0
    is_zero = target.is_zero or settings.target_is_zero
    view = memoryview(data)
    zeroed = written = 0
    for start, stop, is_hole in _runs(_pinned(data) if block else None, len(view), offset, block):
        length = stop - start
        if is_hole:
            zeroed += length
        if not is_hole or not (is_zero or target.zero_at(offset + start, length)):
            target.write_at(view[start:stop], offset + start)
            written += 0 if target.discards else length
    return zeroed, written


class _DiskQueue:
    """The queue and the memory of a disk that is read or written in order."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._chunk = CHUNK
        depth = disk.settings.depth
        #: How many requests of a chunk keep `depth` commands in flight.
        self._max_requests = -(-depth * PIECE // CHUNK) + 1
        self._queue = disk.queue_of_first(depth)
        self._free: list[tuple[Any, memoryview]] = []
        self._is_waiting = False

    def wait(self) -> None:
        """Wait until some requests are done."""
        self._is_waiting = True
        await_some(self._queue, self._disk)
        self._is_waiting = False

    def close(self) -> None:
        """Drop the queue, after a moment for the replies to what is in flight."""
        try:
            if len(self._queue):
                # If an exception has ended a wait for the server, the server may be hanging.
                timeout = DRAIN_IDLE_HUNG if self._is_waiting else DRAIN_TIMEOUT
                self._queue.wait(len(self._queue), timeout)
        finally:
            self._queue.close()

    def _memory(self) -> tuple[Any, memoryview]:
        return self._free.pop() if self._free else new_memory(self._chunk)


class _Part:
    """A part of a disk that is being read; or a hole, for which there is no request."""

    __slots__ = ("length", "memory", "request", "view")

    def __init__(self, length: int, request: Request | None, memory: Any, view: memoryview) -> None:
        self.length = length
        self.request = request
        self.memory = memory
        self.view = view


class DiskReader(_DiskQueue, Reader):
    """Reads a disk ahead."""

    def __init__(self, source: Disk) -> None:
        super().__init__(source)
        self._source = source

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """All bytes in order, and whether they are a hole.

        Raises:
            nbd.Error: The server could not read some of them.
        """
        ranges = _ranges(self._source)
        window: deque[_Part] = deque()
        is_complete = False  # whether the window reaches to the end of the disk
        while True:
            while not is_complete and len(window) < self._max_requests:
                following = next(ranges, None)
                if following is None:
                    is_complete = True
                else:
                    window.append(self._requested(*following))
            if not window:
                return
            yield from self._awaited(window.popleft())

    def _requested(self, start: int, stop: int, is_hole: bool) -> _Part:
        length = stop - start
        if is_hole:
            return _Part(length, None, None, memoryview(b""))
        memory, view = self._memory() if length == CHUNK else new_memory(length)
        return _Part(length, self._queue.read(memory, start), memory, view)

    def _awaited(self, part: _Part) -> Iterator[tuple[Data, bool]]:
        """Wait for a part; yield its bytes."""
        request = part.request
        if request is None:
            yield from _hole(part.length)
            return
        while not request.is_done:
            self.wait()
        if request.error is not None:
            yield self._rescued(request, request.error.errnum), False
            return
        yield part.view, False
        if part.length == CHUNK:
            self._free.append((part.memory, part.view))

    def _rescued(self, request: Request, errnum: int) -> memoryview:
        """What can be read of a range that could not be read at once."""
        source, offset, length = self._source, request.offset, request.length
        if source.is_lost(self._queue._shim_queue):
            raise source.failure(READ, offset, length, errnum)
        return source.rescued(offset, length, errnum)


class DiskWriter(_DiskQueue, Writer):
    """Writes a disk behind: `write` copies the bytes, and returns before they are written."""

    def __init__(self, target: Disk) -> None:
        super().__init__(target)
        self._target = target
        self._capacity = target.capacity or 0
        self._offset = 0  # of the next byte
        self._filling: tuple[Any, memoryview] | None = None
        self._filled = 0
        self._is_zero = target.settings.target_is_zero
        can_zero = self._is_zero or target.can_zero
        sparse = target.settings.sparse
        self._block = max(sparse, self._queue.minimum) if sparse and can_zero else 0
        self._chunk = max(CHUNK, self._block)
        # The chunks that are being written: the requests of each that are not done, and its memory.
        self._in_flight: list[tuple[list[Request], tuple[Any, memoryview]]] = []

    def write(self, data: Data) -> None:
        """Take the next bytes; wait while too many writes are in flight."""
        if len(data) > self._capacity - self._offset:
            raise Error(
                f"nbd.copy: the target has {self._capacity} bytes and the source has more; "
                "copy to a larger one",
                errno.ENOSPC,
            )
        rest = memoryview(data)
        while rest:
            if self._filling is None:
                self._filling = self._memory()
            count = min(len(rest), self._chunk - self._filled)
            self._filling[1][self._filled : self._filled + count] = rest[:count]
            self._filled += count
            self._offset += count
            rest = rest[count:]
            if self._filled == self._chunk:
                self._send()

    def drain(self) -> None:
        """Send the last chunk, and wait for all writes."""
        if self._filled:
            self._send()
        while self._in_flight:
            self._reap()
        if self._target.is_flushed_by_queues and self._target.settings.flush:
            self._target.flush_queue(self._queue)

    def _send(self) -> None:
        """Write the chunk that was filled."""
        if self._filling is None:
            return
        while len(self._in_flight) >= self._max_requests:
            self._reap()
        offset = self._offset - self._filled
        requests: list[Request] = []
        pin = ffi.from_buffer(self._filling[1]) if self._block else None
        for start, stop, is_zero in _runs(pin, self._filled, offset, self._block):
            if is_zero:
                self.zeroed += stop - start
            if is_zero and not self._is_zero:
                requests.append(self._queue.zero(stop - start, offset + start))
            elif not is_zero:
                requests.append(self._queue.write(self._part(start, stop), offset + start))
                self.written += stop - start
        self._in_flight.append((requests, self._filling))
        self._filling, self._filled = None, 0

    def _part(self, start: int, stop: int) -> Any:
        """A part of the chunk that was filled."""
        assert self._filling is not None
        memory, view = self._filling
        if not BOUNCES:
            return view[start:stop]
        # PyPy writes an nbd.Buffer, or a bytes, without copying it.
        return memory if stop - start == self._chunk else bytes(view[start:stop])

    def _reap(self) -> None:
        """Wait for some requests, and raise the error of one that has failed."""
        if any(requests for requests, _ in self._in_flight):
            self.wait()
        in_flight = []
        for requests, memory in self._in_flight:
            for request in requests:
                if request.error is not None:
                    errnum = request.error.errnum
                    raise self._target.failure(
                        request._operation, request.offset, request.length, errnum
                    )
            rest = [request for request in requests if not request.is_done]
            if rest:
                in_flight.append((rest, memory))
            else:
                self._free.append(memory)
        self._in_flight = in_flight


def _pinned(data: Data) -> Any:
    """The memory of bytes, for C.  On PyPy it is a copy, as bytes can move there."""
    return ffi.new("char[]", bytes(data)) if BOUNCES else ffi.from_buffer(data)


def _runs(pin: Any, size: int, offset: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cut bytes into runs of blocks that are all zero, or all are not; see nbdshim_run.

    Args:
        pin: The bytes; it is not used if `block` is 0.
        size: How many they are.
        offset: Where they are on the disk.
        block: The size of a block; 0 finds no zeroes.

    Returns:
        Where each run starts and stops in the bytes, and whether they are zeroes.
    """
    start = 0
    while start < size:
        run = lib.nbdshim_run(pin + start, size - start, offset + start, block) if block else size
        stop = start + abs(run)
        yield start, stop, run < 0
        start = stop


def _ranges(source: Endpoint) -> Iterator[tuple[int, int, bool]]:
    """The data of a source, cut into chunks, and its holes: start, stop and whether it is one."""
    size = source.size or 0
    offset = 0
    for start, stop in source.zeroes(0, size, 0) if source.settings.sparse else ():
        yield from _chunks(offset, start)
        yield start, stop, True
        offset = stop
    yield from _chunks(offset, size)


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    while start < stop:
        end = min(start - start % CHUNK + CHUNK, stop)
        yield start, end, False
        start = end


def _hole(length: int) -> Iterator[tuple[Data, bool]]:
    for done in range(0, length, CHUNK):
        yield _ZEROES[: length - done], True  # the slice of a whole chunk is not a copy
