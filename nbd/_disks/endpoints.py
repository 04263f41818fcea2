# SPDX-License-Identifier: LGPL-2.0-or-later
"""The two sides of a copy, source and target, and the interface that their endpoints share.

An endpoint is what a copy reads from or writes to: a disk (diskendpoint), a file (fileendpoint) or
a stream (streamendpoint).  `Endpoint` is for them what struct rw_ops is for libnbd's nbdcopy: those
who copy call its methods and never ask which kind they have.
"""

from __future__ import annotations

import errno
import os
import stat
from mmap import mmap
from time import monotonic

from nbd._binding.convert import as_number, as_seconds
from nbd._binding.errors import Error, Timeout
from nbd._disks.queue import (
    MAX_PIECE,
    READ,
    SOURCE,
    ZERO,
    IdleTimer,
    as_count,
    timeout_error,
)
from nbd._disks.reconnect import as_reconnect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Union

    from nbd._binding.methods import NBD
    from nbd._disks.queue import Moving, ShimQueue

    Anything = Union[
        str, "os.PathLike[str]", bytes, Sequence[str], NBD, Sequence[NBD], Callable[[], NBD], Any
    ]
    Data = Union[bytes, memoryview]
    Progress = Callable[[int, Union[int, None]], object]
    OnError = Callable[[int, int, Error], object]
    # What a copy is asked to copy, each as (offset, length) or as an nbd.Extent.
    Ranges = Iterable[Sequence[int]]
    # A range that cannot be read: offset, length and errno.
    Bad = tuple[int, int, int]

#: How many bytes of a stream are read or written at once.
CHUNK = 1024 * 1024
#: Seconds between two checks of whether the copy was stopped, and between two calls of progress.
TICK = 0.1
#: How many seconds a copy that ends early waits for the replies to its commands.  nbdkit 1.32 can
#: abort, for all of its clients, if it cannot send them.
DRAIN_TIMEOUT = 1.0
#: How many seconds nothing may move meanwhile.
DRAIN_IDLE = 0.25
#: The same where the server seems to hang.
DRAIN_IDLE_HUNG = 0.1
#: A range that could not be read is cut into at most this many parts, which are read at once.
MAX_PARTS = 16
#: The size of the smallest part, in bytes.  No disk has smaller sectors, so smaller parts would
#: take time and find nothing more.
MIN_PART = 512
#: How many seconds a copy that is about to fail searches for the exact range.
_MAX_SEARCH = 1.0
#: How many commands may be in flight by default.
_DEPTH = 16
#: How many connections to make by default, at most.
_MAX_CONNECTIONS = 4
#: The size of the blocks in which zeroes are found, and its minimum, in bytes.
_SPARSE, _MIN_SPARSE = 4096, 512


class Settings:
    """What the caller of a copy has asked for, and what all parts of the copy have to know.

    Attributes:
        sparse: The size of the blocks in which zeroes are found, in bytes; 0 reads and writes
            everything.
        ranges: What to copy, as (start, stop) in order and without overlaps; None is everything.
        is_stopped: Whether the copy has to end, because a part of it has failed, or because its
            caller wants it.
        bad: The ranges that could not be read, as (offset, length), in any order.
        given: The shim's handles that the caller or a callable has provided for both sides.
    """

    def __init__(
        self,
        connections: int | None,
        depth: int | None,
        sparse: bool | int,
        target_is_zero: bool,
        ranges: Ranges | None,
        progress: Progress | None,
        timeout: float | None,
        flush: bool,
        on_error: OnError | None = None,
        reconnect: float | None = None,
    ) -> None:
        if on_error is not None and not callable(on_error):
            kind = type(on_error).__name__
            raise TypeError(f"on_error: a callable or None is needed, not {kind}")
        self.connections = _count("connections", connections)
        self.depth = _count("depth", depth) or _DEPTH
        self.sparse = _as_granularity(sparse)
        self.target_is_zero = bool(target_is_zero)
        self.ranges = None if ranges is None else _as_ranges(ranges)
        self.progress = progress
        self.timeout = None if timeout is None else as_seconds("timeout", timeout)
        self.flush = bool(flush)
        self.on_error = on_error
        self.reconnect = as_reconnect(reconnect)
        self.is_stopped = False
        self.bad: list[tuple[int, int]] = []
        self.given: list[Any] = []

    @property
    def max_connections(self) -> int:
        """How many connections to make at most to a server that allows several."""
        return self.connections or min(processors(), _MAX_CONNECTIONS)

    def check(self) -> None:
        """Raise if the copy has to end."""
        if self.is_stopped:
            raise Error("nbd.copy: the copy was stopped before its end", errno.ECANCELED)


class Endpoint:
    """What one side of a copy reads from or writes to.

    Every endpoint can be read or written in order, by one thread: see `reader` and `writer`.  One
    that has offsets can also be read and written at any offset, by several threads at once.

    Attributes:
        name: What messages call it.
        size: In bytes; None if it is not known.
        capacity: How many bytes fit into it; None if it grows.
        has_offsets: Whether it can be read and written at any offset.
        is_read_only: Whether it refuses writes.
        discards: Whether it keeps nothing of what is written.
        is_zero: Whether it is known to read as zeroes wherever the copy has not written.
        timeout: The timeout of the first handle, in seconds; None if there is no handle, or if it
            has none.
        handles: Its connections to a server; empty if there is no server.
        max_workers: How many threads can share it, now or when further connections have joined.
        is_flushed_by_queues: Whether each queue that has written to it has to flush it, as that
            queue makes again what a lost connection may have undone.
        settings: Those of the copy.
    """

    name: str
    size: int | None = None
    capacity: int | None = None
    has_offsets: bool = True
    is_read_only: bool = False
    is_zero: bool = False
    discards: bool = False
    timeout: float | None = None
    max_workers: int = 1
    is_flushed_by_queues: bool = False
    #: The type of the exception for a range that cannot be read or written.
    _error_type: type[Error] = Error

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.handles: list[NBD] = []

    def identity(self) -> tuple[int, ...] | None:
        """What all names of one file, device or pipe have in common; None if that is not known."""
        return None

    # In order.

    def reader(self) -> Reader:
        """Begin to read from the beginning to the end."""
        raise NotImplementedError

    def writer(self) -> Writer:
        """Begin to write from the beginning."""
        raise NotImplementedError

    # At any offset; only of an endpoint that has offsets.

    @property
    def ready_workers(self) -> int:
        """How many threads can share it now."""
        return self.max_workers

    def add_to(self, queue: ShimQueue, side: int, worker: int, workers: int) -> None:
        """Give the queue of one worker of several its share of the endpoint."""
        raise NotImplementedError

    def start_joining(
        self, count: int, add: Callable[[NBD], object], fail: Callable[[Exception], object]
    ) -> None:
        """Make at most `count` further connections; call `add` with each, in another thread.

        `fail` is called there if the caller's callable returns what cannot be a connection.
        """

    def stop_joining(self) -> None:
        """Make no further connection, without waiting for the one that is being made."""

    def grow(self, size: int) -> None:
        """Prepare a target for the bytes that will be written to it, and find out its is_zero."""

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that are known to read as zeroes: start and stop of each."""
        raise NotImplementedError

    def read_at(self, view: memoryview, offset: int) -> memoryview:
        """Read as much as a view takes; returns the view, or other memory with the bytes.

        What cannot be read is read around: see `rescued`.

        Raises:
            nbd.Error: Some of it cannot be read, and the copy shall not continue; or the connection
                is lost.
        """
        raise NotImplementedError

    def read_parts(self, view: memoryview, offset: int, deadline: float | None) -> list[Bad]:
        """Read as much of a range as possible, in parts that become smaller where a read fails.

        Args:
            view: Where to put the bytes.
            offset: Where the range begins.
            deadline: When to stop making the parts smaller, by time.monotonic(); None is never.

        Returns:
            The ranges that cannot be read, in any order.
        """
        raise NotImplementedError

    def rescued(self, offset: int, length: int, errnum: int) -> memoryview:
        """Read around what cannot be read, in a range that could not be read at once.

        The range is read again in parts, and each part that fails in smaller ones, down to the
        minimum block size.  The ranges that fail then are bad.  They are reported to on_error of
        the copy, which decides whether the copy continues with zeroes instead of them, and are
        added to `bad` of its settings.

        Args:
            offset, length: The range, in bytes.
            errnum: The errno with which reading it has failed.

        Returns:
            The bytes, with zeroes where they are bad.

        Raises:
            nbd.Error: The copy shall not continue: it has no on_error, or that returned false.
        """
        on_error = self.settings.on_error
        deadline = None if on_error is not None else monotonic() + _MAX_SEARCH
        view = memoryview(mmap(-1, length))  # aligned to pages, as O_DIRECT needs it
        bad = merged(self.read_parts(view, offset, deadline))
        if on_error is None:
            raise self.failure(READ, *(bad[0] if bad else (offset, length, errnum)))
        for start, count, number in bad:
            view[start - offset : start - offset + count] = bytes(count)
            error = self.failure(READ, start, count, number)
            if not on_error(start, count, error):
                raise error
            self.settings.bad.append((start, count))
        return view

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write everything, beginning at an offset."""
        raise NotImplementedError

    def zero_at(self, offset: int, length: int) -> bool:
        """Zero a range without writing, where that is possible; returns whether it was."""
        return False

    def is_lost(self, queue: ShimQueue) -> bool:
        """Whether a queue has lost one of the connections."""
        return False

    def note_losses(self, queue: ShimQueue) -> None:
        """Have the connections made again that a queue has lost, if the copy reconnects."""

    def last_moved(self) -> float:
        """When a byte last moved outside of any queue, by time.monotonic()."""
        return 0.0

    def failure(self, operation: int, offset: int, length: int, errnum: int) -> Error:
        """The exception for a range that could not be read, written or zeroed.

        Args:
            operation: READ if the endpoint is the source; WRITE or ZERO if it is the target.
            offset, length: The range, in bytes.
            errnum: The errno.
        """
        texts = {READ: "reading the source", ZERO: "zeroing the target"}
        what = texts.get(operation, "writing to the target")
        return self._error_type(
            f"nbd.copy: {what} failed at offset {offset}: {os.strerror(errnum)} "
            f"({length} bytes of {self.name})",
            errnum,
        )

    # The end.

    def flush(self) -> None:
        """Have everything written to the disk, if the copy's settings ask for it."""
        raise NotImplementedError

    def finish(self, end: int) -> None:
        """End a copy up to offset `end` that has succeeded, without waiting for a server."""

    def await_shutdown(self, deadline: float) -> None:
        """Wait until servers have ended the connections, but not past a time.monotonic()."""

    def abort(self) -> None:
        """Have calls of other threads on the endpoint return, where that is possible."""

    def close(self) -> None:
        """Release everything at once.  Closing twice does nothing."""
        raise NotImplementedError


class Reader:
    """Reads an endpoint in order."""

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """All bytes in order, and whether they are a hole.

        A memoryview keeps its bytes only until the next chunk is asked for.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release what `chunks` uses, also in the middle.  The endpoint stays open."""


class Writer:
    """Writes an endpoint in order.

    Attributes:
        zeroed: How many of the bytes were found to be zeroes, and are zeroed instead of written.
        written: How many bytes were sent as data.
    """

    zeroed = 0
    written = 0

    def write(self, data: Data) -> None:
        """Write the next bytes, or keep a copy of them to be written later."""
        raise NotImplementedError

    def drain(self) -> None:
        """Wait until everything is written."""

    def close(self) -> None:
        """Give up what is not written yet.  The endpoint stays open."""


class _NeverMoved:
    def last_moved(self) -> float:
        return 0.0


_NEVER_MOVED = _NeverMoved()


class BoundedWait:
    """One wait of a copy, in slices: bounded by its timeout, and ended when the copy is stopped.

    Args:
        settings: Those of the copy.
        what: What the copy waits for in vain if it takes too long, for the message.
        moves: A queue, or another object whose `last_moved` tells when a byte last moved: from then
            on the timeout counts.  None counts from now on.
    """

    def __init__(
        self, settings: Settings, what: str = "nothing was copied", moves: Moving | None = None
    ) -> None:
        self._settings = settings
        self._what = what
        self._timer = IdleTimer(_NEVER_MOVED if moves is None else moves, settings.timeout)

    def slice(self) -> float:
        """How many seconds to wait next.

        Raises:
            nbd.Error: The copy was stopped.
        """
        self._settings.check()
        return self._timer.remaining(TICK)

    def check(self) -> None:
        """Raise nbd.Timeout if the wait has taken too long; to be called after a slice."""
        if self._timer.is_over():
            raise late(self._settings.timeout, self._what)


def late(seconds: float | None, what: str = "nothing was copied") -> Timeout:
    """The exception for a wait that has taken longer than the copy's timeout."""
    return timeout_error(f"nbd.copy: {what} for", seconds)


def drain_idle(raised: BaseException) -> float:
    """How many seconds nothing may move while a copy waits for replies after an exception."""
    if isinstance(raised, Timeout):
        return DRAIN_IDLE_HUNG
    if isinstance(raised, Error):
        return DRAIN_TIMEOUT
    return DRAIN_IDLE  # the user may have pressed Ctrl-C because the server hangs


def parts(ranges: list[tuple[int, int]], block: int) -> Iterator[tuple[int, int]]:
    """Cut ranges into parts that begin at multiples of a block size."""
    for start, stop in ranges:
        step = max(1, -(-(stop - start) // (MAX_PARTS * block))) * block
        while start < stop:
            end = min(start - start % block + step, stop)
            yield start, end
            start = end


def is_past(deadline: float | None) -> bool:
    """Whether a time.monotonic() has passed; None never does."""
    return deadline is not None and monotonic() >= deadline


def merged(bad: list[Bad]) -> list[Bad]:
    """Sort bad ranges, and join those that touch and have the same errno."""
    merged: list[Bad] = []
    for start, length, errnum in sorted(bad):
        if merged and (sum(merged[-1][:2]), merged[-1][2]) == (start, errnum):
            merged[-1] = merged[-1][0], merged[-1][1] + length, errnum
        else:
            merged.append((start, length, errnum))
    return merged


def side_name(side: int) -> str:
    """What messages call a side."""
    return "source" if side == SOURCE else "target"


def name_of(file: Any) -> str:
    """What messages call a file object: its path if it has one."""
    name = getattr(file, "name", None)
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return f"descriptor {name}" if isinstance(name, int) else type(file).__name__


def identity_of(fd: int) -> tuple[int, ...] | None:
    """What all names of one file, device or pipe have in common; None for a socket or terminal.

    Raises:
        OSError: The descriptor is closed.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)  # several device nodes can stand for one device
    if stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return (status.st_dev, status.st_ino)
    return None


def check_sides(source: Endpoint, target: Endpoint) -> None:
    """Refuse a copy that cannot succeed, before anything is written."""
    identity = source.identity()
    if identity is not None and identity == target.identity():
        raise ValueError(
            "source and target are the same file: the copy would read what it has written; "
            "copy to another one"
        )
    if target.is_read_only:
        raise Error("nbd.copy: the target is read-only; copy to another export", errno.EROFS)
    end = source.size or 0
    ranges = source.settings.ranges
    if ranges is not None:
        _check_ranges(ranges, source, target)
        end = ranges[-1][1] if ranges else 0
    if target.capacity is not None and target.capacity < end:
        what = "the source" if ranges is None else "the ranges end at"
        raise Error(
            f"nbd.copy: the target has {target.capacity} bytes and {what} {end}; "
            "copy to a larger one",
            errno.ENOSPC,
        )


def _check_ranges(ranges: list[tuple[int, int]], source: Endpoint, target: Endpoint) -> None:
    for endpoint, side in ((source, "source"), (target, "target")):
        if not endpoint.has_offsets:
            raise ValueError(
                f"ranges: the {side} is a stream, which has no offsets; leave ranges out, or use a "
                "disk or file"
            )
    if ranges and ranges[-1][1] > (source.size or 0):
        raise ValueError(
            f"ranges: they end at {ranges[-1][1]}, and the source has {source.size} bytes"
        )


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # PyPy


def _as_granularity(sparse: object) -> int:
    """The argument `sparse` of a copy as a number of bytes; 0 is False."""
    if isinstance(sparse, bool):
        return _SPARSE if sparse else 0
    size = as_number("sparse", sparse)
    if size and (not _MIN_SPARSE <= size <= MAX_PIECE or size & (size - 1)):
        raise ValueError(
            f"sparse: {size} is not True, False or a power of two from {_MIN_SPARSE} to {MAX_PIECE}"
        )
    return size


def _as_ranges(ranges: Ranges) -> list[tuple[int, int]]:
    """The argument `ranges` of a copy, sorted and merged, as (start, stop)."""
    if not hasattr(ranges, "__iter__"):
        raise TypeError(f"ranges: an iterable is needed, not {type(ranges).__name__}")
    pairs = sorted((start, start + length) for start, length in map(_as_range, ranges) if length)
    result: list[tuple[int, int]] = []
    for start, stop in pairs:
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(stop, result[-1][1])
        else:
            result.append((start, stop))
    return result


def _as_range(one: Sequence[int]) -> tuple[int, int]:
    """The offset and the length of one of the ranges."""
    try:
        start, length = one[:2]
    except (TypeError, ValueError):
        raise TypeError(
            f"ranges: (offset, length) or an nbd.Extent is needed, not {one!r}"
        ) from None
    start, length = as_number("ranges: offset", start), as_number("ranges: length", length)
    if start < 0 or length < 0:
        raise ValueError(f"ranges: {length} bytes at offset {start} are not a range of a disk")
    return start, length


def _count(name: str, value: object) -> int | None:
    return None if value is None else as_count(name, value)
